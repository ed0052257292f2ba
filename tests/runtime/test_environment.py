"""The environment of a run: leftover variables, a locale without Unicode, failing disks and machines, other
operating systems. Each problem is reported in one line, and run.json records the environment."""

import errno
import json
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from chain import stop_after
from commands import ENV, ROOT, call, ended, free_port

from stic_min import InputError, checkpoint
from stic_min.runtime import console, process, provenance
from stic_min.runtime.ranks import gpu_index, place, start_device, start_ranks

LAUNCHER = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def python(*args, env=None, **how):
    how = {"cwd": ROOT, "env": ENV | (env or {}), "capture_output": True, "text": True, "timeout": 100} | how
    return subprocess.run([sys.executable, *map(str, args)], **how)


def outcome(main, capsys):
    """Runs a function like a script -> (exit status, the last line on stderr)."""
    status = 0
    try:
        process.run(main)
    except SystemExit as end:
        status = end.code
    return status, (capsys.readouterr().err.splitlines() or [""])[-1]


def fails(error):
    def main():
        raise error

    return main


# ---------------------------------------------------------------- the launcher's variables


def launched(monkeypatch, *values):
    for name, value in zip(LAUNCHER, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("values, expected", [
    ((None, None, None, None), (0, 1)), ((None, None, "host", "29500"), (0, 1)),
    (("0", "1", None, None), (0, 1)),
    (("0", None, None, None), (0, 1)), ((None, "1", None, None), (0, 1)),
    (("3", "8", "host", "29500"), (3, 8))])
def test_rank_and_world(monkeypatch, values, expected):
    launched(monkeypatch, *values)
    assert place() == expected


LEFT_OVER = [
    ("1", None, None, None), (None, "2", None, None), ("", None, None, None), ("0", "2", "host", None),
    ("one", "2", "host", "29500"), ("2", "2", "host", "29500"), ("-1", "2", "host", "29500"),
    ("0", "", None, None),
    (None, "2", "host", "29500"), ("0", "2", "", "29500"), ("0", "2", "host", "a port"),
]  # fmt: skip


@pytest.mark.parametrize("values", LEFT_OVER)
def test_leftover_variables_are_an_error(monkeypatch, values):
    launched(monkeypatch, *values)
    with pytest.raises(InputError, match="was not started by torchrun: unset them, or use torchrun") as error:
        place()
    for name, value in zip(LAUNCHER, values):
        assert (f"no {name}" if value is None else f"{name}={value}") in str(error.value)


@pytest.mark.parametrize("command", [
    "evaluate table .", "evaluate score scienceqa --answers a --data d", "evaluate ask What? --model m",
    "evaluate scienceqa --model m --data d --out o", "stic_min.merge --model m --adapter a --out o",
    "generate_pairs --model m --images i --out o", "train_stage1 --model m --pairs p --images i --out o",
    "train_stage2 --model m --instructions i --descriptions d --images i --out o", "stic_min.toy.__main__"])
def test_no_command_mistakes_itself_for_one_of_many(monkeypatch, tmp_path, command):
    """merge, score, table and ask run on the first rank only: with a leftover RANK=1 they used to do nothing
    and exit with status 0."""
    launched(monkeypatch, "1", None, None, None)
    monkeypatch.setattr(process.time, "sleep", lambda seconds: None)  # before a second rank reports an error
    monkeypatch.chdir(tmp_path)
    status, said = ended(*command.split())
    assert status == 1 and said.startswith("error: RANK and WORLD_SIZE are set, but this process was not")
    assert not list(tmp_path.iterdir())


def test_which_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched(monkeypatch, "6", "8", "host", "29500")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert gpu_index() == 2  # mpirun: the third GPU of the second node
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert gpu_index() == 3
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(InputError, match="LOCAL_RANK=x is not the index of a GPU"):
        gpu_index()


def test_an_unusable_gpu_is_reported(monkeypatch, capsys):
    def too_old():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert start_device() == torch.device("cpu")
    said = capsys.readouterr().err
    reason = "CUDA initialization: The NVIDIA driver on your system is too old"
    assert said == f"warning: no GPU is used: {reason}\n"


@pytest.mark.parametrize("rank, taken", [("0", False), ("1", False), ("0", True)])
def test_ranks_that_do_not_find_each_other(monkeypatch, rank, taken, capfd):
    import socket

    port = free_port()
    launched(monkeypatch, rank, "2", "127.0.0.1", f"{port}")
    monkeypatch.setattr("stic_min.runtime.ranks.JOINING", timedelta(seconds=1))
    with socket.socket() as other:
        if taken:
            other.bind(("", port))
            other.listen()
        message = f"rank {rank} of 2 can't join the others at 127.0.0.1:{port}: "
        with pytest.raises(InputError, match=message) as error:
            start_ranks("cpu")
    assert ("EADDRINUSE" in str(error.value)) is taken and not dist.is_initialized()


# ---------------------------------------------------------------- error messages


@pytest.mark.parametrize("error, says", [
    (InputError("a.jsonl, line 2: no image"), "error: a.jsonl, line 2: no image"),
    (InputError("two\nlines, and a \x1b[31m color"), r"error: two\nlines, and a \x1b[31m color"),
    (FileNotFoundError(2, "No such file or directory", "a"), "error: a: No such file or directory"),
    (OSError(errno.ENOSPC, "No space left on device"), "error: writing: No space left on device"),
    (OSError(errno.EIO, "Input/output error"), "error: reading or writing: Input/output error"),
    (OSError(errno.ESTALE, "Stale file handle"), "error: reading or writing: Stale file handle"),
    (RuntimeError("can't start new thread"),
     "error: can't start a thread: the limit on processes (ulimit -u)"),
    (MemoryError(), "error: out of memory (main memory). Training: "),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 79.11 GiB"),
     "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB). Training: "),
    (dist.DistBackendError("NCCL error in: a.cpp:3690\nLast error:\nDuplicate GPU detected : rank 1"),
     "error: the ranks can't reach each other: Duplicate GPU detected : rank 1"),
    (UnicodeEncodeError("utf-8", "x" * 999 + "\udce9.jpg", 999, 1000, "surrogates not allowed"),
     f"error: '{'x' * 40}\\udce9.jpg' can't be written in utf-8: rename the file or folder"),
    (UnicodeEncodeError("ascii", "caf\xe9", 3, 4, "ordinal not in range(128)"),
     "error: 'caf\\xe9' can't be written in ascii: set PYTHONUTF8=1")])  # fmt: skip
def test_errors_caused_by_user_or_machine_are_one_line(monkeypatch, capsys, error, says):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    status, said = outcome(fails(error), capsys)
    assert status == 1 and said.startswith(says) and len(said) <= 300


@pytest.mark.parametrize("error", [ValueError("a"), KeyError("a"),
                                   OSError(errno.EBADF, "Bad file descriptor"),
                                   RuntimeError("CUDA error: device-side assert"), RecursionError(),
                                   OSError("a")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(type(error)):
        process.run(fails(error))


def test_no_message_is_long(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    _, said = outcome(fails(InputError(f"{'n' * 10**6}.jpg: can't\nread it")), capsys)
    assert said.startswith("error: nnn") and said.endswith(r"n.jpg: can't\nread it")
    assert 290 < len(said) <= 300
    console.warn("skipped: " + "\n" * 10**6 + "end")
    said = capsys.readouterr().err
    assert said.startswith("warning: skipped: ") and said.endswith("end\n") and len(said) <= 301
    for name in ("0" * 299, "0" * 300, "0" * 301):
        assert len(console.one_line(name)) == min(len(name), 299 if len(name) > 300 else 300)


# ---------------------------------------------------------------- locale, streams, other systems


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}


def test_a_locale_without_unicode(tiny, tmp_path):
    """Files are read and written in UTF-8 in any locale; file names that it can't represent are skipped."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "caf\xe9.jpg"):
        (images / name).write_bytes((tiny / "images" / "scene_01.jpg").read_bytes())
    script = tmp_path / "all.py"
    benchmark = ["scienceqa", "--data", str(tiny / "scienceqa"), "--dar"]
    model = ["--model", str(tiny / "llava-v1.6-tiny"), "--device", "cpu"]
    data, few = ["--images", str(images)], ["--max-new-tokens", "8"]
    describe = ["--describe", "i.json", "--adapter", "stage1"]
    train = [*model, *data, "--lora-r", "2"]
    talk = [{"from": "human", "value": "<image>\nQu\xe9?"}, {"from": "gpt", "value": "\xc9t\xe9."}]
    records = [{"id": "\xfc", "image": "a.jpg", "conversations": talk}]
    (tmp_path / "i.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    commands = [
        ["generate_pairs", *model, *data, *few, "--out", "pairs.jsonl"],
        ["train_stage1", *train, "--pairs", "pairs.jsonl", "--out", "stage1"],
        ["generate_pairs", *model, *data, *few, *describe, "--out", "d.jsonl"],
        ["train_stage2", *train, "--instructions", "i.json", "--descriptions", "d.jsonl", "--out", "stage2"],
        ["evaluate", *benchmark, *model, *few, "--out", "results"],
        ["evaluate", "table", "results"],
        ["stic_min.merge", *model[:2], "--adapter", "stage2", "--out", "merged"],
    ]
    script.write_text(f"""
import importlib, sys
from stic_min.runtime import process
def main():
    for name, *args in {commands!r}:
        sys.argv = [name, *args]
        importlib.import_module(name).main()
process.run(main)
""")
    done = python(script, env=ASCII, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: this locale encodes file names in ascii: if some of yours differ, set " in done.stderr
    assert r"skipped: image name 'caf\udcc3\udca9.jpg' is not valid Unicode" in done.stderr
    assert (tmp_path / "merged" / "config.json").is_file() and (tmp_path / "results" / "tables.md").is_file()


def test_arguments_that_are_not_text():
    status, said = ended("evaluate", "ask", b"caf\xe9".decode(errors="surrogateescape"), "--model", "m")
    assert (status, said) == (1, "error: the command line: 'caf\\udce9' is not valid Unicode")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream(monkeypatch, stream):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(sys, stream, None)  # as by >&-
    process.run(lambda: [print(1), console.warn("w")])


def test_a_closed_terminal(monkeypatch):
    """A run continues without it."""
    gone = mock.Mock()
    gone.write.side_effect = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(sys, "stdout", gone)
    console.print_line("a")
    console.print_line("b")
    assert sys.stdout is not gone


def test_windows_is_not_supported():
    code = "import sys; sys.modules['fcntl'] = None; import stic_min.runtime.process"
    done = python("-c", code)
    says = "error: stic_min needs Linux or macOS (Python's fcntl); on Windows use WSL\n"
    assert (done.returncode, done.stderr) == (1, says)


def test_memory_is_in_gigabytes_on_every_system(monkeypatch):
    used = {"linux": 3_000_000, "darwin": 3_000_000_000}  # KB, bytes
    for system, maximum in used.items():
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(provenance.resource, "getrusage", lambda _, m=maximum: mock.Mock(ru_maxrss=m))
        assert provenance.peak_memory_gb(torch.device("cpu")) == 3.0


def test_folders_that_cannot_be_synced(monkeypatch, tmp_path):
    for number, raised in ((errno.EINVAL, False), (errno.EIO, True)):
        monkeypatch.setattr(checkpoint.os, "fsync", mock.Mock(side_effect=OSError(number, "no")))
        if raised:
            with pytest.raises(OSError):
                checkpoint.sync(tmp_path)
        else:
            checkpoint.sync(tmp_path)


# ---------------------------------------------------------------- run.json


def run_json(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_run_json_records_the_environment(stage1, tmp_path):
    call(*stage1.command, "--batch-size", 20, "--out", tmp_path)
    saved = run_json(tmp_path)["record"]
    assert saved["command"].startswith("train_stage1 --model ")
    assert saved["command"].endswith(f"--out {tmp_path}")
    assert saved["model"] == str(stage1.command[2]) and (saved["ranks"], saved["nodes"]) == (1, 1)
    assert saved["hardware"].startswith("1 x ")
    assert saved["hardware"].endswith(f" cpu, threads: {torch.get_num_threads()}")
    assert saved["versions"]["torch"] == torch.__version__.split("+")[0] and set(saved["versions"]) == {
        "python", *provenance.PACKAGES}  # fmt: skip
    assert 0 < saved["wall_seconds"] < 100 and 0.05 < saved["peak_memory_gb"] < 20
    assert abs(time.mktime(time.strptime(saved["start"][:19], "%Y-%m-%d %H:%M:%S")) - time.time()) < 100


def test_wall_time_adds_up_when_a_run_is_resumed(stage1, tmp_path):
    command = [*stage1.command[:-1], 2, "--batch-size", 4, "--out", tmp_path]
    with stop_after(5), pytest.raises(SystemExit):
        call(*command)
    saved = run_json(tmp_path / "checkpoint-4")
    earlier = {"start": "2001-02-03 04:05:06 +0000", "wall_seconds": 5000.0}
    earlier |= {"peak_memory_gb": 99.0, "nodes": 7}
    saved["record"] |= earlier
    (tmp_path / "checkpoint-4" / "run.json").write_text(json.dumps(saved))
    assert "resuming after step 4" in call(*command)
    now = run_json(tmp_path)["record"]
    assert 5000 < now["wall_seconds"] < 5100 and now["peak_memory_gb"] == 99 and now["nodes"] == 1
    assert now["start"] == earlier["start"]


@pytest.mark.parametrize("damage", [
    {}, {"record": None}, {"record": {"wall_seconds": "long"}}, {"record": [1]}])
def test_a_checkpoint_without_a_record_can_be_resumed(stage1, tmp_path, damage):
    command = [*stage1.command[:-1], 2, "--batch-size", 4, "--out", tmp_path]
    with stop_after(3), pytest.raises(SystemExit):
        call(*command)
    saved = run_json(tmp_path / "checkpoint-2")
    del saved["record"]
    (tmp_path / "checkpoint-2" / "run.json").write_text(json.dumps(saved | damage))
    assert "resuming after step 2" in call(*command)
    assert run_json(tmp_path)["record"]["wall_seconds"] < 100


def test_the_commit(monkeypatch, tmp_path):
    def git(*args):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = Path(provenance.__file__).relative_to(ROOT)
    code = tmp_path / file
    code.parent.mkdir(parents=True)
    code.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert provenance.commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "HEAD")
    assert provenance.commit() == commit
    code.write_text("changed")
    assert provenance.commit() == f"{commit}-dirty"
    installed = tmp_path / "env" / file  # in another repository
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.commit() is None
    monkeypatch.setattr(provenance, "__file__", str(code))
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None
