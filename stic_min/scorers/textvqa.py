"""TextVQA (validation, 5,000 questions about 3,166 images, ten reference answers each): the join and the
scores.

Data: `TextVQA_0.5.1_val.json` and `train_images/` from TextVQA's site (textvqa.org), and LLaVA's question
file `llava_textvqa_val_v051_ocr.jsonl`, from the `eval.zip` of its evaluation guide. The question file has
the complete prompt, with OCR tokens and suffix. Its ids name images, not questions, so answers are joined by
the question in their prompt.

RULES are two ways to normalize answers: `llava` is that of LLaVA's `eval_textvqa.py` and its
`m4c_evaluator.py`, `vlmevalkit` that of VLMEvalKit's `vqa_eval.py`. The score of a normalized answer is the
same in both.
Not here: prompts without OCR tokens, the test split (its answers are secret).
"""

import re
from collections import Counter
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import read_records, text_field
from stic_min.scorers.common import mean, read_entries, with_interval

DATA_FILES = """\
TextVQA_0.5.1_val.json             https://textvqa.org
train_images/ID.jpg                the same
llava_textvqa_val_v051_ocr.jsonl   in eval.zip, linked from LLaVA's evaluation guide
"""
COMPLETE = True
MAX_NEW_TOKENS = 128
KEY = "key"  # question_id is the image's

# ---------------------------------------------------------------- data


def question_in(prompt, where):
    """The question in a recorded prompt, in lower case. `where` is for the error message.

    Three forms are known: LLaVA-1.0's, on one or more lines; three lines, one of them the OCR tokens; two
    lines, without OCR tokens. Raises InputError for any other form, such as a prompt with a description.
    Source: LLaVA, `eval_textvqa.py`.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if match := re.search("Question: (.*?) Short answer:", prompt, re.DOTALL):
            return match[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise InputError(f"{where}: the prompt {prompt[:60]!r} has an unknown form (or a description in it)")


def load(data: str | Path) -> list[dict]:
    """The questions, in the order of LLaVA's question file.

    data: the folder of `TextVQA_0.5.1_val.json` and `llava_textvqa_val_v051_ocr.jsonl`.
    Returns one dict per question: `key`, its position in the question file, from 1; `question_id`, the
    image's id, which is not unique; `image`, a path relative to `data`; `text`, and the same as `prompt`;
    `answers`, ten texts.
    Raises InputError like `read_entries`, `read_records` and `question_in`; also if a question has no
    reference answers, or if they are not ten texts.
    """
    references_file = Path(data) / "TextVQA_0.5.1_val.json"
    references = {}
    entries, _ = read_entries(references_file, {"image_id": str, "question": str, "answers": list}, "data")
    for number, entry in enumerate(entries):
        if len(entry["answers"]) != 10 or not all(isinstance(answer, str) for answer in entry["answers"]):
            raise InputError(f"{references_file}, entry {number}: 'answers' are not ten texts")
        references[entry["image_id"], entry["question"].lower()] = entry["answers"]
    questions = []
    for key, (where, line) in enumerate(read_records(Path(data) / "llava_textvqa_val_v051_ocr.jsonl"), 1):
        qid, image, text = (text_field(line, name, where) for name in ("question_id", "image", "text"))
        question = question_in(text, where)
        if (qid, question) not in references:
            raise InputError(f"{where}: {references_file.name} has no question {question!r} about {qid!r}")
        questions.append({
            "key": key, "question_id": qid, "image": f"train_images/{image}", "text": text, "prompt": text,
            "answers": references[qid, question],
        })  # fmt: skip
    return questions


# ---------------------------------------------------------------- normalizing an answer

MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}

# The contraction table of the VQA evaluation, 120 spellings: all ways to omit one apostrophe from one of
# these words, and three odd entries. Those with a capital I never apply, since answers are in lower case by
# then.
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in """
        ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
        he'd
        he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't
        mightn't've
        must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
        shouldn't've
        somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
        something'd've
        something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've
        'twas wasn't
        we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
        who'll who's
        who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
        you'd've you'll
        you're you've
        """.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}

# Which periods are dropped. The VQA evaluation meant to keep those after a digit as well; a slip in its
# pattern, which LLaVA copied, drops them.
FULL_STOP = {"llava": r"\.(?!\d)", "vlmevalkit": r"(?<!\d)\.(?!\d)"}
RULES = tuple(FULL_STOP)


def normalize(text, rule="llava"):
    """The form in which answers are compared: no case, articles or most punctuation; numbers up to ten as
    digits.

    Sources: LLaVA, `EvalAIAnswerProcessor` in `m4c_evaluator.py`; VLMEvalKit, `process_answer` in
    `vqa_eval.py`.
    """
    if rule == "llava":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    original = text
    for mark in MARKS:  # all marks of one kind are treated alike, by where they appear in the original text
        dropped = f"{mark} " in original or f" {mark}" in original or re.search(r"\d,\d", original)
        text = text.replace(mark, "" if dropped else " ")
    text = re.sub(FULL_STOP[rule], "", text, count=32)  # the originals pass re.UNICODE, 32, as the count
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


# ---------------------------------------------------------------- scores


def accuracy(text, references, rule="llava"):
    """The score of one answer, 0 to 1: one third per matching reference of the ten, at most 1.

    It is the mean over the ten ways to leave one reference out: one match gives 0.3, four or more give 1.
    Source: LLaVA, `TextVQAAccuracyEvaluator`.
    """
    text = normalize(text, rule)
    matches = sum(normalize(reference, rule) == text for reference in references)
    return (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10


def score(questions: list[dict], answers: list[dict], rule: str = "llava") -> dict:
    """The mean accuracy in percent.

    questions: from `load`. answers: records {"question_id", "prompt", "text"}, in any order. rule: one of
    RULES.
    Returns {"score", "interval", "n", "missing": 0, "rule", "groups": {}}.
    Raises InputError: no questions; an answer without prompt or text, of unknown form, to an unknown
    question, or repeated; a question without an answer. (The official scorer averages over the available
    answers.)
    Source: LLaVA, `eval_textvqa.py`.
    """
    if not questions:
        raise InputError("TextVQA: no questions")
    join = lambda entry, where: (str(entry.get("question_id")), question_in(entry["prompt"], where))
    keys = [join(question, f"TextVQA question {question[KEY]}") for question in questions]
    references = {key: question["answers"] for key, question in zip(keys, questions)}
    unanswered = Counter(keys)
    values = []
    for number, record in enumerate(answers, 1):
        where = f"TextVQA answers, record {number}"
        for name in ("prompt", "text"):
            if not isinstance(record.get(name), str):
                raise InputError(f"{where}: no {name!r}")
        qid, question = key = join(record, where)
        if not unanswered[key]:
            fault = "is answered twice" if key in references else "is not among the questions"
            raise InputError(f"{where}: {question!r} about {qid!r} {fault}")
        unanswered[key] -= 1
        values.append(accuracy(record["text"], references[key], rule))
    if unanswered := +unanswered:
        qid, question = next(iter(unanswered))
        raise InputError(
            f"TextVQA: {unanswered.total()} of {len(questions)} questions have no answer, "
            f"the first is {question!r} about {qid!r}"
        )
    return mean(values) | {"missing": 0, "rule": rule, "groups": {}}


def report(scores: dict) -> str:
    """The accuracy as text. scores: from `score`."""
    head = f"TextVQA val: {scores['n']} questions, {scores['missing']} without an answer; accuracy in %"
    return f"{head}\nall (rule {scores['rule']})   {with_interval(scores)}"
