"""MathVista (testmini, 1,000 problems): the prompt, the extraction of answers, their normalization and the
scores.

Data: `testmini.json` and `images/`, from MathVista's repository and its dataset page. A file with the same
content may also be called `annot_testmini.json` (the repository's own file of that name has other annotations
and no problems). The query is the dataset's field `query`. Extraction follows the repository's
`evaluation/extract_answer.py`, normalization and groups its `evaluation/calculate_score.py`, with the
precision of float answers cast to an integer, which some versions of the script forgot. Not here: the
program-of-thought and few-shot queries, captions and OCR texts of `build_query.py`, the gains over random
chance, and the protocols of VLMEvalKit (unrounded floats, options matched as in MMBench) and lmms-eval
(another prompt).
"""

import json
import re
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import check_text, read_json, read_records
from stic_min.scorers.common import match_answers, proportion, unread, with_interval
from stic_min.scorers.mathvista_prompts import HINTS, OWN_PROMPTS, build_query  # noqa: F401

DATA_FILES = """\
testmini.json (or annot_testmini.json)   https://github.com/lupantech/MathVista, its data folder
images/ID.jpg                            https://huggingface.co/datasets/AI4Math/MathVista
"""
FILES = ("testmini.json", "annot_testmini.json")
GROUPED_BY = "answer_type"
RULES = ("lenient_int", "strict_int")  # the repository's code; the rule behind most published totals

# The fields of a problem in official files, in their order, besides `pid` and `query`.
FIELDS = ("question", "image", "choices", "unit", "precision", "answer", "question_type", "answer_type",
          "metadata")  # fmt: skip
TAGS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade",
        "skills")  # fmt: skip
PRINTED = ("question_type", "answer_type", "task", "context", "skills")

OFFICIAL_JUDGE = "gpt-4-0613"
PROMPTS = "mathvista_extract"
TRIES = 5

# ---------------------------------------------------------------- data files


def load(data: str | Path) -> list[dict]:
    """The problems, in the order of the file.

    data: the folder of `testmini.json` or, without that, `annot_testmini.json`: {pid: problem}, or a list of
    problems with a `pid`. Returns one dict per problem: `question_id`, the pid as text; `image`, relative to
    `data`; `text` and `prompt`, the query, built from the question if the file has no `query`; and the
    official FIELDS. A file only for scoring may lack image, question and query: then image is None and `text`
    is "".
    Raises InputError: no file or not JSON, a pid repeated or missing, a field missing or of the wrong type,
    text that is not valid Unicode, an image without a question.
    """
    path = next((Path(data) / name for name in FILES if (Path(data) / name).is_file()), None)
    if path is None:
        raise InputError(f"{data}: has neither {FILES[0]} nor {FILES[1]}")
    content = read_json(path, (dict, list))
    if isinstance(content, dict):
        problems = content.items()
    else:
        problems = [(p.get("pid") if isinstance(p, dict) else None, p) for p in content]
    questions = {}
    for number, (pid, problem) in enumerate(problems):
        if not isinstance(problem, dict) or not isinstance(pid, (str, int)):
            raise InputError(f"{path}, entry {number}: not a JSON object with a 'pid'")
        if str(pid) in questions:
            raise InputError(f"{path}: pid {str(pid)!r} is repeated")
        questions[str(pid)] = _question(str(pid), problem, f"{path}, problem {str(pid)!r}")
    if not questions:
        raise InputError(f"{path}: no problems")
    return list(questions.values())


def _question(pid, problem, where):
    is_text = lambda value: isinstance(value, str)
    are_texts = lambda value: isinstance(value, list) and all(map(is_text, value))
    get = problem.get
    tags = get("metadata")
    is_choice = get("question_type") == "multi_choice"
    number_types = ("integer", "float", "list")
    valid = {
        "question_type": is_choice or get("question_type") == "free_form",
        "answer_type": is_text(get("answer_type")) if is_choice else get("answer_type") in number_types,
        "answer": is_text(get("answer")),
        "choices": not is_choice or are_texts(get("choices")) and get("choices"),
        "precision": get("answer_type") != "float" or get("precision") in (1, 2),
        "metadata": isinstance(tags, dict) and are_texts([tags.get(t) for t in TAGS[2:-1]])
        and are_texts(tags.get("skills")),
    }
    for field in ("question", "image", "unit", "query"):
        valid[field] = get(field) is None or is_text(get(field))
    for field, is_valid in valid.items():
        if not is_valid:
            raise InputError(f"{where}: {field!r} is missing or not in MathVista's format")
    check_text(json.dumps(problem, ensure_ascii=False), where)
    question = {field: get(field) for field in FIELDS}
    query = (get("query") or build_query(question)).strip()
    if get("image") and not query:
        raise InputError(f"{where}: an image, but neither 'question' nor 'query'")
    return {"question_id": pid, **question, "text": query, "prompt": query}


# ---------------------------------------------------------------- answers and extractions in files


def _official_entries(path):
    """[(where, pid, entry)] from an official results file {pid: entry}; None for any other file."""
    try:
        content = read_json(path)
    except InputError:
        return None  # JSON lines are not one JSON value; `read_records` reports what is not JSON at all
    if not content or not all(isinstance(entry, dict) for entry in content.values()):
        return None
    return [(f"{path}, problem {pid!r}", pid, entry) for pid, entry in content.items()]


def read_answers(path):
    """Reads answer records from the official results file {pid: {..., "response": text}} or from JSON lines.

    Raises InputError: the file is neither, an entry has no response."""
    entries = _official_entries(path)
    if entries is None:
        return [record for _, record in read_records(path)]
    for where, _, entry in entries:
        if not isinstance(entry.get("response"), str):
            raise InputError(f"{where}: no 'response'")
    return [{"question_id": p, "prompt": e.get("query", ""), "text": e["response"]} for _, p, e in entries]


def official(questions, answers):
    """(".json", the text of the official results file: {pid: the problem and its response}).

    questions: from `load`. answers: records {"question_id", "text"}. Raises InputError like
    `match_answers`."""
    records = match_answers("MathVista", questions, answers)
    results = {}
    for q in questions:
        pid = q["question_id"]
        if pid in records:
            fields = {field: q[field] for field in FIELDS}
            results[pid] = {**fields, "pid": pid, "query": q["text"], "response": records[pid]["text"]}
    return ".json", json.dumps(results, indent=2) + "\n"


def read_judged(paths):
    """Reads {pid: extraction} from one file: official results {pid: {..., "extraction": ...}}, or JSON lines
    {"pid", "extraction"}. Raises InputError: not one file, neither form, a pid or extraction is missing."""
    if len(paths) != 1:
        raise InputError(f"MathVista: {len(paths)} files of extractions; expected one")
    entries = _official_entries(paths[0])
    if entries is None:
        entries = [(where, record.get("pid"), record) for where, record in read_records(paths[0])]
    judged = {}
    for where, pid, entry in entries:
        if not isinstance(pid, (str, int)) or str(pid) in judged:
            fault = "missing" if pid is None else "repeated or not a pid"
            raise InputError(f"{where}: its 'pid' is {fault}")
        if "extraction" not in entry:
            raise InputError(f"{where}: no 'extraction'")
        judged[str(pid)] = entry["extraction"]
    return judged


def judged_files(judged):
    """{file name ending: text} for the result of `judge`, in a form that `read_judged` reads."""
    entries = {pid: {"extraction": extraction} for pid, extraction in judged.items()}
    return {".extractions.json": json.dumps(entries, indent=2) + "\n"}


# ---------------------------------------------------------------- from a response to an answer


def extract(question, response, quick=False):
    """The answer in a response by rules alone; None if that takes the judge.

    question: `question_type`, `answer_type` and `choices` are used. quick: also read `The answer is "...".`
    Source: MathVista, `evaluation/extract_answer.py`."""
    if response == "":
        return ""
    if question["question_type"] == "multi_choice" and response in question["choices"]:
        return response
    number = {"integer": int, "float": float}.get(question["answer_type"])
    if number:
        try:
            return str(number(response))
        except ValueError:
            pass
    quoted = re.search(r'The answer is "(.*)"\.', response) if quick else None
    return quoted[1] if quoted else None


def distance(a, b):
    """Levenshtein distance: the number of characters to insert, delete or replace to turn a into b."""
    row = list(range(len(b) + 1))  # from a[:i] to every b[:j]
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def normalize(question, extraction, rule=RULES[0]):
    """An extraction in the form of the true answers; None if it does not fit.

    question: `question_type`, `answer_type`, `choices` and `precision` are used. extraction: text, any other
    JSON value, or None if nothing was extracted, which stays None. Multiple choice always yields one of the
    choices.
    rule: where an integer is expected, "lenient_int" truncates decimals and "strict_int" accepts only whole
    numbers.
    Source: MathVista, `evaluation/calculate_score.py`."""
    if extraction is None:
        return None
    if question["question_type"] == "multi_choice":
        text = str(extraction).strip()
        choices = question["choices"]
        if bracketed := re.search(r"\(([a-zA-Z])\)", text):
            text = bracketed[1].upper()
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        if text in letters:
            return choices[letters.index(text)]
        return min(choices, key=lambda choice: distance(text, choice))  # ties: the first
    try:
        if question["answer_type"] == "integer":
            return str(int(extraction if rule == "strict_int" else float(extraction)))
        if question["answer_type"] == "float":
            return str(round(float(extraction), int(question["precision"])))
    except (ValueError, TypeError, OverflowError):  # not a number; a list; infinity, which is not an integer
        return None
    return str(extraction)


def _extract_all(questions, answers):
    """(records by pid, {pid: extraction by the rules} for the answered questions)"""
    records = match_answers("MathVista", questions, answers)
    answered = [q for q in questions if q["question_id"] in records]
    return records, {q["question_id"]: extract(q, records[q["question_id"]]["text"]) for q in answered}


def judge(questions, answers, judge):
    """Extracts every answer, by the rules where possible, else by asking the judge.

    questions: from `load`, with their text. answers: records {"question_id", "text"}. judge: see
    `scorers.judge`.
    Returns {pid: extraction}: "" for an empty response, or if the judge's replies are empty or cut off by the
    token limit; None without an answer. Raises InputError like `match_answers`, or if a question has no text.
    Source: MathVista, `evaluation/extract_answer.py`."""
    records, extracted = _extract_all(questions, answers)
    unextracted = [q for q in questions if extracted.get(q["question_id"], "") is None]
    for q in unextracted:
        if not q["text"]:
            raise InputError(f"MathVista: problem {q['question_id']!r} has no question to show the judge")

    def ask(question):
        pid = question["question_id"]
        item = f"{question['text']}\n\n{records[pid]['text']}"
        content = f"{judge.texts['few_shot'].strip()}\n\n{item}{judge.texts['suffix']}"
        for attempt in range(1, TRIES + 1):
            messages = [{"role": "user", "content": content}]
            reply = judge.ask(f"problem {pid}, attempt {attempt}", messages, temperature=0, max_tokens=256)
            if reply.content.strip() and not reply.cut:
                return reply.content.strip()
        return ""

    extracted |= {q["question_id"]: reply for q, reply in zip(unextracted, judge.map(ask, unextracted))}
    return {q["question_id"]: extracted.get(q["question_id"]) for q in questions}


# ---------------------------------------------------------------- scores


def score(
    questions: list[dict], answers: list[dict] | None, judged: dict | None = None, rule: str = RULES[0]
) -> dict:
    """Accuracy over all problems and by tag: an answer is correct if, normalized, it equals the true one as
    text.

    questions: from `load`. answers: records {"question_id", "text"}; None if `judged` stands for them.
    judged: {pid: extraction} for all questions; without it, answers are extracted by the rules. rule: one of
    RULES.
    Returns {"score", "interval", "n", "correct", "missing", "unextracted", "rule", "groups": {"tag|value":
    {"score", "interval", "n", "correct"}}}. A problem is wrong without an answer, or if its answer was not
    extracted (None); a problem counts in the group of each of its skills. With `judged` also "unread" and
    "unread_share": extractions that are "" for a non-empty answer (known only with `answers`); in multiple
    choice, "" still selects a choice.
    Raises InputError like `match_answers`, or if the pids of `judged` are not those of the questions.
    Source: MathVista, `evaluation/calculate_score.py`."""
    ids = {q["question_id"] for q in questions}
    records, by_rules = _extract_all(questions, answers or [])
    if judged is not None and (differences := sorted(ids ^ set(judged))):
        fault = "not a problem's pid" if differences[0] in judged else "without an extraction"
        count = f"{len(differences)} such differences"
        raise InputError(f"MathVista extractions: {differences[0]!r} is {fault} ({count})")
    answered = ids if answers is None else set(records)
    extracted = {pid: (by_rules if judged is None else judged)[pid] for pid in answered}
    is_unread = lambda pid: judged[pid] == "" != records[pid]["text"]
    hits, groups = [], {}
    for q in questions:
        hits.append(normalize(q, extracted.get(q["question_id"]), rule) == q["answer"])
        tags = {**q["metadata"], "question_type": q["question_type"], "answer_type": q["answer_type"]}
        for number, tag in enumerate(TAGS):
            for value in set(tags[tag]) if tag == "skills" else [tags[tag]]:
                groups.setdefault((number, value), []).append(hits[-1])
    return {
        **proportion(hits),
        "missing": len(ids) - len(answered),
        "unextracted": sum(extraction is None for extraction in extracted.values()),
        **({} if judged is None else unread(sum(map(is_unread, records)), len(questions))),
        "rule": rule,
        "groups": {f"{TAGS[number]}|{value}": proportion(group)
                   for (number, value), group in sorted(groups.items())},
    }  # fmt: skip


def report(scores: dict) -> str:
    """The scores as lines of text: accuracy overall, then by type, task, context and skill."""
    lines = [f"MathVista testmini: {scores['n']} problems, {scores['missing']} without an answer; "
             f"accuracy in % [95% interval], rule {scores['rule']}"]  # fmt: skip
    if scores["unextracted"]:
        lines += [f"A lower bound: {scores['unextracted']} answers could not be extracted by the rules and "
                  "count as wrong; extracting them requires a judge"]  # fmt: skip
    rows = [("all", scores)]
    for tag in PRINTED:
        rows.append((tag.replace("_", " "), None))
        rows += [(f"  {name.split('|', 1)[1]}", group) for name, group in scores["groups"].items()
                 if name.startswith(f"{tag}|")]  # fmt: skip
    for name, group in rows:
        lines.append(f"{name:<32}{with_interval(group):>20}   n={group['n']}" if group else name)
    return "\n".join(lines)
