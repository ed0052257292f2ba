"""train_stage1.py: the whole stage against Eq. 4.1 and AdamW worked out by hand, then its details."""

import json
import math
import random

import pytest
import torch
from by_hand import assert_trained_like, logps_by_hand, train_by_hand
from chain import STEPS, log, tensors
from commands import call, lines
from safetensors.torch import load_file
from torch.nn import functional as F

import train_stage1
from stic_min import InputError, data, lora
from stic_min.formats.adapters import PREFIX
from stic_min.loader import load_llava
from stic_min.runtime.files import fingerprint
from stic_min.runtime.work import row_seed
from stic_min.samples import global_batches, pair_sample


def test_stage1_by_hand(runs, tmp_path):
    """Eq. 4.1 pair by pair, with a second model as theta_0, and AdamW by hand.

    One pair has two equal responses. Only its NLL counts: margin and accuracy are means over the other pairs.
    """
    beta, alpha, equal = 2.0, 0.5, 2
    records = lines(runs.out / "pairs.jsonl")
    for name in ("", "_finish"):
        records[equal][f"rejected{name}"] = records[equal][f"chosen{name}"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--beta", beta, "--alpha", alpha, "--projector-lr", 5e-4, "--pairs", tmp_path / "pairs.jsonl"]
    call(*runs.commands["stage1"], *flags, "--out", tmp_path / "out")

    policy, theta_0 = (load_llava(runs.model, image_mode="pad") for _ in range(2))
    adapter = lora.new_adapter(policy, 4, 8, 0.0, seed=0)
    lora.attach(policy, adapter)
    for name, value in adapter.tensors.items():
        policy.get_parameter(name).data.copy_(value)
    pairs = data.read_pairs(tmp_path / "pairs.jsonl")
    samples = [pair_sample(pair, policy, runs.tiny / "images", 1024) for pair in pairs]
    expected = []  # log.jsonl, step by step

    def loss(indices):
        """The mean of Eq. 4.1 over the pairs of one global batch."""
        terms, margins = [], []
        for i in indices:
            logp_w, logp_l = logps_by_hand(policy, samples[i])
            ref_logp_w, ref_logp_l = logps_by_hand(theta_0, samples[i])
            reward_w = beta * (logp_w - ref_logp_w)
            reward_l = beta * (logp_l - ref_logp_l)
            dpo = -F.logsigmoid(reward_w - reward_l)
            nll = -alpha * logp_w
            terms.append({"loss": dpo + nll, "dpo": dpo, "alpha_nll": nll, "logp_chosen": logp_w,
                          "logp_rejected": logp_l, "reward_chosen": reward_w, "reward_rejected": reward_l})
            if i != equal:
                margins.append(reward_w - reward_l)
        means = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
        expected.append({name: mean.item() for name, mean in means.items()})
        expected[-1]["margin"] = sum(margins).item() / len(margins)
        expected[-1]["accuracy"] = sum(margin.item() > 0 for margin in margins) / len(margins)
        expected[-1]["equal"] = indices.count(equal)
        return means["loss"]

    batches = global_batches([sample.length for sample in samples], 3, seed=0)
    losses = [lambda batch=batch: loss(batch) for batch in batches]
    norms = train_by_hand(policy, losses, lr=1e-3, projector_lr=5e-4)
    assert max(norms) > 1.2 * min(norms) > 1.2  # clipping is active, and differs from step to step
    for record, values, norm in zip(log(tmp_path / "out"), expected, norms, strict=True):
        assert record == pytest.approx(record | values | {"grad_norm": norm}, rel=1e-3, abs=1e-4)
    assert_trained_like(policy, tmp_path / "out", projector_lr=5e-4)


def test_stage1_starts_at_theta_0(runs):
    records = log(runs.out / "stage1")
    names = {"step", "loss", "dpo", "alpha_nll", "margin", "accuracy", "equal", "logp_chosen",
             "logp_rejected", "reward_chosen", "reward_rejected", "grad_norm", "lr"}  # fmt: skip
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(set(record) == names for record in records)
    assert records[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5) and abs(records[0]["margin"]) < 1e-6
    assert all(abs(r["margin"]) > 1e-6 for r in records[1:])
    assert all(r["loss"] == pytest.approx(r["dpo"] + r["alpha_nll"], abs=1e-6) for r in records)
    assert all(r["alpha_nll"] == pytest.approx(-r["logp_chosen"] / 1024, rel=1e-5) for r in records)  # the default
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 1e-3, 0.5e-3])  # warm-up, then a cosine
    printed = runs.printed["stage1"]
    assert "8 pairs, 0 truncated to 1024 tokens" in printed and f"step {STEPS}/{STEPS}" in printed


@pytest.mark.parametrize("reference", [False, True])
def test_a_second_round(runs, tmp_path, reference):
    """Continues theta_1; the reference is theta_0, or theta_1 with its own projector. By hand: the first step's
    rewards from separately loaded models."""
    theta_1 = runs.out / "stage1"
    flags = ["--adapter", theta_1, "--lora-r", 4, "--lora-alpha", 8, "--beta", 2.0, "--batch-size", 8]
    flags += ["--reference", theta_1] if reference else []
    call(*runs.commands["stage1"], *flags, "--out", tmp_path / "out")
    policy = load_llava(runs.model, image_mode="pad", adapter=theta_1)
    other = load_llava(runs.model, image_mode="pad", adapter=theta_1 if reference else None)
    pairs = data.read_pairs(runs.out / "pairs.jsonl")
    samples = [pair_sample(pair, policy, runs.tiny / "images", 1024) for pair in pairs]
    rewards = []
    for sample in samples:
        rewards.append((2 * (logps_by_hand(policy, sample) - logps_by_hand(other, sample))).tolist())
    [record] = log(tmp_path / "out")
    chosen, rejected = (sum(column) / len(samples) for column in zip(*rewards))
    assert record["reward_chosen"] == pytest.approx(chosen, abs=1e-4)
    assert record["reward_rejected"] == pytest.approx(rejected, abs=1e-4)
    if reference:  # theta starts at the reference, bit for bit
        assert record["dpo"] == pytest.approx(math.log(2), abs=1e-7) and record["margin"] == 0
    else:
        assert abs(chosen) > 1e-3
    before, after = tensors(theta_1), tensors(tmp_path / "out")
    assert before.keys() == after.keys()  # the reference's LoRA is not saved
    assert all(0 < (after[name] - before[name]).abs().max() < 1.1e-3 for name in after)  # one step of Adam


def test_a_reference_must_fit(runs, tmp_path):
    """Its own log p is the reference's also where policy and reference differ, and its form must match."""
    with pytest.raises(InputError, match="--reference: its LoRA has another scale"):
        flags = ["--reference", runs.out / "stage1", "--lora-r", 4, "--lora-alpha", 4]
        call(*runs.commands["stage1"], *flags, "--out", tmp_path / "a")
    call(*runs.commands["stage1"], "--reference", runs.out / "stage1", "--batch-size", 8, "--out", tmp_path / "b")
    [record] = log(tmp_path / "b")
    assert abs(record["reward_chosen"]) > 1e-4  # theta_0 against theta_1
    run_json = json.loads((tmp_path / "b/run.json").read_text())
    assert run_json["reference"] == fingerprint(runs.out / "stage1")


def test_policy_and_reference_are_compared_before_step_1(runs, tmp_path, monkeypatch):
    """Whenever both are the same adapter, however its path is spelled."""
    checked = []
    monkeypatch.setattr(train_stage1, "check_reference", lambda *arguments: checked.append(1))
    stage1 = runs.out / "stage1"
    for i, (flags, count) in enumerate((
        ([], 1), (["--adapter", stage1, "--reference", f"{stage1}/"], 1), (["--adapter", stage1], 0),
        (["--reference", stage1], 0),
    )):  # fmt: skip
        call(*runs.commands["stage1"], *flags, "--batch-size", 8, "--out", tmp_path / str(i))
        assert len(checked) == count, flags
        checked.clear()


def test_there_is_no_weight_decay(runs, tmp_path):
    """With B = 0 the first gradient of A is zero, so the first step leaves A unchanged."""
    call(*runs.commands["stage1"], "--batch-size", 8, "--out", tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    adapter = lora.new_adapter(load_llava(runs.model), 4, 8, 0.0, seed=0)
    for name, before in adapter.tensors.items():
        assert torch.equal(after[f"{PREFIX}{name}.weight"], before) is ("lora_A" in name)


def test_trained_weights_are_float32_in_a_bfloat16_model(runs, tmp_path):
    """Steps of 1e-6 on weights of about 0.1, which bfloat16 would round away."""
    rates = ["--lr", 1e-6, "--projector-lr", 1e-6]
    call(*runs.commands["stage1"], "--dtype", "bfloat16", *rates, "--out", tmp_path)
    llava = load_llava(runs.model)
    adapter = lora.new_adapter(llava, 4, 8, 0.0, seed=0)
    before = {f"{PREFIX}{name}.weight": value for name, value in adapter.tensors.items()}
    before |= {f"model.{name}": p for name, p in llava.named_parameters() if name.startswith("mm_projector.")}
    after = tensors(tmp_path)
    assert set(after) == set(before) and {v.dtype for v in after.values()} == {torch.float32}
    for name, value in after.items():
        assert 1e-7 < (value - before[name]).abs().max() < 1e-5, name
    first = log(tmp_path)[0]  # in bfloat16, too, theta equals theta_0 bit for bit
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == first["reward_chosen"] == 0


def test_a_batch_of_equal_pairs_has_no_margin(runs, tmp_path):
    pair = lines(runs.out / "pairs.jsonl")[0]
    equal = pair | {"rejected": pair["chosen"], "rejected_finish": pair["chosen_finish"]}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [pair, equal, equal])))
    flags = ["--pairs", tmp_path / "pairs.jsonl", "--batch-size", 1]
    call(*runs.commands["stage1"], *flags, "--out", tmp_path / "out")
    records = log(tmp_path / "out")
    assert sum(r["equal"] for r in records) == 2
    assert all(("margin" in r, "accuracy" in r) == (not r["equal"],) * 2 for r in records)


def test_the_steps_of_two_epochs_by_hand(runs, tmp_path):
    """Without learning, a step's mean log p(y_w) shows which pairs it had."""
    still = ["--lr", 0, "--projector-lr", 0, "--epochs", 2]
    call(*runs.commands["stage1"], *still, "--out", tmp_path)
    llava = load_llava(runs.model, image_mode="pad")
    pairs = data.read_pairs(runs.out / "pairs.jsonl")
    samples = [pair_sample(pair, llava, runs.tiny / "images", 1024) for pair in pairs]
    with torch.no_grad():
        logps = [logps_by_hand(llava, sample)[0].item() for sample in samples]
    expected = []
    for seed in (0, row_seed(0, "epoch", 1)):
        order = list(range(8))
        random.Random(seed).shuffle(order)
        expected += [sum(logps[i] for i in batch) / len(batch) for batch in (order[:3], order[3:6], order[6:])]
    records = log(tmp_path)
    assert [record["logp_chosen"] for record in records] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == 2 * STEPS
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert (run_json["record"]["steps"], run_json["record"]["samples"]) == (2 * STEPS, 8)


def test_stage1_learns_a_repeated_pair(runs, tmp_path):
    pair = lines(runs.out / "pairs.jsonl")[0]
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 6)
    flags = ["--pairs", tmp_path / "pairs.jsonl", "--batch-size", 1]
    call(*runs.commands["stage1"], *flags, "--out", tmp_path / "out")
    margins, losses = ([record[key] for record in log(tmp_path / "out")] for key in ("margin", "loss"))
    assert margins == sorted(margins) and losses == sorted(losses, reverse=True) and margins[-1] > 0.1
