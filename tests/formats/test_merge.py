"""Merged checkpoints: the same model as base plus adapter, in the layout and the form the base came in."""

import json
import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from checkpoints import PROMPT, TEXT, V15, V16, copy, read_tensors
from PIL import Image

from stic_min import InputError, lora
from stic_min.formats import adapters
from stic_min.loader import load_llava
from stic_min.merge import main, merge


def make_adapter(llava, folder, size):
    """An adapter with a projector; `size` scales the change."""
    made = lora.new_adapter(llava, r=4, alpha=8, dropout=0.05, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in made.tensors.items():
        if name.endswith("lora_B"):
            tensor.normal_(std=size, generator=generator)
    for name, parameter in llava.mm_projector.named_parameters(prefix="mm_projector"):
        made.tensors[name] = parameter + size * torch.randn(parameter.shape, generator=generator)
    adapters.write_adapter(folder, made)
    return folder


@pytest.mark.parametrize("name", [V16, V15])
@pytest.mark.parametrize("form", ["model.safetensors", "model-0000%d-of-00003.safetensors",
                                  "pytorch_model-0000%d-of-00003.bin"])  # fmt: skip
def test_merged_equals_unmerged(tiny, tmp_path, name, form):
    base = copy(tiny, name, tmp_path / "base", form=form)
    adapter = make_adapter(load_llava(base), tmp_path / "adapter", 0.05)
    survived = merge(base, adapter, tmp_path / "merged", torch.float32)
    assert survived == pytest.approx(1, abs=1e-6)
    image = Image.open(tiny / "images" / "scene_01.jpg")
    merged, unmerged = load_llava(tmp_path / "merged"), load_llava(base, adapter=adapter)
    torch.testing.assert_close(
        merged.logits(PROMPT, [image]), unmerged.logits(PROMPT, [image]), atol=1e-4, rtol=0
    )
    assert (merged.logits(PROMPT, [image]) - load_llava(base).logits(PROMPT, [image])).abs().max() > 0.1
    assert read_tensors(tmp_path / "merged").keys() == read_tensors(tiny / name).keys()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_change_below_the_rounding_is_lost_and_said_so(tiny, tmp_path):
    # A change of about 1e-6 on weights of about 0.1: bf16 has 8 bits, so steps of about 1e-3 there. fp32
    # keeps it.
    adapter = make_adapter(load_llava(tiny / V16), tmp_path / "adapter", 1e-6)
    assert merge(copy(tiny, V16, tmp_path / "base"), adapter, tmp_path / "bf16") < 0.2
    assert merge(tmp_path / "base", adapter, tmp_path / "fp32", torch.float32) > 0.9
    base, rounded = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "bf16")
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}  # as stored
    key = "model.layers.0.self_attn.q_proj.weight"
    assert (base[key] == rounded[key]).float().mean() > 0.9


def test_the_sum_is_rounded_once(tiny, tmp_path):
    adapter = make_adapter(load_llava(tiny / V16), tmp_path / "adapter", 0.01)
    merge(copy(tiny, V16, tmp_path / "base"), adapter, tmp_path / "bf16")
    merge(tmp_path / "base", adapter, tmp_path / "fp32", torch.float32)
    exact = read_tensors(tmp_path / "fp32")
    assert all(torch.equal(t, exact[key].bfloat16()) for key, t in read_tensors(tmp_path / "bf16").items())


def test_nothing_is_overwritten(tiny, tmp_path):
    adapter = make_adapter(load_llava(tiny / V16), tmp_path / "adapter", 0.1)
    with pytest.raises(InputError, match="already exists"):
        merge(tiny / V16, adapter, tmp_path)


def test_bin_files_may_share_and_transpose_memory(tiny, tmp_path):
    tensors = read_tensors(tiny / V16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    tensors["model.norm.weight"] = tensors["model.layers.0.input_layernorm.weight"]
    base = copy(tiny, V16, tmp_path / "base", tensors, "pytorch_model.bin")
    merge(base, make_adapter(load_llava(base), tmp_path / "adapter", 0.1), tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    assert all(torch.equal(merged[key], tensors[key]) for key in ("lm_head.weight", "model.norm.weight"))


def test_a_tower_inside_the_checkpoint_comes_along(tiny, tmp_path):
    base = copy(tiny, V15, tmp_path / "base", mm_vision_tower="clip")
    shutil.copytree(tiny / "clip-tiny", base / "clip")
    (base / "optimizer.bin").touch()  # which is no part of it
    merge(base, make_adapter(load_llava(base), tmp_path / "adapter", 0.1), tmp_path / "elsewhere" / "merged")
    shutil.rmtree(base)
    assert load_llava(tmp_path / "elsewhere" / "merged").config.vision.image_size == 56
    assert not (tmp_path / "elsewhere" / "merged" / "optimizer.bin").exists()


def test_a_failed_merge_leaves_nothing(tiny, tmp_path, monkeypatch):
    base = copy(tiny, V16, tmp_path / "base", form="model-0000%d-of-00003.safetensors")
    adapter = make_adapter(load_llava(base), tmp_path / "adapter", 0.1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stic_min.merge.merge_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_transformers_loads_a_merged_checkpoint_of_its_own(tiny, tmp_path):
    hf = pytest.importorskip("transformers")
    numbers = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    vision = hf.CLIPVisionConfig(**numbers | {"num_hidden_layers": 3}, image_size=56, patch_size=14)
    text = hf.LlamaConfig(**numbers, vocab_size=664)
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "base")
    shutil.copy(tiny / V16 / "tokenizer.model", tmp_path / "base")
    adapter = make_adapter(load_llava(tmp_path / "base"), tmp_path / "adapter", 0.1)
    merge(tmp_path / "base", adapter, tmp_path / "merged")

    ours = load_llava(tmp_path / "base", adapter=adapter)
    theirs, report = hf.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs.eval()(input_ids=torch.tensor([ours.tokenizer.encode_prompt(TEXT)])).logits[
            0, :, :600
        ]
    torch.testing.assert_close(ours.logits(TEXT, []), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size, flags, warns", [
    (1e-6, [], "--dtype float16"), (1e-6, ["--dtype", "float32"], None),
    (1e-9, ["--dtype", "float16"], "--dtype float32")])  # fmt: skip
def test_a_lost_change_is_a_warning(tiny, tmp_path, capsys, size, flags, warns):
    base = copy(tiny, V16, tmp_path / "base")
    adapter, out = make_adapter(load_llava(base), tmp_path / "adapter", size), tmp_path / "out"
    command = ["merge", "--model", base, "--adapter", adapter, "--out", out, *flags]
    with mock.patch.object(sys, "argv", list(map(str, command))):
        main()
    captured = capsys.readouterr()
    assert re.search(r"wrote .*out; \d+\.\d\d% of the update", captured.out)
    lines = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert [warns in line for line in lines] == ([True] if warns else [])


def test_other_files_in_the_checkpoint(tiny, tmp_path):
    """An adapter's files would be applied to the result again; of two tokenizers, the one in use is
    copied."""
    base = copy(tiny, V16, tmp_path / "base")
    adapter, other = make_adapter(load_llava(base), tmp_path / "adapter", 0.1), tmp_path / "other.model"
    shutil.copytree(adapter, base, dirs_exist_ok=True)
    shutil.copy(base / "tokenizer.model", other)
    for name in ("tokenizer.json", "generation_config.json", "tokenizer.model", "mm_projector.bin"):
        (base / name).write_text("{}")
    merge(base, adapter, tmp_path / "out", torch.float32, tokenizer=other)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
                     "tokenizer_config.json"}  # fmt: skip
    assert (tmp_path / "out/tokenizer.model").read_bytes() == other.read_bytes()
