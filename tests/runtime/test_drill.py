"""The drill of drill.py in small: one kill per command, and a little generation. Real ones are longer."""

import re
from pathlib import Path

import pytest
from commands import run_script

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="it reads /proc")


def test_killed_commands_end_as_if_undisturbed():
    printed = run_script("tests/runtime/drill", "--kills", 5, "--copies", 2)
    assert len(re.findall(r"^\w+ +1 .* equal$", printed, re.M)) == 5 and "WRONG" not in printed


def test_memory_and_open_files_stay_constant():
    printed = run_script("tests/runtime/drill", "--images", 120)
    rows = [line for line in printed.splitlines() if re.fullmatch(r" +\d+ +[\d.]+ +\d+", line)]
    handles = [int(row.split()[-1]) for row in rows]
    assert len(handles) == 6 and len(set(handles[1:])) == 1
