"""Checks of stored answers, descriptions and verdicts before scoring: empty, cut off, all the same,
unreadable, or from another run. No model code."""

import json
from pathlib import Path

from stic_min import InputError
from stic_min.runtime import console
from stic_min.runtime.files import printable, read_records

# The largest fraction of unreadable verdicts at which there still is a score: it is then off by at most two
# points.
UNREAD = 0.02
# The settings in which an answers file, its descriptions and its scores must agree.
SAME_RUN = ("benchmark", "mode", "model", "adapter", "fingerprint", "template", "image_mode", "dtype",
            "preset")  # fmt: skip


def check_unread(scores, allowed, asked):
    """Warns of unreadable verdicts. Raises InputError if there are too many for a score.

    allowed: --allow-unread. asked: whether we asked the judge, who could be given more room.
    """
    if not scores.get("unread"):
        return
    percent = f"{scores['unread_share']:.1%}"
    text = f"{scores['unread']} of the judge's verdicts could not be read ({percent} of all)"
    if scores["unread_share"] > UNREAD and not allowed:
        advice = "raise --judge-max-tokens or use another judge, or " if asked else ""
        raise InputError(f"{text}: too many for a score; {advice}accept this with --allow-unread")
    console.warn(text)


def count_endings(records, field):
    """{"n": number of records, "empty": those with an empty `field`, "cut": those cut off by
    --max-new-tokens, or None if the records were made elsewhere and do not say}."""
    finishes = [record.get("finish") for record in records]
    return {
        "n": len(records),
        "empty": sum(not record[field].strip() for record in records),
        "cut": finishes.count("length") if any(finishes) else None,
    }


def summarize(name, counts):
    """Formats the result of `count_endings` as a line of text."""
    parts = {"missing": "missing", "empty": "empty", "cut": "cut off by --max-new-tokens"}
    known = [f"{counts[part]} {text}" for part, text in parts.items() if counts.get(part) is not None]
    return f"{name}: {counts['n']}, {', '.join(known)}"


def count_descriptions(questions, descriptions):
    """`count_endings` for the descriptions of these questions, and "missing": images without one."""
    images = {""} if "" in descriptions else {q["image"] for q in questions if q["image"] is not None}
    used = [record for image, record in descriptions.items() if image in images]
    return count_endings(used, "description") | {"missing": len(images) - len(used)}


def warn_of_sameness(texts):
    """A model that always gives the same answer is broken or was prompted incorrectly."""
    if len(texts) > 1 and len(set(texts)) == 1:
        what = f"the same: {printable(texts[0])[:60]!r}" if texts[0] else "empty"
        console.warn(f"all {len(texts)} answers are {what}")


def find_difference(settings, record):
    """The first setting that shows that two files are from different runs, or None."""
    return next((name for name in SAME_RUN if record.get(name) != settings.get(name)), None)


def find_other_answers(path, run):
    """The answers file next to a .scores.json, if its first line shows that it is not from the scored `run`.

    None if it is from that run or there is no such file.
    """
    answers = Path(str(path).removesuffix(".scores.json") + ".jsonl")
    try:
        with open(answers, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(first, dict) and "fingerprint" in first
    return answers if is_ours and find_difference(run, first) else None


def read_descriptions(stem, settings):
    """{image: record} of the descriptions next to our answers file; None for answers given directly.

    Raises InputError if they are from another run.
    """
    path = Path(f"{stem}.descriptions.jsonl")
    if settings.get("mode", "direct") == "direct":
        return None
    descriptions = {}
    for where, record in read_records(path) if path.is_file() else []:
        if not all(isinstance(record.get(name), str) for name in ("image", "description")):
            raise InputError(f"{where}: needs text fields 'image' and 'description'")
        if name := find_difference(settings, record):
            values = f"{name} {record.get(name)!r}, but the answers with {settings.get(name)!r}"
            raise InputError(f"{where}: written with {values}")
        descriptions[record["image"]] = record
    return descriptions
