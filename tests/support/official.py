"""Results of the official scorers, read from the project's reference data. Tests that need it are skipped without."""

import json
import os
from pathlib import Path

import pytest

# Numbers computed by the official code. The program never needs them.
SHARED = Path(os.environ.get("STIC_SHARED") or Path(__file__).resolve().parents[3] / "shared")


def shared(name):
    """The cases of one file: a JSON value, or the list of a JSON Lines file."""
    path = SHARED / "scorers" / name
    if not path.is_file():
        pytest.skip(f"no shared data: {name}")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.strip().split("\n")]
