"""The toy world's captions: hallucinated and forgotten objects (CHAIR, precision, recall, F1).

Data: `captions.json` as `python -m stic_min.toy` writes it: {"vocabulary": names of all objects there are,
"captions": [{"question_id", "image", "text": the captioning prompt, "objects": what is in the picture, "signature":
what captions of such places tend to mention}]}. CHAIR_i and CHAIR_s are those of Rohrbach et al. (2018), arXiv
1809.02156, with exact names in place of COCO's synonyms. An object in the wrong cell counts as mentioned.
"""

import re
from pathlib import Path

from stic_min import InputError
from stic_min.scorers.common import match_answers, read_entries

RATES = {
    "chair_i": "CHAIR_i, mentions of objects that are not there",
    "chair_s": "CHAIR_s, captions with such a mention",
    "precision": "precision of the objects mentioned",
    "recall": "recall of the objects there",
    "f1": "F1",
    "signature": "absent signature objects mentioned",
}


def load(data):
    """The captions to make: a dict each with `question_id`, `image` (relative to `data`), `text`, `objects`,
    `signature` and `vocabulary`. Raises InputError as `read_entries`, also for a vocabulary that is none."""
    path, form = Path(data) / "captions.json", {"question_id": str, "image": str, "text": str}
    captions, content = read_entries(path, form | {"objects": list, "signature": list}, key="captions")
    vocabulary = content.get("vocabulary")
    names = isinstance(vocabulary, list) and all(isinstance(v, str) and v and v == v.lower() for v in vocabulary)
    if not names or not vocabulary:
        raise InputError(f"{path}: 'vocabulary' is not a list of names in lower case")
    return [caption | {"vocabulary": vocabulary} for caption in captions]


def pattern(vocabulary):
    """A regular expression for a mention of an object, in any case.

    Of names that overlap, such as "red ring" and "ring", the longer one is taken.
    """
    names = sorted(vocabulary, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, names)) + r")\b", re.IGNORECASE)


def mentions(text, vocabulary):
    """Every mention of an object of the vocabulary (lower case) in a caption, in order."""
    return [name.lower() for name in pattern(vocabulary).findall(text)]


def score(questions, answers):
    """Rates in percent over all captions (micro-averages); a missing caption mentions nothing.

    questions: as from `load`. answers: records {"question_id", "text"}. Returns RATES' keys, `mentioned` (mentions a
    caption), `n` and `missing`. A rate over nothing (no mention at all) is 0. Raises InputError as `match_answers`.
    """
    records = match_answers("toy captions", questions, answers)
    counts = dict.fromkeys(("mentions", "wrong", "with_wrong", "said", "right", "objects", "absent", "absent_said"), 0)
    for question in questions:
        text = records.get(question["question_id"], {"text": ""})["text"]
        found, there = mentions(text, question["vocabulary"]), set(question["objects"])
        wrong = [name for name in found if name not in there]
        absent = set(question["signature"]) - there
        counts["mentions"] += len(found)
        counts["wrong"] += len(wrong)
        counts["with_wrong"] += bool(wrong)
        counts["said"] += len(set(found))
        counts["right"] += len(set(found) & there)
        counts["objects"] += len(there)
        counts["absent"] += len(absent)
        counts["absent_said"] += len(absent & set(found))
    percent = lambda part, whole: round(100 * part / whole, 2) if whole else 0.0
    return {
        "chair_i": percent(counts["wrong"], counts["mentions"]),
        "chair_s": percent(counts["with_wrong"], len(questions)),
        "precision": percent(counts["right"], counts["said"]),
        "recall": percent(counts["right"], counts["objects"]),
        "f1": percent(2 * counts["right"], counts["said"] + counts["objects"]),
        "signature": percent(counts["absent_said"], counts["absent"]),
        "mentioned": round(counts["mentions"] / len(questions), 3),
        "n": len(questions),
        "missing": len(questions) - len(records),
    }


def report(scores):
    head = f"toy captions: {scores['n']} pictures, {scores['missing']} without a caption, "
    head += f"{scores['mentioned']:.2f} objects mentioned in each (all in %)"
    return "\n".join([head, *(f"{name:<50}{scores[key]:>8.2f}" for key, name in RATES.items())])
