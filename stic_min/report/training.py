"""The page of a training run, finished, stopped or still running: curves, settings, command and machine."""

import fcntl
import math
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stic_min import InputError
from stic_min.report import record as records
from stic_min.report import svg
from stic_min.report.options import Options
from stic_min.report.page import html_table, page
from stic_min.runtime.files import read_json, read_own_lines, write_text

LN2 = math.log(2)
CLIP_NORM = 1.0  # training.CLIP_NORM; importing it would import torch
MOST_POINTS = 2000  # of a line; a longer one keeps the extremes of its neighborhoods

STYLE = records.STYLE + """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22em, 100%), 1fr));
  gap: 1.6em 2em; margin: 1em 0; }
.curves svg { width: 100%; max-width: 30em; }
.curves figcaption { max-width: 36em; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30em, 100%), 1fr)); gap: 0 3em; }
h3 { font-size: 1em; margin: 1.6em 0 .3em; }
"""


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
        if "descriptions" in self.settings or "answer_tokens" in first:
            return 2
        return 1 if "pairs" in self.settings or "dpo" in first else None

    @property
    def steps(self) -> int | None:
        """Steps of the whole epoch."""
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
    if samples is None:
        text = "How many samples were truncated was not recorded."
        logged = sum(record.get("equal", 0) for record in run.log)
        if run.stage == 1 and logged and math.isfinite(logged):
            text += f" {logged:g} pairs in the logged steps have identical responses: no preference to learn."
        return text
    text = f"{samples} {what}; {truncated} truncated" + (f" to {limit} tokens" if limit else "")
    if run.stage == 1:
        text += f"; {equal} with identical responses: no preference to learn"
    return f"{text}."


# ---------------------------------------------------------------- curves


@dataclass
class Curve:
    title: str
    fields: dict[str, str]  # {name in log.jsonl: name in the legend}
    how_to_read: str  # HTML
    zero: bool = False
    smooth: bool = True
    levels: dict[str, float] | None = None


def curves(run: Training) -> list[Curve]:
    equal, samples = records.number(run.record, "equal"), records.number(run.record, "samples")
    floor = ""
    if equal and samples:
        floor = (
            f" Pairs with identical responses stay at ln 2, so here the average over all pairs can't fall "
            f"below {equal / samples * LN2:.2f}."
        )
    stage1 = [
        Curve(
            "Loss and its two terms (Eq. 4.1)",
            {"loss": "loss", "dpo": "DPO term", "alpha_nll": "α·NLL term"},
            "loss = DPO term + α·NLL term. The DPO term (Eq. 3.3) starts at ln 2 = 0.693, where policy and "
            f"reference are the same, and should fall.{floor} The α·NLL term is −α log p of the chosen "
            "response; it falls if that becomes more probable.",
            levels={"ln 2": LN2},
        ),
        Curve(
            "Margin",
            {"margin": "margin"},
            "Reward of the chosen response minus that of the rejected one, the argument of ℓ in Eq. 3.3, "
            "averaged over the pairs whose responses differ. It starts at 0 and should rise.",
            zero=True,
        ),
        Curve(
            "Accuracy",
            {"accuracy": "accuracy"},
            "Fraction of the differing pairs whose margin is positive. It should rise toward 1; at 0.5, the "
            "responses are told apart no better than by chance. (At step 1 all margins are 0, so it is 0.)",
            zero=True,
            levels={"chance": 0.5},
        ),
        Curve(
            "log p of the responses",
            {"logp_chosen": "chosen", "logp_rejected": "rejected"},
            "log p(y | v, x) under the model in training, summed over the tokens, so long responses have "
            "lower values. The gap should grow. If log p of the chosen response falls as well, both become "
            "less probable: Eq. 3.3 sees only their difference. The α·NLL term of Eq. 4.1 pulls the chosen "
            "one up.",
        ),
        Curve(
            "Reward of the responses",
            {"reward_chosen": "chosen", "reward_rejected": "rejected"},
            "β (log p − log p of the reference), DPO's implicit reward. Both start at 0. Good: chosen above "
            "0, rejected below. A negative reward of the chosen response means that it has become less "
            "probable than it was before training.",
            zero=True,
        ),
    ]
    stage2 = [
        Curve(
            "Loss",
            {"loss": "loss"},
            "−log p(y | v, x) of the answers (Algorithm 2), averaged over the answer tokens of each batch. "
            "It should fall, at least at first, and then level off.",
        ),
    ]
    common = [
        Curve(
            "Gradient norm",
            {"grad_norm": "gradient norm"},
            f"Before clipping: above {CLIP_NORM:g}, the dashed line, gradients are scaled down to it. Single "
            "peaks are harmless; if the norm keeps growing, the learning rate may be too high.",
            zero=True,
            levels={"clipped": CLIP_NORM},
        ),
        Curve(
            "Learning rate for LoRA",
            {"lr": "learning rate"},
            "Linear warm-up over the first 3% of the steps, then a cosine to 0.",
            zero=True,
            smooth=False,
        ),
        Curve(
            "Tokens per second",
            {"tokens_per_s": "tokens per second"},
            "Over all ranks, image tokens included. A step that saved a checkpoint counts the time for it "
            "toward the next one.",
            zero=True,
        ),
        Curve(
            "Peak memory in GB",
            {"memory_gb": "memory"},
            "Of the first rank up to this step: its GPU's, or on a CPU the process's. It never falls, except "
            "where a run was resumed.",
            zero=True,
            smooth=False,
        ),
    ]
    return {1: stage1, 2: stage2}.get(run.stage, []) + common


def thin(points):
    """At most about MOST_POINTS points: the lowest and the highest of each neighborhood, in order."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        y = lambda i, part=part: part[i][1]
        extremes = {min(range(len(part)), key=y), max(range(len(part)), key=y)}
        kept += [part[i] for i in sorted(extremes)]
    return kept


def points_of(run, field):
    """[(step, value), ...] of a field of log.jsonl, and how many of its values are NaN or infinite."""
    points = [(record["step"], record[field]) for record in run.log if field in record]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return finite, len(points) - len(finite)


def figure(run: Training, curve: Curve) -> str:
    """One chart with what to look for below it; a line of text if there is nothing to draw."""
    series, not_finite = {}, 0
    for field, name in curve.fields.items():
        points, count = points_of(run, field)
        not_finite += count
        if points:
            series[name] = thin(points)
    note = f" {not_finite} values are NaN or infinite and left out." if not_finite else ""
    if not series:
        return f"<figure><b>{curve.title}</b><figcaption>No data in log.jsonl.{note}</figcaption></figure>"
    count = max(map(len, series.values()))
    window = smoothing(count) if curve.smooth else 1
    chart = svg.line_chart(
        curve.title, series, width=420, height=250, zero=curve.zero, smooth=window, levels=curve.levels
    )
    missing = [name for name in curve.fields.values() if name not in series]
    if missing:
        note += f" Not in log.jsonl: {', '.join(missing)}."
    return f"<figure>{chart}<figcaption>{curve.how_to_read}{note}</figcaption></figure>"


def smoothing(count):
    """The window of the running mean: about a tenth of the points, and none where there are few."""
    return max(3, count // 10 | 1) if count >= 20 else 1


# ---------------------------------------------------------------- tables

NAMES = {
    "dpo": "DPO term", "alpha_nll": "α·NLL term", "logp_chosen": "log p, chosen",
    "logp_rejected": "log p, rejected", "reward_chosen": "reward, chosen",
    "reward_rejected": "reward, rejected", "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second", "memory_gb": "peak memory in GB",
    "answer_tokens": "answer tokens", "equal": "pairs with identical responses",
    "accuracy": "accuracy, differing pairs", "margin": "margin, differing pairs",
}  # fmt: skip
NOT_SHOWN = "step", "seconds_left", "lr"


def short(value: float) -> str:
    """A number with four digits, or all of those before the point; NaN and infinity in words."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def last_values(run: Training) -> list[tuple[str, str, str, str]]:
    """(name, at the first step, at the last step, mean of the last tenth of the steps) of what was logged."""
    fields = [field for field in run.log[-1] if field not in NOT_SHOWN]
    rows = []
    for field in fields:
        values = [record[field] for record in run.log if field in record]
        last = values[-window_of_last(run) :]
        mean = sum(last) / len(last)
        rows.append((NAMES.get(field, field.replace("_", " ")), *map(short, (values[0], values[-1], mean))))
    return rows


def window_of_last(run):
    return max(1, round(len(run.log) / 10))


def values_table(run: Training) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of `last_values`."""
    count = window_of_last(run)
    header = ["", f"step {run.log[0]['step']}", f"step {run.log[-1]['step']}"]
    header += [f"mean of the last {count} steps"] if count > 1 else []
    return header, [list(row)[: len(header)] for row in last_values(run)]


SETTINGS = {
    "lr": "peak learning rate, LoRA", "projector_lr": "peak learning rate, projector",
    "limit": "random subset", "batch_size": "samples per step", "beta": "β, the paper's λ", "alpha": "α",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha", "max_length": "maximum length in tokens", "template": "chat template",
    "dtype": "precision of the weights", "fingerprint": "fingerprint of model and adapter",
    "pairs": "SHA-256 of the pairs", "instructions": "SHA-256 of the instructions",
    "descriptions": "SHA-256 of the descriptions", "plain": "without descriptions (--plain)",
    "one_line": "one-line descriptions",
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
        return "<p class=note>Settings are recorded with the first checkpoint, which does not exist yet.</p>"
    rows = [(SETTINGS.get(name, name.replace("_", " ")), setting(name, value))
            for name, value in run.settings.items()]  # fmt: skip
    return records.facts(rows)


# ---------------------------------------------------------------- the page


def title(run: Training) -> str:
    return {
        1: "Stage 1: training on preference pairs",
        2: "Stage 2: fine-tuning on instructions with descriptions",
    }.get(run.stage, "Training")


def section(path: str | Path, options: Options | None = None) -> str:
    """The run in a folder as HTML, from an <h2> on."""
    run = read(path)
    body = [f"<h2>{title(run)}</h2>", f"<p>{escape(status(run))} {escape(counts(run))}</p>"]
    if run.log:
        count = smoothing(min(len(run.log), MOST_POINTS))
        strong = f" The strong line is the running mean of {count} points." if count > 1 else ""
        body.append(f"<p class=note>Each point of a curve is one optimizer step.{strong}</p>")
        body.append(f"<div class=curves>{''.join(figure(run, curve) for curve in curves(run))}</div>")
        body.append(f"<h3>Values</h3>{html_table(*values_table(run), 0)}")
    else:
        body.append("<p class=note>No curves: log.jsonl is missing or has no complete line.</p>")
    body.append("<div class=columns>")
    body.append(f"<div><h3>Settings</h3>{settings_table(run)}</div>")
    body.append(f"<div><h3>Command and machine</h3>{records.table(run.record)}</div></div>")
    return "\n".join(body)


def write(path: str | Path, options: Options | None = None) -> Path:
    """Writes report.html into the folder of a run -> its path."""
    file = Path(path) / "report.html"
    name = Path(path).resolve().name
    body = f"<h1>{escape(name)}</h1>{section(path, options)}"
    write_text(file, page(f"{name}: training", body, STYLE))
    return file
