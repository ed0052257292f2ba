"""The commands as a whole: what they write, their help, and the whole method on photographs."""

import importlib
import json
import math
import sys
from unittest import mock

import pytest
import torch
from chain import chain, log
from commands import call, lines, run_script
from safetensors.torch import load_file

from stic_min.formats.tensors import read_metadata
from stic_min.images import open_image
from stic_min.loader import load_llava, open_llava


def test_a_finished_run_is_an_adapter_with_its_projector(runs, two_ranks, tmp_path):
    files = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "report.html", "run.json"}
    for stage in (out / stage for out in (runs.out, two_ranks) for stage in ("stage1", "stage2")):
        assert {f.name for f in stage.iterdir()} == files | {"projector.safetensors"}
        config = json.loads((stage / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
        recorded = read_metadata(stage / "adapter_model.safetensors")["base_fingerprint"]
        assert recorded == open_llava(runs.model)[0].base.fingerprint
    before = load_llava(runs.model).state_dict()
    for key, value in load_file(runs.out / "stage1" / "projector.safetensors").items():
        assert not torch.equal(value, before[key.removeprefix("model.")]), key
    flags = ["--projector-lr", 0, "--image-mode", "pad"]
    printed = call(*runs.commands["stage1"], *flags, "--out", tmp_path / "frozen")
    assert {f.name for f in (tmp_path / "frozen").iterdir()} == files
    assert "projector.safetensors" not in printed


def test_a_merged_checkpoint_is_the_adapter(runs, tmp_path):
    command = ["stic_min.merge", "--model", runs.model, "--out"]
    exact = call(*command, tmp_path / "exact", "--adapter", runs.out / "stage2", "--dtype", "float32")
    assert "100.00% of the update survived rounding" in exact
    images = [open_image(runs.tiny / "images" / "scene_02.png")]
    vision = runs.tiny / "clip-tiny"
    logits = lambda path, **options: load_llava(path, **options).logits("<image>\nWhat is this?", images)
    adapted = logits(runs.model, adapter=runs.out / "stage2")
    assert (adapted - logits(runs.model)).abs().max() > 1e-2
    torch.testing.assert_close(logits(tmp_path / "exact", vision=vision), adapted, rtol=1e-4, atol=1e-4)

    rates = ["--lr", 1e-7, "--projector-lr", 0]  # so small an update is mostly lost to rounding
    call(*runs.commands["stage1"], *rates, "--out", tmp_path / "small")
    printed = run_script(*command, tmp_path / "stored", "--adapter", tmp_path / "small")
    assert abs(float(printed.split("; ")[1].split("% of the update survived")[0])) < 90
    kinds = lambda file: {key: (value.dtype, value.shape) for key, value in load_file(file).items()}
    for file in runs.model.glob("*.safetensors"):
        assert kinds(file) == kinds(tmp_path / "stored" / file.name)


@pytest.mark.parametrize("script, shown", [
    ("generate_pairs", {"--temperature": "0.2", "--seed": "0", "--max-new-tokens": "1024"}),
    ("train_stage1", {"--lr": "1e-07", "--projector-lr": "2e-05", "--beta": "0.1", "--alpha": "1/1024, as in the paper",
                      "--batch-size": "4", "--lora-dropout": "0.0",
                      "--max-length": "1024; 4096 in anyres mode"}),
    ("train_stage2", {"--lr": "2e-05", "--lora-dropout": "0.05", "--batch-size": "64", "--seed": "0"}),
    ("evaluate", {"--temperature": "0.0", "--seed": "0",
                  "--batch-size": "what fits in the GPU's memory, up to 64; 8 on a CPU"})])
def test_help_shows_the_defaults(script, shown, capsys):
    argv = [script, "scienceqa", "--help"] if script == "evaluate" else [script, "--help"]
    with pytest.raises(SystemExit, match="0"), mock.patch.object(sys, "argv", argv):
        importlib.import_module(script).main()
    text = " ".join(capsys.readouterr().out.split()).partition("options:")[2]
    for flag, default in shown.items():
        assert f"(default: {default})" in text.partition(f" {flag} ")[2].partition(" --")[0], flag


@pytest.mark.parametrize("model", ["tiny-llava-v1.6-mistral", "tiny-llava-v1.5-vicuna"])
def test_the_whole_method_on_photographs(model, shared, tmp_path):
    names = sorted(p.name for p in (shared / "photos").iterdir() if p.suffix in (".png", ".jpg"))
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A photograph."}]
    records = [{"id": f"{i}", "image": name, "conversations": turns} for i, name in enumerate(names)]
    (tmp_path / "instructions.json").write_text(json.dumps(records))
    for name, target in ((model, f"oracle/{model}"), ("openai", "oracle/openai"), ("images", "photos")):
        (tmp_path / name).symlink_to(shared / target)
    commands, few = chain(model, tmp_path, tmp_path), ["--limit", 4, "--max-new-tokens", 8]
    call(*commands["pairs"], *few)
    call(*commands["stage1"])
    call(*commands["describe"], *few)
    assert f"4 described of {len(names)} records" in call(*commands["stage2"])
    assert len(lines(tmp_path / "pairs.jsonl")) == len(lines(tmp_path / "descriptions.jsonl")) == 4
    assert log(tmp_path / "stage1")[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    ask = ["evaluate", "ask", "What is this?", "--model", tmp_path / model, "--adapter", tmp_path / "stage2"]
    ask += ["--image", tmp_path / "images" / names[0], "--device", "cpu", "--max-new-tokens", 8]
    assert call(*ask).strip()
