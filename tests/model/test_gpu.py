"""The checks of gpu_checks.py, each in a process that sees the machine's GPUs; skipped if there are none."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = "graphs", "small_updates", "theta_0", "decode_attention", "sampled_logits", "commands", "neighbours"


def child(*args):
    """A Python process with the GPUs that conftest.py hides from this one."""
    hidden = json.loads(os.environ["STIC_GPUS"])
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {name: value for name, value in hidden.items() if value is not None}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def gpus():
    count = int(child("-c", "import torch; print(torch.cuda.device_count())").stdout or 0)
    if not count:
        pytest.skip("no GPU")
    return count


def test_other_tests_see_no_gpu():
    assert all(os.environ[name] == "-1" for name in json.loads(os.environ["STIC_GPUS"]))
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], text=True,
                          capture_output=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(gpus, check):
    done = child(Path(__file__).with_name("gpu_checks.py"), check)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_is_run():
    checks = runpy.run_path(str(Path(__file__).with_name("gpu_checks.py")))["CHECKS"]
    assert tuple(checks) == CHECKS
