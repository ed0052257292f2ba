"""Several nodes: two torchrun agents on this machine, a rank each, as `torchrun --nnodes=2` starts them.

With one folder for both, all commands give what one process gives. In folders of their own, as on nodes that share no
disk, every command says so and ends, at its start or when it is done, and nothing that was finished is lost.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import commands
import pytest
from chain import STEPS, assert_same_training, chain
from commands import ENV, ROOT, call, free_port, lines

from stic_min import InputError
from stic_min.runtime import files, process
from stic_min.runtime.ranks import Ranks


def two_nodes(*command, folders=(ROOT, ROOT)):
    """README.md's command for two nodes, each in its folder -> [(exit status, what it said), ...]."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=tests",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]  # fmt: skip
    how = {"env": ENV, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    nodes = [subprocess.Popen([*torchrun, *map(str, command)], cwd=folder, **how) for folder in folders]
    try:
        said = [node.communicate(timeout=200)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, text) for node, text in zip(nodes, said)]


# ---------------------------------------------------------------- a disk that they share


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """All commands: of one process in `one`, of two nodes in `two`."""
    folder = tmp_path_factory.mktemp("nodes")
    one, two = (chain("llava-v1.6-tiny", tiny, folder / name) for name in ("one", "two"))
    for command in one.values():
        call(*command)
    ended = two_nodes(commands.__file__, json.dumps(list(two.values()), default=str))
    assert [status for status, _ in ended] == [0, 0], ended
    return SimpleNamespace(one=folder / "one", two=folder / "two", pairs=one["pairs"], folder=folder)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_nodes_train_the_same(runs, stage):
    assert_same_training(runs.one / stage, runs.two / stage)
    assert len(lines(runs.two / stage / "log.jsonl")) == STEPS
    assert json.loads((runs.two / stage / "run.json").read_text(encoding="utf-8"))["record"]["ranks"] == 2


@pytest.mark.parametrize("file", ["pairs.jsonl", "descriptions.jsonl", "results/scienceqa-stage2-direct.jsonl",
                                  "results/scienceqa-stage2-dar.jsonl", "results/scienceqa-stage2-dar.scores.json"])
def test_two_nodes_write_the_same_file(runs, file):
    one, two = ((folder / file).read_text(encoding="utf-8") for folder in (runs.one, runs.two))
    if file != "pairs.jsonl":  # all but the hash of the adapter, which on two ranks differs in the last bits
        one, two = (re.sub(r'"fingerprint": "[0-9a-f]{12}"', "", text) for text in (one, two))
    assert one == two and one
    assert not [*runs.two.rglob("*.part*"), *runs.two.rglob("*.lock")]


# ---------------------------------------------------------------- disks of their own


@pytest.fixture(scope="module")
def apart(runs, tiny):
    """What two nodes in folders of their own said, command by command, and with which status the last one ended."""
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
def test_a_disk_that_is_not_shared_is_found_at_the_start(apart, name, out):
    says = f"--out must be on a disk that all nodes share: rank 1 does not see what rank 0 writes next to {out}"
    assert [said[name] for said in apart.said] == [says, says]


def test_every_node_ends_with_that_line_and_an_error(apart):
    says = "error: --out must be on a disk that all nodes share: rank 1 does not see what rank 0 writes next to pairs"
    for _, text in apart.ended:
        assert text.count(says) == 1 and "Traceback" not in text[: text.find("torch/distributed/elastic")]
    assert not [*apart.folders[0].glob("pairs.jsonl*")][1:]  # nothing but the lock


def test_nodes_with_other_input_are_found_at_the_start(apart):
    says = "rank 1 has seed 1, but rank 0 has 0: all nodes must run the same command on the same input"
    assert [said["other"] for said in apart.said] == [says, says]


def test_what_was_finished_on_separate_disks_is_not_lost(apart, runs, tmp_path):
    """The disk was shared at the start; at the end it is not."""
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
