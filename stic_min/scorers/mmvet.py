"""MM-Vet (218 questions on 200 images): the prompt, the judge's request and the scores from its grades.

Data: `mm-vet.json` and `images/`, the release of the MM-Vet repository. Answers are exchanged in its form,
one JSON object {id: text}. The request, the parsing of the reply and the scores follow that repository's
evaluator notebook; the prompt, the bare question, is that of LLaVA's `llava-mm-vet.jsonl`. One difference: a
judge that replies `nan` is asked again; the official range check accepts it. Not here: any score without a
judge's grades, and the official evaluator's sixth request after five unreadable replies, whose reply it
stores unread next to the grade 0.
"""

import json
import math
import re
from pathlib import Path

import numpy as np

from stic_min import InputError
from stic_min.runtime.files import read_json, read_records, text_field
from stic_min.scorers.common import match_answers, mean, unread, with_interval

DATA_FILES = """\
mm-vet.json        in mm-vet.zip, linked from https://github.com/yuweihao/MM-Vet
images/v1_ID.png   the same
"""
COMPLETE = True
GROUPED_BY = "capabilities"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

OFFICIAL_JUDGE = "gpt-4-0613"
RUNS = 5
PROMPTS = "mm_vet"
OWN_PROMPTS = {
    "few_shot": (
        "You grade short answers about pictures. Every row below holds a question, the true answer, what a "
        "model "
        "answered and a grade from 0.0 (nothing right) to 1.0 (all of it right) in steps of 0.1. A true "
        "answer with "
        "<AND> has several parts, and the grade is the portion of them that the model gives; one with <OR> "
        "lists "
        "alternatives, any of which earns 1.0. Judge the meaning, not the wording, and write nothing but "
        "the grade "
        "that the last row lacks.\n\n"
        "Question | Ground truth | Prediction | Correctness\n"
        "--- | --- | --- | ---\n"
        "Which fruits are in the bowl? | apple <AND> pear | Two lemons. | 0.0\n"
        "Which fruits are in the bowl? | apple <AND> pear | There is a pear in it. | 0.5\n"
        "Which fruits are in the bowl? | apple <AND> pear | A green pear and a red apple. | 1.0\n"
        "What does the ticket cost? | 4.50 <OR> 4.50 euros | It costs 4.50. | 1.0\n"
        "What does the ticket cost? | 4.50 <OR> 4.50 euros | 45 euros | 0.0\n"
        "Why are the people running? | It has begun to rain heavily, and they have no umbrellas, so they "
        "run to the "
        "bus shelter. | They want to catch the bus at the shelter. | 0.2\n"
        "Why are the people running? | It has begun to rain heavily, and they have no umbrellas, so they "
        "run to the "
        "bus shelter. | They are caught in the rain and hurry to a place with a roof. | 0.8\n"
    ),
    "retry_suffix": "\nThe grade as a number, with no other text: ",
}

TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)  # of the five attempts; the first one is without the suffix

# ---------------------------------------------------------------- questions and answers


def load(data: str | Path) -> list[dict]:
    """The questions, in the order of the file.

    data: the folder of `mm-vet.json`. Returns one dict per question: `question_id`, an int, 12 for the
    official "v1_12" (as in LLaVA's question file); `image`; `text` and `prompt`, the bare question; `answer`,
    the ground truth; `capabilities`, the names of the required ones. Raises InputError naming file and id.
    """
    path = Path(data) / "mm-vet.json"
    questions = []
    for key, entry in read_json(path).items():
        number = _number(key)
        where = f"{path}: {key!r}"
        if not isinstance(number, int):
            raise InputError(f"{where} is not an id of the form v1_12")
        if not isinstance(entry, dict):
            raise InputError(f"{where} is not a JSON object")
        required = entry.get("capability")
        known = [name for name in CAPABILITIES if isinstance(required, list) and name in required]
        if not known or len(known) != len(required):  # an unknown or repeated one makes the list longer
            raise InputError(f"{where}: capability is not a list of some of {', '.join(CAPABILITIES)}")
        text = text_field(entry, "question", where)
        questions.append({
            "question_id": number, "image": f"images/{text_field(entry, 'imagename', where)}", "text": text,
            "prompt": text, "answer": text_field(entry, "answer", where), "capabilities": known})  # fmt: skip
    if not questions:
        raise InputError(f"{path}: no questions")
    return questions


def _number(key):
    """12 for "v1_12", anything else unchanged."""
    return int(key[3:]) if isinstance(key, str) and re.fullmatch("v1_(0|[1-9][0-9]{0,8})", key) else key


def read_answers(path):
    """Reads answers in the official form {"v1_12": text}, or JSON lines with question_id 12 or "v1_12".

    Returns records {"question_id": 12, "text", ...}. Raises InputError naming the file.
    """
    try:
        results = read_json(path)
    except InputError:  # several lines, or not JSON at all: `read_records` reports what is wrong
        results = {"question_id": None}
    if "question_id" in results:
        records = [record for _, record in read_records(path)]
        return [record | {"question_id": _number(record.get("question_id"))} for record in records]
    return [{"question_id": _number(key), "text": text} for key, text in results.items()]


def official(questions, records):
    """(".json", the text of the official result file, {"v1_12": text}). Raises InputError like
    `match_answers`.

    Source: LLaVA, `scripts/convert_mmvet_for_eval.py`.
    """
    texts = {qid: record["text"] for qid, record in match_answers("MM-Vet", questions, records).items()}
    ids = [str(q["question_id"]) for q in questions]
    return ".json", json.dumps({f"v1_{qid}": texts[qid] for qid in ids if qid in texts}, indent=2) + "\n"


# ---------------------------------------------------------------- the judge


def parse(content):
    """The grade in a reply: the text up to the first space as a number from 0 to 1; None if it is not one.

    "nan" is not outside that range, so it gives NaN. Source: the MM-Vet evaluator.
    """
    try:
        value = float(_first(content))
    except ValueError:
        return None
    return None if value < 0 or value > 1 else value


def _is_grade(content):
    value = parse(str(content))
    return value is not None and not math.isnan(value)


def _first(content):
    return content.split(" ")[0].strip()


def judge(questions, answers, judge):
    """Asks the judge about every answer, `judge.runs` times -> the official grades, as `score` takes them.

    If a reply cannot be parsed (or is NaN), the request is repeated with the suffix and a rising temperature;
    after the fifth such reply the grade is 0. questions: from `load`. answers: records {"question_id",
    "text"}, one for each question. judge: a Judge with `texts` in the form of OWN_PROMPTS. Raises InputError
    like `match_answers`.
    Source: the MM-Vet evaluator.
    """
    records = match_answers("MM-Vet", questions, answers, complete=True)

    def grade(item):
        question, run = item
        truth = question["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        row = " | ".join([question["prompt"], truth, records[str(question["question_id"])]["text"], ""])
        request = f"{judge.texts['few_shot']}\n{row}"
        failed = False
        for attempt, temperature in enumerate(TEMPERATURES, 1):
            where = f"v1_{question['question_id']}, run {run}, attempt {attempt}"
            text = request if attempt == 1 else request + judge.texts["retry_suffix"]
            messages = [{"role": "user", "content": text}]
            reply = judge.ask(where, messages, temperature=temperature, max_tokens=3)
            if _is_grade(reply.content):
                value = parse(reply.content)
                break
        else:
            value = 0.0
            failed = True
        return failed, {"content": _first(reply.content), "score": value, "model": reply.model}

    items = [(question, run) for question in questions for run in range(1, judge.runs + 1)]
    judged = {f"v1_{q['question_id']}": {"content": [], "score": [], "model": []} for q in questions}
    verdicts = judge.map(grade, items)
    if all(failed for failed, _ in verdicts):
        first = verdicts[0][1]["content"]
        hint = "(see --judge-max-tokens)"
        raise InputError(f"MM-Vet: none of the judge's replies is a grade, the first is {first!r} {hint}")
    for (question, _), (_, verdict) in zip(items, verdicts):
        for name, values in judged[f"v1_{question['question_id']}"].items():
            values.append(verdict[name])
    return judged


def read_judged(paths):
    """Reads official grades files -> {"v1_12": {"content": [...], "score": [...], "model": [...]}}, one item
    per run.

    The runs of several files are concatenated. Raises InputError naming the file and the id: the three lists
    are missing or of unequal lengths, a grade is not a number from 0 to 1.
    """
    judged = {}
    for path in paths:
        for key, entry in read_json(path).items():
            names = ("content", "score", "model")
            lists = [entry.get(name) if isinstance(entry, dict) else None for name in names]
            if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
                message = "needs lists 'content', 'score' and 'model' of the same length"
                raise InputError(f"{path}: {key!r} {message}")
            for value in lists[1]:
                if type(value) not in (int, float) or not 0 <= value <= 1:  # also rejects NaN
                    message = "which is not a number from 0 to 1"
                    raise InputError(f"{path}: {key!r} has the grade {value!r}, {message}")
            grades = judged.setdefault(key, {"content": [], "score": [], "model": []})
            for values, new_values in zip(grades.values(), lists):
                values += new_values
    return judged


def judged_files(judged):
    """{".grades.json": the text of the official grades file}."""
    return {".grades.json": json.dumps(judged, indent=2) + "\n"}


# ---------------------------------------------------------------- scores


def score(questions: list[dict], answers: list[dict] | None, judged: dict | None) -> dict:
    """The mean grade in percent, over all questions, by capability and by exact set of capabilities.

    questions: from `load`. answers: None, or the graded records, checked to be complete. judged: from `judge`
    or `read_judged`.
    Returns {"score", "interval", "n", "missing": 0, "unread", "unread_share": grades of 0 because the judge
    gave none, "runs": [total of each run], "std": their population standard deviation, "groups": {capability:
    {"score", "interval", "n"}}, "integrations": {"gen_know_rec": the same}}. All numbers are means over the
    runs; the intervals reflect the choice of questions. A question counts in each of its capabilities and in
    one integration; the integration with the most questions comes first.
    Raises InputError: no grades, grades of an unknown question, a question without grades, or with a
    different number of grades, answers like `match_answers`.
    Source: the MM-Vet evaluator, which rounds each number to one decimal.
    """
    if judged is None:
        raise InputError("MM-Vet is graded by a judge model: --judge, or --judged FILE with official grades")
    if answers is not None:
        match_answers("MM-Vet", questions, answers, complete=True)
    ids = [f"v1_{q['question_id']}" for q in questions]
    if unknown := [key for key in judged if key not in ids]:
        raise InputError(f"MM-Vet grades: {unknown[0]!r} is not a question id")
    runs = {key: len(judged[key]["score"]) if key in judged else 0 for key in ids}
    if ungraded := [key for key in ids if not runs[key]]:
        count = f"{len(ungraded)} of {len(ids)} questions have no grade"
        raise InputError(f"MM-Vet: {count}, the first is {ungraded[0]!r}")
    if uneven := [key for key in ids if runs[key] != runs[ids[0]]]:
        counts = f"{ids[0]!r} has {runs[ids[0]]} grades, {uneven[0]!r} has {runs[uneven[0]]}"
        raise InputError(f"MM-Vet: not the same number of runs for all questions: {counts}")
    grades = np.array([judged[key]["score"] for key in ids], dtype=np.float64)  # (questions, runs)
    verdicts = [pair for key in ids for pair in zip(judged[key]["content"], judged[key]["score"])]
    failed = sum(grade == 0 and not _is_grade(content) for content, grade in verdicts)

    capabilities = {name: [] for name in CAPABILITIES}
    integrations = {}
    for question, grade in zip(questions, grades.mean(1)):
        for name in question["capabilities"]:
            capabilities[name].append(grade)
        integrations.setdefault("_".join(sorted(question["capabilities"])), []).append(grade)
    by_size = sorted(integrations.items(), key=lambda item: -len(item[1]))
    totals = 100 * grades.mean(0)
    return {
        **mean(grades.mean(1)), "missing": 0, **unread(failed, grades.size),
        "runs": totals.tolist(), "std": float(totals.std()),
        "groups": {name: mean(values) for name, values in capabilities.items() if values},
        "integrations": {name: mean(values) for name, values in by_size},
    }  # fmt: skip


def report(scores: dict) -> str:
    """The numbers as lines of text. scores: from `score`."""
    runs = " ".join(f"{run:.1f}" for run in scores["runs"])
    rows = [("all", scores), *scores["groups"].items(), *scores["integrations"].items()]
    lines = [f"{name:<20} {with_interval(group):<20} n={group['n']}" for name, group in rows]
    first = 1 + len(scores["groups"])
    return "\n".join([
        f"MM-Vet: {scores['n']} questions; the judge's grades in %, [95% interval over the questions]",
        f"{len(scores['runs'])} runs of the judge: {runs}, std {scores['std']:.1f}",
        *lines[:first], "by exact set of capabilities:", *lines[first:]])  # fmt: skip
