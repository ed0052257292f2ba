"""The toy world's questions about pictures: accuracy by type of question.

Data: `questions.json` as `python -m stic_min.toy` writes it: [{"question_id", "image", "type", "text", "answer"}].
An answer is right if it is the true one to the letter, case, outer blanks and a full stop at the end aside.
"""

from pathlib import Path

from stic_min.scorers.common import match_answers, read_entries

GROUPED_BY = "type"


def load(data):
    """The questions: a dict each with `question_id`, `image` (relative to `data`), `type`, `text` and `answer`.
    Raises InputError as `read_entries`."""
    form = dict.fromkeys(("question_id", "image", "type", "text", "answer"), str)
    return read_entries(Path(data) / "questions.json", form)[0]


def is_right(text, answer):
    return text.strip().removesuffix(".").lower() == answer.lower()


def score(questions, answers):
    """Accuracy in percent: {"accuracy", "types": {type: {"n", "accuracy"}}, "n", "missing"}; a missing answer is wrong.

    questions: as from `load`. answers: records {"question_id", "text"}. Raises InputError as `match_answers`.
    """
    records = match_answers("toy questions", questions, answers)
    hits = {}
    for question in questions:
        text = records.get(question["question_id"], {"text": ""})["text"]
        hits.setdefault(question["type"], []).append(is_right(text, question["answer"]))
    percent = lambda own: round(100 * sum(own) / len(own), 2)
    return {
        "accuracy": percent([hit for own in hits.values() for hit in own]),
        "types": {kind: {"n": len(own), "accuracy": percent(own)} for kind, own in sorted(hits.items())},
        "n": len(questions),
        "missing": len(questions) - len(records),
    }


def report(scores):
    rows = [("all", scores), *scores["types"].items()]
    head = f"toy questions: {scores['n']}, {scores['missing']} without an answer; accuracy in %"
    return "\n".join([head, *(f"{kind:<12}{own['accuracy']:>8.2f}   n={own['n']}" for kind, own in rows)])
