"""The whole method as a chain of commands on a tiny checkpoint, and how two training runs are compared."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from commands import call, lines, run_script
from safetensors.torch import load_file

from stic_min import training

STEPS = 3  # 8 samples, 3 at a time: the last batch is short, and two ranks never have equal shares


def log(folder):
    """log.jsonl without the fields that depend on the machine."""
    records = lines(folder / "log.jsonl")
    for record in records:
        assert record.pop("tokens_per_s") > 0 and record.pop("memory_gb") > 0
        assert record.pop("seconds_left") >= 0
    return records


def tensors(folder):
    """The tensors of an adapter folder, projector included."""
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def distance(a, b):
    """The largest difference of two adapters, projector included."""
    a, b = tensors(a), tensors(b)
    assert a and set(a) == set(b)
    return max((a[key] - b[key]).abs().max().item() for key in a)


def assert_same_parameters(a, b, lr=1e-3, projector_lr=2e-5):
    """Two sets of trained tensors are equal up to the order of summation: apart by less than 1e-4 of lr, on average.

    The largest difference is a poor test. Adam divides a gradient by its own size, so rounding noise n in a gradient g
    moves a step by min(2, n / |g|) lr: by any fraction of lr where g is near zero, and how near the smallest of 6,000
    gets depends on the CPU (1e-2 lr was observed). The mean is well conditioned. Gradients of typical size s are spread
    evenly around zero, so it is n / s * (1 + log(2 s / n)), 2e-6 for n / s = 1e-7; observed are 4e-7 to 4e-6. One of
    6,500 parameters missing one step would be 1.5e-4, and a sample weighted 1% too high about 1e-2.
    """
    assert a and set(a) == set(b)
    steps = [(a[key] - b[key]).abs().flatten() / (projector_lr if "mm_projector" in key else lr) for key in a]
    assert torch.cat(steps).mean() < 1e-4


def assert_same_training(a, b):
    """Equal up to the order of summation: every logged quantity of every step, and what was trained."""
    assert len(log(a)) == len(log(b))
    for x, y in zip(log(a), log(b)):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-4)
    assert_same_parameters(tensors(a), tensors(b))


def chain(model, tiny, out):
    """{step: command}. Each step reads the files of those before."""
    at = ["--model", tiny / model, "--device", "cpu"]
    images = ["--images", tiny / "images"]
    train = [*at, *images, "--lr", 1e-3, "--batch-size", 3, "--lora-dropout", 0]
    benchmark = ["scienceqa", *at, "--data", tiny / "scienceqa", "--adapter", out / "stage2", "--out", out / "results"]
    few = ["--max-new-tokens", 16]
    return {
        "pairs": ["generate_pairs", *at, *images, *few, "--out", out / "pairs.jsonl"],
        "stage1": ["train_stage1", *train, "--lora-r", 4, "--pairs", out / "pairs.jsonl", "--out", out / "stage1"],
        "describe": ["generate_pairs", "--describe", tiny / "instructions.json", *at, *images, *few,
                     "--adapter", out / "stage1", "--out", out / "descriptions.jsonl"],
        "stage2": ["train_stage2", *train, "--instructions", tiny / "instructions.json", "--adapter", out / "stage1",
                   "--descriptions", out / "descriptions.jsonl", "--out", out / "stage2"],
        "direct": ["evaluate", *benchmark, *few],
        "dar": ["evaluate", *benchmark, *few, "--dar"],
    }


def run_chain(model, tiny, out):
    """All commands on one rank: v1.6's in processes of their own, v1.5's in this one."""
    commands = chain(model, tiny, out)
    run = run_script if "v1.6" in model else call
    printed = {step: run(*command) for step, command in commands.items()}
    return SimpleNamespace(model=tiny / model, tiny=tiny, out=out, printed=printed, commands=commands)


def with_images(tiny):
    """The instruction records that have an image."""
    return [record for record in json.loads((tiny / "instructions.json").read_text()) if "image" in record]


def identical(a, b):
    """Whether two runs are equal bit for bit: every logged quantity of every step, and what was trained."""
    return log(a) == log(b) and distance(a, b) == 0


def stop_after(step):
    """With this, a training run in this process ends as if killed, after so many steps are logged."""

    def end_and_exit(run, norm, end_step=training.Run.end_step):
        end_step(run, norm)
        if run.step + 1 == step:
            raise SystemExit(9)

    return mock.patch.object(training.Run, "end_step", end_and_exit)
