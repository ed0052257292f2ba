"""Devices, flags and progress, shared by the four scripts."""

import argparse
import sys

import pytest
import torch

import evaluate
from stic_min import InputError
from stic_min.runtime import console, files, flags
from stic_min.runtime.ranks import Ranks, start_device


@pytest.mark.parametrize(
    "name, rank, index", [(None, None, 0), (None, 3, 3), ("cuda", 2, 2), ("cuda:1", 3, 1)]
)
def test_a_gpu_always_has_an_index(monkeypatch, name, rank, index):
    """torch.cuda.set_device rejects a plain "cuda". No GPU is needed: calls that would reach one are
    recorded."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **kind: chosen.append(kind["device"]) or torch.zeros(1))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert start_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)] * 2  # selected, and tested


def test_the_cpu_is_used_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start_device() == torch.device("cpu")
    for name in ("tpu9", "meta", "hpu"):
        with pytest.raises(InputError, match=f"--device {name}: "):
            start_device(name)


@pytest.mark.parametrize("kind, good, bad", [
    (flags.positive, {"1": 1, "20": 20}, ["0", "-3", "1.5", "abc", ""]),
    (flags.not_negative, {"0": 0.0, "1e-7": 1e-7}, ["-1", "nan", "inf", "abc"]),
    (flags.probability, {"0": 0.0, "0.05": 0.05}, ["1", "-0.1", "nan"]),
    (flags.top_p_value, {"1": 1.0, "0.9": 0.9}, ["0", "1.1", "nan"]),
    (flags.seed_value, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "0.5"]),
])  # fmt: skip
def test_numbers_in_flags(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a "):
            kind(text)


def test_help_shows_every_default_zero_included(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "scienceqa", "--help"])
    with pytest.raises(SystemExit):
        evaluate.main()
    text = " ".join(capsys.readouterr().out.split())
    assert "0 is greedy (default: 0.0)" in text and "random seed (default: 0)" in text
    assert "in tokens (default: 1024)" in text and "None" not in text and "default: False" not in text


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (65, "1:05"), (59.6, "1:00"), (3700, "1:01:40")])
def test_clock(seconds, text):
    assert console.clock(seconds) == text


def test_progress_shows_rate_and_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.Progress("pairs", 40)
    now[0] = 105.0
    progress.add(5)  # after five seconds: too early for a line in a log file
    now[0] = 112.0
    progress.add(0)  # nothing done: nothing to print
    now[0] = 120.0
    progress.add(5)  # 10 of 40 in 20 s: 2 s each, 30 to go
    now[0] = 130.0
    progress.add(30)  # all 40 in 30 s
    assert capsys.readouterr().err == "pairs 10/40  2.0 s each  1:00 left\npairs 40/40  1.3/s  0:30\n"
    console.Progress("pairs", 1, Ranks(1, 2, torch.device("cpu"))).add()
    assert capsys.readouterr().err == ""  # only the first rank prints


def test_fingerprints_depend_on_contents(tmp_path):
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    for folder in (model, one, two):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    for folder in (one, two):
        (folder / "adapter_model.safetensors").write_bytes(b"12345678" * 10**6)
        (folder / "run.json").write_text(str(folder))  # does not count
    assert files.fingerprint(model, one) == files.fingerprint(model, two) != files.fingerprint(model)
    (two / "adapter_model.safetensors").write_bytes(b"12345679" * 10**6)  # same size
    assert files.fingerprint(model, one) != files.fingerprint(model, two)
    (two / "adapter_model.safetensors").write_bytes(b"12345678" * 10**6)
    (two / "adapter_config.json").write_text('{"lora_alpha": 1600}')
    assert files.fingerprint(model, one) != files.fingerprint(model, two)
    assert files.fingerprint(model, None, two / "adapter_config.json") != files.fingerprint(model)
    before = files.fingerprint(model)
    (model / "config.json").write_text("[]")
    assert files.fingerprint(model) != before
