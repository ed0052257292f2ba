"""Scripts in processes forked from one that has imported torch, which saves each of them four seconds of imports.

Otherwise each is what `python script.py ...` starts: a process in a session of its own, with default signal handlers,
in which the script runs as __main__.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["torch._dynamo", "torch.distributed.launcher.api", "train_stage1", "train_stage2", "generate_pairs"]


def run_script(argv, outputs, folder, env, code):
    """In the child."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = argv
    exec("\n".join(code), {})
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


class Forked:
    """A running script, with the methods of subprocess.Popen that the tests need.

    argv: a file or module, and its arguments. code: lines of Python to execute before it. stdout, stderr: existing
    files or named pipes, instead of temporary files.
    """

    def __init__(self, argv, folder, env, code=(), stdout=None, stderr=None):
        with mock.patch.dict(os.environ, env):  # Python 3.11 gives the server no other search path
            CONTEXT.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()
        self.files = [tempfile.NamedTemporaryFile(prefix="stic-") for _ in range(2)]
        outputs = [stdout or self.files[0].name, stderr or self.files[1].name]
        self.process = CONTEXT.Process(
            target=run_script, args=([*map(str, argv)], [*map(str, outputs)], str(folder), dict(env), list(code)))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    poll = lambda self: self.returncode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Waits for its end -> (stdout, stderr)."""
        self.wait(timeout)
        return tuple(Path(file.name).read_text(errors="replace") for file in self.files)

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)
