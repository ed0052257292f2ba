"""ChartQA (test, 1,250 questions by people and 1,250 by a program): the prompt and relaxed accuracy.

Data: `test_human.json`, `test_augmented.json` and `png/`, the test folder of the ChartQA dataset (vis-nlp/ChartQA).
Neither LLaVA-1.5 nor STIC released a script for it. The prompt's suffix is LLaVA's for short answers; lmms-eval's is
"Answer the question with a single word.", so it is an option.

RULES are three scorers in use: `lmms_eval` is lmms-eval's, which takes answers as they are; `vlmevalkit` is
VLMEvalKit's, which strips them; `vlmevalkit_2024` is the same before September 2025, with answer and label exchanged.
Not here: rules for lists, units or thousands separators, which none of these has.
"""

from pathlib import Path

from stic_min.runtime.files import check_text
from stic_min.scorers.common import figure, match_answers, read_entries, share

SUFFIX = "Answer the question using a single word or phrase."
GROUPED_BY = "split"
SPLITS = ("human", "augmented")


def load(data, suffix=SUFFIX):
    """The questions, those by people first.

    data: the folder of `test_human.json` and `test_augmented.json`. suffix: the prompt's last line, "" for none.
    Returns a dict a question: `question_id`, such as "human-0"; `image`, a path relative to `data`; `text`, and the
    same as `prompt`; `label`; `split`. Raises InputError as `read_entries` and `check_text`.
    """
    questions = []
    for split in SPLITS:
        path, form = Path(data) / f"test_{split}.json", dict.fromkeys(("imgname", "query", "label"), str)
        for number, entry in enumerate(read_entries(path, form)[0]):
            text = entry["query"] + (f"\n{suffix}" if suffix else "")
            check_text(text, f"{path}, entry {number}: query")
            questions.append({
                "question_id": f"{split}-{number}", "image": f"png/{entry['imgname']}", "text": text, "prompt": text,
                "label": entry["label"], "split": split,
            })  # fmt: skip
    return questions


def to_float(text):
    """The number that a text is, percentages as fractions; None if it is none. Python's own idea of a number counts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_relaxed_match(text, label):
    """Whether an answer is right: numbers to 5 % of the label, all else to the letter but for case.

    A label of zero has no 5 %, so it is compared as text. Source: lmms-eval, `relaxed_correctness`.
    """
    number, wanted = to_float(text), to_float(label)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= 0.05
    return text.lower() == label.lower()


MATCHES = {
    "lmms_eval": is_relaxed_match,
    "vlmevalkit": lambda text, label: is_relaxed_match(text.strip(), label),
    "vlmevalkit_2024": lambda text, label: is_relaxed_match(label, text.strip()),
}
RULES = tuple(MATCHES)


def score(questions, answers, rule="lmms_eval"):
    """Relaxed accuracy in percent; a missing answer is wrong.

    questions: as from `load`. answers: records {"question_id", "text"}. rule: one of RULES.
    Returns {"score", "interval", "n", "correct", "mean_of_splits", "missing", "rule", "groups"}, over all questions and
    for the groups human and augmented. Raises InputError as `match_answers`.
    """
    records, hits = match_answers("ChartQA", questions, answers), {}
    for question in questions:
        record = records.get(question["question_id"])
        hit = record is not None and MATCHES[rule](record["text"], question["label"])
        hits.setdefault(question["split"], []).append(hit)
    groups = {split: share(own) for split, own in hits.items()}
    return share([hit for own in hits.values() for hit in own]) | {
        "mean_of_splits": sum(own["score"] for own in groups.values()) / len(groups),
        "missing": len(questions) - len(records),
        "rule": rule,
        "groups": groups,
    }


def report(scores):
    """The accuracies as lines of text. scores: as from `score`."""
    head = f"ChartQA test: {scores['n']} questions, {scores['missing']} without an answer; "
    head += f"relaxed accuracy in %, rule {scores['rule']}"
    rows = [("all", scores), *scores["groups"].items()]
    table = [f"{name:<16}{figure(own)}   n={own['n']}" for name, own in rows]
    return "\n".join([head, *table, f"{'mean of splits':<16}{scores['mean_of_splits']:.1f}"])
