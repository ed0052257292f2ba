"""Output: records appended by one or several ranks, killed and resumed."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from stic_min import InputError
from stic_min.runtime import files
from stic_min.runtime import output as output_module
from stic_min.runtime.output import Output
from stic_min.runtime.work import subset

names = lambda path: [record["image"] for _, record in files.read_records(path)]


def test_a_larger_subset_contains_the_smaller():
    items = [f"{i:03}" for i in range(100)]
    chosen = subset(items, 10, seed=1)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) and set(chosen) <= set(subset(items, 20, seed=1))
    assert chosen == subset(items, 10, seed=1) != subset(items, 10, seed=2)
    assert subset(items, None, 1) == subset(items, 100, 1) == subset(items, 101, 1) == items


files_in = lambda folder: sorted(path.name for path in folder.iterdir())
RUNNING = []


def output(path, rank=0, world=1, **settings):
    """The Output of one of several ranks, which here run one after another."""
    gather = lambda value: [o.appended for o in RUNNING] if isinstance(value, int) else [value]
    ranks = SimpleNamespace(rank=rank, world=world, first=rank == 0, barrier=lambda: None, gather=gather,
                            check_shared=lambda *_: None, device=torch.device("cpu"), begin=time.time())  # fmt: skip
    if rank == 0:
        for earlier in RUNNING[:1]:  # its process was killed
            earlier.lock.close()
        RUNNING.clear()
    started = Output(path, "image", {"model": "M", "seed": 0} | settings, ranks).start()
    RUNNING.append(started)
    return started


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "runs" / "out.jsonl"
    first = output(path)
    for name in ("é", "c"):
        first.append({"image": name})
        assert names(path)[-1] == name and name in first.done  # on disk at once
    whole = path.read_bytes()
    for cut in range(1, whole.index(b"\n")):  # a line cut off anywhere, even within a character
        path.write_bytes(whole + whole[:cut])
        again = output(path)
        assert list(again.done) == ["é", "c"] and path.read_bytes() == whole
    again.append({"image": "a"})
    assert again.finish(["a", "b", "c"]) == [{"image": name, "model": "M", "seed": 0} for name in "ac"]
    assert names(path) == ["a", "c", "é"]  # in the order of the keys, then others


def test_a_part_file_without_a_complete_line_is_dropped(tmp_path):
    (tmp_path / "out.jsonl.part0").write_text('{"image": "a"')
    (tmp_path / "out.jsonl.partial").write_text("not ours")
    two = [output(tmp_path / "out.jsonl", rank, 2) for rank in range(2)]
    two[0].append({"image": "a"})
    assert [r["image"] for r in two[0].finish("a")] == ["a"]
    assert files_in(tmp_path) == ["out.jsonl", "out.jsonl.partial", "out.run.json"]


def test_the_parts_of_several_ranks_are_merged(tmp_path):
    path = tmp_path / "out.jsonl"
    three = [output(path, rank, 3) for rank in range(3)]
    for rank, name in ((1, "c"), (0, "d"), (1, "a"), (0, "b")):
        three[rank].append({"image": name})
    with open(tmp_path / "out.jsonl.part1", "a") as file:
        file.write('{"image": "z", "mod')  # killed while writing
    two = [output(path, rank, 2) for rank in range(2)]  # started again with fewer ranks
    assert [set(o.done) for o in two] == [set("abcd")] * 2
    two[1].append({"image": "e"})
    assert two[1].finish("abcdef") == [] and [r["image"] for r in two[0].finish("abcdef")] == list("abcde")
    assert names(path) == list("abcde") and files_in(tmp_path) == ["out.jsonl", "out.run.json"]


def test_a_part_that_another_rank_does_not_see_is_kept(tmp_path, monkeypatch):
    """As on nodes that do not share a disk."""
    monkeypatch.setattr(output_module, "wait_until", lambda true: true())
    path, elsewhere = tmp_path / "out.jsonl", tmp_path / "elsewhere"
    two = [output(path, rank, 2) for rank in range(2)]
    two[0].append({"image": "a"})
    two[1].append({"image": "b"})
    two[1].file.rename(elsewhere)
    with pytest.raises(InputError, match="rank 1 wrote 1 records, but .*part1 has 0: --out must be on a"):
        two[0].finish("ab")
    assert (tmp_path / "out.jsonl.part0").is_file() and not path.exists()
    elsewhere.rename(two[1].file)
    assert [r["image"] for r in output(path).finish("ab")] == ["a", "b"]


def test_output_of_a_running_command_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    first = output(path)
    first.append({"image": "a"})
    second = Output(path, "image", first.settings, first.ranks)
    with pytest.raises(InputError, match=f"another run is writing to {path}"):
        second.start()
    first.append({"image": "b"})
    assert [r["image"] for r in first.finish("ab")] == ["a", "b"]
    assert files_in(tmp_path) == ["out.jsonl", "out.run.json"]
    assert list(second.start().done) == ["a", "b"]


def test_output_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    output(path, 1, 2).append({"image": "a"})  # in a part file
    with pytest.raises(InputError, match="part1 was written with seed 0, but this run has 1"):
        output(path, seed=1)
    assert output(path).finish("a")
    with pytest.raises(InputError, match=f"{path} was written with model 'M', but this run has 'N'"):
        output(path, model="N")
    assert names(path) == ["a"]
    path.write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=f"{path}, line 1: not a line written by this command"):
        output(path)


def test_a_file_that_can_not_be_written_is_not_called_a_folder(tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").touch()
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    for path in (tmp_path / "out.jsonl", tmp_path):
        with pytest.raises(InputError, match=f"can't write to {path}: {path} is not writable"):
            files.check_place(path)


# ---------------------------------------------------------------- NAME.run.json


def record(path):
    [(name, value)] = json.loads(path.with_suffix(".run.json").read_text(encoding="utf-8")).items()
    assert name == "record"
    return value


def test_an_output_file_has_a_record_from_its_start_on(tmp_path):
    path = tmp_path / "out.jsonl"
    first = output(path)
    start = record(path)
    assert not start["finished"] and "requested" not in start and start["model"] == "M" and start["parts"] == 1
    first.append({"image": "a"})
    first.finish("ab")
    end = record(path)
    assert end["finished"] and (end["requested"], end["skipped"], end["parts"]) == (2, 1, 1)
    assert end["peak_memory_gb"] > 0 and end["wall_seconds"] >= 0 and {**end, **start}.keys() == end.keys()


def test_wall_time_adds_up_over_the_parts(tmp_path):
    path = tmp_path / "out.jsonl"
    output(path).append({"image": "a"})  # interrupted
    earlier = record(path) | {"wall_seconds": 5000.0, "start": "2001-02-03 04:05:06 +0000", "hardware": "a slide rule"}
    path.with_suffix(".run.json").write_text(json.dumps({"record": earlier}))
    second = output(path)
    second.append({"image": "b"})
    second.finish("ab")
    now = record(path)
    assert 5000 <= now["wall_seconds"] < 5100 and now["parts"] == 2 and now["start"] == earlier["start"]
    assert now["hardware"] != earlier["hardware"] and (now["requested"], now["skipped"]) == (2, 0)


def test_a_run_that_adds_nothing_leaves_the_record_of_those_that_did(tmp_path):
    path = tmp_path / "out.jsonl"
    first = output(path)
    first.append({"image": "a"})
    first.finish("a")
    before = record(path) | {"command": "earlier"}
    path.with_suffix(".run.json").write_text(json.dumps({"record": before}))
    output(path).finish("a")
    assert record(path) == before
    path.with_suffix(".run.json").unlink()  # as of an earlier version: nobody knows how it was made
    output(path).finish("a")
    assert record(path) == {"finished": True, "requested": 1, "skipped": 0}


def test_outputs_do_not_share_a_record(tmp_path):
    for name in ("pairs-0.4", "pairs-0.7", "pairs.json", "a.b.jsonl"):
        output(tmp_path / name).finish("")
    names = {path.name for path in tmp_path.glob("*.run.json")}
    assert names == {"pairs-0.4.run.json", "pairs-0.7.run.json", "pairs.json.run.json", "a.b.run.json"}


@pytest.mark.parametrize("content", ['{"image": "a.png"}\n', "{", "", '{"image": "a.png"}\n{"image": "b.png"}\n'])
def test_no_other_file_is_replaced_by_a_record(tmp_path, content):
    (tmp_path / "out.run.json").write_text(content)
    with pytest.raises(InputError, match="out.run.json"):
        output(tmp_path / "out.jsonl")
    assert (tmp_path / "out.run.json").read_text() == content


@pytest.mark.parametrize("damage", [{"parts": float("nan"), "wall_seconds": float("inf")}, {"wall_seconds": 10**400},
                                    {"peak_memory_gb": "much", "parts": [1]}])  # fmt: skip
def test_a_damaged_record_does_not_fail_the_run(tmp_path, damage):
    (tmp_path / "out.run.json").write_text(json.dumps({"record": damage}))
    output(tmp_path / "out.jsonl").finish("")
    assert record(tmp_path / "out.jsonl")["finished"]


KEY = "a 'secret'"


@pytest.mark.parametrize("flag", [["--judge-key", KEY], [f"--judge-key={KEY}"], ["--judge-k", KEY],
                                  ["--judge-url", "https://me:a secret@host/v1"]])  # fmt: skip
def test_the_recorded_command_does_not_contain_the_api_key(tmp_path, monkeypatch, flag):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "mmvet", *flag, "--judge-model", "a model"])
    output(tmp_path / "out.jsonl")
    command = record(tmp_path / "out.jsonl")["command"]
    assert "secret" not in command and command.endswith("--judge-model 'a model'") and "***" in command
