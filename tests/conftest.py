"""Fixtures of several test files: reference data next to the repository, and the checkpoints of support/tiny.py."""

import functools
import json
import os
import signal

# Before torch is imported, and for all child processes: the tests run on the CPU whatever the machine has. test_gpu.py
# gives its children the GPUs back.
HIDING = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
os.environ.setdefault("STIC_GPUS", json.dumps({name: os.environ.get(name) for name in HIDING}))
os.environ |= dict.fromkeys(HIDING, "-1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread waits more than it works

import pytest  # noqa: E402
import torch  # noqa: E402
from official import SHARED  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"no reference data in {SHARED} (set STIC_SHARED)")
    return SHARED


@pytest.fixture(autouse=True)
def signals():
    """As Python has them: a command that has ended, in a fixture too, leaves them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with tiny checkpoints, images, instructions and a benchmark, written once."""
    from tiny import write_all

    folder = tmp_path_factory.mktemp("tiny")
    write_all(folder)
    return folder


@pytest.fixture(scope="session")
def chains(tiny, tmp_path_factory):
    """model -> its chain of commands on one rank, run once for all tests."""
    from chain import run_chain

    return functools.cache(lambda model: run_chain(model, tiny, tmp_path_factory.mktemp(model)))


@pytest.fixture(params=["llava-v1.6-tiny", "llava-v1.5-tiny"])
def runs(request, chains):
    """The chain of either checkpoint: `out` holds its files, `printed` the output of each of its `commands`."""
    return chains(request.param)
