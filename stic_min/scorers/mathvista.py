"""MathVista (testmini, 1000 problems): the prompt, the extraction of answers, their normalisation and the scores.

Data: `testmini.json` and `images/`, as MathVista's repository and its data set page have them; a file with the same
content may also be called `annot_testmini.json` (the repository's own file of that name has other annotations and no
problems). The query is the data set's own field `query`. Extraction follows the repository's
`evaluation/extract_answer.py`, normalisation and groups its `evaluation/calculate_score.py`, with the precision of
float answers cast to an integer, which some versions of the script forgot. Not here: the program-of-thought and
few-shot queries, captions and OCR texts of `build_query.py`, the gains over random chance, and the protocols of
VLMEvalKit (floats unrounded, options matched as in MMBench) and lmms-eval (another prompt).
"""

import json
import re
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import check_text, read_records
from stic_min.scorers.common import figure, match_answers, read_json, share, unread

FILES = ("testmini.json", "annot_testmini.json")
GROUPED_BY = "answer_type"
RULES = ("lenient_int", "strict_int")  # the code of the repository, and what most published totals were made with

# What official files hold of a problem, in their order, besides `pid` and `query`.
FIELDS = ("question", "image", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata")
TAGS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
PRINTED = ("question_type", "answer_type", "task", "context", "skills")

# The sentence in front of a question, by its type and, for floats, its precision.
HINTS = {
    "multi_choice": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.",
    "float 1": "Please answer the question requiring a floating-point number with one decimal place "
    "and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "Please answer the question requiring a floating-point number with two decimal places "
    "and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}

# ---------------------------------------------------------------- the judge's texts

OFFICIAL_JUDGE = "gpt-4-0613"
PROMPTS = "mathvista_extract"
TRIES = 5
OWN_PROMPTS = {
    "few_shot": f"""\
You are given exam questions about pictures, each followed by what a student wrote. Copy out the student's final \
answer in the form that the hint asks for, and nothing else: no reasons, no units, no correction of mistakes.

Hint: {HINTS["integer"]}
Question: How many chairs stand around the table?

There are three chairs on the left and two on the right, so five in all.

Extracted answer: 5

Hint: {HINTS["float 1"]}
Question: How tall is the taller plant? (Unit: m)

The ruler beside the taller plant ends at 2.3 m.

Extracted answer: 2.3

Hint: {HINTS["float 2"]}
Question: What is the slope of the line?

It rises by 3 over a run of 8, i.e. 0.375, which I round to 0.38.

Extracted answer: 0.38

Hint: {HINTS["list"]}
Question: Which two days were the coldest?

The bars for the 4th and the 19th are the shortest.

Extracted answer: [4, 19]

Hint: {HINTS["multi_choice"]}
Question: Which animal is the heaviest?
Choices:
(A) fox
(B) badger
(C) bear

Of the three animals the bear weighs the most.

Extracted answer: C""",
    "suffix": "\n\nExtracted answer: ",
}

# ---------------------------------------------------------------- data files


def load(data):
    """The problems, in the order of the file.

    data: the folder with `testmini.json` or, if there is none, `annot_testmini.json`: {pid: problem}, or a list of
    problems with a `pid`. Returns a dict a problem: `question_id`, the pid as text; `image`, relative to `data`;
    `text` and `prompt`, the query, put together from the question where the file has no `query`; and the official
    FIELDS. A file for scoring alone may lack image, question and query: then image is None and `text` is "".
    Raises InputError: no file or not JSON, a pid repeated or missing, a field missing or not of its kind, text
    that is not valid Unicode, an image without a question.
    """
    path = next((Path(data) / name for name in FILES if (Path(data) / name).is_file()), None)
    if path is None:
        raise InputError(f"{data}: has neither {FILES[0]} nor {FILES[1]}")
    content, questions = read_json(path, (dict, list)), {}
    if isinstance(content, dict):
        problems = content.items()
    else:
        problems = [(p.get("pid") if isinstance(p, dict) else None, p) for p in content]
    for number, (pid, problem) in enumerate(problems):
        if not isinstance(problem, dict) or not isinstance(pid, (str, int)):
            raise InputError(f"{path}, entry {number}: no JSON object, or no 'pid'")
        if str(pid) in questions:
            raise InputError(f"{path}: pid {str(pid)!r} is repeated")
        questions[str(pid)] = _question(str(pid), problem, f"{path}, problem {str(pid)!r}")
    if not questions:
        raise InputError(f"{path}: no problems")
    return list(questions.values())


def _question(pid, problem, where):
    text = lambda value: isinstance(value, str)
    texts = lambda value: isinstance(value, list) and all(map(text, value))
    get, tags = problem.get, problem.get("metadata")
    choice = get("question_type") == "multi_choice"
    checks = {
        "question_type": choice or get("question_type") == "free_form",
        "answer_type": text(get("answer_type")) if choice else get("answer_type") in ("integer", "float", "list"),
        "answer": text(get("answer")),
        "choices": not choice or texts(get("choices")) and get("choices"),
        "precision": get("answer_type") != "float" or get("precision") in (1, 2),
        "metadata": isinstance(tags, dict) and texts([tags.get(t) for t in TAGS[2:-1]]) and texts(tags.get("skills")),
        **{field: get(field) is None or text(get(field)) for field in ("question", "image", "unit", "query")},
    }
    for field, fine in checks.items():
        if not fine:
            raise InputError(f"{where}: {field!r} is missing or not as MathVista has it")
    check_text(json.dumps(problem, ensure_ascii=False), where)
    question = {field: get(field) for field in FIELDS}
    query = (get("query") or build_query(question)).strip()
    if get("image") and not query:
        raise InputError(f"{where}: an image, but neither 'question' nor 'query'")
    return {"question_id": pid, **question, "text": query, "prompt": query}


def build_query(question):
    """The query of a problem with the official FIELDS: hint, question, unit and choices; "" without a question.

    Source: the field `query` of the data set."""
    if not question["question"]:
        return ""
    kind = question["question_type"] if question["question_type"] == "multi_choice" else question["answer_type"]
    hint = HINTS[f"float {int(question['precision'])}" if kind == "float" else kind]
    unit = f" (Unit: {question['unit']})" if question["unit"] else ""
    lines = [f"Hint: {hint}", f"Question: {question['question']}{unit}"]
    if kind == "multi_choice":
        lines += ["Choices:", *(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(question["choices"]))]
    return "\n".join(lines)


# ---------------------------------------------------------------- answers and extractions, as they are exchanged


def _official_entries(path):
    """[(where, pid, entry)] of an official results file {pid: entry}; None if the file is anything else."""
    try:
        content = read_json(path)
    except InputError:
        return None  # JSON lines are not one JSON value; what is no JSON at all is told by who reads lines
    if not content or not all(isinstance(entry, dict) for entry in content.values()):
        return None
    return [(f"{path}, problem {pid!r}", pid, entry) for pid, entry in content.items()]


def read_answers(path):
    """Answer records of the official results file {pid: {..., "response": text}}, or of JSON lines of such records.

    Raises InputError: the file is neither, an entry has no response."""
    entries = _official_entries(path)
    if entries is None:
        return [record for _, record in read_records(path)]
    for where, _, entry in entries:
        if not isinstance(entry.get("response"), str):
            raise InputError(f"{where}: no 'response'")
    return [{"question_id": p, "prompt": e.get("query", ""), "text": e["response"]} for _, p, e in entries]


def official(questions, answers):
    """The official results file -> (".json", its text): {pid: the problem and its response}.

    questions: as from `load`. answers: records {"question_id", "text"}. Raises InputError as `match_answers`."""
    records = match_answers("MathVista", questions, answers)
    results = {}
    for q in questions:
        if q["question_id"] in records:
            pid, response = q["question_id"], records[q["question_id"]]["text"]
            results[pid] = {**{f: q[f] for f in FIELDS}, "pid": pid, "query": q["text"], "response": response}
    return ".json", json.dumps(results, indent=2) + "\n"


def read_judged(paths):
    """{pid: extraction} of one file: official results {pid: {..., "extraction": ...}}, or JSON lines {"pid",
    "extraction"}. Raises InputError: not one file, neither form, a pid repeated or missing, no extraction."""
    if len(paths) != 1:
        raise InputError(f"MathVista: {len(paths)} files of extractions, it takes one")
    entries = _official_entries(paths[0])
    if entries is None:
        entries = [(where, record.get("pid"), record) for where, record in read_records(paths[0])]
    judged = {}
    for where, pid, entry in entries:
        if not isinstance(pid, (str, int)) or str(pid) in judged:
            raise InputError(f"{where}: its 'pid' is " + ("missing" if pid is None else "repeated or no pid"))
        if "extraction" not in entry:
            raise InputError(f"{where}: no 'extraction'")
        judged[str(pid)] = entry["extraction"]
    return judged


def judged_files(judged):
    """{name ending: text} of what `judge` returns, in a form that `read_judged` reads."""
    entries = {pid: {"extraction": extraction} for pid, extraction in judged.items()}
    return {".extractions.json": json.dumps(entries, indent=2) + "\n"}


# ---------------------------------------------------------------- from a response to an answer


def extract(question, response, quick=False):
    """What a response gives as its answer, by rules alone; None if that takes the judge.

    question: its `question_type`, `answer_type` and `choices` are read. quick: also read `The answer is "...".`
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
    """Levenshtein's: how many characters to insert, delete or replace to make b of a."""
    row = list(range(len(b) + 1))  # from a[:i] to every b[:j]
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def normalize(question, extraction, rule=RULES[0]):
    """An extraction in the form that answers have; None if it can't be one.

    question: its `question_type`, `answer_type`, `choices` and `precision` are read. extraction: a text, any other
    JSON value, or None for nothing extracted, which stays None. A multiple choice always gets one of its choices.
    rule: "lenient_int" cuts decimals off where an integer is asked for, "strict_int" takes whole numbers alone.
    Source: MathVista, `evaluation/calculate_score.py`."""
    if extraction is None:
        return None
    if question["question_type"] == "multi_choice":
        text, choices = str(extraction).strip(), question["choices"]
        if bracketed := re.search(r"\(([a-zA-Z])\)", text):
            text = bracketed[1].upper()
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        if text in letters:
            return choices[letters.index(text)]
        return min(choices, key=lambda choice: distance(text, choice))  # the first of the nearest
    try:
        if question["answer_type"] == "integer":
            return str(int(extraction if rule == "strict_int" else float(extraction)))
        if question["answer_type"] == "float":
            return str(round(float(extraction), int(question["precision"])))
    except (ValueError, TypeError, OverflowError):  # no number; a list; infinity, which is no integer
        return None
    return str(extraction)


def _extract_all(questions, answers):
    """(records by pid, {pid: extraction by the rules}, of the answered questions)"""
    records = match_answers("MathVista", questions, answers)
    own = [q for q in questions if q["question_id"] in records]
    return records, {q["question_id"]: extract(q, records[q["question_id"]]["text"]) for q in own}


def judge(questions, answers, judge):
    """Extracts every answer, by the rules where they do, else by asking the judge.

    questions: as from `load`, with their text. answers: records {"question_id", "text"}. judge: see `scorers.judge`.
    Returns {pid: extraction}: "" for an empty response or a judge that stays silent or is cut off by its token limit,
    None without an answer. Raises InputError as `match_answers`, or if a question has no text.
    Source: MathVista, `evaluation/extract_answer.py`."""
    records, found = _extract_all(questions, answers)
    rest = [q for q in questions if found.get(q["question_id"], "") is None]
    for q in rest:
        if not q["text"]:
            raise InputError(f"MathVista: problem {q['question_id']!r} has no question to show to the judge")

    def ask(question):
        pid = question["question_id"]
        item = f"{question['text']}\n\n{records[pid]['text']}"
        content = f"{judge.texts['few_shot'].strip()}\n\n{item}{judge.texts['suffix']}"
        for attempt in range(1, TRIES + 1):
            where, messages = f"problem {pid}, attempt {attempt}", [{"role": "user", "content": content}]
            reply = judge.ask(where, messages, temperature=0, max_tokens=256)
            if reply.content.strip() and not reply.cut:
                return reply.content.strip()
        return ""

    found |= {q["question_id"]: reply for q, reply in zip(rest, judge.map(ask, rest))}
    return {q["question_id"]: found.get(q["question_id"]) for q in questions}


# ---------------------------------------------------------------- scores


def score(questions, answers, judged=None, rule=RULES[0]):
    """Accuracy over all problems and by tag: an answer is right if, normalised, it equals the true one as text.

    questions: as from `load`. answers: records {"question_id", "text"}; None if there is `judged`, which then stands
    for them. judged: {pid: extraction} of all questions; without, the rules alone extract. rule: one of RULES.
    Returns {"score", "interval", "n", "correct", "missing", "unextracted", "rule", "groups": {"tag|value": {"score",
    "interval", "n", "correct"}}}. A problem without an answer and one whose answer is not extracted (None) are wrong;
    a problem counts in the group of each of its skills. With `judged` also "unread" and "unread_share": extractions
    that are "" although there was an answer (known only with `answers`), which for a multiple choice still is one.
    Raises InputError as `match_answers`, or if the pids of `judged` are not those of the questions.
    Source: MathVista, `evaluation/calculate_score.py`."""
    ids = {q["question_id"] for q in questions}
    records, found = _extract_all(questions, answers or [])
    if judged is not None and (odd := sorted(ids ^ set(judged))):
        fault = "no problem's pid" if odd[0] in judged else "without an extraction"
        raise InputError(f"MathVista extractions: {odd[0]!r} is {fault} ({len(odd)} such differences)")
    answered = ids if answers is None else set(records)
    extracted = {pid: (found if judged is None else judged)[pid] for pid in answered}
    silent = lambda pid: judged[pid] == "" != records[pid]["text"]
    hits, groups = [], {}
    for q in questions:
        hits.append(normalize(q, extracted.get(q["question_id"]), rule) == q["answer"])
        tags = {**q["metadata"], "question_type": q["question_type"], "answer_type": q["answer_type"]}
        for number, tag in enumerate(TAGS):
            for value in set(tags[tag]) if tag == "skills" else [tags[tag]]:
                groups.setdefault((number, value), []).append(hits[-1])
    return {
        **share(hits),
        "missing": len(ids) - len(answered),
        "unextracted": sum(extraction is None for extraction in extracted.values()),
        **({} if judged is None else unread(sum(map(silent, records)), len(questions))),
        "rule": rule,
        "groups": {f"{TAGS[number]}|{value}": share(own) for (number, value), own in sorted(groups.items())},
    }


def report(scores):
    """The numbers as lines of text: accuracy over all, then by type, task, context and skill. scores: of `score`."""
    lines = [f"MathVista testmini: {scores['n']} problems, {scores['missing']} without an answer; "
             f"accuracy in % [95 % interval], rule {scores['rule']}"]  # fmt: skip
    if scores["unextracted"]:
        lines += [f"A lower bound: {scores['unextracted']} answers could not be extracted by the rules and "
                  "count as wrong, a judge has to read them"]  # fmt: skip
    rows = [("all", scores)]
    for tag in PRINTED:
        rows.append((tag.replace("_", " "), None))
        rows += [(f"  {name.split('|', 1)[1]}", own) for name, own in scores["groups"].items()
                 if name.startswith(f"{tag}|")]  # fmt: skip
    lines += [f"{name:<32}{figure(own):>20}   n={own['n']}" if own else name for name, own in rows]
    return "\n".join(lines)
