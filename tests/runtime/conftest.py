"""Fixtures shared by the tests of what surrounds a run."""

import functools
from types import SimpleNamespace

import pytest
from chain import chain
from commands import call, call_two_ranks
from small_world import pair, write


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
def stage1(tiny, tmp_path_factory):
    """Forty pairs, a command that trains on them, and two undisturbed runs, with batches of 1 and of 4."""
    folder = tmp_path_factory.mktemp("stage1")
    images = sorted(path.name for path in (tiny / "images").iterdir())
    words = "a red house, a blue boat and the yellow sun over green grass".split()
    pairs = []
    for i in range(40):
        chosen = " ".join(words[: 4 + i % 9])
        rejected = " ".join(words[::-1][: 3 + i % 7])
        pairs.append(pair(images[i % len(images)], chosen, rejected))
    write(folder / "pairs.jsonl", pairs)
    data = ["--images", tiny / "images", "--pairs", folder / "pairs.jsonl"]
    command = ["train_stage1", "--model", tiny / "llava-v1.5-tiny", "--device", "cpu", *data, "--lora-r", 4,
               "--lr", 1e-3, "--save-every", 1000]  # fmt: skip
    call(*command, "--batch-size", 1, "--out", folder / "ones")
    call(*command, "--batch-size", 4, "--out", folder / "fours")
    return SimpleNamespace(command=command, folder=folder, ones=folder / "ones", fours=folder / "fours")
