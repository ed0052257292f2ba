"""MMBench (dev, English, 4,377 rows: 1,176 questions in all rotations of their options): prompt, parser,
scores.

Data: `mmbench_dev_20230712.tsv` from OpenCompass's MMBench site; it contains the images as base64 text.
The prompt is that of LLaVA's `llava/eval/model_vqa_mmbench.py`, the submission sheet that of its
`scripts/convert_mmbench_for_submission.py`. Matching, CircularEval and judge follow VLMEvalKit
(`matching_util.py`, `multiple_choice.py`): rule "2024" as of May 2024, when the paper appeared, rule "2026"
its later version. Two known
differences: the judge sees every unmatched row, even if its group is already wrong (so that accuracy by rows
is meaningful), and the random letter used when it fails depends only on the row's index. Not here: the
evaluation server, which scored 1,164 questions for the paper, the Chinese edition with its own prompts, and
writing xlsx.
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
from stic_min.scorers.common import match_answers, proportion, unread, with_interval

DATA_FILES = """\
mmbench_dev_20230712.tsv   OpenCompass's MMBench, linked from LLaVA's evaluation guide; has the images
"""
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
NAN = {*"#NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split(),
       "#N/A", "#N/A N/A"}  # fmt: skip

OFFICIAL_JUDGE = "gpt-3.5-turbo-0613"
PROMPTS = "mmbench_match"
OWN_PROMPTS = {
    "template": "Somebody answered a multiple-choice question in free words. Say which option the words "
    "stand for. "
    "Reply with that option's capital letter and nothing else, or with Z if they fit none of the options.\n\n"
    "Question: Which animal sleeps on the sofa?\nOptions: A. a dog B. a parrot C. a cat D. a hamster\n"
    "Answer: some kind of kitten\nLetter: C\n\n"
    "Question: Which animal sleeps on the sofa?\nOptions: A. a dog B. a parrot C. a cat D. a hamster\n"
    "Answer: a bowl of fruit\nLetter: Z\n\n"
    "Question: {}\nOptions: {}\nAnswer: {}\nLetter: "
}

# ---------------------------------------------------------------- questions


def load(data: str | Path) -> list[dict]:
    """The rows of the table, in its order.

    data: the folder of `mmbench_dev_20230712.tsv`, whose columns must include `NEEDED`.
    Returns one dict per row: `question_id`, its index; `group`, the index of the question that it repeats;
    `image`, a digest of the image, and `encoded`, the image as base64 text, both None if the table has no
    images; `prompt` and `text`, without and with the suffix; `options`, {letter: text} as in the prompt;
    `answer`, a letter; `category` and `l2`, "" where unknown; `row`, {column: cell}, the cells of the
    submission.
    Raises InputError: no such file, not such a table, an index that is repeated or not a number, a missing
    question, option list or answer.
    Source: LLaVA, `llava/eval/model_vqa_mmbench.py`.
    """
    path = Path(data) / FILE
    table = _table(path, "\t", NEEDED)
    rows = [{name: "" if cell in NAN else cell for name, cell in row.items()} for row in table]
    image_cells = {row["index"]: row.get("image") for row in rows}
    questions, indices, shared = [], set(), {}
    for row in rows:
        where = f"{path}, row {row['index']!r}"
        if not re.fullmatch("[0-9]{1,12}", row["index"]) or int(row["index"]) in indices:
            raise InputError(f"{where}: the index is repeated or not a whole number")
        index = int(row["index"])
        options = _options(row)
        indices.add(index)
        if not row["question"] or not options:
            raise InputError(f"{where}: has no {'options' if row['question'] else 'question'}")
        if row["answer"] not in set(LETTERS):  # not `options`: "None" ends them, but can be an option's text
            raise InputError(f"{where}: answer {row['answer']!r} is not one of A, B, C, D")
        encoded = row.get("image")
        encoded = image_cells.get(encoded, encoded)  # in later tables the index of the row with the image
        digest = None if encoded is None else hashlib.sha256(encoded.encode()).hexdigest()[:16]
        hint = [row["hint"]] if not _absent(row.get("hint", "")) else []
        listed = [f"{letter}. {text}" for letter, text in options.items()]
        prompt = "\n".join([*hint, row["question"], *listed])
        questions.append({
            "question_id": index, "group": index % CIRCLE, "image": digest,
            "encoded": shared.setdefault(digest, encoded),  # one copy in memory for the rows that share it
            "prompt": prompt, "text": f"{prompt}\n{SUFFIX}", "options": options, "answer": row["answer"],
            "category": row.get("category", ""), "l2": row.get("l2-category", ""),
            "row": {name: cell for name, cell in row.items() if name not in NOT_SUBMITTED}})  # fmt: skip
    return questions


def image_bytes(question):
    """The encoded image of a row, as bytes. Raises InputError naming the row: no image, or not base64."""
    where = f"{FILE}, row {question['question_id']}"
    if not question["encoded"]:
        raise InputError(f"{where}: has no image")
    try:
        return base64.b64decode("".join(question["encoded"].split()), validate=True)
    except ValueError:
        raise InputError(f"{where}: its image is not base64") from None


def _options(row):
    """{letter: text} up to the first absent option, even if more follow."""
    options = {}
    for letter in LETTERS:
        if _absent(row[letter]):
            break
        options[letter] = row[letter]
    return options


def _absent(cell):
    return cell.lower() in ("", "nan", "none")


def _table(path, delimiter, columns):
    """The rows of a table with a header as [{column: cell}], with pandas' quoting. Raises InputError naming
    the line."""
    csv.field_size_limit(2**31 - 1)  # a cell can hold an image
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table in UTF-8 ({error})") from None
    if len(lines) < 2:
        raise InputError(f"{path}: has no rows")
    (_, header), *rows = lines
    if lines[-1][1][-1].endswith("\n"):  # pandas reports an end of file inside a string
        raise InputError(f"{path}: a quote is never closed, in the row that ends at line {lines[-1][0]}")
    for column in columns:
        if header.count(column) != 1:
            raise InputError(f"{path}: has {'two columns' if column in header else 'no column'} {column!r}")
    for number, cells in rows:
        if len(cells) != len(header):
            where = f"{path}, row ending at line {number}"
            raise InputError(f"{where}: {len(cells)} cells, the header has {len(header)}")
    return [dict(zip(header, cells)) for _, cells in rows]


# ---------------------------------------------------------------- answers in and out


def read_answers(path):
    """Reads answers from a table (.tsv, .csv) with the columns `index` and `prediction`, or from JSON lines
    -> records.

    An empty prediction is an answer without text, as a sheet cannot distinguish it from a missing one; both
    are wrong.
    Raises InputError naming the file.
    """
    delimiter = {".tsv": "\t", ".csv": ","}.get(Path(path).suffix.lower())
    if not delimiter:
        return [record for _, record in read_records(path)]
    rows = _table(path, delimiter, ("index", "prediction"))
    return [{"question_id": row["index"], "text": row["prediction"]} for row in rows]


def official(questions, answers):
    """(".tsv", text): the sheet to submit, with every row of `questions` and the model's responses verbatim.

    Raises InputError like `match_answers`. Source: LLaVA, `scripts/convert_mmbench_for_submission.py`.
    """
    records = match_answers("MMBench", questions, answers)
    out = io.StringIO()
    columns = list(questions[0]["row"])
    columns.insert(6, "prediction")
    # Quote everything: a bare carriage return would end the row.
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
    """The option that a response names: its letter, "Z" for a refusal, None if undecidable.

    options: {letter: text}. rule: one of RULES.
    Source: VLMEvalKit, `can_infer` in `vlmeval/utils/matching_util.py`.
    """
    return _by_letter(text, options, rule) or _by_text(text, options, rule)


def _by_letter(text, options, rule):
    if API_FAILURE in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    tokens = text.translate(SPACED).split()
    letters = [letter for letter in options if letter in tokens]
    # 2026: the first occurrence must be among the last four tokens
    if len(letters) == 1 and (rule == "2024" or tokens.index(letters[0]) >= len(tokens) - 4):
        return letters[0]
    if not letters and "Z" in tokens:
        return "Z"
    # 2026: the letter may start a word, so "the answer is blue" means B
    stated = re.search(r"answer\s+is\s+\**([ABCD])", text, re.IGNORECASE) if rule == "2026" else None
    return stated[1].upper() if stated and stated[1].upper() in options else None


def _by_text(text, options, rule):
    lower = text.lower()
    if rule == "2026" and len(lower) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in lower]
    return named[0] if len(named) == 1 else None


def _letters(questions, records, rule):
    """{index: result of `match`} for the rows with an answer."""
    answered = [(q, records[str(q["question_id"])]) for q in questions if str(q["question_id"]) in records]
    return {q["question_id"]: match(record["text"], q["options"], rule) for q, record in answered}


# ---------------------------------------------------------------- judge


def judge(questions, answers, judge, rule=RULES[0]):
    """Asks which option an answer means, for the rows that `match` cannot decide -> {index: letter, "random":
    count}.

    questions, answers, rule: as in `score`. judge: has `texts` (here `template`, with {} for question,
    options and answer), `ask` and `map`. A reply is matched like an answer. After three replies that cannot
    be matched or were cut off by the token limit, the official protocol picks a letter or Z at random;
    "random" counts these rows.
    Raises InputError like `match_answers`, and if the template does not have three {}.
    Source: VLMEvalKit, `extract_answer_from_item` in `multiple_choice.py`.
    """
    template = judge.texts.get("template")
    if not isinstance(template, str) or template.count("{}") != 3:
        raise InputError(f"judge prompts, {PROMPTS}: 'template' is not text with three {{}}")
    records = match_answers("MMBench", questions, answers)
    letters = _letters(questions, records, rule)
    unmatched = [q for q in questions if letters.get(q["question_id"], "") is None]
    unmatched = [q for q in unmatched if records[str(q["question_id"])]["text"]]  # not the empty ones

    def ask(question):
        index = question["question_id"]
        options = question["options"]
        listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
        start, middle, then, end = template.split("{}")  # not str.format: a question may contain braces
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
    return judged | {"random": sum(is_random for _, is_random in replies)}


# ---------------------------------------------------------------- scores


def score(
    questions: list[dict], answers: list[dict], judged: dict | None = None, rule: str = RULES[0]
) -> dict:
    """CircularEval: a question is correct if all its rows in `questions` are; a row without an answer is
    wrong.

    questions: from `load`. answers: records {"question_id", "text"}. judged: from `judge`; without it an
    unmatched row is wrong (the toolkit's "exact matching"). rule: one of RULES, for `match`.
    Returns {"score", "interval", "n", "correct"} over the questions, in percent; the same in `groups`, by
    l2-category, in `categories`, in `vanilla`, over the rows with unrotated options, and in `rows`, over all
    rows; `missing` and `unmatched`, counts of rows; `rule`; with a judge also `judged`, the number of rows it
    decided, and `unread`, the number of these with a random letter, with `unread_share`, its fraction of all
    rows. Empty groups are omitted.
    Raises InputError like `match_answers`.
    Source: VLMEvalKit, `multiple_choice.py`.
    """
    records = match_answers("MMBench", questions, answers)
    letters = _letters(questions, records, rule)
    unmatched = {index for index, letter in letters.items() if letter is None}
    letters |= {index: letter for index, letter in (judged or {}).items() if index in unmatched}
    hits = [letters.get(q["question_id"]) == q["answer"] for q in questions]
    circles = {}  # group -> (its first row, whether all its rows are correct)
    for question, hit in zip(questions, hits):
        first, correct = circles.get(question["group"], (question, True))
        circles[question["group"]] = first, correct and hit

    def group_by(field, names):
        groups = {}
        for name in names:
            if members := [correct for first, correct in circles.values() if first[field] == name]:
                groups[GROUPS.get(name, name)] = proportion(members)
        return groups

    unrotated = [hit for question, hit in zip(questions, hits) if question["question_id"] < CIRCLE]
    scores = {
        **proportion([correct for _, correct in circles.values()]),
        "groups": group_by("l2", GROUPS),
        "categories": group_by("category", sorted({q["category"] for q in questions} - {""})),
        **({"vanilla": proportion(unrotated)} if unrotated else {}),
        "rows": proportion(hits),
        "missing": len(questions) - len(records),
        "unmatched": len(unmatched),
        "rule": rule,
    }
    if judged is not None:
        scores["judged"] = len(unmatched & judged.keys())
        scores |= unread(judged.get("random", 0), len(questions))
    return scores


def report(scores: dict) -> str:
    """A plain-text table with intervals: overall, by ability, by category. scores: from `score`."""
    rest = "they count as wrong"
    if "judged" in scores:
        rest = f"{scores['judged']} of them judged, {scores['unread']} with a random letter"
    rows = scores["rows"]
    lines = [
        f"MMBench dev: {scores['n']} questions in {rows['n']} rows, {scores['missing']} without an answer",
        f"{scores['unmatched']} answers match no option under rule {scores['rule']}; {rest}",
        f"{'accuracy (%)':<42}  [95% interval]",
    ]
    table = {"CircularEval": scores, "vanilla (unrotated options)": scores.get("vanilla"), "rows": rows}
    for name, group in {**table, **scores["groups"], **scores["categories"]}.items():
        if group:
            lines.append(f"{name:<42}  {with_interval(group):<20} n={group['n']}")
    return "\n".join(lines)
