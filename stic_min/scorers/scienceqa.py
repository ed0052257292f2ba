"""ScienceQA (test split, 4,241 questions, 2,017 with an image): the prompt, the parser and the scores.

Data: `problems.json`, `pid_splits.json` and `images/test/{id}/`, as published on https://scienceqa.github.io.
The prompt is that of LLaVA's `llava_test_CQM-A.json`, the groups are those of ScienceQA's
`tools/evaluate_acc.py`.

RULES are two parsers: `llava` is that of LLaVA's `llava/eval/eval_science_qa.py`, `lmms_eval` that of
lmms-eval's `tasks/scienceqa/utils.py`. An unreadable answer is wrong in both; the GPT-3 scorer of ScienceQA
picked a random choice instead. Not here: the chain-of-thought format of the fine-tuned LLaVA-v0 models.
"""

import re
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import check_text, read_json
from stic_min.scorers.common import match_answers, proportion

DATA_FILES = """\
problems.json, pid_splits.json   https://scienceqa.github.io
images/test/ID/image.png         the same
"""
SUFFIX = "Answer with the option's letter from the given choices directly."

GROUPED_BY = "subject"
LETTERS = tuple("ABCDE")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = {f"grade{g}": "G1-6" if g <= 6 else "G7-12" for g in range(1, 13)}
GROUPS = ("average", "IMG", "TXT", "NO", "NAT", "SOC", "LAN", "G1-6", "G7-12", "img_acc")
NOTE = (
    "IMG (with an image) is what LLaVA publishes for v1.5 (img_acc: by its script); the STIC paper does not "
    "say"
)


def prompt(problem):
    """The text of one problem, without `<image>` and suffix: the context if any, the question, the options.

    problem: an entry of problems.json; `question`, `choices` and `hint` are read.
    Returns the text; double spaces are replaced in one left-to-right pass (three become two), then it is
    stripped.
    Source: LLaVA, `llava_test_CQM-A.json`.
    """
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    options = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(problem["choices"]))
    return f"{context}{problem['question']}\n{options}".replace("  ", " ").strip()


def load(data: str | Path) -> list[dict]:
    """The questions of the test split, in the order of pid_splits.json.

    data: the folder of `problems.json` and `pid_splits.json`.
    Returns one dict per question: `question_id`; `image`, a path relative to `data`, or None; `text`, with
    the suffix, without `<image>`; `answer`, an index into `choices`; `choices`; `hint`, "" for none;
    `subject` and `grade`, None where unknown. The prompt to record is `text`, after "<image>\\n" if there is
    an image.
    Raises InputError: a file is missing or not JSON, an id of the split is repeated or unknown, a question or
    its choices are missing, an answer index is out of range, another field is not text or not valid Unicode,
    an image is outside the problem's folder.
    """
    problems_file = Path(data) / "problems.json"
    splits_file = Path(data) / "pid_splits.json"
    problems = read_json(problems_file)
    ids = read_json(splits_file).get("test")
    if not isinstance(ids, list) or len(set(map(str, ids))) != len(ids):
        raise InputError(f"{splits_file}: 'test' is not a list of distinct ids")
    questions = []
    for qid in map(str, ids):
        problem = problems.get(qid)
        where = f"{problems_file}: problem {qid!r}"
        if not isinstance(problem, dict):
            raise InputError(f"{splits_file}: test id {qid!r} is not a problem in {problems_file.name}")
        choices = problem.get("choices")
        answer = problem.get("answer")
        if not isinstance(problem.get("question"), str) or not isinstance(choices, list):
            raise InputError(f"{where} needs a text 'question' and a list 'choices'")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise InputError(f"{where}: answer {answer!r} is not an index into its {len(choices)} choices")
        optional = {name: problem.get(name) for name in ("image", "hint", "subject", "grade")}
        for name, value in optional.items():
            if not isinstance(value, str | None):
                raise InputError(f"{where}: {name} {value!r} is not text")
        image = optional["image"]
        parts = Path(f"{qid}/{image}").parts
        if image and (len(parts) != 2 or ".." in parts):
            raise InputError(f"{where}: image {image!r} is not a file name in the problem's folder")
        text = f"{prompt(problem)}\n{SUFFIX}"
        check_text(text, f"{where}: prompt")
        questions.append({
            "question_id": qid, "image": f"images/test/{qid}/{image}" if image else None, "text": text,
            "answer": answer, "choices": choices, "hint": optional["hint"] or "",
            "subject": optional["subject"], "grade": optional["grade"],
        })  # fmt: skip
    return questions


def parse(text):
    """The option letter in a response. Case matters, and the text is not stripped.

    Returns the letter or "FAILED". The third rule also accepts letters after E, and none of the rules knows
    the number of choices (`predicted_index` does).
    Source: LLaVA, `llava/eval/eval_science_qa.py`.
    """
    if text in LETTERS:  # "B"
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":  # "B. rock", but not "B." or "B) rock"
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)  # one more character must follow, no newline
    return letters[0] if len(letters) == 1 else "FAILED"


def parse_lmms_eval(text):
    """lmms-eval's version: a letter in any case, or a capital and a period, whatever follows.

    Source: lmms-eval, `sqa_process_results` in `tasks/scienceqa/utils.py`.
    """
    text = text.strip()
    if text.upper() in LETTERS:  # "b"
        return text.upper()
    return text[0] if text[:1] in LETTERS and text[1:2] == "." else "FAILED"  # "B.", "B.rock"


PARSERS = {"llava": parse, "lmms_eval": parse_lmms_eval}
RULES = tuple(PARSERS)


def predicted_index(text, num_choices, rule="llava"):
    """The index of the choice that a response names, -1 (wrong) if it names none.

    num_choices: the number of choices of the question; letters after E never count. rule: one of RULES.
    Source: LLaVA, `llava/eval/eval_science_qa.py`.
    """
    letter = PARSERS[rule](text)
    return LETTERS.index(letter) if letter in LETTERS[:num_choices] else -1


def score(questions: list[dict], answers: list[dict], rule: str = "llava") -> dict:
    """Accuracy in percent, by group; a missing prediction is wrong.

    questions: from `load`. answers: records {"question_id", "prompt", "text"}. rule: one of RULES.
    Returns {"score", "interval", "n", "correct", "missing", "rule", "groups": {name: the first four}}. The
    top-level numbers are those of the group IMG, or of average if no question has an image. Groups: average;
    IMG, TXT, NO (the problem has an image, a hint, neither; IMG and TXT overlap); NAT, SOC, LAN by subject;
    G1-6, G7-12 by grade; img_acc, LLaVA's IMG, over the records whose prompt contains `<image>` (a missing
    record has no prompt, so it is not included). Empty groups are omitted. Raises InputError like
    `match_answers`.
    Sources: ScienceQA, `tools/evaluate_acc.py`; LLaVA, `llava/eval/eval_science_qa.py`.
    """
    records = match_answers("ScienceQA", questions, answers)
    hits = {group: [] for group in GROUPS}
    for q in questions:
        record = records.get(q["question_id"], {"text": "FAILED"})
        hit = predicted_index(record["text"], len(q["choices"]), rule) == q["answer"]
        member = {
            "average": True, "IMG": q["image"], "TXT": q["hint"], "NO": not (q["image"] or q["hint"]),
            SUBJECTS.get(q["subject"]): True, GRADES.get(q["grade"]): True,
            "img_acc": "<image>" in str(record.get("prompt")),
        }  # fmt: skip
        for group in GROUPS:
            if member.get(group):
                hits[group].append(hit)
    groups = {group: proportion(group_hits) for group, group_hits in hits.items() if group_hits}
    headline = groups.get("IMG", groups["average"])
    return headline | {"missing": len(questions) - len(records), "rule": rule, "groups": groups}


def report(scores: dict) -> str:
    """The accuracies as lines of text. scores: from `score`."""
    total = scores["groups"]["average"]["n"]
    head = f"ScienceQA test: {total} questions, {scores['missing']} without a prediction; "
    row = "{:<9}{score:>7.2f} [{interval[0]:.2f}, {interval[1]:.2f}]   n={n}"
    table = [row.format(name, **group) for name, group in scores["groups"].items()]
    return "\n".join([f"{head}accuracy in %, rule {scores['rule']}", *table, NOTE])
