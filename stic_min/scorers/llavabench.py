"""LLaVA-Bench (In-the-Wild; 60 questions on 24 images): the prompt, the judge's request, the scores from its reviews.

Data: `questions.jsonl`, `context.jsonl`, `answers_gpt4.jsonl` (the reference answers) and `images/`, as the data set
liuhaotian/llava-bench-in-the-wild has them. Request and reading of the review follow LLaVA's
`llava/eval/eval_gpt_review_bench.py`, scores its `llava/eval/summarize_gpt_review.py`. The judge rates reference and
answer in one review, the reference always first; the score is how many percent of the reference's mean the answers
reach. OFFICIAL_JUDGE is the one of STIC's release, LLaVA's own numbers are by gpt-4-0314. Not here: any score without
a judge's reviews, and reviews with the order swapped.
"""

import json
from pathlib import Path

import numpy as np

from stic_min import InputError
from stic_min.runtime.files import read_records, text_field
from stic_min.scorers.common import bootstrap, figure, match_answers, unread

COMPLETE, GROUPED_BY = True, "category"
CATEGORIES = ("conv", "detail", "complex")
FAILED = (-1, -1)

OFFICIAL_JUDGE = "gpt-4-0613"
RUNS = 3
PROMPTS = "llava_bench"
OWN_PROMPTS = {
    "system": "You review answers to questions about pictures, with care and without favour.",
    "role": "Assistant",
    "rule": (
        "Above are a description of a picture in words, a question that was asked about the picture, and the replies "
        "of two assistants. Rate each reply with a number from 1 (useless) to 10 (excellent). Ask yourself whether it "
        "helps the person who asked, keeps to the question, agrees with the description, and goes into as much detail "
        "as the question calls for.\n"
        "The first line of your review has to be the rating of Assistant 1, one blank and the rating of Assistant 2: "
        "two plain numbers, without a comma or any word. From the second line on, give your reasons. Which reply "
        "comes first must not count."
    ),
}

# ---------------------------------------------------------------- questions


def load(data):
    """The questions, in the order of the file.

    data: the folder that holds the three JSON lines files.
    Returns a dict a question: `question_id`; `image`; `text` and `prompt`, the bare question; `category`, one of
    CATEGORIES; `caption`, what the judge is told about the image; `reference`, the reference answer.
    Raises InputError naming file and line: a field is missing, an id repeated, a category unknown, an image without a
    caption, the reference answers are not those of the questions in their order (the official script does not look).
    """
    folder = Path(data)
    captions = _captions(folder / "context.jsonl")
    asked, references = read_records(folder / "questions.jsonl"), read_records(folder / "answers_gpt4.jsonl")
    if len(asked) != len(references):
        raise InputError(f"{folder / 'answers_gpt4.jsonl'}: {len(references)} answers to {len(asked)} questions")
    questions, ids = [], set()
    for (where, entry), (reference_where, reference) in zip(asked, references):
        qid, category = entry.get("question_id"), entry.get("category")
        image, text = text_field(entry, "image", where), text_field(entry, "text", where)
        if type(qid) not in (int, str) or str(qid) in ids:
            raise InputError(f"{where}: question_id {qid!r} is " + ("repeated" if str(qid) in ids else "no id"))
        if category not in CATEGORIES:
            raise InputError(f"{where}: category {category!r} is none of {', '.join(CATEGORIES)}")
        if image not in captions:
            raise InputError(f"{where}: image {image!r} is not in context.jsonl")
        if str(own := reference.get("question_id")) != str(qid):
            raise InputError(f"{reference_where}: question_id is {own!r}, that of the same line's question {qid!r}")
        ids.add(str(qid))
        questions.append({
            "question_id": qid, "image": f"images/{image}", "text": text, "prompt": text, "category": category,
            "caption": captions[image], "reference": text_field(reference, "text", reference_where)})  # fmt: skip
    return questions


def _captions(path):
    """{image: caption}. Raises InputError if a picture has two."""
    captions = {}
    for where, entry in read_records(path):
        image, caption = text_field(entry, "image", where), _caption(entry, where)
        if captions.setdefault(image, caption) != caption:
            raise InputError(f"{where}: another caption of {image!r}")
    return captions


def _caption(entry, where):
    caption = entry.get("caption")
    if isinstance(caption, list) and caption and all(isinstance(line, str) for line in caption):
        entry = {"caption": "\n".join(caption)}
    return text_field(entry, "caption", where)


# ---------------------------------------------------------------- the judge


def parse(review):
    """The two scores that a review gives on its first line; FAILED unless they are two numbers with one blank or comma
    between. Python's float reads them, so NaN is a number here. Source: LLaVA, `parse_score`."""
    try:
        reference, model = review.split("\n")[0].replace(",", " ").split(" ")
        return float(reference), float(model)
    except ValueError:
        return FAILED


def _has_mean(pair):
    return all(abs(value) < 1e9 for value in pair)  # not so NaN, infinity and integers that no float holds


def judge(questions, answers, judge):
    """Asks the judge for a review of every answer, `judge.runs` times -> reviews, as `score` takes them.

    questions: as from `load`. answers: records {"question_id", "text"}, one for each. judge: what asks, with `texts`
    of the form of OWN_PROMPTS. A pair with a NaN or an infinite number in it is FAILED here: no mean survives those.
    Raises InputError as `match_answers`. Source: LLaVA, `llava/eval/eval_gpt_review_bench.py`.
    """
    records, texts = match_answers("LLaVA-Bench", questions, answers, complete=True), judge.texts
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
        raise InputError(f"LLaVA-Bench: no review of the judge has two scores, the first starts {first!r}")
    return [reviews[start : start + len(questions)] for start in range(0, len(reviews), len(questions))]


def read_judged(paths):
    """Official review files, one a run -> a list a run of its reviews {"question_id", "category", "content", "tuple"}.

    A review needs its question's id and either `tuple` or `content`. Raises InputError naming file and line.
    """
    runs = [read_records(path) for path in paths]
    for where, review in (pair for run in runs for pair in run):
        pair = review.get("tuple")
        if not isinstance(pair, list) or len(pair) != 2 or any(type(value) not in (int, float) for value in pair):
            if "tuple" in review or not isinstance(review.get("content"), str):
                raise InputError(f"{where}: needs a 'tuple' of two numbers or, without one, a text 'content'")
        if "question_id" not in review:
            raise InputError(f"{where}: no question_id")
    return [[review for _, review in run] for run in runs]


def judged_files(judged):
    """{".reviews-1.jsonl": the text of the official review file of run 1, ...}."""
    return {f".reviews-{number}.jsonl": "".join(json.dumps(review) + "\n" for review in run)
            for number, run in enumerate(judged, 1)}  # fmt: skip


# ---------------------------------------------------------------- scores


def score(questions, answers, judged):
    """The answers' mean rating in percent of the reference's, over all questions and by category.

    questions: as from `load`. answers: None, or the records that were reviewed, checked to be complete. judged: a list
    of reviews a run, as from `judge` or `read_judged`; `tuple` counts, without one `content` is parsed.
    Returns {"score", "interval", "n", "missing": 0, "reference", "model": the mean ratings times ten, "runs": [score of
    each run], "unread", "unread_share": reviews without two scores, "groups": {category: all but missing and unread}}.
    Each number of a run is rounded as the official one, and those of several runs are averaged; the interval is over
    the choice of questions. An unread review counts as a pair of -1, so if all are unread the score is 100.
    Raises InputError: no reviews, a review of an unknown question or a repeated one, a question without one, another
    category than the question's, a NaN or an infinite number, ratings of the reference that average to 0, answers as
    `match_answers`. Source: LLaVA, `llava/eval/summarize_gpt_review.py`.
    """
    if not judged:
        raise InputError("LLaVA-Bench is graded by a judge model: --judge, or --judged FILE with official reviews")
    if answers is not None:
        match_answers("LLaVA-Bench", questions, answers, complete=True)
    pairs = np.array([_pairs(questions, run, f"LLaVA-Bench reviews, run {i}") for i, run in enumerate(judged, 1)])
    groups = {}
    for name in CATEGORIES:
        if any(own := [question["category"] == name for question in questions]):
            groups[name] = _figures(pairs[:, own], name)
    failed = (pairs == FAILED).all(2)  # (runs, questions)
    return {**_figures(pairs, "all"), "missing": 0, **unread(int(failed.sum()), failed.size), "groups": groups}


def _pairs(questions, reviews, where):
    """One run's [(reference, model)] in the order of the questions."""
    categories = {str(q["question_id"]): f"llava_bench_{q['category']}" for q in questions}
    pairs = {}
    for review in reviews:
        qid = str(review["question_id"])
        if qid not in categories or qid in pairs:
            raise InputError(f"{where}: {qid!r} is " + ("repeated" if qid in pairs else "no question's id"))
        if (named := review.get("category", categories[qid])) != categories[qid]:
            raise InputError(f"{where}: {qid!r} has category {named!r}, the question's is {categories[qid]!r}")
        pairs[qid] = tuple(review["tuple"]) if "tuple" in review else parse(review["content"])
        if not _has_mean(pairs[qid]):
            raise InputError(f"{where}: {qid!r} has the ratings {pairs[qid]}, which have no mean")
    if without := [qid for qid in categories if qid not in pairs]:
        raise InputError(f"{where}: {len(without)} of {len(questions)} questions have no review, "
                         f"the first is {without[0]!r}")  # fmt: skip
    return [pairs[qid] for qid in categories]


def _figures(pairs, name):
    """(runs, questions, 2) ratings -> the numbers of one group."""
    rounded = [[round(value, 3) for value in run.mean(0).tolist()] for run in pairs]
    if not all(reference for reference, _ in rounded):
        raise InputError(f"LLaVA-Bench reviews: the ratings of the reference ({name}) average to 0, there is no score")
    runs = [round(model / reference * 100, 1) for reference, model in rounded]
    reference, model = (sum(round(value * 10, 1) for value in column) / len(runs) for column in zip(*rounded))
    return {"score": sum(runs) / len(runs), "interval": bootstrap(pairs.mean(0), _ratios), "n": pairs.shape[1],
            "reference": reference, "model": model, "runs": runs}  # fmt: skip


def _ratios(drawn):
    reference, model = drawn.mean(1).T
    kept = reference != 0  # failed reviews can cancel the others in a small sample, which then has no ratio
    return 100 * model[kept] / reference[kept]


def report(scores):
    """The numbers as lines of text. scores: as from `score`."""
    n, runs = scores["n"], scores["runs"]
    lines = [f"{name:<10} {figure(own):<22}{own['reference']:>9.1f}{own['model']:>9.1f}{own['n']:>6}"
             for name, own in [("all", scores), *scores["groups"].items()]]  # fmt: skip
    return "\n".join([
        f"LLaVA-Bench (In-the-Wild): {n} questions, {scores['unread']} of {n * len(runs)} reviews without two scores",
        f"{len(runs)} runs of the judge: {' '.join(f'{run:.1f}' for run in runs)}",
        f"{'':<10} {'score [95 % interval]':<22}{'reference':>9}{'model':>9}{'n':>6}", *lines])  # fmt: skip
