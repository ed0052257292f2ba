"""What evaluation has stored, looked at before it is scored: answers, descriptions and verdicts of a judge that are
empty, cut off, all the same, unreadable, or another run's. No model code."""

import json
from pathlib import Path

from stic_min import InputError
from stic_min.runtime import console
from stic_min.runtime.files import printable, read_records

UNREAD = 0.02  # the largest share of verdicts without which there still is a score: it is off by two points at most
# What an answers file, its descriptions and its scores have to agree in.
SAME_RUN = ("benchmark", "mode", "model", "adapter", "fingerprint", "template", "image_mode", "dtype")


def check_unread(scores, allowed, asked):
    """Warns of verdicts of the judge that could not be read. Raises InputError if they are too many for a score."""
    if not scores.get("unread"):
        return
    text = f"{scores['unread']} verdicts of the judge could not be read ({scores['unread_share']:.1%} of all)"
    if scores["unread_share"] > UNREAD and not allowed:
        more = "give it more room (--judge-max-tokens) or use another one, or " if asked else ""
        raise InputError(f"{text}: too many for a score; {more}accept this with --allow-unread")
    console.warn(text)


def counts(records, field):
    """How many records there are, how many have no text in `field`, and how many ended by --max-new-tokens: None if
    they don't say, as those made elsewhere."""
    finishes = [record.get("finish") for record in records]
    return {
        "n": len(records),
        "empty": sum(not record[field].strip() for record in records),
        "cut": finishes.count("length") if any(finishes) else None,
    }


def summary(name, found):
    """`counts` as a line of text."""
    parts = {"missing": "missing", "empty": "empty", "cut": "cut off by --max-new-tokens"}
    known = [f"{found[part]} {text}" for part, text in parts.items() if found.get(part) is not None]
    return f"{name}: {found['n']}, {', '.join(known)}"


def description_counts(questions, described):
    """`counts` of the descriptions that the questions were asked with; "missing": images that have none."""
    shown = {""} if "" in described else {q["image"] for q in questions if q["image"] is not None}
    found = [record for image, record in described.items() if image in shown]
    return counts(found, "description") | {"missing": len(shown) - len(found)}


def warn_of_sameness(texts):
    """A model that says the same whatever it is asked is broken, or asked in a wrong way."""
    if len(texts) > 1 and len(set(texts)) == 1:
        what = f"the same: {printable(texts[0])[:60]!r}" if texts[0] else "empty"
        console.warn(f"all {len(texts)} answers are {what}")


def differing(settings, record):
    """The first setting in which two files are not of the same run; None if they are."""
    return next((name for name in SAME_RUN if record.get(name) != settings.get(name)), None)


def other_answers(path, run):
    """The answers file beside a .scores.json, if it is not of the `run` that was scored; None if it is or is not there.
    Its first line tells."""
    answers = Path(str(path).removesuffix(".scores.json") + ".jsonl")
    try:
        with open(answers, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return None
    return answers if isinstance(first, dict) and "fingerprint" in first and differing(run, first) else None


def read_descriptions(stem, settings):
    """{image: record} of the descriptions beside an answers file of ours; None for answers that were given directly.

    Raises InputError if they are of another run."""
    path = Path(f"{stem}.descriptions.jsonl")
    if settings.get("mode", "direct") == "direct":
        return None
    described = {}
    for where, record in read_records(path) if path.is_file() else []:
        if not all(isinstance(record.get(name), str) for name in ("image", "description")):
            raise InputError(f"{where}: no image, or no description")
        if name := differing(settings, record):
            raise InputError(f"{where}: made with {name} {record.get(name)!r}, the answers with {settings.get(name)!r}")
        described[record["image"]] = record
    return described
