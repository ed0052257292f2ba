"""What a file or folder is, recognized from its content: which step of the recipe wrote it."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from stic_min import InputError
from stic_min.formats.records import KINDS, record_kind
from stic_min.report import training

ORDER = "pairs", "stage 1", "descriptions", "stage 2", "training", "scores"  # of the recipe
MODULES = {"stage 1": "training", "stage 2": "training"}  # the others are named as their step
PEEK = 1 << 20  # characters; instruction files take a gigabyte


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
    """pairs, descriptions (of stage 2, not of describe-and-respond), or another kind of `record_kind`."""
    record = first_record(path)
    if record is None or "benchmark" in record:
        return None
    return record_kind(record)


def steps_in(folder: Path, levels: int = 2) -> list[Step]:
    """The steps in a folder and, `levels` deep, in its folders; in the order of the recipe."""
    if training.is_training(folder):
        return [Step(training_kind(folder), folder)]
    steps = [Step("scores", folder)] if has_scores(folder) else []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            steps += steps_in(path, levels - 1) if levels and not path.name.startswith(".") else []
        elif path.suffix in (".jsonl", ".json") and (kind := file_kind(path)) in ORDER:
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
    kind = file_kind(path)
    if kind in ORDER:
        return Step(kind, path).module
    if path.name in ("log.jsonl", "run.json") or path.name.endswith(".scores.json"):
        raise InputError(f"{path} is part of a run: give its folder, {path.parent}")
    record = first_record(path) or {}
    if "benchmark" in record or "question_id" in record:
        raise InputError(f"{path} contains answers of a benchmark: give the folder of its scores")
    content = KINDS[kind] if kind else "neither pairs nor descriptions"
    raise InputError(f"{path} contains {content}: there is no page for it")
