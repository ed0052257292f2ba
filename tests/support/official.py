"""What the official scorers give, from the project's reference data; without it the test that asks is skipped."""

import json
import os
from pathlib import Path

import pytest

# Numbers computed by the official code; the project never needs them to run.
SHARED = Path(os.environ.get("STIC_SHARED") or Path(__file__).resolve().parents[3] / "shared")


def shared(name):
    """The content of a file of cases: a JSON value, or the list of a JSON lines file."""
    path = SHARED / "scorers" / name
    if not path.is_file():
        pytest.skip(f"no shared data: {name}")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.strip().split("\n")]
