"""The drill of tests/runtime/drill.py in small: one kill a command, and a little generation. Real ones are longer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds processes and open files in /proc")


def drill(*args):
    done = subprocess.run([sys.executable, "tests/runtime/drill.py", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_killed_commands_end_as_if_nothing_had_been():
    said = drill("--kills", "5", "--copies", "2")
    assert len(re.findall(r"^\w+ +1 .* equal$", said, re.M)) == 5 and "WRONG" not in said


def test_memory_and_open_files_stay_what_they_were():
    said = drill("--images", "120")
    handles = [int(line.split()[-1]) for line in said.splitlines() if re.fullmatch(r" +\d+ +[\d.]+ +\d+", line)]
    assert len(handles) == 6 and len(set(handles[1:])) == 1
