"""SIGTERM and Ctrl-C at any moment of a command: at every step of the code that handles them, and in bursts.

Run as a script, this file is the process that receives the signals. It forks a child for each burst, because
importing torch takes seconds.
"""

import gc
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from stic_min import InputError
from stic_min.runtime import console, process

ROOT = Path(__file__).resolve().parents[2]
STOPPED, KEPT = (
    "stopped after step 3; run the same command to resume",
    "stopped; completed output is kept",
)
WRONG = "error: sample 7 is off"


def run(what):
    """Runs this file as a script; returns the lines that it prints."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # threads would not survive a fork
    done = subprocess.run(
        [sys.executable, __file__, what], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_signal_at_every_step_of_the_handling():
    assert [int(line.split()[1]) > 100 for line in run("every")] == [True] * 5


def test_bursts_of_signals():
    assert run("bursts") == ["18 bursts"]


# ---------------------------------------------------------------- commands


def sleeps():
    time.sleep(60)


def stops():
    """Sends the first signal; the next one arrives while this one is handled."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def ends():
    time.sleep(0.001)


def fails():
    raise InputError("sample 7 is off")


def trains():
    """Stops like training.Run."""
    with process.Stop() as stop:
        for _ in range(20):
            time.sleep(0.0005)
            if stop.signal:
                print(STOPPED)
                raise KeyboardInterrupt(STOPPED)


def prints():
    for i in range(4):
        console.print_line(f"step {i}")


def finalizes():
    """Python discards what a finalizer raises, and would lose the signal with it."""

    class Slow:
        def __del__(self):
            for _ in range(1000):
                pass

    end = time.monotonic() + 60
    while time.monotonic() < end:
        Slow()
        time.sleep(0.0001)


def check(command, status, out, err):
    """Checks that a command ended in one of the allowed ways, whenever the signal arrived."""
    lines = err.splitlines()
    if STOPPED in out:
        assert (status, lines) == (130, [STOPPED])
    elif status == 130:
        assert lines[-1] == KEPT and lines[:-1] in ([], [WRONG])
    elif status == 1:
        assert command is fails and lines == [WRONG]
    else:
        assert status == 0 and command in (ends, trains, prints) and not lines


# ---------------------------------------------------------------- the process that receives the signals


class Stream(io.StringIO):
    """Sends another signal whenever an interrupted command prints."""

    def reconfigure(self, **how):
        pass

    def write(self, text):
        if not process.interrupt.armed:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def send_signal(command, moment):
    """Runs the command and sends a signal before instruction `moment` of process.py; returns whether it got
    that far."""
    counted, status = 0, 0

    def trace(frame, event, _):
        nonlocal counted
        if frame.f_code.co_filename == process.__file__:
            frame.f_trace_opcodes = True
            counted += event == "opcode"
            if event == "opcode" and counted == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return trace

    process.interrupt.armed = False
    process.on_signals(process.interrupt)  # until `run` does: the default handler would end this process
    with mock.patch.object(sys, "stdout", Stream()) as out, mock.patch.object(sys, "stderr", Stream()) as err:
        sys.settrace(trace)
        try:
            process.run(command)
        except SystemExit as end:
            status = end.code
        finally:
            sys.settrace(None)
    check(command, status, out.getvalue(), err.getvalue())
    return counted >= moment


def every():
    for command in stops, ends, fails, trains, prints:
        moment = 1
        while send_signal(command, moment):
            moment += 1
        print(command.__name__, moment, "moments")


def bursts():
    """Bursts of twenty signals within a few milliseconds."""
    rng, commands = random.Random(0), [sleeps, ends, fails, trains, prints, finalizes] * 3
    gc.collect()
    gc.freeze()  # otherwise a child would traverse all of torch's objects at exit
    for command in commands:
        ready, out, err = os.pipe(), os.pipe(), os.pipe()
        if not (child := os.fork()):
            os.dup2(out[1], 1)
            os.dup2(err[1], 2)
            process.run(lambda: [os.write(ready[1], b"."), command()])
            sys.exit()
        for _, end in (ready, out, err):
            os.close(end)
        os.read(ready[0], 1)
        time.sleep(rng.uniform(0, 0.003))
        for _ in range(20):
            os.kill(child, rng.choice(process.SIGNALS))
            time.sleep(rng.uniform(0, 0.0003))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        check(command, status, *(os.read(end, 1 << 16).decode() for end, _ in (out, err)))
        for end, _ in (ready, out, err):
            os.close(end)
    print(len(commands), "bursts")


if __name__ == "__main__":
    {"every": every, "bursts": bursts}[sys.argv[1]]()
