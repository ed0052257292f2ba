"""What the scorers share: reading data files, matching answers to questions, percentages with intervals."""


import json
import math
from pathlib import Path

import numpy as np

from stic_min import InputError

# ---------------------------------------------------------------- files in


def read_json(path, kind=dict):
    """The JSON value in a file. Raises InputError naming it if it is missing, not JSON, or no `kind`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_no_repeats)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: is not a JSON {'object' if kind is dict else 'list'}")
    return value


def _no_repeats(pairs):
    """A JSON object; of a repeated key the last value would win in silence. Here keys are question ids."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in value if keys.count(key) > 1)!r} is there twice")
    return value


def read_entries(path, form, key=None):
    """The JSON list in a data file (or at its `key`) -> (its entries, the whole content), checked against `form`.

    form: {field: type} that every entry has to have; other fields are left out. Raises InputError naming the file.
    """
    content = read_json(path, object)
    if key and (not isinstance(content, dict) or key not in content):
        raise InputError(f"{path}: has no {key!r}")
    entries = content[key] if key else content
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: is not a list with something in it")
    for number, entry in enumerate(entries):
        for field, kind in form.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                raise InputError(f"{path}, entry {number}: {field!r} is missing or no {kind.__name__}")
    return [{field: entry[field] for field in form} for entry in entries], content


def match_answers(name, questions, answers, complete=False):
    """{question id as text: record} of an answers file, checked against its questions.

    Raises InputError: no questions, a repeated id, an answer to no question, a record without text; if `complete`,
    a question without an answer.
    """
    ids, records = {str(q["question_id"]) for q in questions}, {}
    if not questions or len(ids) != len(questions):
        raise InputError(f"{name}: " + ("a question id is repeated" if questions else "no questions"))
    for number, record in enumerate(answers, 1):
        if record.get("question_id") is None:
            raise InputError(f"{name} answers: record {number} has no question_id")
        qid = str(record["question_id"])
        if qid not in ids or qid in records:
            fault = "repeated" if qid in ids else "no question's id"
            raise InputError(f"{name} answers: {qid!r} is {fault}")
        if not isinstance(record.get("text"), str):
            raise InputError(f"{name} answers: {qid!r} has no 'text'")
        records[qid] = record
    if complete and len(records) < len(ids):
        without = [q["question_id"] for q in questions if str(q["question_id"]) not in records]
        raise InputError(f"{name}: {len(without)} of {len(ids)} questions have no answer, the first is {without[0]!r}")
    return records


# ---------------------------------------------------------------- figures with their 95 % intervals


def wilson(p, n):
    """95 % interval in percent of a share p of n; it never leaves [0, 100]. Returns [low, high]."""
    z = 1.959963984540054
    middle = (n * p + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [100 * max(middle - half, 0), 100 * min(middle + half, 1)]


def share(hits):
    """[bool] -> {"score", "interval", "n", "correct"}, in percent, with Wilson's interval."""
    n, correct = len(hits), sum(map(bool, hits))
    return {"score": 100 * correct / n, "interval": wilson(correct / n, n), "n": n, "correct": correct}


def bootstrap(rows, statistic=None, samples=2000):
    """Percentile interval of `statistic` over items drawn anew with replacement, the same for the same rows.

    rows: (n,) or (n, k) numbers, one row an item. statistic: (m, n, k) -> (m,); by default the mean of (m, n).
    Returns [low, high].
    """
    rows, generator = np.asarray(rows, dtype=np.float64), np.random.default_rng(0)
    statistic, values = statistic or (lambda drawn: drawn.mean(1)), []
    for start in range(0, samples, 100):  # 100 at a time: 5,000 questions 2,000 times over would take gigabytes
        drawn = generator.integers(0, len(rows), (min(100, samples - start), len(rows)))
        values.append(statistic(rows[drawn]))
    values = np.concatenate(values)
    if not len(values):
        raise InputError("too few items for an interval")
    return np.percentile(values, [2.5, 97.5]).tolist()


def mean(values):
    """[number in 0..1] -> {"score", "interval", "n"}, in percent, with a bootstrap interval.

    Where all are equal the bootstrap knows no spread: Wilson's interval for a share of that size, which is wider than
    any other distribution on 0..1 would ask for.
    """
    p, n = sum(values) / len(values), len(values)
    interval = bootstrap(100 * np.asarray(values, float)) if len(set(values)) > 1 else wilson(p, n)
    return {"score": 100 * p, "interval": interval, "n": n}


def unread(count, total):
    """How many of the judge's verdicts could not be read, of `total` that the score is made of."""
    return {"unread": count, "unread_share": count / total}


def figure(scores):
    """`71.6 [69.6, 73.6]` of an entry with `score` and `interval`."""
    low, high = scores["interval"]
    return f"{scores['score']:.1f} [{low:.1f}, {high:.1f}]"
