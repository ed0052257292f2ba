"""MMBench (dev, English, 4377 rows: 1176 questions, each asked again with its options rotated): prompt, parser, scores.

Data: `mmbench_dev_20230712.tsv`, as the MMBench site of OpenCompass has it; pictures are base64 text inside it.
The prompt is that of LLaVA's `llava/eval/model_vqa_mmbench.py`, the sheet to submit that of its
`scripts/convert_mmbench_for_submission.py`. Matching, CircularEval and judge follow VLMEvalKit (`matching_util.py`,
`multiple_choice.py`): rule "2024" as it was in May 2024, when the paper appeared, rule "2026" as it became. Two known
differences: the judge sees every unmatched row, also where the group is lost anyway (so that accuracy by rows means
something), and the letter drawn when it fails depends on the row's index alone. Not here: the evaluation server,
which scored 1164 questions for the paper, the Chinese edition with its own prompts, and writing xlsx.
"""

import base64
import csv
import hashlib
import io
import random
import re
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import check_text, read_records
from stic_min.scorers.common import figure, match_answers, share, unread

FILE = "mmbench_dev_20230712.tsv"
SUFFIX = "Answer with the option's letter from the given choices directly."
RULES = ("2024", "2026")
LETTERS = "ABCD"
GROUPED_BY = "l2"
CIRCLE = 1_000_000  # row k * CIRCLE + i is question i with its options rotated k times
GROUPS = {
    "logic_reasoning": "LR",
    "attribute_reasoning": "AR",
    "relation_reasoning": "RR",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "coarse_perception": "CP",
}
NEEDED = ("index", "question", *LETTERS, "answer")
NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category"}

# Cells that pandas reads as missing, quoted or not: the official scripts never see their text.
NAN = {*"#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split(), "#N/A N/A"}

OFFICIAL_JUDGE = "gpt-3.5-turbo-0613"
PROMPTS = "mmbench_match"
OWN_PROMPTS = {
    "template": "Somebody answered a multiple-choice question in free words. Say which option the words stand for. "
    "Reply with that option's capital letter and nothing else, or with Z if they fit none of the options.\n\n"
    "Question: Which animal sleeps on the sofa?\nOptions: A. a dog B. a parrot C. a cat D. a hamster\n"
    "Answer: some kind of kitten\nLetter: C\n\n"
    "Question: Which animal sleeps on the sofa?\nOptions: A. a dog B. a parrot C. a cat D. a hamster\n"
    "Answer: a bowl of fruit\nLetter: Z\n\n"
    "Question: {}\nOptions: {}\nAnswer: {}\nLetter: "
}

# ---------------------------------------------------------------- questions


def load(data):
    """The rows of the table, in its order.

    data: the folder that holds `mmbench_dev_20230712.tsv`. Of its columns, `NEEDED` have to be there.
    Returns a dict a row: `question_id`, its index; `group`, the index of the question that it is a copy of; `image`, a
    digest of the picture, and `picture`, its base64 text, both None if the table has no pictures; `prompt` and `text`,
    without and with the suffix; `options`, {letter: text} as in the prompt; `answer`, a letter; `category` and `l2`,
    "" where unknown; `row`, {column: cell} of what is submitted.
    Raises InputError: no such file, no such table, an index that is no number or repeated, a question, its options or
    its answer missing.
    Source: LLaVA, `llava/eval/model_vqa_mmbench.py`.
    """
    path = Path(data) / FILE
    rows = [{name: "" if cell in NAN else cell for name, cell in row.items()} for row in _table(path, "\t", NEEDED)]
    cells = {row["index"]: row.get("image") for row in rows}
    questions, seen, pictures = [], set(), {}
    for row in rows:
        where = f"{path}, row {row['index']!r}"
        if not re.fullmatch("[0-9]{1,12}", row["index"]) or int(row["index"]) in seen:
            raise InputError(f"{where}: the index is repeated or not a whole number")
        index, options = int(row["index"]), _options(row)
        seen.add(index)
        if not row["question"] or not options:
            raise InputError(f"{where}: has no {'options' if row['question'] else 'question'}")
        if row["answer"] not in set(LETTERS):  # it may lie behind the cut: "None" is an option in words
            raise InputError(f"{where}: answer {row['answer']!r} is not one of A, B, C, D")
        picture = row.get("image")
        picture = cells.get(picture, picture)  # later tables: the index of the row that has the picture
        image = None if picture is None else hashlib.sha256(picture.encode()).hexdigest()[:16]
        hint = [row["hint"]] if not _absent(row.get("hint", "")) else []
        prompt = "\n".join([*hint, row["question"], *(f"{letter}. {text}" for letter, text in options.items())])
        questions.append({
            "question_id": index, "group": index % CIRCLE, "image": image,
            "picture": pictures.setdefault(image, picture),  # one copy in memory for the rows that share it
            "prompt": prompt, "text": f"{prompt}\n{SUFFIX}", "options": options, "answer": row["answer"],
            "category": row.get("category", ""), "l2": row.get("l2-category", ""),
            "row": {name: cell for name, cell in row.items() if name not in NOT_SUBMITTED}})  # fmt: skip
    return questions


def picture_bytes(question):
    """The encoded picture of a row, as bytes. Raises InputError naming the row: no picture, or not base64."""
    where = f"{FILE}, row {question['question_id']}"
    if not question["picture"]:
        raise InputError(f"{where}: has no picture")
    try:
        return base64.b64decode("".join(question["picture"].split()), validate=True)
    except ValueError:
        raise InputError(f"{where}: its picture is not base64") from None


def _options(row):
    """{letter: text} up to the first that is absent, even if more follow."""
    options = {}
    for letter in LETTERS:
        if _absent(row[letter]):
            break
        options[letter] = row[letter]
    return options


def _absent(cell):
    return cell.lower() in ("", "nan", "none")


def _table(path, delimiter, columns):
    """[{column: cell}] of a table with a header, quoted as pandas reads it. Raises InputError naming file and line."""
    csv.field_size_limit(2**31 - 1)  # a cell can hold a picture
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a table in UTF-8 ({error})") from None
    if len(lines) < 2:
        raise InputError(f"{path}: has no rows")
    (_, header), *rows = lines
    if lines[-1][1][-1].endswith("\n"):  # pandas calls this an end of file inside a string
        raise InputError(f"{path}: a quote is never closed, in the row up to line {lines[-1][0]}")
    for column in columns:
        if header.count(column) != 1:
            raise InputError(f"{path}: has {'two columns' if column in header else 'no column'} {column!r}")
    for number, cells in rows:
        if len(cells) != len(header):
            raise InputError(f"{path}, row up to line {number}: {len(cells)} cells, the header has {len(header)}")
    return [dict(zip(header, cells)) for _, cells in rows]


# ---------------------------------------------------------------- answers in and out


def read_answers(path):
    """Answers in a table (.tsv, .csv) with the columns `index` and `prediction`, or else in JSON lines -> records.

    An empty prediction is an answer without text, as the sheet cannot tell it from a missing one; either is wrong.
    Raises InputError naming the file.
    """
    delimiter = {".tsv": "\t", ".csv": ","}.get(Path(path).suffix.lower())
    if not delimiter:
        return [record for _, record in read_records(path)]
    rows = _table(path, delimiter, ("index", "prediction"))
    return [{"question_id": row["index"], "text": row["prediction"]} for row in rows]


def official(questions, answers):
    """(".tsv", text): the sheet to submit, with every row of `questions` and the predictions as the model wrote them.

    Raises InputError as `match_answers`. Source: LLaVA, `scripts/convert_mmbench_for_submission.py`.
    """
    records, out = match_answers("MMBench", questions, answers), io.StringIO()
    columns = list(questions[0]["row"])
    columns.insert(6, "prediction")
    # Everything quoted: a bare carriage return would end the row.
    writer = csv.writer(out, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(columns)
    for question in questions:
        index = question["question_id"]
        text = records.get(str(index), {"text": ""})["text"]
        check_text(text, f"MMBench answers: {index}")
        writer.writerow((question["row"] | {"prediction": text})[column] for column in columns)
    return ".tsv", out.getvalue()


# ---------------------------------------------------------------- matching

API_FAILURE = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def match(text, options, rule=RULES[0]):
    """The option that a prediction names: its letter, "Z" for a refusal, None if it cannot be told.

    text: what the model said. options: {letter: text}. rule: one of RULES.
    Source: VLMEvalKit, `can_infer` in `vlmeval/utils/matching_util.py`.
    """
    return _by_letter(text, options, rule) or _by_text(text, options, rule)


def _by_letter(text, options, rule):
    if API_FAILURE in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    tokens = text.translate(SPACED).split()
    found = [letter for letter in options if letter in tokens]
    # 2026: its first occurrence has to be among the last four tokens
    if len(found) == 1 and (rule == "2024" or tokens.index(found[0]) >= len(tokens) - 4):
        return found[0]
    if not found and "Z" in tokens:
        return "Z"
    # 2026: no end of word is asked for, so "the answer is blue" says B
    stated = re.search(r"answer\s+is\s+\**([ABCD])", text, re.IGNORECASE) if rule == "2026" else None
    return stated[1].upper() if stated and stated[1].upper() in options else None


def _by_text(text, options, rule):
    lower = text.lower()
    if rule == "2026" and len(lower) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in lower]
    return found[0] if len(found) == 1 else None


def _letters(questions, records, rule):
    """{index: what `match` says} of the rows with an answer."""
    answered = [(q, records[str(q["question_id"])]) for q in questions if str(q["question_id"]) in records]
    return {q["question_id"]: match(record["text"], q["options"], rule) for q, record in answered}


# ---------------------------------------------------------------- judge


def judge(questions, answers, judge, rule=RULES[0]):
    """Asks which option an answer means, for the rows that `match` cannot tell -> {index: letter, "drawn": number}.

    questions, answers, rule: as for `score`. judge: has `texts` (here `template`, with {} for question, options and
    answer), `ask` and `map`. The reply is matched like an answer; after three that cannot be, or that the token limit
    cut off, a letter or Z is drawn as in the official protocol, and "drawn" says how often. Raises InputError as
    `match_answers`, and if the template has not three {}.
    Source: VLMEvalKit, `extract_answer_from_item` in `multiple_choice.py`.
    """
    template = judge.texts.get("template")
    if not isinstance(template, str) or template.count("{}") != 3:
        raise InputError(f"judge prompts, {PROMPTS}: 'template' is not a text with {{}} at three places")
    records = match_answers("MMBench", questions, answers)
    letters = _letters(questions, records, rule)
    unmatched = [  # nothing said is nothing to match
        q for q in questions if letters.get(q["question_id"], "") is None and records[str(q["question_id"])]["text"]
    ]

    def ask(question):
        index, options = question["question_id"], question["options"]
        listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
        start, middle, then, end = template.split("{}")  # not format: a question may have braces
        content = (start + question["row"]["question"] + middle + "There are several options: \n" + listed
                   + then + records[str(index)]["text"] + end)  # fmt: skip
        for attempt in range(1, 4):
            messages = [{"role": "user", "content": content}]
            reply = judge.ask(f"{index}, attempt {attempt}", messages, temperature=0, max_tokens=1024)
            if letter := None if reply.cut else match(reply.content, options, rule):
                return letter, False
        return random.Random(index).choice([*options, "Z"]), True

    replies = judge.map(ask, unmatched)
    judged = {question["question_id"]: letter for question, (letter, _) in zip(unmatched, replies)}
    return judged | {"drawn": sum(drawn for _, drawn in replies)}


# ---------------------------------------------------------------- scores


def score(questions, answers, judged=None, rule=RULES[0]):
    """CircularEval: a question is right if all its rows in `questions` are; a row without an answer is wrong.

    questions: as from `load`. answers: records {"question_id", "text"}. judged: as from `judge`, without it an
    unmatched row is wrong (the toolkit's "exact matching"). rule: one of RULES, for `match`.
    Returns {"score", "interval", "n", "correct"} over the questions, in percent; the same as `groups`, by l2-category,
    as `categories`, as `vanilla` over the rows with options in their first order, as `rows` over all rows; `missing`
    and `unmatched`, numbers of rows; `rule`; with a judge `judged`, for how many rows it was asked, and `unread`, for
    how many of these a letter was drawn, with its share of all rows as `unread_share`. Empty groups are left out.
    Raises InputError as `match_answers`.
    Source: VLMEvalKit, `multiple_choice.py`.
    """
    records = match_answers("MMBench", questions, answers)
    letters = _letters(questions, records, rule)
    unmatched = {index for index, letter in letters.items() if letter is None}
    letters |= {index: letter for index, letter in (judged or {}).items() if index in unmatched}
    hits = [letters.get(q["question_id"]) == q["answer"] for q in questions]
    circles = {}  # group -> (its first row, whether all its rows are right)
    for question, hit in zip(questions, hits):
        first, right = circles.get(question["group"], (question, True))
        circles[question["group"]] = first, right and hit

    def shares(field, names):
        parts = {name: [right for first, right in circles.values() if first[field] == name] for name in names}
        return {GROUPS.get(name, name): share(part) for name, part in parts.items() if part}

    base = [hit for question, hit in zip(questions, hits) if question["question_id"] < CIRCLE]
    scores = {
        **share([right for _, right in circles.values()]),
        "groups": shares("l2", GROUPS),
        "categories": shares("category", sorted({q["category"] for q in questions} - {""})),
        **({"vanilla": share(base)} if base else {}),
        "rows": share(hits),
        "missing": len(questions) - len(records),
        "unmatched": len(unmatched),
        "rule": rule,
    }
    if judged is not None:
        scores |= {"judged": len(unmatched & judged.keys()), **unread(judged.get("drawn", 0), len(questions))}
    return scores


def report(scores):
    """A plain-text table with intervals: the whole, by ability, by category. scores: as from `score`."""
    rest = "they count as wrong"
    if "judged" in scores:
        rest = f"{scores['judged']} of them judged, {scores['unread']} letters drawn"
    lines = [
        f"MMBench dev: {scores['n']} questions in {scores['rows']['n']} rows, {scores['missing']} without an answer",
        f"{scores['unmatched']} answers match no option by the rule of {scores['rule']}; {rest}",
        f"{'accuracy (%)':<42}  [95 % interval]",
    ]
    table = {"CircularEval": scores, "vanilla (first order of options)": scores.get("vanilla"), "rows": scores["rows"]}
    for name, part in {**table, **scores["groups"], **scores["categories"]}.items():
        if part:
            lines.append(f"{name:<42}  {figure(part):<20} n={part['n']}")
    return "\n".join(lines)
