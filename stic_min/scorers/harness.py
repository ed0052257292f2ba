"""From questions and answers to a score: what running a benchmark and scoring an answers file have in common."""

import contextlib
import glob
import io
import json
import os
import sys
from pathlib import Path

from stic_min import InputError
from stic_min.formats.image_folder import image_path
from stic_min.images import open_image
from stic_min.runtime import console
from stic_min.runtime.files import check_text, write_text
from stic_min.runtime.work import subset
from stic_min.scorers import audit, chartqa, llavabench, mathvista, mmbench, mmvet, published, scienceqa, textvqa
from stic_min.scorers.common import read_json
from stic_min.scorers.judge import Judge, JudgeError
from stic_min.text import TEMPLATES, with_description, with_image
from stic_min.toy import captions as toy_captions
from stic_min.toy import vqa as toy_vqa

SCORERS = {
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "chartqa": chartqa,
    "llavabench": llavabench,
    "mmbench": mmbench,
    "mmvet": mmvet,
    "mathvista": mathvista,
    "toycaptions": toy_captions,
    "toyvqa": toy_vqa,
}
JUDGED = [name for name, scorer in SCORERS.items() if hasattr(scorer, "judge")]

# ---------------------------------------------------------------- questions


def load_questions(benchmark, data, suffix):
    """The benchmark's questions; ChartQA's with another suffix than its own, if one is given."""
    scorer = SCORERS[benchmark]
    questions = scorer.load(data, **({} if suffix is None else {"suffix": suffix}))
    for question in questions:
        check_text(str(question[key_of(scorer)]), f"{data}: question id")
    return questions


def group_of(benchmark, question):
    """What a question is counted and drawn as: itself, or all the orders in which it comes."""
    return question.get("group", question[key_of(SCORERS[benchmark])])


def limited(benchmark, questions, limit, seed):
    """`limit` of the questions, drawn with `seed`; whole groups, where a question comes in several orders."""
    groups = dict.fromkeys(group_of(benchmark, q) for q in questions)
    chosen = set(subset(list(groups), limit, seed))
    return [q for q in questions if group_of(benchmark, q) in chosen]


def warn_of_limit(benchmark, questions, limit):
    if limit and limit > (count := len({group_of(benchmark, q) for q in questions})):
        console.warn(f"--limit {limit}: only {count} questions")


def key_of(scorer):
    return getattr(scorer, "KEY", "question_id")  # of a question and of its line in the answers file


def recorded(question):
    """The prompt in the answers file. Never the description: scorers read it."""
    if "prompt" in question:
        return question["prompt"]
    return with_image(question["text"]) if question["image"] else question["text"]


def entries_of(questions, key):
    """{key: what the answers file says of a question before its answer}."""
    return {q[key]: {key: q[key], "question_id": q["question_id"], "prompt": recorded(q)} for q in questions}


def check_prompts(path, records, entries, key):
    """Raises InputError if answers of ours were to other questions than the data folder has now by the same ids."""
    prompts = {str(k): entry["prompt"] for k, entry in entries.items()}
    for record in records:
        own = str(record.get(key))
        if own in prompts and record.get("prompt") != prompts[own]:
            raise InputError(f"{path}: {own!r} was another question then; name another --out, or delete it")


def description_of(question, descriptions):
    """Its picture's, or the one that a blind describer gave for all; None without a picture."""
    if question["image"] is None:
        return None
    return descriptions.get("", descriptions.get(question["image"]))


def open_picture(question, scorer, data):
    """The question's picture in a list, an empty one if it has none. Raises InputError if it can't be read."""
    if question["image"] is None:
        return []
    if "picture" in question:  # in the data file itself
        opened = io.BytesIO(scorer.picture_bytes(question))
        return [open_image(opened, f"of question {question['question_id']}")]
    return [open_image(image_path(data, question["image"]))]


# ---------------------------------------------------------------- scoring


def start_judge(args, scorer, stem):
    """The judge that the flags name, with its replies in `stem`.judge.jsonl. Raises InputError without a key."""
    if not (key := args.judge_key or os.environ.get("OPENAI_API_KEY")):
        raise InputError("--judge needs the endpoint's key: set OPENAI_API_KEY, or give --judge-key")
    texts = scorer.OWN_PROMPTS
    if args.judge_prompts:
        texts = read_json(args.judge_prompts).get(scorer.PROMPTS)
        for field in scorer.OWN_PROMPTS:
            if not isinstance(texts, dict) or not isinstance(texts.get(field), str) or not texts[field].strip():
                raise InputError(f"{args.judge_prompts}: has no text {scorer.PROMPTS}.{field}")
    return Judge(
        args.judge_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
        key,
        args.judge_model or scorer.OFFICIAL_JUDGE,
        f"{stem}.judge.jsonl",
        texts=texts,
        runs=args.judge_runs or getattr(scorer, "RUNS", 1),
        timeout=args.judge_timeout,
        progress=lambda total: console.Progress("judge", total),
        say=console.warn,
        max_tokens=args.judge_max_tokens,
        token_field=args.judge_token_field or "max_tokens",
        temperature=not args.judge_no_temperature,
    )


@contextlib.contextmanager
def naming(file):
    """Puts the file in front of what is wrong with its content."""
    try:
        yield
    except JudgeError:
        raise
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def judge_of(args, scorer, questions, answers, stem, where):
    """What --judged holds or --judge says -> (verdicts, a note on who gave them); (None, None) without either.

    Verdicts by our own wording of the judge's prompt go to files that say so: they don't compare with published ones.
    """
    if args.judged:
        own = any(".own-prompt." in Path(path).name for path in args.judged)
        return scorer.read_judged(args.judged), {"files": args.judged, "comparable": not own}
    if not args.judge:
        return None, None
    judge = start_judge(args, scorer, stem)
    rule = {"rule": args.rule} if args.rule and scorer is mmbench else {}  # what goes unmatched depends on it
    with naming(where):
        judged = scorer.judge(questions, answers, judge, **rule)
    if hasattr(scorer, "judged_files"):
        own = "" if args.judge_prompts else ".own-prompt"
        for old in stem.parent.glob(f"{glob.escape(stem.name)}{own}.reviews-*.jsonl"):  # there may have been more runs
            old.unlink()
        for suffix, text in scorer.judged_files(judged).items():
            write_text(f"{stem}{own}{suffix}", text)
    note = {"model": judge.model, "served": sorted(judge.served), "official": scorer.OFFICIAL_JUDGE}
    return judged, note | {"comparable": bool(args.judge_prompts) or not judge.served}


def check_flags(args, benchmark):
    """Raises InputError for flags of `score` and of the judge that don't go with the benchmark or with each other."""
    scorer, rules = SCORERS[benchmark], getattr(SCORERS[benchmark], "RULES", ())
    names = ("model", "url", "key", "prompts", "runs", "max_tokens", "token_field", "no_temperature")
    given = [name for name in names if getattr(args, f"judge_{name}", None)]
    if args.rule and args.rule not in rules:
        raise InputError(f"--rule {args.rule}: {benchmark} has {' and '.join(rules) or 'no second rule'}")
    if args.judge and benchmark not in JUDGED:
        raise InputError(f"--judge: {benchmark} is scored without one")
    if args.judged and not hasattr(scorer, "read_judged"):
        raise InputError(f"--judged: there are no published verdicts on {benchmark}")
    if args.judged and args.judge:
        raise InputError("--judged has the verdicts, --judge asks for them: give one")
    if given and not args.judge:
        raise InputError(f"--judge-{given[0].replace('_', '-')} goes with --judge")
    if "runs" in given and not hasattr(scorer, "RUNS"):
        raise InputError(f"--judge-runs: {benchmark} has one run")


def scores_of(args, benchmark, questions, answers, stem, where, described):
    """The scores, by a judge if the flags say so. Raises InputError; `where` is the file that is scored.

    described: {image: record} of the descriptions, None if the questions were asked directly.
    """
    scorer, options = SCORERS[benchmark], {"rule": args.rule} if args.rule else {}
    if benchmark in JUDGED:
        options["judged"], note = judge_of(args, scorer, questions, answers, stem, where)
    with naming(where):
        scores = scorer.score(questions, answers, **options)
        audit.check_unread(scores, args.allow_unread, args.judge)
    if answers:
        audit.warn_of_sameness([record["text"] for record in answers])
        scores["answers"] = audit.counts(answers, "text")
    if described is not None:
        scores["descriptions"] = audit.description_counts(questions, described)
    return scores | ({"judge": note} if options.get("judged") is not None else {})


def saved_run(path):
    """The `run` of a .scores.json, {} if there is none that can be used."""
    try:
        run = read_json(path)["run"]
        usable = type(run["limit"]) in (int, type(None)) and type(run["seed"]) is int
    except (InputError, KeyError, TypeError):
        return {}
    return run if usable else {}


def save(stem, settings, limit, benchmark, questions, scores, described):
    """stem.scores.json: the settings, what item 1 was asked (its description uncut), the scores.

    A whole benchmark's score is not overwritten by a subset's of the same answers.
    """
    saved = saved_run(f"{stem}.scores.json")
    if limit and saved and saved["limit"] is None and settings.items() <= saved.items():
        print(f"{stem}.scores.json has the score of all questions: kept", file=sys.stderr)
        return
    first, descriptions = questions[0], {image: record["description"] for image, record in (described or {}).items()}
    description = description_of(first, descriptions)
    text = first["text"] if description is None else with_description(description, first["text"])
    prompt = TEMPLATES[settings["template"]].prompt(with_image(text) if first["image"] is not None else text)
    if settings["mode"] != "direct" and first["image"] is not None and description is None:
        prompt = "(its description is not at hand)"
    run = settings | {"limit": limit, "prompt": prompt}
    result = {"benchmark": benchmark, "run": run} | scores
    write_text(f"{stem}.scores.json", json.dumps(result, indent=2) + "\n")


def base_of(model):
    """Which of the paper's base models a folder's name stands for."""
    return "v1.5" if "1.5" in Path(model or "").name else "v1.6"


def show(benchmark, scores, settings):
    """The scores as text, the published ones below if they can be compared. settings: the run's, {} if unknown."""
    lines = [SCORERS[benchmark].report(scores)]
    if settings.get("limit"):
        lines.append(f"a subset: --limit {settings['limit']}")
    lines += [audit.summary(name, scores[name]) for name in ("answers", "descriptions") if name in scores]
    if "suffix" in settings:
        lines.append(f"each question was followed by {settings['suffix']!r}")
    note = scores.get("judge")
    if "unread" in scores:
        lines.append(f"verdicts of the judge that could not be read: {scores['unread']} ({scores['unread_share']:.1%})")
    if note and "model" in note:
        by = ", ".join(note["served"]) or note["model"]
        lines.append(f"judged by {by} (the official judge is {note['official']})")
    if note and not note["comparable"]:
        lines.append("not comparable with published numbers: the judge's prompt was our own wording (--judge-prompts)")
    elif benchmark in published.BENCHMARKS:
        rows = published.rows(benchmark, base_of(settings.get("model")))
        lines += ["published:", *(f"  {label:<44}{value:>6}" for label, value in rows)]
    print("\n".join(lines))
