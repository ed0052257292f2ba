"""ScienceQA (test split, 4241 questions, 2017 with an image): the prompt, the parser and the scores.

Data: `problems.json`, `pid_splits.json` and `images/test/{id}/`, as https://scienceqa.github.io has them.
The prompt is that of LLaVA's `llava_test_CQM-A.json`, the parser that of `llava/eval/eval_science_qa.py`,
the groups are those of ScienceQA's `tools/evaluate_acc.py`. An answer that cannot be read is wrong; the
GPT-3 scorer of ScienceQA drew a random choice instead. Not here: the chain-of-thought format of the
fine-tuned LLaVA-v0 models, and lmms-eval's lenient parser (it strips, ignores case, accepts `B.`).
"""

import json
import re
from pathlib import Path

from stic_min import InputError
from stic_min.scorers import match_answers

SUFFIX = "Answer with the option's letter from the given choices directly."

LETTERS = tuple("ABCDE")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = {f"grade{g}": "G1-6" if g <= 6 else "G7-12" for g in range(1, 13)}
GROUPS = ("average", "IMG", "TXT", "NO", "NAT", "SOC", "LAN", "G1-6", "G7-12", "img_acc")

# (row, all, IMG, one of the two): STIC paper, Tables 1 and 2; LLaVA's model zoo; LLaVA-1.5 paper.
PUBLISHED = (
    ("STIC paper, LLaVA-1.6 7B", None, None, 68.9),
    ("STIC paper, LLaVA-1.6 7B, DaR", None, None, 69.9),
    ("STIC paper, LLaVA-1.6 7B w/ STIC, no DaR", None, None, 72.5),
    ("STIC paper, LLaVA-1.6 7B w/ STIC, DaR", None, None, 75.3),
    ("STIC paper, LLaVA-1.5 7B w/ STIC", None, None, 69.5),
    ("LLaVA, v1.6-mistral-7b (model zoo)", None, None, 72.8),
    ("LLaVA, v1.5-7b", None, 66.8, None),
    ("LLaVA, v1.5-13b (all: its answers file)", 74.4, 71.6, None),
)
NOTE = ("Note: the STIC paper does not say which accuracy it reports; LLaVA's published one for v1.5 is IMG, "
        "and the paper's LLaVA-1.5 row (66.8) repeats it.")


def prompt(problem):
    """The text of one problem, without `<image>` and suffix: the context if any, the question, the options.

    problem: an entry of problems.json; `question`, `choices` and `hint` are read.
    Returns the text; double spaces are replaced in one left-to-right pass (three become two), then it is
    stripped. Source: LLaVA, `llava_test_CQM-A.json`.
    """
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    options = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(problem["choices"]))
    return f"{context}{problem['question']}\n{options}".replace("  ", " ").strip()


def load(data):
    """The questions of the test split, in the order of pid_splits.json.

    data: the folder that holds `problems.json` and `pid_splits.json`.
    Returns a dict a question: `question_id`; `image`, a path relative to `data`, or None; `text`, with the
    suffix, without `<image>`; `answer`, an index into `choices`; `choices`; `hint`, "" for none; `subject`
    and `grade`, None where unknown. The prompt to record is `text`, behind "<image>\\n" if there is an image.
    Raises InputError: a file is missing or not JSON, an id of the split is repeated or unknown, a question
    or its choices are missing, an answer index is out of range, an image lies outside the problem's folder.
    """
    problems_file, splits_file = Path(data) / "problems.json", Path(data) / "pid_splits.json"
    problems, ids = _read_object(problems_file), _read_object(splits_file).get("test")
    if not isinstance(ids, list) or len(set(map(str, ids))) != len(ids):
        raise InputError(f"{splits_file}: 'test' is not a list of distinct ids")
    questions = []
    for qid in map(str, ids):
        problem, where = problems.get(qid), f"{problems_file}: problem {qid!r}"
        if not isinstance(problem, dict):
            raise InputError(f"{splits_file}: test id {qid!r} is not a problem in {problems_file.name}")
        choices, answer, image = problem.get("choices"), problem.get("answer"), problem.get("image")
        if not isinstance(problem.get("question"), str) or not isinstance(choices, list):
            raise InputError(f"{where} needs a text 'question' and a list 'choices'")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise InputError(f"{where}: answer {answer!r} is not an index into its {len(choices)} choices")
        parts = Path(f"{qid}/{image}").parts
        if image and (len(parts) != 2 or ".." in parts):
            raise InputError(f"{where}: image {image!r} is not a file name in the problem's folder")
        questions.append({
            "question_id": qid, "image": f"images/test/{qid}/{image}" if image else None,
            "text": f"{prompt(problem)}\n{SUFFIX}", "answer": answer, "choices": choices,
            "hint": problem.get("hint") or "", "subject": problem.get("subject"),
            "grade": problem.get("grade")})
    return questions


def _read_object(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object")
    return value


def parse(text):
    """The option letter that a prediction gives; case matters and the text is not stripped.

    text: what the model said. Returns the letter or "FAILED"; the third rule also finds letters after E,
    and none of the rules knows how many choices there are (`predicted_index` does).
    Source: LLaVA, `llava/eval/eval_science_qa.py`.
    """
    if text in LETTERS:                                     # "B"
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":           # "B. rock", but not "B." or "B) rock"
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)     # one more character must follow, no newline
    return found[0] if len(found) == 1 else "FAILED"


def predicted_index(text, num_choices):
    """The index of the choice that a prediction names, -1 (wrong) when it names none.

    text: what the model said. num_choices: how many choices the question has; letters after E never count.
    Source: LLaVA, `llava/eval/eval_science_qa.py`.
    """
    letter = parse(text)
    return LETTERS.index(letter) if letter in LETTERS[:num_choices] else -1


def score(questions, answers):
    """Accuracy over all questions and by group; a missing prediction is wrong.

    questions: as from `load`. answers: records {"question_id", "prompt", "text"}.
    Returns {group: {"n", "correct", "acc"}, ..., "missing": questions without a record}; acc is a percentage
    with two decimals. Groups: average; IMG, TXT, NO (the problem has an image, a hint, neither; IMG and TXT
    overlap); NAT, SOC, LAN by subject; G1-6, G7-12 by grade; img_acc, LLaVA's IMG: over the records whose
    prompt contains `<image>` (a missing record has no prompt, hence is not in it). Empty groups are left out.
    Raises InputError as `match_answers`.
    Sources: ScienceQA, `tools/evaluate_acc.py`; LLaVA, `llava/eval/eval_science_qa.py`.
    """
    records = match_answers("ScienceQA", questions, answers)
    hits = {group: [] for group in GROUPS}
    for q in questions:
        record = records.get(q["question_id"], {"text": "FAILED"})
        hit = predicted_index(record["text"], len(q["choices"])) == q["answer"]
        member = {"average": True, "IMG": q["image"], "TXT": q["hint"], "NO": not (q["image"] or q["hint"]),
                  SUBJECTS.get(q["subject"]): True, GRADES.get(q["grade"]): True,
                  "img_acc": "<image>" in (record.get("prompt") or "")}
        for group in GROUPS:
            if member.get(group):
                hits[group].append(hit)
    scores = {g: {"n": len(h), "correct": sum(h), "acc": round(sum(h) / len(h) * 100, 2)}
              for g, h in hits.items() if h}
    return {**scores, "missing": len(questions) - len(records)}


def report(scores):
    """A plain-text table: both accuracies, the published ones, the other groups. scores: as from `score`."""
    def acc(group):
        return f"{scores[group]['acc']:.2f}" if group in scores else None

    rows = [("accuracy (%)", "all", "IMG", "unstated"), ("these answers", acc("average"), acc("IMG"), None),
            ("  IMG by recorded prompt, as LLaVA", None, acc("img_acc"), None), *PUBLISHED]
    table = [f"{name:<42}" + "".join(f"{v or '-':>9}" for v in values) for name, *values in rows]
    groups = "  ".join(f"{g} {acc(g)} (n={scores[g]['n']})" for g in GROUPS[2:-1] if g in scores)
    head = f"ScienceQA test: {scores['average']['n']} questions, {scores['missing']} without a prediction"
    return "\n".join([head, *table, groups, NOTE])
