"""The page of a training run, finished, stopped or still running: curves, settings, command and machine."""

import fcntl
import math
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stic_min import InputError
from stic_min.report import curves
from stic_min.report import record as records
from stic_min.report.options import Options
from stic_min.report.page import html_table, note, page_of
from stic_min.runtime.files import read_json, read_own_lines, write_text

STYLE = records.STYLE + curves.STYLE + """
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30em, 100%), 1fr)); gap: 0 3em; }
"""
TITLES = {1: "Stage 1, preference training", 2: "Stage 2, description-infused fine-tuning", None: "Training"}


@dataclass
class Training:
    """What the folder of a training run holds."""

    path: Path
    log: list[dict]  # one record per step
    settings: dict  # run.json without the next two; {} before the first checkpoint
    record: dict
    saved_step: int | None  # of the newest checkpoint
    finished: bool
    running: bool | None  # None if that can't be known

    @property
    def stage(self) -> int | None:
        first = self.log[0] if self.log else {}
        if "instructions" in self.settings or "answer_tokens" in first:
            return 2
        return 1 if "pairs" in self.settings or "dpo" in first else None

    @property
    def scores_text(self) -> bool:
        """Whether stage 1 scores the text of the rejected response: then equal responses have no gradient."""
        return self.settings.get("rejected_score", "text") == "text"

    @property
    def steps(self) -> int | None:
        """Steps of the whole run."""
        if self.finished and self.log:
            return self.log[-1]["step"]
        return records.number(self.record, "steps")


# ---------------------------------------------------------------- reading


def is_training(folder: Path) -> bool:
    return (folder / "log.jsonl").is_file() or bool(checkpoints(folder))


def checkpoints(folder: Path) -> list[Path]:
    """The run.json files of a folder's checkpoints, oldest first."""
    step = lambda path: path.parent.name.removeprefix("checkpoint-")
    files = [path for path in folder.glob("checkpoint-*/run.json") if step(path).isdecimal()]
    return sorted(files, key=lambda path: int(step(path)))


def parse(record):
    """A line of log.jsonl, with its numbers; raises ValueError for any other JSON value."""
    if type(record["step"]) is not int or not all(type(value) in (int, float) for value in record.values()):
        raise ValueError
    if any(type(value) is int and abs(value) >= records.LARGEST for value in record.values()):
        raise ValueError  # a step or a count
    return record


def is_locked(folder: Path) -> bool | None:
    """Whether a run holds the folder's lock; None on a file system without locks."""
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def read(folder: str | Path) -> Training:
    """Raises InputError if the folder holds no run, or a damaged one. An incomplete last line of log.jsonl is
    dropped: a kill has cut it off, or it is being written."""
    folder = Path(folder)
    log = read_own_lines(folder / "log.jsonl", parse)
    finished = (folder / "adapter_config.json").is_file()
    files = [path for path in (folder / "run.json",) if path.is_file()] or checkpoints(folder)
    if not log and not files:
        raise InputError(f"{folder}: no training run, for there is no step in log.jsonl and no run.json")
    settings = read_json(files[-1]) if files else {}
    record = settings.pop("record", None)
    step = settings.pop("step", None)
    return Training(
        folder, log, settings, record if isinstance(record, dict) else {},
        step if type(step) is int else None, finished, False if finished else is_locked(folder),
    )  # fmt: skip


# ---------------------------------------------------------------- how far it is


def status(run: Training) -> str:
    """How far a run is, in a sentence or two."""
    step = run.log[-1]["step"] if run.log else run.saved_step
    steps = run.steps
    reached = f"step {step}" + (f" of {steps}" if steps else "")
    if run.finished:
        return f"Finished: {step} steps." if step else "Finished."
    seen = ""
    if run.log:
        seen = time.strftime(" Last step logged: %Y-%m-%d %H:%M:%S.", time.localtime(log_time(run)))
    if run.running:
        seconds_left = run.log[-1].get("seconds_left") if run.log else None
        left = ""
        if seconds_left is not None and math.isfinite(seconds_left):
            left = f", about {records.duration(seconds_left)} left then"
        return f"Running: {reached}{left}.{seen}"
    saved = f"checkpoint-{run.saved_step}" if run.saved_step else None
    resume = f"The same command resumes from {saved}." if saved else "There is no checkpoint to resume from."
    state = "Stopped" if run.running is False else "Stopped or running"
    return f"{state} after {reached}.{seen} {resume}"


def log_time(run):
    return (run.path / "log.jsonl").stat().st_mtime


def counts(run: Training) -> str:
    """What was truncated or has nothing to learn from, in a sentence."""
    get = lambda name: records.number(run.record, name)
    samples, truncated, equal = get("samples"), get("truncated"), get("equal")
    what = {1: "pairs", 2: "conversations"}.get(run.stage, "samples")
    limit = run.settings.get("max_length")
    nothing = ": no preference to learn" if run.scores_text else ""
    if samples is None:
        text = "How many samples were truncated was not recorded."
        logged = sum(record.get("equal", 0) for record in run.log)
        if run.stage == 1 and logged and math.isfinite(logged):
            text += f" {logged:g} pairs in the logged steps have identical responses{nothing}."
        return text
    text = f"{samples} {what}; {truncated} truncated" + (f" to {limit} tokens" if limit else "")
    if run.stage == 1:
        text += f"; {equal} with identical responses{nothing}"
    return f"{text}."


# ---------------------------------------------------------------- tables

NAMES = {
    "dpo": "DPO term", "alpha_nll": "α·NLL term", "logp_chosen": "log p, preferred",
    "logp_rejected": "log p, dispreferred", "reward_chosen": "reward, preferred",
    "reward_rejected": "reward, dispreferred", "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second", "memory_gb": "peak memory in GB",
    "answer_tokens": "answer tokens", "equal": "pairs with identical responses",
    "accuracy": "accuracy, differing pairs", "margin": "margin, differing pairs",
}  # fmt: skip
NOT_SHOWN = "step", "seconds_left", "lr"


def short(value: float) -> str:
    """A number with four digits, or all of those before the point; NaN and infinity in words."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def values_table(run: Training) -> tuple[list[str], list[list[str]]]:
    """(header, rows): what was logged at the first and the last step, and on average in the last tenth."""
    window = max(1, round(len(run.log) / 10))
    header = ["", f"step {run.log[0]['step']}", f"step {run.log[-1]['step']}"]
    header += [f"mean of the last {window} steps"] if window > 1 else []
    rows = []
    for field in run.log[-1]:
        if field not in NOT_SHOWN:
            values = [record[field] for record in run.log if field in record]
            last = values[-window:]
            numbers = values[0], values[-1], sum(last) / len(last)
            row = [NAMES.get(field, field.replace("_", " ")), *map(short, numbers)]
            rows.append(row[: len(header)])
    return header, rows


SETTINGS = {
    "lr": "peak learning rate, LoRA", "projector_lr": "peak learning rate, projector",
    "limit": "random subset", "batch_size": "samples per step", "beta": "β, the paper's λ", "alpha": "α",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha", "max_length": "maximum length in tokens", "template": "chat template",
    "dtype": "precision of the weights", "fingerprint": "fingerprint of model and adapter",
    "pairs": "SHA-256 of the pairs", "instructions": "SHA-256 of the instructions",
    "descriptions": "SHA-256 of the descriptions", "plain": "without descriptions (--plain)",
    "one_line": "one-line descriptions", "rejected_score": "score of the rejected response",
    "reference": "fingerprint of the reference's adapter", "preset": "--preset",
}  # fmt: skip


def setting(name, value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "alpha" and isinstance(value, float) and value and (1 / value).is_integer():
        return f"1/{1 / value:.0f}"
    if value is None:
        return "all" if name == "limit" else "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def settings_table(run: Training) -> str:
    if not run.settings:
        return note("Settings are recorded with the first checkpoint, which does not exist yet.")
    rows = [(SETTINGS.get(name, name.replace("_", " ")), setting(name, value))
            for name, value in run.settings.items()]  # fmt: skip
    return records.facts(rows)


# ---------------------------------------------------------------- the page


def section(path: str | Path, options: Options | None = None) -> str:
    """The run in a folder as HTML, from an <h2> on."""
    run = read(path)
    body = [
        f"<h2>{TITLES[run.stage]}: {escape(Path(path).resolve().name)}</h2>",
        f"<p>{escape(status(run))} {escape(counts(run))}</p>",
    ]
    if run.log:
        body.append(curves.section(run.log, run.stage, run.record, run.scores_text))
        body.append(f"<h3>Values</h3>{html_table(*values_table(run), 'Values')}")
    else:
        body.append(note("No curves: log.jsonl is missing or has no complete line."))
    body.append("<div class=columns>")
    body.append(f"<div><h3>Settings</h3>{settings_table(run)}</div>")
    body.append(f"<div><h3>Command and machine</h3>{records.table(run.record)}</div></div>")
    return "\n".join(body)


def write(path: str | Path, options: Options | None = None) -> Path:
    """Writes report.html into the folder of a run -> its path."""
    file = Path(path) / "report.html"
    write_text(file, page_of(section(path, options), STYLE))
    return file
