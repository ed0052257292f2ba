"""The toy world's questions about pictures: accuracy by type of question.

Data: `questions.json`, written by `python -m stic_min.toy`: [{"question_id", "image", "type", "text",
"answer"}]. An answer is right if it equals the true answer, ignoring case, surrounding whitespace and one
final period.
"""

from pathlib import Path

from stic_min.scorers.common import match_answers, proportion, read_entries

GROUPED_BY = "type"


def load(data: str | Path) -> list[dict]:
    """The questions: dicts with `question_id`, `image` (relative to `data`), `type`, `text` and `answer`.
    Raises InputError like `read_entries`."""
    form = dict.fromkeys(("question_id", "image", "type", "text", "answer"), str)
    return read_entries(Path(data) / "questions.json", form)[0]


def is_right(text: str, answer: str) -> bool:
    return text.strip().removesuffix(".").lower() == answer.lower()


def score(questions: list[dict], answers: list[dict]) -> dict:
    """Accuracy in percent: {"score", "interval", "n", "correct", "groups": {type: these four}, "missing"},
    and rounded {"accuracy", "types": {type: {"n", "accuracy"}}}.

    questions: from `load`. answers: records {"question_id", "text"}; a missing answer is wrong. Raises
    InputError like `match_answers`.
    """
    records = match_answers("toy questions", questions, answers)
    hits_by_type = {}
    for question in questions:
        text = records.get(question["question_id"], {"text": ""})["text"]
        hits_by_type.setdefault(question["type"], []).append(is_right(text, question["answer"]))
    total = proportion([hit for hits in hits_by_type.values() for hit in hits])
    groups = {kind: proportion(hits) for kind, hits in sorted(hits_by_type.items())}
    percent = lambda part: round(part["score"], 2)
    return {
        "accuracy": percent(total),
        "types": {kind: {"n": part["n"], "accuracy": percent(part)} for kind, part in groups.items()},
        **total,
        "groups": groups,
        "missing": len(questions) - len(records),
    }


def report(scores: dict) -> str:
    rows = [("all", scores), *scores["types"].items()]
    head = f"toy questions: {scores['n']}, {scores['missing']} without an answer; accuracy in %"
    return "\n".join([head, *(f"{kind:<12}{part['accuracy']:>8.2f}   n={part['n']}" for kind, part in rows)])
