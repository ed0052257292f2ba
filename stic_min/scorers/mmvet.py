"""MM-Vet (218 questions on 200 images): the prompt, the judge's request and the scores from its grades.

Data: `mm-vet.json` and `images/`, the release of the MM-Vet repository. Answers are exchanged as there: one JSON object
of id and text. Request, reading of the reply and scores follow that repository's evaluator notebook; the prompt, the
bare question, is that of LLaVA's `llava-mm-vet.jsonl`. One difference: a judge that says `nan` is asked again, the
official range check lets it through. Not here: any score without a judge's grades, and the official evaluator's sixth
request after five unreadable replies, whose reply it stores unread beside the grade 0.
"""

import json
import math
import re
from pathlib import Path

import numpy as np

from stic_min import InputError
from stic_min.runtime.files import read_records, text_field
from stic_min.scorers.common import figure, match_answers, mean, read_json, unread

COMPLETE, GROUPED_BY = True, "capabilities"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

OFFICIAL_JUDGE = "gpt-4-0613"
RUNS = 5
PROMPTS = "mm_vet"
OWN_PROMPTS = {
    "few_shot": (
        "You grade short answers about pictures. Every row below holds a question, the true answer, what a model "
        "answered and a grade from 0.0 (nothing right) to 1.0 (all of it right) in steps of 0.1. A true answer with "
        "<AND> has several parts, and the grade is the portion of them that the model gives; one with <OR> lists "
        "alternatives, any of which earns 1.0. Judge the meaning, not the wording, and write nothing but the grade "
        "that the last row lacks.\n\n"
        "Question | Ground truth | Prediction | Correctness\n"
        "--- | --- | --- | ---\n"
        "Which fruits are in the bowl? | apple <AND> pear | Two lemons. | 0.0\n"
        "Which fruits are in the bowl? | apple <AND> pear | There is a pear in it. | 0.5\n"
        "Which fruits are in the bowl? | apple <AND> pear | A green pear and a red apple. | 1.0\n"
        "What does the ticket cost? | 4.50 <OR> 4.50 euros | It costs 4.50. | 1.0\n"
        "What does the ticket cost? | 4.50 <OR> 4.50 euros | 45 euros | 0.0\n"
        "Why are the people running? | It has begun to rain heavily, and they have no umbrellas, so they run to the "
        "bus shelter. | They want to catch the bus at the shelter. | 0.2\n"
        "Why are the people running? | It has begun to rain heavily, and they have no umbrellas, so they run to the "
        "bus shelter. | They are caught in the rain and hurry to a place with a roof. | 0.8\n"
    ),
    "retry_suffix": "\nThe grade as a number, with no other text: ",
}

TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)  # of the five attempts; the first one is without the suffix

# ---------------------------------------------------------------- questions and answers


def load(data):
    """The questions, in the order of the file.

    data: the folder that holds `mm-vet.json`. Returns a dict a question: `question_id`, an int, 12 for the official
    "v1_12" (as in LLaVA's question file); `image`; `text` and `prompt`, the bare question; `answer`, the truth;
    `capabilities`, the names of what it needs. Raises InputError naming file and id.
    """
    path, questions = Path(data) / "mm-vet.json", []
    for key, entry in read_json(path).items():
        number, where = _number(key), f"{path}: {key!r}"
        if not isinstance(number, int):
            raise InputError(f"{where} is no id of the form v1_12")
        if not isinstance(entry, dict):
            raise InputError(f"{where} is not a JSON object")
        needs = entry.get("capability")
        known = [name for name in CAPABILITIES if isinstance(needs, list) and name in needs]
        if not known or len(known) != len(needs):  # an unknown one or one twice makes it longer
            raise InputError(f"{where}: capability is not a list of some of {', '.join(CAPABILITIES)}")
        text = text_field(entry, "question", where)
        questions.append({
            "question_id": number, "image": f"images/{text_field(entry, 'imagename', where)}", "text": text,
            "prompt": text, "answer": text_field(entry, "answer", where), "capabilities": known})  # fmt: skip
    if not questions:
        raise InputError(f"{path}: no questions")
    return questions


def _number(key):
    """12 for "v1_12", and anything else as it is."""
    return int(key[3:]) if isinstance(key, str) and re.fullmatch("v1_(0|[1-9][0-9]{0,8})", key) else key


def read_answers(path):
    """Answers in the official form {"v1_12": text}, or as JSON lines with question_id 12 or "v1_12".

    Returns records {"question_id": 12, "text", ...}. Raises InputError naming the file.
    """
    try:
        results = read_json(path)
    except InputError:  # several lines, or none at all: `read_records` says what is wrong with a broken file
        results = {"question_id": None}
    if "question_id" in results:
        return [record | {"question_id": _number(record.get("question_id"))} for _, record in read_records(path)]
    return [{"question_id": _number(key), "text": text} for key, text in results.items()]


def official(questions, records):
    """(".json", the text of the official result file, {"v1_12": text}). Raises InputError as `match_answers`.

    Source: LLaVA, `scripts/convert_mmvet_for_eval.py`.
    """
    texts = {qid: record["text"] for qid, record in match_answers("MM-Vet", questions, records).items()}
    ids = [str(q["question_id"]) for q in questions]
    return ".json", json.dumps({f"v1_{qid}": texts[qid] for qid in ids if qid in texts}, indent=2) + "\n"


# ---------------------------------------------------------------- the judge


def parse(content):
    """The grade that a reply gives: all before its first blank, as a number from 0 to 1; None if it is no such number.

    "nan" is not a number outside that range, so it gives NaN. Source: the MM-Vet evaluator.
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

    A reply that cannot be read (or says NaN) is asked for again, with the suffix and a rising temperature; after the
    fifth one the grade is 0. questions: as from `load`. answers: records {"question_id", "text"}, one for each.
    judge: what asks, with `texts` of the form of OWN_PROMPTS. Raises InputError as `match_answers`.
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
            value, failed = 0.0, True
        return failed, {"content": _first(reply.content), "score": value, "model": reply.model}

    items = [(question, run) for question in questions for run in range(1, judge.runs + 1)]
    judged = {f"v1_{q['question_id']}": {"content": [], "score": [], "model": []} for q in questions}
    verdicts = judge.map(grade, items)
    if all(failed for failed, _ in verdicts):
        first = verdicts[0][1]["content"]
        raise InputError(f"MM-Vet: no reply of the judge is a grade, the first says {first!r} (see --judge-max-tokens)")
    for (question, _), (_, verdict) in zip(items, verdicts):
        for name, values in judged[f"v1_{question['question_id']}"].items():
            values.append(verdict[name])
    return judged


def read_judged(paths):
    """Official grades files -> {"v1_12": {"content": [...], "score": [...], "model": [...]}}, an item a run.

    The runs of several files are put together. Raises InputError naming the file and the id: the three lists are not
    there or of unequal lengths, a grade is no number from 0 to 1.
    """
    judged = {}
    for path in paths:
        for key, entry in read_json(path).items():
            lists = [entry.get(name) if isinstance(entry, dict) else None for name in ("content", "score", "model")]
            if not all(isinstance(own, list) and len(own) == len(lists[0]) for own in lists):
                raise InputError(f"{path}: {key!r} has no 'content', 'score' and 'model', lists of one length")
            for value in lists[1]:
                if type(value) not in (int, float) or not 0 <= value <= 1:  # NaN is not either
                    raise InputError(f"{path}: {key!r} has the grade {value!r}, which is not a number from 0 to 1")
            grades = judged.setdefault(key, {"content": [], "score": [], "model": []})
            for own, new in zip(grades.values(), lists):
                own += new
    return judged


def judged_files(judged):
    """{".grades.json": the text of the official grades file}."""
    return {".grades.json": json.dumps(judged, indent=2) + "\n"}


# ---------------------------------------------------------------- scores


def score(questions, answers, judged):
    """The mean grade in percent, over all questions, by capability and by exact set of capabilities.

    questions: as from `load`. answers: None, or the records that were graded, checked to be complete. judged: as from
    `judge` or `read_judged`.
    Returns {"score", "interval", "n", "missing": 0, "unread", "unread_share": grades of 0 because the judge gave none,
    "runs": [total of each run], "std": of these, as of a population, "groups": {capability: {"score", "interval",
    "n"}}, "integrations": {"gen_know_rec": the same}}. Everything is a
    mean over the runs; the intervals are over the choice of questions. A question counts in each of its capabilities
    and in one integration; the integration with most questions comes first.
    Raises InputError: no grades, grades of an unknown question, a question without grades, or with more or fewer than
    the others, answers as `match_answers`.
    Source: the MM-Vet evaluator, which rounds each number to one decimal.
    """
    if judged is None:
        raise InputError("MM-Vet is graded by a judge model: --judge, or --judged FILE with official grades")
    if answers is not None:
        match_answers("MM-Vet", questions, answers, complete=True)
    ids = [f"v1_{q['question_id']}" for q in questions]
    if unknown := [key for key in judged if key not in ids]:
        raise InputError(f"MM-Vet grades: {unknown[0]!r} is no question's id")
    runs_of = {key: len(judged[key]["score"]) if key in judged else 0 for key in ids}
    if without := [key for key in ids if not runs_of[key]]:
        raise InputError(f"MM-Vet: {len(without)} of {len(ids)} questions have no grade, the first is {without[0]!r}")
    if uneven := [key for key in ids if runs_of[key] != runs_of[ids[0]]]:
        first, other = f"{ids[0]!r} has {runs_of[ids[0]]} grades", f"{uneven[0]!r} has {runs_of[uneven[0]]}"
        raise InputError(f"MM-Vet: not the same number of runs for all questions: {first}, {other}")
    grades = np.array([judged[key]["score"] for key in ids], dtype=np.float64)  # (questions, runs)
    verdicts = [pair for key in ids for pair in zip(judged[key]["content"], judged[key]["score"])]
    failed = sum(grade == 0 and not _is_grade(content) for content, grade in verdicts)

    capabilities, integrations = {name: [] for name in CAPABILITIES}, {}
    for question, own in zip(questions, grades.mean(1)):
        for name in question["capabilities"]:
            capabilities[name].append(own)
        integrations.setdefault("_".join(sorted(question["capabilities"])), []).append(own)
    by_size = sorted(integrations.items(), key=lambda item: -len(item[1]))
    runs = 100 * grades.mean(0)
    return {
        **mean(grades.mean(1)), "missing": 0, **unread(failed, grades.size),
        "runs": runs.tolist(), "std": float(runs.std()),
        "groups": {name: mean(own) for name, own in capabilities.items() if own},
        "integrations": {name: mean(own) for name, own in by_size},
    }  # fmt: skip


def report(scores):
    """The numbers as lines of text. scores: as from `score`."""
    runs = " ".join(f"{run:.1f}" for run in scores["runs"])
    rows = [("all", scores), *scores["groups"].items(), *scores["integrations"].items()]
    lines = [f"{name:<20} {figure(own):<20} n={own['n']}" for name, own in rows]
    first = 1 + len(scores["groups"])
    return "\n".join([
        f"MM-Vet: {scores['n']} questions; the judge's grades in %, [95 % interval over the questions]",
        f"{len(scores['runs'])} runs of the judge: {runs}, std {scores['std']:.1f}",
        *lines[:first], "by exact set of capabilities:", *lines[first:]])  # fmt: skip
