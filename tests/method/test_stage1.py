"""train_stage1.py: the whole stage against Eq. 4.1 and AdamW worked out by hand, then its details one by one."""

import json
import math

import pytest
import torch
from by_hand import assert_trained_like, logps_by_hand, train_by_hand
from chain import STEPS, log
from commands import call, lines
from safetensors.torch import load_file
from torch.nn import functional as F

from stic_min import data, lora
from stic_min.formats.adapters import PREFIX
from stic_min.loader import load_llava


def test_stage1_by_hand(runs, tmp_path):
    """Eq. 4.1 pair by pair, with a second model as theta_0. One pair has equal responses, so that only its NLL counts:
    margin and accuracy are those of the others."""
    beta, alpha, flags = 2.0, 0.5, ["--beta", 2, "--alpha", 0.5, "--projector-lr", 5e-4]
    records = lines(runs.out / "pairs.jsonl")
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


def test_stage1_starts_at_theta_0(runs):
    records = log(runs.out / "stage1")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert all(set(r) == {"step", "loss", "dpo", "alpha_nll", "margin", "accuracy", "grad_norm", "lr", "logp_chosen",
                          "logp_rejected", "reward_chosen", "reward_rejected", "equal"} for r in records)
    assert records[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5) and abs(records[0]["margin"]) < 1e-6
    assert all(abs(r["margin"]) > 1e-6 for r in records[1:])
    assert all(r["loss"] == pytest.approx(r["dpo"] + r["alpha_nll"], abs=1e-6) for r in records)
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 1e-3, 0.5e-3])  # one step of warm-up, then a cosine
    assert "8 pairs, 0 cut to 1024 tokens" in runs.printed["stage1"] and f"step {STEPS}/{STEPS}" in runs.printed["stage1"]


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
    pair = lines(runs.out / "pairs.jsonl")[0]
    equal = pair | {"rejected": pair["chosen"], "rejected_finish": pair["chosen_finish"]}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [pair, equal, equal])))
    call(*runs.commands["stage1"], "--pairs", tmp_path / "pairs.jsonl", "--batch-size", 1, "--out", tmp_path / "out")
    records = log(tmp_path / "out")
    assert sum(r["equal"] for r in records) == 2
    assert all(("margin" in r, "accuracy" in r) == (not r["equal"],) * 2 for r in records)


def test_stage1_learns_what_it_is_shown(runs, tmp_path):
    pair = (runs.out / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "pairs.jsonl").write_text(pair * 6, encoding="utf-8")
    call(*runs.commands["stage1"], "--pairs", tmp_path / "pairs.jsonl", "--batch-size", 1, "--out", tmp_path / "out")
    margins, losses = ([record[key] for record in log(tmp_path / "out")] for key in ("margin", "loss"))
    assert margins == sorted(margins) and losses == sorted(losses, reverse=True) and margins[-1] > 0.1
