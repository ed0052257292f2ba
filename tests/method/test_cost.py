"""The estimates of --check against what was measured, and the defaults that follow from a GPU's memory."""

from types import SimpleNamespace

import pytest
import torch

from stic_min import cost, lora
from stic_min.clip import ClipConfig
from stic_min.llava import LLaVA, LlavaConfig
from stic_min.mistral import DecoderConfig
from stic_min.runtime import ranks
from stic_min.samples import TrainingSample

GIB = 2**30
IMAGE = {"pad": 576, "anyres": 2340}  # tokens of 640x480
# Measured on an H200: the memory before a step is 16.7 GiB, weights, LoRA and its gradients.
BEFORE = 16.7 * GIB


def model(mode="pad", dropout=0.0, projector=False):
    """v1.6's true shapes without numbers -> (LLaVA, its adapter)."""
    decoder = DecoderConfig(4096, 14336, 32, 32, 8, 32064, 1e-6, 1e6, 32768)
    config = LlavaConfig(decoder, ClipConfig(), mode, ((672, 672),), "mistral_instruct", 4096)
    with torch.device("meta"):
        llava = LLaVA(config).bfloat16().requires_grad_(False)
        names = [name for name, _ in llava.model.named_modules(prefix="model")]
        modules = [name for name in names if name.rpartition(".")[2] in lora.TARGETS]
        adapter = lora.Adapter(128, 256, dropout, modules, {})
        lora.attach(llava, adapter)
        llava.mm_projector.float().requires_grad_(projector)
    return llava, adapter


def pair(mode):
    """The pairs of tests/speed/stage1.py: a text of 30 tokens, responses of 270 and 230."""
    trunk = [([1] * (32 + IMAGE[mode]), False)]
    return TrainingSample("", trunk, [[1] * 270, [1] * 230], "", 32 + IMAGE[mode] + 500, False)


def conversations():
    """Those of tests/speed/stage2.py."""
    return [
        TrainingSample("", [([1] * (578 + n), False), ([1] * m, True)], [], "", 578 + n + m, False)
        for n, m in ((260, 30), (320, 120), (220, 60), (290, 200))
    ]


def flags(**changes):
    values = {"dtype": None, "micro_batch": None, "shard": None, "batch_size": 4, "max_new_tokens": 1024,
              "checkpoint_activations": False, "check": False, "device": None, "lora_dropout": 0.0}  # fmt: skip
    return SimpleNamespace(**values | changes)


def within(estimate, measured, share=0.15):
    assert abs(estimate / measured - 1) < share, f"{estimate:.4g} instead of {measured:.4g}"


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("samples, mode, measured", [
    ([pair("pad")] * 4, "pad", 25.9), ([pair("anyres")], "anyres", 16.7), (conversations(), "pad", 21.2)])
def test_memory_of_a_step(samples, mode, measured):
    llava, adapter = model(mode)
    memory = cost.training_memory(flags(), llava, adapter, samples, len(samples))
    within(memory["activations"] + memory["logits"], measured * GIB)
    state = memory["LoRA and projector with gradient and Adam"] / 2  # these runs had no Adam
    within(memory["weights"] + state, BEFORE, 0.01)


def test_memory_of_dropout():
    (llava, plain), (_, dropping) = model(), model(dropout=0.05)
    tokens = sum(sample.length for sample in conversations())
    without, dropped = (
        cost.training_memory(flags(), llava, adapter, conversations(), 4) for adapter in (plain, dropping)
    )
    within((dropped["activations"] - without["activations"]) / tokens, 2.0e6)


def test_memory_of_the_command():
    """train_stage1.py with the projector trained, micro-batches of 2, pad."""
    llava, adapter = model(projector=True)
    within(sum(cost.training_memory(flags(), llava, adapter, [pair("pad")] * 9, 2).values()), 32.4e9)


def test_what_saves_memory():
    llava, adapter = model(projector=True)
    memory = lambda *args, **changes: cost.training_memory(flags(**changes), llava, adapter, [pair("pad")] * 9, *args)
    whole, sharded = memory(1), memory(1, 4)
    assert sharded["weights"] < whole["weights"] / 4 + 2.3e9 and sharded["activations"] == whole["activations"]
    assert sum(memory(1, checkpoint_activations=True).values()) < 24e9 < sum(whole.values())


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("mode, count, measured", [("pad", 4, 0.492), ("anyres", 1, 0.364)])
def test_time_of_a_step(mode, count, measured):
    sample = pair(mode)
    trunk = sample.length - 500
    spans = [(trunk, 0), (270, trunk), (230, trunk)]
    flops = count * cost.decoder_flops(model(mode)[0].config.decoder, spans, sample.scored, 128, True)
    within(flops / cost.TRAINING_FLOPS, measured)


@pytest.mark.parametrize("rows, positions, measured", [
    (8, 760, 5.6), (8, 2700, 6.3), (64, 760, 7.2), (64, 2700, 11.1)])
def test_time_of_decoding(rows, positions, measured):
    llava, _ = model()
    within(1000 * cost.step_seconds(flags(), llava, rows, positions), measured)


@pytest.mark.parametrize("mode, measured", [("pad", 0.025), ("anyres", 0.080)])
def test_time_of_a_prefill(mode, measured):
    """Of two prompts about one image, with 160 and 20 tokens of text."""
    within(cost.prefill_seconds(model(mode)[0], 2 + IMAGE[mode] + 160 + 20), measured)


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize("gigabytes, world, expected", [
    (24, 1, (1, "none")), (40, 1, (2, "none")), (80, 1, (7, "none")), (150, 1, (8, "none")),
    (24, 4, (2, "full")), (40, 4, (2, "none")), (80, 4, (6, "none")), (150, 2, (8, "none"))])
def test_micro_batch_and_sharding_follow_from_memory(gigabytes, world, expected):
    llava, adapter = model(projector=True)
    args, samples = flags(batch_size=64), [pair("pad")] * 100
    micro_batch, shard, why = cost.choose_training(args, llava, adapter, samples, world, gigabytes * 1e9)
    assert (micro_batch, shard) == expected
    assert why.startswith(f"--micro-batch {micro_batch}") and f"of {gigabytes} GB per GPU (weights" in why
    assert (f"--shard {shard}" in why) == (world > 1)
    assert ("--checkpoint-activations" in why) == ((gigabytes, world) == (24, 1))


def test_micro_batches_are_of_equal_size():
    llava, adapter = model(projector=True)
    choose = lambda **changes: cost.choose_training(
        flags(**changes), llava, adapter, [pair("pad")] * 100, 1, 80e9)[0]  # fmt: skip
    assert [choose(batch_size=n) for n in (1, 4, 7, 8, 15)] == [1, 4, 7, 4, 5]  # up to 7 fit


def test_what_is_given_is_kept():
    llava, adapter = model()
    choose = lambda memory, **given: cost.choose_training(
        flags(**given), llava, adapter, [pair("pad")] * 9, 4, memory)[:2]  # fmt: skip
    assert choose(150e9, micro_batch=3) == (3, "none") and choose(24e9, micro_batch=3) == (3, "full")
    assert choose(150e9, shard="full", batch_size=64) == (3, "full")  # 9 samples on 4 ranks
    assert choose(None) == (1, "full")  # a CPU
    assert choose(None, micro_batch=2, shard="none") == (2, "none")


@pytest.mark.parametrize("gigabytes, rows", [(24, 5), (40, 27), (80, 64), (150, 64), (16, 1)])
def test_rows_follow_from_memory(gigabytes, rows):
    llava, _ = model("anyres")
    chosen, why = cost.choose_rows(flags(), llava, gigabytes * 1e9)
    assert chosen == rows and why.startswith(f"--batch-size {rows}: weights ")
    assert cost.choose_rows(flags(), llava, None) == (8, "")


def test_all_ranks_choose_for_the_smallest_gpu(monkeypatch, capsys):
    llava, adapter = model()
    monkeypatch.setattr(ranks, "gpu_memory", lambda device: 150e9)
    monkeypatch.setattr(ranks.Ranks, "gather", lambda self, value: [value, 40e9])
    args = flags(batch_size=64)
    cost.fit_training(args, llava, adapter, [pair("pad")] * 100, ranks.Ranks(0, 2, torch.device("cuda", 0)))
    assert (args.micro_batch, args.shard) == (2, "none")
    assert "--micro-batch 2 --shard none: about 34.7 of 40 GB per GPU (weights 15.1, LoRA" in capsys.readouterr().out


def test_check_assumes_an_h200_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = lambda **changes: ranks.memory_per_gpu(flags(**changes), ranks.Ranks(0, 1, torch.device("cpu")), 7e9)
    assert memory(check=True) == 7e9 and capsys.readouterr().out == "no GPU here: a GPU of 7 GB is assumed\n"
    assert memory() is memory(check=True, device="cpu") is None
