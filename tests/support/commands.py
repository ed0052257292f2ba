"""Runs the commands as a user does: in processes of their own, on several ranks, or in this process.

Importing torch and our modules takes four seconds. So `start` forks its process from one that has done that
(forked.py); only `run` really starts Python. Where the process boundary is not the point, `call` runs a script's main
in this process, and `call_ranks` runs several commands in one start of all ranks, with this file as the script.
"""

import contextlib
import importlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from forked import Forked

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}


def torchrun(ranks):
    """Arguments to put after `python`; none for one rank."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []


def run(*args, check=True):
    """`python args...` from the repository's root -> the finished process."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def start(script, *args, ranks=1, env=ENV, **options):
    """A command in the background; torchrun starts its ranks if there are several -> the running process."""
    name = script if "." in script else ROOT / f"{script}.py"  # a module of the package, or a script
    return Forked([*torchrun(ranks)[1:], name, *args], ROOT, env, **options)


def run_script(script, *args):
    """A command in a process of its own -> stdout."""
    process = start(script, *args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{script} {args}\n{out}\n{err}"
    return out


def call(script, *args):
    """A script's main in this process -> stdout."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [script, *map(str, args)]), contextlib.redirect_stdout(out):
        importlib.import_module(script).main()
    return out.getvalue()


def ended(script, *args):
    """A script in this process, errors handled as in a process of its own -> (exit status, last line on stderr)."""
    from stic_min.runtime import process

    err = io.StringIO()
    err.reconfigure = lambda **options: None
    try:
        with mock.patch.object(sys, "argv", [script, *map(str, args)]), mock.patch.object(sys, "stderr", err):
            process.run(importlib.import_module(script).main)
    except SystemExit as end:
        return end.code, err.getvalue().splitlines()[-1]
    return 0, ""


def call_ranks(count, *commands, check=True):
    """Several commands, one start of all ranks -> (whether all ended well, rank 0's stdout).

    ("kill", N) instead of a command: in those after it, rank 0 dies by SIGKILL after step N. No torchrun is involved.
    """
    job = {"WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    argv = [__file__, json.dumps(commands, default=str)]
    ranks = [Forked(argv, ROOT, ENV | job | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"}) for r in range(count)]
    wait_for(lambda: all(rank.poll() == 0 for rank in ranks) or any(rank.poll() for rank in ranks), seconds=300)
    success = all(rank.poll() == 0 for rank in ranks)
    for rank in ranks:  # as torchrun does when one has failed
        rank.kill()
    outputs = [rank.communicate() for rank in ranks]
    assert success or not check, f"{commands}\n" + "\n".join(err for _, err in outputs)
    return success, outputs[0][0]


def call_two_ranks(*commands, check=True):
    return call_ranks(2, *commands, check=check)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_port():
    """Below the range that a system hands out by itself, so that it stays free until the caller takes it."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.002)


# ---------------------------------------------------------------- one of several ranks


def die_after(step):
    from stic_min import training

    def end_and_die(run, norm, end_step=training.Run.end_step):
        end_step(run, norm)
        if run.step + 1 == step and run.ranks.first:
            if run.checkpoints.writing:
                run.checkpoints.writing.result()
            os.kill(os.getpid(), signal.SIGKILL)

    training.Run.end_step = end_and_die


def main():
    import torch.distributed as dist

    for name, *rest in json.loads(sys.argv[1]):
        if name == "kill":
            die_after(*rest)
        else:
            print(call(name, *rest))
            if dist.is_initialized():
                dist.barrier()  # the next command reads what the first rank wrote
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main()
