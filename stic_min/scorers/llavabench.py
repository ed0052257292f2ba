"""LLaVA-Bench (In-the-Wild; 60 questions on 24 images): prompt, the judge's request, the scores from its
reviews.

Data: `questions.jsonl`, `context.jsonl`, `answers_gpt4.jsonl` (the reference answers) and `images/`, from the
dataset liuhaotian/llava-bench-in-the-wild. The request and the parsing of the review follow LLaVA's
`llava/eval/eval_gpt_review_bench.py`, the scores its `llava/eval/summarize_gpt_review.py`. The judge rates
reference and answer in one review, the reference always first; the score is the answers' mean rating in
percent of the reference's. OFFICIAL_JUDGE is that of STIC's release; LLaVA's own numbers are by gpt-4-0314.
Not here: any score without a judge's reviews, and reviews with the order swapped.
"""

import json
from pathlib import Path

import numpy as np

from stic_min import InputError
from stic_min.runtime.files import read_records, text_field
from stic_min.scorers.common import bootstrap, match_answers, unread, with_interval

DATA_FILES = """\
questions.jsonl, context.jsonl, answers_gpt4.jsonl
images/NAME.jpg   all from https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild
"""
COMPLETE = True
GROUPED_BY = "category"
CATEGORIES = ("conv", "detail", "complex")
FAILED = (-1, -1)

OFFICIAL_JUDGE = "gpt-4-0613"
RUNS = 3
PROMPTS = "llava_bench"
OWN_PROMPTS = {
    "system": "You review answers to questions about pictures, with care and without favour.",
    "role": "Assistant",
    "rule": (
        "Above are a description of a picture in words, a question that was asked about the picture, and "
        "the replies "
        "of two assistants. Rate each reply with a number from 1 (useless) to 10 (excellent). Ask yourself "
        "whether it "
        "helps the person who asked, keeps to the question, agrees with the description, and goes into as "
        "much detail "
        "as the question calls for.\n"
        "The first line of your review has to be the rating of Assistant 1, one blank and the rating of "
        "Assistant 2: "
        "two plain numbers, without a comma or any word. From the second line on, give your reasons. Which "
        "reply "
        "comes first must not count."
    ),
}

# ---------------------------------------------------------------- questions


def load(data: str | Path) -> list[dict]:
    """The questions, in the order of the file.

    data: the folder of the three JSON lines files.
    Returns one dict per question: `question_id`; `image`; `text` and `prompt`, the bare question; `category`,
    one of CATEGORIES; `caption`, which describes the image to the judge; `reference`, the reference answer.
    Raises InputError naming file and line: a field is missing, an id repeated, a category unknown, an image
    without a caption, reference answers not in the order of the questions (the official script does not check
    that).
    """
    folder = Path(data)
    captions = _captions(folder / "context.jsonl")
    records = read_records(folder / "questions.jsonl")
    references = read_records(folder / "answers_gpt4.jsonl")
    if len(records) != len(references):
        message = f"{len(references)} answers to {len(records)} questions"
        raise InputError(f"{folder / 'answers_gpt4.jsonl'}: {message}")
    questions, ids = [], set()
    for (where, entry), (reference_where, reference) in zip(records, references):
        qid = entry.get("question_id")
        category = entry.get("category")
        image = text_field(entry, "image", where)
        text = text_field(entry, "text", where)
        if type(qid) not in (int, str) or str(qid) in ids:
            fault = "repeated" if str(qid) in ids else "not an id"
            raise InputError(f"{where}: question_id {qid!r} is {fault}")
        if category not in CATEGORIES:
            raise InputError(f"{where}: category {category!r} is not one of {', '.join(CATEGORIES)}")
        if image not in captions:
            raise InputError(f"{where}: image {image!r} is not in context.jsonl")
        if str(reference_id := reference.get("question_id")) != str(qid):
            message = f"question_id is {reference_id!r}, but the question on the same line is {qid!r}"
            raise InputError(f"{reference_where}: {message}")
        ids.add(str(qid))
        questions.append({
            "question_id": qid, "image": f"images/{image}", "text": text, "prompt": text,
            "category": category, "caption": captions[image],
            "reference": text_field(reference, "text", reference_where)})  # fmt: skip
    return questions


def _captions(path):
    """{image: caption}. Raises InputError if an image has two."""
    captions = {}
    for where, entry in read_records(path):
        image = text_field(entry, "image", where)
        caption = _caption(entry, where)
        if captions.setdefault(image, caption) != caption:
            raise InputError(f"{where}: a second caption of {image!r}")
    return captions


def _caption(entry, where):
    caption = entry.get("caption")
    if isinstance(caption, list) and caption and all(isinstance(line, str) for line in caption):
        entry = {"caption": "\n".join(caption)}
    return text_field(entry, "caption", where)


# ---------------------------------------------------------------- the judge


def parse(review):
    """The two scores on the first line of a review; FAILED unless it is two numbers separated by one space or
    comma. Parsed by Python's `float`, so NaN is a number here. Source: LLaVA, `parse_score`."""
    try:
        reference, model = review.split("\n")[0].replace(",", " ").split(" ")
        return float(reference), float(model)
    except ValueError:
        return FAILED


def _has_mean(pair):
    return all(abs(value) < 1e9 for value in pair)  # not NaN, infinity or integers too large for a float


def judge(questions, answers, judge):
    """Asks the judge for a review of every answer, `judge.runs` times -> reviews, as `score` takes them.

    questions: from `load`. answers: records {"question_id", "text"}, one for each question. judge: a Judge
    with `texts` in the form of OWN_PROMPTS. A pair with a NaN or an infinite number is FAILED here, as it
    would leave no mean.
    Raises InputError like `match_answers`. Source: LLaVA, `llava/eval/eval_gpt_review_bench.py`.
    """
    records = match_answers("LLaVA-Bench", questions, answers, complete=True)
    texts = judge.texts
    role = texts["role"]

    def review(item):
        run, number, question = item
        text = (
            f"[Context]\n{question['caption']}\n\n[Question]\n{question['prompt']}\n\n"
            f"[{role} 1]\n{question['reference']}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{records[str(question['question_id'])]['text']}\n\n[End of {role} 2]\n\n"
            f"[System]\n{texts['rule']}\n\n"
        )
        messages = [{"role": "system", "content": texts["system"]}, {"role": "user", "content": text}]
        reply = judge.ask(f"{question['question_id']}, run {run}", messages, temperature=0.2, max_tokens=1024)
        pair = parse(reply.content)
        return {"id": number, "question_id": question["question_id"],
                "category": f"llava_bench_{question['category']}", "content": reply.content,
                "tuple": list(pair if _has_mean(pair) else FAILED), "model": reply.model}  # fmt: skip

    runs = range(1, judge.runs + 1)
    reviews = judge.map(review, [(run, number, q) for run in runs for number, q in enumerate(questions, 1)])
    if all(review["tuple"] == list(FAILED) for review in reviews):  # which would score 100
        first = reviews[0]["content"][:80]
        message = "none of the judge's reviews has two scores"
        raise InputError(f"LLaVA-Bench: {message}, the first starts {first!r}")
    return [reviews[start : start + len(questions)] for start in range(0, len(reviews), len(questions))]


def read_judged(paths):
    """Reads official review files, one per run -> one list per run of {"question_id", "category", "content",
    "tuple"}.

    A review needs its question's id and either `tuple` or `content`. Raises InputError naming file and line.
    """
    runs = [read_records(path) for path in paths]
    for where, review in (pair for run in runs for pair in run):
        pair = review.get("tuple")
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or any(type(value) not in (int, float) for value in pair):
            if "tuple" in review or not isinstance(review.get("content"), str):
                raise InputError(f"{where}: needs a 'tuple' of two numbers or, instead, the text 'content'")
        if "question_id" not in review:
            raise InputError(f"{where}: no question_id")
    return [[review for _, review in run] for run in runs]


def judged_files(judged):
    """{".reviews-1.jsonl": the text of the official review file of run 1, ...}."""
    return {f".reviews-{number}.jsonl": "".join(json.dumps(review) + "\n" for review in run)
            for number, run in enumerate(judged, 1)}  # fmt: skip


# ---------------------------------------------------------------- scores


def score(questions: list[dict], answers: list[dict] | None, judged: list[list[dict]] | None) -> dict:
    """The answers' mean rating in percent of the reference's, over all questions and by category.

    questions: from `load`. answers: None, or the reviewed records, checked to be complete. judged: one list
    of reviews per run, from `judge` or `read_judged`; `tuple` counts, or else the parsed `content`.
    Returns {"score", "interval", "n", "missing": 0, "reference", "model": the mean ratings times ten, "runs":
    [score of each run], "unread", "unread_share": reviews without two scores, "groups": {category: the same
    without missing and unread}}. The numbers of each run are rounded like the official ones, then averaged
    over the runs; the interval reflects the choice of questions. An unread review counts as a pair of -1, so
    if all are unread the score is 100.
    Raises InputError: no reviews, a review of an unknown question or a repeated one, a question without one,
    another category than the question's, a NaN or infinite number, ratings of the reference that average to
    0, answers like `match_answers`. Source: LLaVA, `llava/eval/summarize_gpt_review.py`.
    """
    if not judged:
        flags = "--judge, or --judged FILE with official reviews"
        raise InputError(f"LLaVA-Bench is graded by a judge model: {flags}")
    if answers is not None:
        match_answers("LLaVA-Bench", questions, answers, complete=True)
    pairs = [_pairs(questions, run, f"LLaVA-Bench reviews, run {i}") for i, run in enumerate(judged, 1)]
    pairs = np.array(pairs)  # (runs, questions, 2)
    groups = {}
    for name in CATEGORIES:
        members = [question["category"] == name for question in questions]
        if any(members):
            groups[name] = _summarize(pairs[:, members], name)
    failed = (pairs == FAILED).all(2)  # (runs, questions)
    counts = unread(int(failed.sum()), failed.size)
    return {**_summarize(pairs, "all"), "missing": 0, **counts, "groups": groups}


def _pairs(questions, reviews, where):
    """One run's [(reference, model)] in the order of the questions."""
    categories = {str(q["question_id"]): f"llava_bench_{q['category']}" for q in questions}
    pairs = {}
    for review in reviews:
        qid = str(review["question_id"])
        if qid not in categories or qid in pairs:
            raise InputError(f"{where}: {qid!r} is " + ("repeated" if qid in pairs else "not a question id"))
        if (category := review.get("category", categories[qid])) != categories[qid]:
            mismatch = f"has category {category!r}, the question's is {categories[qid]!r}"
            raise InputError(f"{where}: {qid!r} {mismatch}")
        pairs[qid] = tuple(review["tuple"]) if "tuple" in review else parse(review["content"])
        if not _has_mean(pairs[qid]):
            raise InputError(f"{where}: {qid!r} has the ratings {pairs[qid]}, which have no mean")
    if unreviewed := [qid for qid in categories if qid not in pairs]:
        count = f"{len(unreviewed)} of {len(questions)} questions have no review"
        raise InputError(f"{where}: {count}, the first is {unreviewed[0]!r}")
    return [pairs[qid] for qid in categories]


def _summarize(pairs, name):
    """(runs, questions, 2) ratings -> the numbers of one group."""
    rounded = [[round(value, 3) for value in run.mean(0).tolist()] for run in pairs]
    if not all(reference for reference, _ in rounded):
        message = f"the reference's ratings ({name}) average to 0, so there is no score"
        raise InputError(f"LLaVA-Bench reviews: {message}")
    runs = [round(model / reference * 100, 1) for reference, model in rounded]
    reference, model = (sum(round(value * 10, 1) for value in column) / len(runs) for column in zip(*rounded))
    interval = bootstrap(pairs.mean(0), _ratios)
    return {"score": sum(runs) / len(runs), "interval": interval, "n": pairs.shape[1],
            "reference": reference, "model": model, "runs": runs}  # fmt: skip


def _ratios(resampled):
    reference, model = resampled.mean(1).T
    nonzero = reference != 0  # in a small sample, failed reviews can cancel the others: it has no ratio
    return 100 * model[nonzero] / reference[nonzero]


def report(scores: dict) -> str:
    """The numbers as lines of text. scores: from `score`."""
    n = scores["n"]
    runs = scores["runs"]
    row = "{:<10} {:<22}{reference:>9.1f}{model:>9.1f}{n:>6}"
    lines = [row.format(name, with_interval(group), **group)
             for name, group in [("all", scores), *scores["groups"].items()]]  # fmt: skip
    unread_count = f"{scores['unread']} of {n * len(runs)} reviews without two scores"
    return "\n".join([
        f"LLaVA-Bench (In-the-Wild): {n} questions, {unread_count}",
        f"{len(runs)} runs of the judge: {' '.join(f'{run:.1f}' for run in runs)}",
        f"{'':<10} {'score [95% interval]':<22}{'reference':>9}{'model':>9}{'n':>6}", *lines])  # fmt: skip
