"""ChartQA (test; 1,250 human-written and 1,250 machine-generated questions): the prompt and relaxed accuracy.

Data: `test_human.json`, `test_augmented.json` and `png/`, the test folder of the ChartQA dataset
(vis-nlp/ChartQA). Neither LLaVA-1.5 nor STIC released a script for it. The prompt suffix is LLaVA's for short
answers; lmms-eval uses "Answer the question with a single word.", so the suffix is an option.

RULES are three scorers in use: `lmms_eval` is lmms-eval's, which takes answers verbatim; `vlmevalkit` is
VLMEvalKit's, which strips them; `vlmevalkit_2024` is VLMEvalKit's before September 2025, with answer and
label swapped.
Not here: rules for lists, units or thousands separators, which none of the three has.
"""

from pathlib import Path

from stic_min.runtime.files import check_text
from stic_min.scorers.common import match_answers, proportion, read_entries, with_interval

DATA_FILES = """\
test_human.json, test_augmented.json   https://github.com/vis-nlp/ChartQA, its test folder
png/NAME.png                           the same
"""
SUFFIX = "Answer the question using a single word or phrase."
GROUPED_BY = "split"
SPLITS = ("human", "augmented")


def load(data: str | Path, suffix: str = SUFFIX) -> list[dict]:
    """The questions, the human-written ones first.

    data: the folder of `test_human.json` and `test_augmented.json`. suffix: the last line of the prompt, ""
    for none.
    Returns one dict per question: `question_id`, such as "human-0"; `image`, a path relative to `data`;
    `text`, and the same as `prompt`; `label`; `split`. Raises InputError like `read_entries` and
    `check_text`.
    """
    questions = []
    form = dict.fromkeys(("imgname", "query", "label"), str)
    for split in SPLITS:
        path = Path(data) / f"test_{split}.json"
        entries, _ = read_entries(path, form)
        for number, entry in enumerate(entries):
            text = entry["query"] + (f"\n{suffix}" if suffix else "")
            check_text(text, f"{path}, entry {number}: query")
            questions.append({
                "question_id": f"{split}-{number}", "image": f"png/{entry['imgname']}", "text": text,
                "prompt": text, "label": entry["label"], "split": split,
            })  # fmt: skip
    return questions


def to_float(text):
    """The number in a text by Python's `float`, percentages as fractions; None if it is not a number."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_relaxed_match(text, label):
    """Whether an answer is correct: numbers within 5% of the label, everything else verbatim except for case.

    A label of zero has no 5% margin, so it is compared as text. Source: lmms-eval, `relaxed_correctness`.
    """
    number = to_float(text)
    target = to_float(label)
    if number is not None and target:
        return abs(number - target) / abs(target) <= 0.05
    return text.lower() == label.lower()


MATCHES = {
    "lmms_eval": is_relaxed_match,
    "vlmevalkit": lambda text, label: is_relaxed_match(text.strip(), label),
    "vlmevalkit_2024": lambda text, label: is_relaxed_match(label, text.strip()),
}
RULES = tuple(MATCHES)


def score(questions: list[dict], answers: list[dict], rule: str = "lmms_eval") -> dict:
    """Relaxed accuracy in percent; a missing answer is wrong.

    questions: from `load`. answers: records {"question_id", "text"}. rule: one of RULES.
    Returns {"score", "interval", "n", "correct", "mean_of_splits", "missing", "rule", "groups"}, over all
    questions and for the groups human and augmented. Raises InputError like `match_answers`.
    """
    records = match_answers("ChartQA", questions, answers)
    hits = {}
    for question in questions:
        record = records.get(question["question_id"])
        hit = record is not None and MATCHES[rule](record["text"], question["label"])
        hits.setdefault(question["split"], []).append(hit)
    groups = {split: proportion(split_hits) for split, split_hits in hits.items()}
    return proportion([hit for split_hits in hits.values() for hit in split_hits]) | {
        "mean_of_splits": sum(group["score"] for group in groups.values()) / len(groups),
        "missing": len(questions) - len(records),
        "rule": rule,
        "groups": groups,
    }


def report(scores: dict) -> str:
    """The accuracies as lines of text. scores: from `score`."""
    head = f"ChartQA test: {scores['n']} questions, {scores['missing']} without an answer; "
    head += f"relaxed accuracy in %, rule {scores['rule']}"
    rows = [("all", scores), *scores["groups"].items()]
    table = [f"{name:<16}{with_interval(group)}   n={group['n']}" for name, group in rows]
    return "\n".join([head, *table, f"{'mean of splits':<16}{scores['mean_of_splits']:.1f}"])
