"""One rank or two, any micro-batch, sharded or not: the same result."""

import json
import re

import pytest
from chain import assert_same_training, log
from commands import call, call_two_ranks, lines

RESULTS = [f"results/scienceqa-stage2-{name}" for name in ("direct.jsonl", "dar.jsonl", "dar.scores.json")]


@pytest.mark.parametrize("file", ["pairs.jsonl", "descriptions.jsonl", *RESULTS])
def test_two_ranks_write_the_same_file(runs, two_ranks, file):
    one, two = ((path / file).read_text(encoding="utf-8") for path in (runs.out, two_ranks))
    if file != "pairs.jsonl":
        # All but the hash of the adapter, whose last bits depend on the number of ranks.
        one, two = (re.sub(r'"fingerprint": "[0-9a-f]{12}"', "", text) for text in (one, two))
    assert one == two and one
    assert not [*two_ranks.rglob("*.part*"), *two_ranks.rglob("*.new")]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_how_the_batch_is_computed_changes_nothing(runs, two_ranks, stage, tmp_path):
    assert_same_training(runs.out / stage, two_ranks / stage)
    for number, flags in enumerate((["--micro-batch", 2], ["--micro-batch", 4, "--checkpoint-activations"])):
        call(*runs.commands[stage], *flags, "--out", tmp_path / f"{number}")
        assert_same_training(runs.out / stage, tmp_path / f"{number}")


def test_sharding_changes_nothing(runs, tmp_path):
    variants = [
        "--shard none",
        "--shard none --micro-batch 2",
        "--shard full --micro-batch 4 --checkpoint-activations",
    ]
    outs = {}  # folder: (stage, flags)
    for stage in ("stage1", "stage2"):
        for number, flags in enumerate(variants):
            outs[tmp_path / f"{stage}{number}"] = stage, flags.split()
    odd = [*runs.commands["stage1"], "--lora-r", 3, "--out"]  # rows that two ranks can't halve
    second = [*runs.commands["stage1"], "--adapter", runs.out / "stage1", "--reference", runs.out / "stage1", "--out"]
    call(*odd, tmp_path / "one")
    call(*second, tmp_path / "second")
    call_two_ranks([*odd, tmp_path / "two"], [*second, tmp_path / "second-two"],
                   *([*runs.commands[stage], *extra, "--out", out] for out, (stage, extra) in outs.items()))
    assert_same_training(tmp_path / "one", tmp_path / "two")
    assert_same_training(tmp_path / "second", tmp_path / "second-two")
    for out, (stage, _) in outs.items():
        assert_same_training(runs.out / stage, out)


@pytest.mark.parametrize("runs", ["llava-v1.5-tiny"], indirect=True)
def test_dropout_masks_differ_between_ranks(runs, tmp_path):
    """One pair on one rank, or the same pair on each of two: without dropout, the same mean gradient."""
    pair, commands = json.dumps(lines(runs.out / "pairs.jsonl")[0]), {}
    for copies in (1, 2):
        (tmp_path / f"{copies}.jsonl").write_text(f"{pair}\n" * copies)
        for dropout in (0, 0.5):
            flags = ["--pairs", tmp_path / f"{copies}.jsonl", "--lora-dropout", dropout]
            commands[copies, dropout] = [*runs.commands["stage1"], *flags, "--out", tmp_path / f"{copies}-{dropout}"]
    call(*commands[1, 0])
    call(*commands[1, 0.5])
    call_two_ranks(commands[2, 0], commands[2, 0.5])
    norm = lambda copies, dropout: log(tmp_path / f"{copies}-{dropout}")[0]["grad_norm"]
    assert norm(1, 0) == pytest.approx(norm(2, 0), rel=1e-4)
    assert norm(1, 0.5) != pytest.approx(norm(2, 0.5), rel=1e-2)
