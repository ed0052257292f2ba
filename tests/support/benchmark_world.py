"""The data of all benchmarks and a tiny checkpoint, for the tests that run evaluate.py."""

import shutil

import pytest
from benchmark_data import write_benchmarks
from tiny import write_scienceqa


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory):
    """A folder with the data of each benchmark and a checkpoint."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_scienceqa(folder)
    write_benchmarks(folder)
    for name in ("llava-v1.6-tiny", "clip-tiny"):
        (folder / name).symlink_to(tiny / name)
    return folder


@pytest.fixture
def own(world, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(world, tmp_path / "own", symlinks=True)
