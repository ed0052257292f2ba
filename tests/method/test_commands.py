"""The commands end to end as a user runs them, on both tiny checkpoints, on one rank and on two.

Each chain (pairs, stage 1, descriptions, stage 2, ScienceQA) runs once; many small tests look at what it left. v1.6
goes through real command lines. For v1.5, and where the process boundary is not the point, `call` runs a script's main
in this process, and this file under torchrun runs several in one start.
"""

import importlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from chain import STEPS, assert_same_parameters, assert_same_training, chain, distance, log, tensors
from commands import ENV, ROOT, call, call_two_ranks, lines, run, torchrun
from safetensors.torch import load_file
from torch.nn import functional as F

import generate_pairs
from stic_min import InputError, data, lora, sampler
from stic_min.batch import collate
from stic_min.formats.adapters import PREFIX
from stic_min.formats.tensors import read_metadata
from stic_min.images import corrupt, open_image
from stic_min.loader import load_llava, open_llava
from stic_min.loss import token_logps
from stic_min.runtime.work import row_seed, subset
from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS, TEMPLATES, with_description, with_image

only = lambda model: pytest.mark.parametrize("runs", [model], indirect=True)


def pictured(tiny):
    return [record for record in json.loads((tiny / "instructions.json").read_text()) if "image" in record]


@pytest.fixture(scope="module", params=["llava-v1.6-tiny", "llava-v1.5-tiny"])
def runs(request, tiny, tmp_path_factory):
    """Both chains of one checkpoint: folders `one` and `two`, what the commands of `one` said, the commands."""
    folder = tmp_path_factory.mktemp(request.param)
    one, two = (chain(request.param, tiny, folder / ranks) for ranks in ("one", "two"))
    if request.param == "llava-v1.6-tiny":
        said = {step: run(f"{script}.py", *args).stdout for step, (script, *args) in one.items()}
        for script, *args in two["pairs"], two["stage1"]:
            run(*torchrun(2), f"{script}.py", *args)
        call_two_ranks(*list(two.values())[2:])
    else:
        said = {step: call(*command) for step, command in one.items()}
        call_two_ranks(*two.values())
    return SimpleNamespace(model=tiny / request.param, tiny=tiny, one=folder / "one", two=folder / "two", said=said,
                           commands=one)


# ---------------------------------------------------------------- generate_pairs.py


def test_pairs_have_the_published_format(runs):
    pairs = lines(runs.one / "pairs.jsonl")
    assert [pair["image"] for pair in pairs] == sorted(p.name for p in (runs.tiny / "images").iterdir())
    template, mode = ("mistral_instruct", "anyres") if "v1.6" in runs.model.name else ("vicuna_v1", "pad")
    settings = {"model": runs.model.name, "adapter": None, "template": template, "image_mode": mode, "seed": 0,
                "temperature": 0.2, "top_p": None, "max_new_tokens": 16, "chosen_prompt": GOOD_PROMPT}
    for pair in pairs:
        assert settings.items() <= pair.items()
        for side in ("chosen", "rejected"):
            assert [set(message) for message in pair[side]] == [{"role", "content"}] * 2
            assert [message["role"] for message in pair[side]] == ["user", "assistant"] and pair[side][1]["content"]
            assert pair[f"{side}_finish"] in ("stop", "length")
        assert pair["chosen"][0] == pair["rejected"][0]  # x, never x_g or x_b
        x = pair["chosen"][0]["content"].removeprefix("<image>\n")
        assert x in CAPTION_PROMPTS and pair["chosen"][0]["content"] == f"<image>\n{x}"
        if pair["image_corruption"]:
            assert pair["hallu_prompt"] == "" and pair["rejected_prompt"] == x
            assert pair["corruption"]["kind"] in ("low_resolution", "color_jitter")
        else:
            assert pair["hallu_prompt"] == pair["rejected_prompt"] and pair["corruption"] is None
            assert pair["hallu_prompt"] in HALLUCINATION_PROMPTS
    assert {pair["image_corruption"] for pair in pairs} == {True, False}
    assert f"8 pairs in {runs.one / 'pairs.jsonl'}, 0 skipped" in runs.said["pairs"]


@pytest.mark.parametrize("corrupted", [True, False])
def test_a_pair_can_be_repeated_from_what_is_recorded(runs, corrupted):
    pair = next(p for p in lines(runs.one / "pairs.jsonl") if p["image_corruption"] is corrupted)
    llava = load_llava(runs.model, template=pair["template"], image_mode=pair["image_mode"])
    picture = bad = open_image(runs.tiny / "images" / pair["image"])
    if corrupted:
        bad, drawn = corrupt(picture, pair["corruption"]["seed"])
        assert pair["corruption"].items() >= drawn.items()
    for side, view in (("chosen", picture), ("rejected", bad)):
        prompt = TEMPLATES[pair["template"]].prompt(with_image(pair[f"{side}_prompt"]))
        seed = row_seed(pair["seed"], pair["image"], side)
        options = {key: pair[key] for key in ("max_new_tokens", "temperature", "top_p")}
        [again] = sampler.sample(llava, [prompt], [[view]], [seed], **options)
        assert llava.tokenizer.decode(again.ids) == pair[side][1]["content"] and again.finish == pair[f"{side}_finish"]


def test_a_description_can_be_repeated_from_what_is_recorded(runs):
    descriptions = lines(runs.one / "descriptions.jsonl")
    llava = load_llava(runs.model, adapter=runs.one / "stage1")
    template = TEMPLATES[llava.config.template]
    for d in descriptions[:3]:
        prompt, picture = template.prompt(with_image(d["prompt"])), open_image(runs.tiny / "images" / d["image"])
        seed, options = row_seed(0, d["id"], "description"), {"max_new_tokens": 16, "temperature": 0.2}
        [again] = sampler.sample(llava, [prompt], [[picture]], [seed], **options)
        assert (llava.tokenizer.decode(again.ids), again.finish) == (d["description"], d["finish"])


def test_what_algorithm_1_draws(tiny):
    folder = tiny / "images"
    plans = {i: generate_pairs.plan_pair(f"{i}.jpg", 0) for i in range(400)}
    assert 160 < sum(plan["x_b"] is None for plan in plans.values()) < 240  # half; 4 standard deviations are 40
    assert all((plan["x_b"] is None) is (plan["corruption_seed"] is not None) for plan in plans.values())
    assert len({plan["corruption_seed"] for plan in plans.values()}) == 1 + sum(not p["x_b"] for p in plans.values())
    assert {plan["x"] for plan in plans.values()} == set(CAPTION_PROMPTS)
    assert {plan["x_b"] for plan in plans.values()} == {*HALLUCINATION_PROMPTS, None}
    described = [generate_pairs.description_rows(f"{i}", "a.jpg", None, 0)[0][0][0] for i in range(400)]
    assert set(described) == set(CAPTION_PROMPTS)
    assert generate_pairs.plan_pair("0.jpg", 0) == plans[0]
    for i in range(9):
        _, record = generate_pairs.pair_rows(f"{i}.jpg", open_image(next(folder.iterdir())), 0)
        made = record(["y_w", "y_l"], ["stop", "length"])
        assert (made["chosen"][1]["content"], made["chosen_finish"]) == ("y_w", "stop")
        assert (made["rejected"][1]["content"], made["rejected_finish"]) == ("y_l", "length")
    drawn = lambda seed: [generate_pairs.plan_pair(f"{i}.jpg", seed)["x"] for i in range(9)]
    assert drawn(0) == [plans[i]["x"] for i in range(9)] != drawn(1)


def test_descriptions_carry_the_records_ids(runs):
    descriptions = lines(runs.one / "descriptions.jsonl")
    assert [(d["id"], d["image"]) for d in descriptions] == [(r["id"], r["image"]) for r in pictured(runs.tiny)]
    assert all(d["prompt"] in CAPTION_PROMPTS and d["description"] and d["adapter"] == "stage1" for d in descriptions)


@pytest.mark.parametrize("file", ["pairs.jsonl", "descriptions.jsonl", "results/scienceqa-stage2-direct.jsonl",
                                  "results/scienceqa-stage2-dar.jsonl", "results/scienceqa-stage2-dar.scores.json"])
def test_two_ranks_write_the_same_file(runs, file):
    one, two = ((path / file).read_text(encoding="utf-8") for path in (runs.one, runs.two))
    if file != "pairs.jsonl":
        # Everything but the hash of the adapter, which on two ranks differs from that on one in the last bits.
        one, two = (re.sub(r'"fingerprint": "[0-9a-f]{12}"', "", text) for text in (one, two))
    assert one == two and one
    assert not [*runs.two.rglob("*.part*"), *runs.two.rglob("*.new")]


@pytest.mark.parametrize("step, file", [("pairs", "pairs.jsonl"), ("describe", "descriptions.jsonl")])
def test_a_restart_makes_only_what_is_missing(runs, step, file, tmp_path):
    command, whole = [*runs.commands[step], "--out", tmp_path / file], (runs.one / file).read_bytes()
    first, _, third, fourth, fifth, *_ = whole.splitlines(keepends=True)
    (tmp_path / file).write_bytes(first + third + fourth[:40])  # one is lost, a kill cut the last in two
    (tmp_path / f"{file}.part1").write_bytes(fifth + b"{")  # another rank's
    for there in (3, 8):
        assert f"{there} of them already in" in call(*command)
        assert (tmp_path / file).read_bytes() == whole and [f.name for f in tmp_path.iterdir()] == [file]
    with pytest.raises(InputError, match=f"{file} was written with seed 0, but this run has 1"):
        call(*command, "--seed", 1)
    assert (tmp_path / file).read_bytes() == whole


def test_some_pictures_only(runs, tmp_path):
    whole = {pair["image"]: pair for pair in lines(runs.one / "pairs.jsonl")}
    (tmp_path / "names").write_text("scene_06.png\nscene_02.png\n")
    call(*runs.commands["pairs"], "--out", tmp_path / "named.jsonl", "--names", tmp_path / "names")
    assert lines(tmp_path / "named.jsonl") == [whole["scene_06.png"], whole["scene_02.png"]]
    call(*runs.commands["pairs"], "--out", tmp_path / "few.jsonl", "--limit", 3)
    names = [pair["image"] for pair in lines(tmp_path / "few.jsonl")]
    assert names == subset(sorted(whole), 3, seed=0) and lines(tmp_path / "few.jsonl") == [whole[n] for n in names]


def test_top_p_is_used(runs, tmp_path):
    answers = []
    for number, flags in enumerate((["--temperature", 0], ["--temperature", 1, "--top-p", 1e-9], ["--temperature", 1])):
        call(*runs.commands["pairs"], *flags, "--limit", 3, "--out", tmp_path / f"{number}")
        answers.append([pair["chosen"] for pair in lines(tmp_path / f"{number}")])
    assert answers[0] == answers[1] != answers[2]  # so small a mass leaves the most probable token alone


# ---------------------------------------------------------------- train_stage1.py, train_stage2.py


def test_stage1_starts_at_theta_0(runs):
    records = log(runs.one / "stage1")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(set(r) == {"step", "loss", "dpo", "alpha_nll", "margin", "accuracy", "grad_norm", "lr", "logp_chosen",
                          "logp_rejected", "reward_chosen", "reward_rejected", "equal"} for r in records)
    assert records[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5) and abs(records[0]["margin"]) < 1e-6
    assert all(abs(r["margin"]) > 1e-6 for r in records[1:])
    assert all(r["loss"] == pytest.approx(r["dpo"] + r["alpha_nll"], abs=1e-6) for r in records)
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 1e-3, 0.5e-3])  # one step of warm-up, then a cosine
    assert "8 pairs, 0 cut to 1024 tokens" in runs.said["stage1"] and f"step {STEPS}/{STEPS}" in runs.said["stage1"]


def train_by_hand(llava, losses, lr, projector_lr):
    """AdamW as in Table 4 on LoRA and the projector, a step for each function in `losses` -> norms of the gradients."""
    lora_weights = [p.requires_grad_() for name, p in llava.named_parameters() if ".lora_" in name]
    projector = [p.requires_grad_() for p in llava.mm_projector.parameters()]
    groups, norms = [{"params": lora_weights}, {"params": projector}], []
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for share, loss in zip((1, 1, 0.5), losses, strict=True):  # one step of warm-up, then a cosine over two
        optimizer.zero_grad()
        loss().backward()
        norms.append(torch.nn.utils.clip_grad_norm_([*lora_weights, *projector], 1.0).item())
        for group, peak in zip(optimizer.param_groups, (lr, projector_lr)):
            group["lr"] = peak * share
        optimizer.step()
    return norms


def logps_by_hand(llava, item):
    """Sums of log p, one for each scored row of one sample."""
    batch = collate([item.example], [data.load_tiles(item, llava)], llava.config)
    return token_logps(llava(batch), batch.labels).sum(-1)


def assert_trained_like(llava, folder, **rates):
    named = {f"model.{name}" if "lora" not in name else f"{PREFIX}{name}.weight": p
             for name, p in llava.named_parameters() if p.requires_grad}
    assert_same_parameters(tensors(folder), named, **rates)


def test_stage1_by_hand(runs, tmp_path):
    """Eq. 4.1 pair by pair, with a second model as theta_0. One pair has equal responses, so that only its NLL counts:
    margin and accuracy are those of the others."""
    beta, alpha, flags = 2.0, 0.5, ["--beta", 2, "--alpha", 0.5, "--projector-lr", 5e-4]
    records = lines(runs.one / "pairs.jsonl")
    records[2]["rejected"], records[2]["rejected_finish"] = records[2]["chosen"], records[2]["chosen_finish"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    call(*runs.commands["stage1"], *flags, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "out")
    policy, theta_0 = (load_llava(runs.model, image_mode="pad") for _ in range(2))
    fresh = lora.new_adapter(policy, 4, 8, 0.0, seed=0)
    lora.attach(policy, fresh)
    for name, value in fresh.tensors.items():
        policy.get_parameter(name).data.copy_(value)
    pairs = data.read_pairs(tmp_path / "pairs.jsonl")
    items = [data.pair_item(pair, policy, runs.tiny / "images", 1024) for pair in pairs]
    expected = []

    def loss(indices):
        values = []
        for i in indices:
            (w, l), (ref_w, ref_l) = logps_by_hand(policy, items[i]), logps_by_hand(theta_0, items[i])
            rewards = beta * (w - ref_w), beta * (l - ref_l)
            values.append(torch.stack([-F.logsigmoid(rewards[0] - rewards[1]), -alpha * w, w, l, *rewards]))
        dpo, nll, *watched = torch.stack(values).mean(0)
        margins = torch.stack([v[4] - v[5] for v, i in zip(values, indices) if i != 2])
        expected.append({"loss": dpo + nll, "dpo": dpo, "alpha_nll": nll, "margin": margins.mean(),
                         "accuracy": (margins > 0).double().mean(), "equal": torch.tensor(indices.count(2))})
        names = "logp_chosen", "logp_rejected", "reward_chosen", "reward_rejected"
        expected[-1] |= dict(zip(names, watched))
        return dpo + nll

    batches = data.global_batches([item.length for item in items], 3, seed=0)
    norms = train_by_hand(policy, [lambda b=b: loss(b) for b in batches], 1e-3, 5e-4)
    assert max(norms) > 1.2 * min(norms) > 1.2  # clipping is at work, and differs from step to step
    for record, values, norm in zip(log(tmp_path / "out"), expected, norms, strict=True):
        values = {name: value.item() for name, value in values.items()}
        assert record == pytest.approx(record | values | {"grad_norm": norm}, rel=1e-3, abs=1e-4)
    assert_trained_like(policy, tmp_path / "out", projector_lr=5e-4)


@pytest.mark.parametrize("how", ["", "one_line", "plain"])
def test_stage2_by_hand(runs, tmp_path, how):
    """-log p of all answers of a batch, by their tokens."""
    out = tmp_path / "out" if how else runs.one / "stage2"
    if how:
        call(*runs.commands["stage2"], f"--{how.replace('_', '-')}", "--out", out)
    llava = load_llava(runs.model, adapter=runs.one / "stage1", image_mode="pad")
    files = runs.tiny / "instructions.json", runs.one / "descriptions.jsonl"
    described, _ = data.read_infused(*files, **{how: True} if how else {})
    items = [data.instruction_item(i, llava, runs.tiny / "images", 2048) for i in described]
    expected = []

    def loss(indices):
        nll = -sum(logps_by_hand(llava, items[i]).sum() for i in indices) / sum(items[i].scored for i in indices)
        expected.append(nll.item())
        return nll

    batches = data.global_batches([item.length for item in items], 3, seed=0)
    norms = train_by_hand(llava, [lambda b=b: loss(b) for b in batches], 1e-3, 2e-5)
    records = log(out)
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-4)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    assert_trained_like(llava, out)


def test_nothing_decays(runs, tmp_path):
    """With B = 0 the first gradient of A is zero, and leaves A as it was."""
    call(*runs.commands["stage1"], "--batch-size", 8, "--out", tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    for name, before in lora.new_adapter(load_llava(runs.model), 4, 8, 0.0, seed=0).tensors.items():
        assert torch.equal(after[f"{PREFIX}{name}.weight"], before) is ("lora_A" in name)


def test_what_is_trained_is_float32_in_a_bfloat16_model(runs, tmp_path):
    """Steps of 1e-6 on weights of about 0.1, which bfloat16 would round away."""
    call(*runs.commands["stage1"], "--dtype", "bfloat16", "--lr", 1e-6, "--projector-lr", 1e-6, "--out", tmp_path)
    llava = load_llava(runs.model)
    before = {f"{PREFIX}{k}.weight": v for k, v in lora.new_adapter(llava, 4, 8, 0.0, seed=0).tensors.items()}
    before |= {f"model.{k}": v for k, v in llava.named_parameters() if k.startswith("mm_projector.")}
    after = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(after) == set(before) and {v.dtype for v in after.values()} == {torch.float32}
    for name, value in after.items():
        assert 1e-7 < (value - before[name]).abs().max() < 1e-5, name
    first = log(tmp_path)[0]  # theta is theta_0 to the last bit, in bfloat16 too
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-7) and first["margin"] == first["reward_chosen"] == 0


def test_batches_of_equal_pairs_have_no_margin(runs, tmp_path):
    pair = lines(runs.one / "pairs.jsonl")[0]
    equal = pair | {"rejected": pair["chosen"], "rejected_finish": pair["chosen_finish"]}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [pair, equal, equal])))
    call(*runs.commands["stage1"], "--pairs", tmp_path / "pairs.jsonl", "--batch-size", 1, "--out", tmp_path / "out")
    records = log(tmp_path / "out")
    assert sum(r["equal"] for r in records) == 2
    assert all(("margin" in r, "accuracy" in r) == (not r["equal"],) * 2 for r in records)


def test_stage1_learns_what_it_is_shown(runs, tmp_path):
    pair = (runs.one / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "pairs.jsonl").write_text(pair * 6, encoding="utf-8")
    call(*runs.commands["stage1"], "--pairs", tmp_path / "pairs.jsonl", "--batch-size", 1, "--out", tmp_path / "out")
    margins, losses = ([record[key] for record in log(tmp_path / "out")] for key in ("margin", "loss"))
    assert margins == sorted(margins) and losses == sorted(losses, reverse=True) and margins[-1] > 0.1


def test_a_finished_run_is_an_adapter_with_its_projector(runs, tmp_path):
    files = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "run.json"}
    for stage in (runs.one / "stage1", runs.two / "stage1", runs.one / "stage2", runs.two / "stage2"):
        assert {f.name for f in stage.iterdir()} == files | {"projector.safetensors"}
        config = json.loads((stage / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
        recorded = read_metadata(stage / "adapter_model.safetensors")["base_fingerprint"]
        assert recorded == open_llava(runs.model)[0].base.fingerprint
    before = load_llava(runs.model).state_dict()
    for key, value in load_file(runs.one / "stage1" / "projector.safetensors").items():
        assert not torch.equal(value, before[key.removeprefix("model.")]), key
    said = call(*runs.commands["stage1"], "--projector-lr", 0, "--image-mode", "pad", "--out", tmp_path / "frozen")
    assert {f.name for f in (tmp_path / "frozen").iterdir()} == files and "projector.safetensors" not in said


def test_what_a_killed_run_left_at_the_top_is_not_taken_for_its_own(runs, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("projector.safetensors", "log.jsonl"):
        (tmp_path / "out" / name).write_bytes((runs.one / "stage1" / name).read_bytes())
    call(*runs.commands["stage1"], "--projector-lr", 0, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "projector.safetensors").exists() and len(log(tmp_path / "out")) == STEPS


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_how_the_batch_is_computed_changes_nothing(runs, stage, tmp_path):
    assert_same_training(runs.one / stage, runs.two / stage)
    for number, flags in enumerate((["--micro-batch", 2], ["--micro-batch", 4, "--checkpoint-activations"])):
        call(*runs.commands[stage], *flags, "--out", tmp_path / f"{number}")
        assert_same_training(runs.one / stage, tmp_path / f"{number}")


def test_sharding_changes_nothing(runs, tmp_path):
    flags = ["--shard none", "--shard none --micro-batch 2", "--shard full --micro-batch 4 --checkpoint-activations"]
    outs = {tmp_path / f"{stage}{n}": (stage, flags[n].split()) for stage in ("stage1", "stage2") for n in range(3)}
    odd = [*runs.commands["stage1"], "--lora-r", 3, "--out"]  # rows that two ranks can't halve
    call(*odd, tmp_path / "one")
    call_two_ranks([*odd, tmp_path / "two"],
                   *([*runs.commands[stage], *extra, "--out", out] for out, (stage, extra) in outs.items()))
    assert_same_training(tmp_path / "one", tmp_path / "two")
    for out, (stage, _) in outs.items():
        assert_same_training(runs.one / stage, out)


@only("llava-v1.5-tiny")
def test_stage1_on_two_ranks_survives_a_kill(runs, tmp_path):
    command = [*runs.commands["stage1"], "--batch-size", 1, "--save-every", 2]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert call_two_ranks(("kill", 5), [*command, "--out", killed], check=False).returncode != 0
    assert len(log(killed)) == 5 and (killed / "checkpoint-4").is_dir()  # step 5 is logged and lost
    said = call_two_ranks([*command, "--out", killed], [*command, "--out", whole]).stdout
    assert "resuming after step 4" in said and len(log(whole)) == 8
    assert log(killed) == log(whole) and distance(killed, whole) == 0 and not list(killed.glob("checkpoint*"))


@only("llava-v1.6-tiny")
def test_stage2_survives_a_kill_at_any_moment(runs, tmp_path):
    described = lines(runs.one / "descriptions.jsonl")
    copies = lambda records: [r | {"id": f"{r['id']}-{copy}"} for r in records for copy in range(5)]  # time to kill it
    (tmp_path / "instructions.json").write_text(json.dumps(copies(pictured(runs.tiny))))
    (tmp_path / "descriptions.jsonl").write_text("\n".join(map(json.dumps, copies(described))))
    script, *args = [*runs.commands["stage2"], "--instructions", tmp_path / "instructions.json", "--descriptions",
                     tmp_path / "descriptions.jsonl", "--lora-dropout", 0.05, "--batch-size", 1, "--save-every", 1]
    killed, whole, plain = tmp_path / "killed", tmp_path / "whole", tmp_path / "plain"
    command = [sys.executable, f"{script}.py", *map(str, args), "--out", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("checkpoint-[0-9]*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "adapter_config.json").exists()
    assert "resuming after step" in call(script, *args, "--out", killed)
    call(script, *args, "--out", whole)
    assert log(killed) == log(whole) and len(log(whole)) == 40 and distance(killed, whole) == 0
    call(script, *args, "--lora-dropout", 0, "--out", plain)
    assert distance(plain, whole) > 1e-6  # dropout was on


def test_stage2_trains_every_answer_of_the_described_records_only(runs):
    encode = load_llava(runs.model).tokenizer.encode_response
    answers = [t["value"] for r in pictured(runs.tiny) for t in r["conversations"] if t["from"] == "gpt"]
    records = log(runs.one / "stage2")
    assert sum(r["answer_tokens"] for r in records) == sum(len(encode(answer)) for answer in answers)
    assert all(set(r) == {"step", "loss", "answer_tokens", "grad_norm", "lr"} for r in records)
    assert "8 described of 8 records with an image, 10 in all; 8 trained, 0 cut to 2048 tokens" in runs.said["stage2"]


def test_stage2_goes_on_from_stage1(runs, tmp_path):
    first = log(runs.one / "stage2")[0]["loss"]
    assert distance(runs.one / "stage1", runs.one / "stage2") > 1e-4
    call(*runs.commands["stage2"], "--lr", 0, "--projector-lr", 0, "--out", tmp_path / "still")
    assert log(tmp_path / "still")[0]["loss"] == pytest.approx(first, rel=1e-5)
    script, *args = runs.commands["stage2"]  # the control that skips stage 1
    at = args.index("--adapter")
    call(script, *args[:at], *args[at + 2 :], "--lora-r", 4, "--out", tmp_path / "control")
    assert log(tmp_path / "control")[0]["loss"] != pytest.approx(first, rel=1e-4)
    assert distance(tmp_path / "control", runs.one / "stage2") > 1e-4
    assert distance(tmp_path / "still", runs.one / "stage1") == 0  # the projector too: runs/stage2 stands alone


# ---------------------------------------------------------------- evaluate.py, stic_min/merge.py


def test_answers_of_scienceqa(runs):
    problems = json.loads((runs.tiny / "scienceqa" / "problems.json").read_text())
    direct, dar = (lines(runs.one / "results" / f"scienceqa-stage2-{mode}.jsonl") for mode in ("direct", "dar"))
    assert [r["question_id"] for r in direct] == [r["question_id"] for r in dar] == list(problems)
    for record, problem in zip(direct, problems.values()):
        assert record["prompt"].startswith("<image>\n") is bool(problem["image"]) and record["adapter"] == "stage2"
        assert record["prompt"].endswith("Answer with the option's letter from the given choices directly.")
        assert problem["question"] in record["prompt"]
    assert [r["prompt"] for r in dar] == [r["prompt"] for r in direct]  # free of the description, as scorers read it
    described = lines(runs.one / "results" / "scienceqa-stage2-dar.descriptions.jsonl")
    shown = [f"images/test/{id}/{p['image']}" for id, p in problems.items() if p["image"]]
    assert [d["image"] for d in described] == shown


@pytest.mark.parametrize("mode", ["direct", "dar"])
def test_scores_can_be_repeated_without_the_model(runs, mode):
    answers = runs.one / "results" / f"scienceqa-stage2-{mode}.jsonl"
    command = ["evaluate", "score", "scienceqa", "--answers", answers, "--data", runs.tiny / "scienceqa"]
    again, saved = json.loads(call(*command, "--json")), json.loads(answers.with_suffix(".scores.json").read_text())
    assert (again["groups"]["average"]["n"], again["missing"]) == (6, 0) and again.items() <= saved.items()
    assert (saved["run"]["mode"], saved["run"]["adapter"]) == (mode, "stage2")
    assert "6 questions, 0 without a prediction" in call(*command) and call(*command) in runs.said[mode]


def test_ask(runs):
    question, adapter, folder = "What is in the picture?", runs.one / "stage2", runs.tiny / "images"
    command = ["evaluate", "ask", question, "--model", runs.model, "--adapter", adapter, "--device", "cpu",
               "--max-new-tokens", 12]
    llava = load_llava(runs.model, adapter=adapter)
    for pictures in ([], [folder / "scene_01.jpg"], [folder / "scene_01.jpg", folder / "scene_02.png"]):
        prompt = TEMPLATES[llava.config.template].prompt(with_image(question, len(pictures)))
        [answer] = llava.generate([prompt], [[open_image(p) for p in pictures]], max_new_tokens=12)
        assert answer and call(*command, *[flag for p in pictures for flag in ("--image", p)]) == f"{answer}\n"
    # describe-and-respond: both times with the picture
    ask = "Detail the composition and subjects within the frame."
    prompt, pictures = TEMPLATES[llava.config.template].prompt, [[open_image(folder / "scene_01.jpg")]]
    [description] = llava.generate([prompt(with_image(ask))], pictures, max_new_tokens=12)
    text = with_image(with_description(description, question))
    [answer] = llava.generate([prompt(text)], pictures, max_new_tokens=12)
    said = call(*command, "--image", folder / "scene_01.jpg", "--dar")
    assert said == f"Description: {description}\n\n{answer}\n"
    marked = [*command[:2], f"<image>\n{question}", *command[3:]]  # a mark of the user's own changes nothing
    assert call(*marked, "--image", folder / "scene_01.jpg", "--dar") == said
    with pytest.raises(InputError, match="--dar describes a picture first"):
        call(*command, "--dar")


def test_an_answer_of_scienceqa_can_be_repeated(runs):
    llava, seen = load_llava(runs.model, adapter=runs.one / "stage2"), 0
    for mode in ("direct", "dar"):
        file = runs.one / "results" / f"scienceqa-stage2-{mode}.jsonl"
        descriptions = lines(file.with_suffix(".descriptions.jsonl")) if mode == "dar" else []
        descriptions = {Path(d["image"]).parent.name: d["description"] for d in descriptions}
        for record in lines(file):
            text = record["prompt"].removeprefix("<image>\n")
            pictures = [open_image(p) for p in (runs.tiny / "scienceqa/images/test" / record["question_id"]).glob("*")]
            described = descriptions.get(record["question_id"])
            text = with_description(described, text) if described is not None else text
            prompt = TEMPLATES[llava.config.template].prompt(with_image(text, len(pictures)))
            assert llava.generate([prompt], [pictures], max_new_tokens=16) == [record["text"]]
            seen += 1
    assert seen == 12


def test_sampled_answers_do_not_depend_on_the_batch(runs, tmp_path):
    files = []
    for number, flags in enumerate((["--batch-size", 1], ["--batch-size", 4], ["--seed", 1])):
        call(*runs.commands["dar"], "--temperature", 1, *flags, "--out", tmp_path / f"{number}")
        file, described = sorted((tmp_path / f"{number}").glob("*.jsonl"), key=lambda path: len(path.name))
        files.append([r["text"] for r in lines(file)] + [d["description"] for d in lines(described)])
    [first] = [r for r in lines(tmp_path / "0" / file.name) if r["question_id"] == "11"]  # without a picture
    llava = load_llava(runs.model, adapter=runs.one / "stage2")
    prompt, seed = TEMPLATES[llava.config.template].prompt(first["prompt"]), row_seed(0, "answer", "11")
    [again] = sampler.sample(llava, [prompt], [[]], [seed], max_new_tokens=16, temperature=1.0)
    assert llava.tokenizer.decode(again.ids) == first["text"]
    assert files[0] == files[1] and all(a != b for a, b in zip(files[0], files[2]))


def test_a_merged_checkpoint_is_the_adapter(runs, tmp_path):
    command = ["stic_min.merge", "--model", runs.model, "--out"]
    exact = call(*command, tmp_path / "exact", "--adapter", runs.one / "stage2", "--dtype", "float32")
    assert "100.00 % of the change survived rounding" in exact
    pictures, vision = [open_image(runs.tiny / "images" / "scene_02.png")], runs.tiny / "clip-tiny"
    logits = lambda path, **options: load_llava(path, **options).logits("<image>\nWhat is this?", pictures)
    adapted = logits(runs.model, adapter=runs.one / "stage2")
    assert (adapted - logits(runs.model)).abs().max() > 1e-2
    torch.testing.assert_close(logits(tmp_path / "exact", vision=vision), adapted, rtol=1e-4, atol=1e-4)

    call(*runs.commands["stage1"], "--lr", 1e-7, "--projector-lr", 0, "--out", tmp_path / "small")  # rounding eats it
    said = run("-m", *command, tmp_path / "stored", "--adapter", tmp_path / "small").stdout
    assert abs(float(said.split("; ")[1].split(" % of the change survived")[0])) < 90
    kinds = lambda file: {key: (value.dtype, value.shape) for key, value in load_file(file).items()}
    for file in runs.model.glob("*.safetensors"):
        assert kinds(file) == kinds(tmp_path / "stored" / file.name)


@pytest.mark.parametrize("script, shown", [
    ("generate_pairs", {"--temperature": "0.2", "--seed": "0", "--max-new-tokens": "1024"}),
    ("train_stage1", {"--lr": "1e-07", "--projector-lr": "2e-05", "--beta": "0.1", "--alpha": f"{1 / 1024}",
                      "--batch-size": "4", "--lora-dropout": "0.0", "--max-length": "1024, in anyres 4096"}),
    ("train_stage2", {"--lr": "2e-05", "--lora-dropout": "0.05", "--batch-size": "64", "--seed": "0"}),
    ("evaluate", {"--temperature": "0.0", "--seed": "0", "--batch-size": "8"})])
def test_help_shows_the_defaults(script, shown, capsys):
    with pytest.raises(SystemExit, match="0"), mock.patch.object(
            sys, "argv", [script, *["scienceqa"] * (script == "evaluate"), "--help"]):
        importlib.import_module(script).main()
    text = " ".join(capsys.readouterr().out.split()).partition("options:")[2]
    for flag, default in shown.items():
        assert f"(default: {default})" in text.partition(f" {flag} ")[2].partition(" --")[0], flag


# ---------------------------------------------------------------- real pictures


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
    assert call(*ask, "--device", "cpu", "--image", tmp_path / "images" / names[0], "--max-new-tokens", 8).strip()
