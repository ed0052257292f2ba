"""What the pages are told besides the run: where images, data and models are; and what a run recorded."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Options:
    """The flags of `python -m stic_min.report`."""

    images: list[Path] = field(default_factory=list)  # folders in which images are looked up
    data: list[Path] = field(default_factory=list)  # folders of benchmark data
    adapter: Path | None = None
    model: Path | None = None


def recorded_folder(record: dict, flag: str) -> Path | None:
    """The value of a flag, such as "--images", in the command that a run.json recorded; None without one.

    record: the content of run.json, or its `record`. The path is as typed, so it may not exist here and now.
    """
    record = record.get("record", record)
    command = record.get("command") if isinstance(record, dict) else None
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # an unbalanced quote
        return None
    value = None
    for word, following in zip(words, [*words[1:], None]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return Path(value) if value else None
