"""Shared by the scorers: reading data files, matching answers to questions, percentages with intervals."""

import math

import numpy as np

from stic_min import InputError
from stic_min.runtime.files import read_json

# ---------------------------------------------------------------- data files and answers


def read_entries(path, form, key=None):
    """Reads the JSON list in a data file (or at its `key`) -> (entries, the file's entire content).

    form: {field: type} that every entry must have; other fields are dropped. Raises InputError naming the
    file.
    """
    content = read_json(path, object)
    if key and (not isinstance(content, dict) or key not in content):
        raise InputError(f"{path}: has no {key!r}")
    entries = content[key] if key else content
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: not a non-empty list")
    for number, entry in enumerate(entries):
        for field, kind in form.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                expected = "string" if kind is str else kind.__name__
                raise InputError(f"{path}, entry {number}: {field!r} is missing or not a {expected}")
    return [{field: entry[field] for field in form} for entry in entries], content


def match_answers(name: str, questions: list[dict], answers: list[dict], complete=False) -> dict[str, dict]:
    """Checks answers against their questions -> {question id as text: record}.

    Raises InputError: no questions, a repeated id, an answer to an unknown question, a record without text;
    if `complete`, a question without an answer.
    """
    ids = {str(q["question_id"]) for q in questions}
    if not questions or len(ids) != len(questions):
        raise InputError(f"{name}: " + ("a question id is repeated" if questions else "no questions"))
    records = {}
    for number, record in enumerate(answers, 1):
        if record.get("question_id") is None:
            raise InputError(f"{name} answers: record {number} has no question_id")
        qid = str(record["question_id"])
        if qid not in ids or qid in records:
            fault = "repeated" if qid in ids else "not a question id"
            raise InputError(f"{name} answers: {qid!r} is {fault}")
        if not isinstance(record.get("text"), str):
            raise InputError(f"{name} answers: {qid!r} has no 'text'")
        records[qid] = record
    if complete and len(records) < len(ids):
        missing = [q["question_id"] for q in questions if str(q["question_id"]) not in records]
        count = f"{len(missing)} of {len(ids)} questions have no answer"
        raise InputError(f"{name}: {count}, the first is {missing[0]!r}")
    return records


# ---------------------------------------------------------------- percentages with their 95% intervals


def wilson(p, n):
    """95% interval, in percent, for a proportion p of n. It never leaves [0, 100]. Returns [low, high]."""
    z = 1.959963984540054
    middle = (n * p + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [100 * max(middle - half, 0), 100 * min(middle + half, 1)]


def proportion(hits: list[bool]) -> dict:
    """{"score", "interval", "n", "correct"}: the percentage of hits with its Wilson interval."""
    n = len(hits)
    correct = sum(map(bool, hits))
    return {"score": 100 * correct / n, "interval": wilson(correct / n, n), "n": n, "correct": correct}


def bootstrap(rows, statistic=None, samples=2000):
    """Percentile interval of `statistic` over items resampled with replacement; deterministic for the same
    rows.

    rows: (n,) or (n, k) numbers, one row per item. statistic: (m, n, k) -> (m,); by default the mean, (m, n)
    -> (m,).
    Returns [low, high].
    """
    rows = np.asarray(rows, dtype=np.float64)
    statistic = statistic or (lambda resampled: resampled.mean(1))
    generator = np.random.default_rng(0)
    values = []
    for start in range(0, samples, 100):  # in chunks: 2,000 resamples of 5,000 questions would take gigabytes
        indices = generator.integers(0, len(rows), (min(100, samples - start), len(rows)))
        values.append(statistic(rows[indices]))
    values = np.concatenate(values)
    if not len(values):
        raise InputError("too few items for an interval")
    return np.percentile(values, [2.5, 97.5]).tolist()


def mean(values) -> dict:
    """[number in 0..1] -> {"score", "interval", "n"}, in percent, with a bootstrap interval.

    If all values are equal, the bootstrap sees no spread. Then the interval is Wilson's for a proportion of
    that size, which is at least as wide as any other distribution on 0..1 would require.
    """
    n = len(values)
    p = sum(values) / n
    interval = bootstrap(100 * np.asarray(values, float)) if len(set(values)) > 1 else wilson(p, n)
    return {"score": 100 * p, "interval": interval, "n": n}


def unread(count, total):
    """The number of unreadable verdicts, also as a fraction of the `total` verdicts in the score."""
    return {"unread": count, "unread_share": count / total}


def with_interval(scores):
    """Formats `score` and `interval` as `71.6 [69.6, 73.6]`."""
    low, high = scores["interval"]
    return f"{scores['score']:.1f} [{low:.1f}, {high:.1f}]"
