"""Fixtures of several test files about what surrounds a run."""

import functools
import json
from types import SimpleNamespace

import pytest
from chain import chain
from commands import call, call_two_ranks


def turns(answer):
    user = {"role": "user", "content": "<image>\nWhat is this?"}
    return [user, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def two_rank_chains(tiny, tmp_path_factory):
    """model -> the folder of its chain of commands on two ranks, run once for all tests."""

    @functools.cache
    def run(model):
        out = tmp_path_factory.mktemp(f"{model}-two-ranks")
        call_two_ranks(*chain(model, tiny, out).values())
        return out

    return run


@pytest.fixture
def two_ranks(runs, two_rank_chains):
    """The same commands as in `runs`, on two ranks: the folder of their files."""
    return two_rank_chains(runs.model.name)


@pytest.fixture(scope="session")
def made(tiny, tmp_path_factory):
    """Forty pairs, the command that trains on them a pair a step, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("robust")
    pictures = sorted(path.name for path in (tiny / "images").iterdir())
    words = "a red house, a blue boat and the yellow sun over green grass".split()
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(40):
            chosen, rejected = " ".join(words[: 4 + i % 9]), " ".join(words[::-1][: 3 + i % 7])
            pair = {"image": pictures[i % len(pictures)], "chosen": turns(chosen), "rejected": turns(rejected)}
            file.write(json.dumps(pair) + "\n")
    command = ["train_stage1", "--model", tiny / "llava-v1.5-tiny", "--images", tiny / "images", "--device", "cpu",
               "--pairs", folder / "pairs.jsonl", "--lora-r", 4, "--lr", 1e-3, "--save-every", 1000]  # fmt: skip
    call(*command, "--batch-size", 1, "--out", folder / "whole")
    call(*command, "--batch-size", 4, "--out", folder / "fours")
    return SimpleNamespace(command=command, folder=folder, whole=folder / "whole", fours=folder / "fours")
