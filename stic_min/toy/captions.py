"""The toy world's captions: hallucinated and omitted objects (CHAIR, precision, recall, F1).

Data: `captions.json`, written by `python -m stic_min.toy`: {"vocabulary": names of all possible objects,
"captions": [{"question_id", "image", "text": the captioning prompt, "objects": the objects in the picture,
"signature": the objects that captions of such places tend to mention}]}. CHAIR_i and CHAIR_s follow Rohrbach
et al. (2018), arXiv 1809.02156, with exact names in place of COCO's synonyms. An object mentioned in the
wrong cell counts as mentioned.
"""

import re
from pathlib import Path

from stic_min import InputError
from stic_min.scorers.common import bootstrap, match_answers, proportion, read_entries, wilson

RATES = {
    "chair_i": "CHAIR_i, mentions of absent objects",
    "chair_s": "CHAIR_s, captions with such a mention",
    "precision": "precision of the objects mentioned",
    "recall": "recall of the objects present",
    "f1": "F1",
    "signature": "absent signature objects mentioned",
}


def load(data: str | Path) -> list[dict]:
    """The captioning requests: dicts with `question_id`, `image` (relative to `data`), `text`, `objects`,
    `signature` and `vocabulary`. Raises InputError like `read_entries`, and for an invalid vocabulary."""
    path = Path(data) / "captions.json"
    form = {"question_id": str, "image": str, "text": str, "objects": list, "signature": list}
    captions, content = read_entries(path, form, key="captions")
    vocabulary = content.get("vocabulary")
    is_name = lambda value: isinstance(value, str) and value and value == value.lower()
    if not isinstance(vocabulary, list) or not vocabulary or not all(map(is_name, vocabulary)):
        raise InputError(f"{path}: 'vocabulary' is not a list of names in lower case")
    return [caption | {"vocabulary": vocabulary} for caption in captions]


def pattern(vocabulary):
    """A regular expression for a mention of an object, in any case.

    Where names overlap, such as "red ring" and "ring", the longer one matches.
    """
    names = sorted(vocabulary, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, names)) + r")\b", re.IGNORECASE)


def mentions(text, vocabulary):
    """All mentions of the vocabulary's objects in a caption, in order, in lower case."""
    return [name.lower() for name in pattern(vocabulary).findall(text)]


def rate(rows: list[tuple[int, int]]) -> dict:
    """{"score", "interval", "n"} of a rate over captions, in percent. rows: (part, total) per caption.

    The interval is from resampled captions. A rate of 0 or 100% has no spread: it gets Wilson's interval.
    """
    part, total = map(sum, zip(*rows))
    p = part / total if total else 0.0
    interval = bootstrap(sorted(rows), ratio) if 0 < p < 1 else wilson(p, total)
    return {"score": 100 * p, "interval": interval, "n": len(rows)}


def ratio(resampled):
    part, total = resampled.sum(1).T
    return 100 * part[total > 0] / total[total > 0]


def score(questions: list[dict], answers: list[dict]) -> dict:
    """Rates in percent over all captions (micro-averages); a missing caption mentions nothing.

    questions: from `load`. answers: records {"question_id", "text"}. Returns RATES' keys, `mentioned`
    (mentions per caption), `n` and `missing`; in `groups`, for each of RATES' keys its `score`, `interval`
    and `n`; `score` and `interval` are those of CHAIR_i, and `better` is "lower". A rate without any cases is
    0. Raises InputError like `match_answers`.
    """
    records = match_answers("toy captions", questions, answers)
    rows = {name: [] for name in RATES}
    for question in questions:
        text = records.get(question["question_id"], {"text": ""})["text"]
        mentioned = mentions(text, question["vocabulary"])
        present = set(question["objects"])
        wrong = [name for name in mentioned if name not in present]
        right = len(set(mentioned) & present)
        absent_signatures = set(question["signature"]) - present
        rows["chair_i"].append((len(wrong), len(mentioned)))
        rows["chair_s"].append((bool(wrong), 1))
        rows["precision"].append((right, len(set(mentioned))))
        rows["recall"].append((right, len(present)))
        rows["f1"].append((2 * right, len(set(mentioned)) + len(present)))
        rows["signature"].append((len(absent_signatures & set(mentioned)), len(absent_signatures)))
    groups = {name: rate(pairs) for name, pairs in rows.items()}
    groups["chair_s"] = proportion([is_wrong for is_wrong, _ in rows["chair_s"]])
    return {
        **{name: round(part["score"], 2) for name, part in groups.items()},
        "mentioned": round(sum(total for _, total in rows["chair_i"]) / len(questions), 3),
        **groups["chair_i"],
        "better": "lower",
        "groups": groups,
        "missing": len(questions) - len(records),
    }


def report(scores: dict) -> str:
    head = (
        f"toy captions: {scores['n']} pictures, {scores['missing']} without a caption, "
        f"{scores['mentioned']:.2f} objects mentioned per caption (all rates in %)"
    )
    return "\n".join([head, *(f"{name:<50}{scores[key]:>8.2f}" for key, name in RATES.items())])
