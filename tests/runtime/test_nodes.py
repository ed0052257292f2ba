"""Several nodes: two torchrun agents on this machine with one rank each, as `torchrun --nnodes=2` starts
them.

With one shared folder, all commands give the same results as one process. With separate folders, as on nodes
without a shared disk, every command reports it and exits, at its start or its end, and no completed record is
lost.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import commands
import pytest
from chain import STEPS, assert_same_training, chain
from commands import ENV, ROOT, call, free_port, lines
from forked import Forked

from stic_min import InputError
from stic_min.runtime import files, process
from stic_min.runtime.ranks import Ranks


def two_nodes(*command, folders=(ROOT, ROOT)):
    """README.md's command for two nodes, each in its folder -> [(exit status, output), ...]."""
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=tests",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]  # fmt: skip
    nodes = [Forked([*torchrun, *command], folder, ENV) for folder in folders]
    try:
        outputs = ["".join(node.communicate(timeout=200)) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, output) for node, output in zip(nodes, outputs)]


# ---------------------------------------------------------------- a shared disk


@pytest.fixture(scope="module")
def runs(chains, tiny, tmp_path_factory):
    """The output of all commands: from one process in `one`, from two nodes in `two`."""
    folder = tmp_path_factory.mktemp("nodes")
    one = chains("llava-v1.6-tiny")
    two = chain("llava-v1.6-tiny", tiny, folder / "two")
    ended = two_nodes(commands.__file__, json.dumps(list(two.values()), default=str))
    assert [status for status, _ in ended] == [0, 0], ended
    return SimpleNamespace(one=one.out, two=folder / "two", pairs=one.commands["pairs"], folder=folder)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_nodes_train_the_same(runs, stage):
    assert_same_training(runs.one / stage, runs.two / stage)
    assert len(lines(runs.two / stage / "log.jsonl")) == STEPS
    assert json.loads((runs.two / stage / "run.json").read_text(encoding="utf-8"))["record"]["ranks"] == 2


@pytest.mark.parametrize("file", [
    "pairs.jsonl", "descriptions.jsonl", "results/scienceqa-stage2-direct.jsonl",
    "results/scienceqa-stage2-dar.jsonl", "results/scienceqa-stage2-dar.scores.json"])
def test_two_nodes_write_the_same_file(runs, file):
    one, two = ((folder / file).read_text(encoding="utf-8") for folder in (runs.one, runs.two))
    if file != "pairs.jsonl":  # except the hash of the adapter, which differs in the last bits on two ranks
        one, two = (re.sub(r'"fingerprint": "[0-9a-f]{12}"', "", text) for text in (one, two))
    assert one == two and one
    assert not [*runs.two.rglob("*.part*"), *runs.two.rglob("*.lock")]


# ---------------------------------------------------------------- separate disks

NOT_SHARED = "--out must be on a disk that all nodes share: rank 1 does not see what rank 0 writes next to "


@pytest.fixture(scope="module")
def apart(runs, tiny):
    """The errors of two nodes in separate folders, by command, and the exit status of the last command."""
    folders = [runs.folder / name for name in ("node0", "node1")]
    for folder in folders:
        folder.mkdir()
    (folders[1] / "pairs.jsonl.lock").write_text("of an earlier run", encoding="utf-8")
    stages = chain("llava-v1.6-tiny", tiny, runs.one)
    commands = {
        "late": [*stages["pairs"], "--out", "late.jsonl"],
        "stage1": [*stages["stage1"], "--out", "stage1"],
        "dar": [*stages["dar"], "--out", "results"],
        "other": [*stages["pairs"], "--out", runs.folder / "other.jsonl"],
        "pairs": [*stages["pairs"], "--out", "pairs.jsonl"],
    }
    ended = two_nodes(Path(__file__).resolve(), json.dumps(commands, default=str), folders=folders)
    assert all(status for status, _ in ended), ended
    said = [dict(re.findall(r"^said (\w+): (.*)$", text, flags=re.M)) for _, text in ended]
    return SimpleNamespace(folders=folders, said=said, ended=ended)


@pytest.mark.parametrize("name, out", [
    ("stage1", "stage1"), ("dar", "results/scienceqa-stage2-dar.descriptions.jsonl")])
def test_separate_disks_are_detected_at_the_start(apart, name, out):
    error = f"{NOT_SHARED}{out}"
    assert [said[name] for said in apart.said] == [error, error]


def test_every_node_exits_with_that_error(apart):
    for _, text in apart.ended:
        assert text.count(f"error: {NOT_SHARED}pairs") == 1
        assert "Traceback" not in text[: text.find("torch/distributed/elastic")]
    assert not [*apart.folders[0].glob("pairs.jsonl*")][1:]  # nothing but the lock


def test_nodes_with_different_input_are_detected_at_the_start(apart):
    error = "rank 1 has seed 1, but rank 0 has 0: all nodes must run the same command on the same input"
    assert [said["other"] for said in apart.said] == [error, error]


def test_completed_records_on_separate_disks_are_not_lost(apart, runs, tmp_path):
    """The disk is shared at the start, but not at the end."""
    for said in apart.said:
        assert said["late"].startswith("rank 1 wrote 4 records, but late.jsonl.part1 has 0: --out must be")
    for rank, folder in enumerate(apart.folders):
        assert len(lines(folder / f"late.jsonl.part{rank}")) == 4 and not (folder / "late.jsonl").exists()
        shutil.copy(folder / f"late.jsonl.part{rank}", tmp_path)
    assert "8 of them already in" in call(*runs.pairs, "--out", tmp_path / "late.jsonl")
    assert (tmp_path / "late.jsonl").read_bytes() == (runs.one / "pairs.jsonl").read_bytes()


if __name__ == "__main__":
    files.wait_until.__defaults__ = (1,)
    for name, command in json.loads(sys.argv[1]).items():
        if name == "pairs":
            process.run(lambda: call(*command))
        if name == "other":
            command += ["--seed", os.environ["RANK"]]
        unseen = mock.patch.object(Ranks, "check_shared") if name == "late" else mock.MagicMock()
        with unseen:
            try:
                call(*command)
            except InputError as error:
                print(f"said {name}: {error}", flush=True)
