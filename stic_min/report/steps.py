"""What a file or folder is, recognized from its content: which step of the recipe wrote it."""

import functools
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from stic_min import InputError
from stic_min.formats.records import IMAGE_KEYS, KINDS, record_kind
from stic_min.report import training
from stic_min.runtime.console import warn

ORDER = "pairs", "stage 1", "descriptions", "stage 2", "training", "scores"  # of the recipe
MODULES = {"stage 1": "training", "stage 2": "training"}  # the others are named as their step
warn_once = functools.cache(warn)  # a folder is looked at several times
PEEK = 1 << 24  # characters; instruction files take a gigabyte


@dataclass
class Step:
    """One step of the recipe: a file or a folder that it wrote."""

    kind: str  # one of ORDER
    path: Path

    @property
    def module(self):
        """The module of stic_min.report that renders it."""
        return importlib.import_module(f"stic_min.report.{MODULES.get(self.kind, self.kind)}")


def first_record(path: Path) -> dict | None:
    """The first record of a JSON list or of JSON Lines; None for any other content."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(PEEK)
        text = text.lstrip().removeprefix("[").lstrip()
        record, _ = json.JSONDecoder().raw_decode(text)
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def has_scores(folder: Path) -> bool:
    return any(folder.glob("*.scores.json"))


def training_kind(folder: Path) -> str:
    stage = training.read(folder).stage
    return f"stage {stage}" if stage else "training"


def file_kind(path: Path) -> str | None:
    """pairs, descriptions (of stage 2, not of describe-and-respond), or another kind of `record_kind`.

    A "description" alone does not make one: many JSON files of other programs have it.
    """
    record = first_record(path)
    if record is None or "benchmark" in record:
        return None
    kind = record_kind(record)
    return kind if kind == "instructions" or any(key in record for key in IMAGE_KEYS) else None


def steps_in(folder: Path, levels: int = 2, seen: set[str] | None = None) -> list[Step]:
    """The steps in a folder and, `levels` deep, in its folders; in the order of the recipe.

    `seen`: the real paths that are not looked at again, because links lead to them.
    """
    if seen is None:
        place = Path(os.path.realpath(folder))
        seen = {str(path) for path in (place, *place.parents)}
    if training.is_training(folder):
        return [Step(training_kind(folder), folder)]
    steps = [Step("scores", folder)] if has_scores(folder) else []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path)):
        if (place := os.path.realpath(path)) in seen:
            continue
        seen.add(place)
        if path.is_dir():
            if not levels or path.name.startswith("."):
                continue
            if os.access(path, os.R_OK | os.X_OK):
                steps += steps_in(path, levels - 1, seen)
            else:
                warn_once(f"skipped: can't read {path}")
        elif path.suffix in (".jsonl", ".json") and path.is_file() and (kind := file_kind(path)) in ORDER:
            steps.append(Step(kind, path))
    return sorted(steps, key=lambda step: ORDER.index(step.kind))


def recognize(path: Path):
    """The module of stic_min.report for a RUN. Raises InputError if it is nothing that has a page."""
    if path.is_dir():
        steps = steps_in(path)
        if not steps:
            raise InputError(f"{path} contains no run: no pairs, descriptions, log.jsonl or .scores.json, "
                             "in it or up to two folders below")  # fmt: skip
        if len(steps) == 1 and steps[0].path == path:
            return steps[0].module
        return importlib.import_module("stic_min.report.recipe")
    if not path.is_file():
        raise InputError(f"no such file or folder: {path}")
    if not os.access(path, os.R_OK):
        raise InputError(f"can't read {path}")
    if path.name in ("log.jsonl", "run.json") or path.name.endswith(".scores.json"):
        raise InputError(f"{path} is part of a run: give its folder, {path.parent}")
    record = first_record(path) or {}
    if "question_id" in record or "benchmark" in record and "description" not in record:
        raise InputError(f"{path} contains answers of a benchmark: give the folder of its scores")
    kind = record_kind(record)
    if kind in ORDER:
        return Step(kind, path).module
    content = KINDS[kind] if kind else "neither pairs nor descriptions"
    raise InputError(f"{path} contains {content}: there is no page for it")
