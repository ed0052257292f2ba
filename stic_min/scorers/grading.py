"""From answers to scores: the judge, the scores, what is saved and printed. No model code."""

import contextlib
import glob
import json
import os
import sys
from pathlib import Path

from stic_min import InputError
from stic_min.runtime import console
from stic_min.runtime.files import read_json, write_text
from stic_min.scorers import audit, published
from stic_min.scorers.harness import find_description
from stic_min.scorers.judge import Judge, JudgeError
from stic_min.text import TEMPLATES, with_description, with_image

# ---------------------------------------------------------------- the judge


def start_judge(args, benchmark, stem):
    """The judge set by the flags, with its replies in `stem`.judge.jsonl. Raises InputError without a key."""
    key = args.judge_key or os.environ.get("OPENAI_API_KEY")
    if not key:
        raise InputError("--judge needs an API key: set OPENAI_API_KEY, or pass --judge-key")
    texts = benchmark.own_prompts
    if args.judge_prompts:
        texts = read_json(args.judge_prompts).get(benchmark.prompts)
        for field in benchmark.own_prompts:
            text = texts.get(field) if isinstance(texts, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{args.judge_prompts}: {benchmark.prompts}.{field} is missing or not text")
    return Judge(
        args.judge_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
        key,
        args.judge_model or benchmark.official_judge,
        f"{stem}.judge.jsonl",
        texts=texts,
        runs=args.judge_runs or benchmark.runs or 1,
        timeout=args.judge_timeout,
        progress=lambda total: console.Progress("judge", total),
        warn=console.warn,
        max_tokens=args.judge_max_tokens,
        token_field=args.judge_token_field or "max_tokens",
        temperature=not args.judge_no_temperature,
    )


def get_verdicts(args, benchmark, questions, answers, stem, source):
    """Reads --judged or asks --judge -> (verdicts, a note on who gave them); (None, None) without either.

    Verdicts obtained with our own wording of the prompt go to files whose names say so, because they are not
    comparable with published ones.
    """
    if args.judged:
        is_own = any(".own-prompt." in Path(path).name for path in args.judged)
        return benchmark.read_judged(args.judged), {"files": args.judged, "comparable": not is_own}
    if not args.judge:
        return None, None
    judge = start_judge(args, benchmark, stem)
    # MMBench: which answers are left to the judge depends on the rule.
    rule = {"rule": args.rule} if args.rule and benchmark.name == "mmbench" else {}
    with prefix_errors(source):
        judged = benchmark.judge(questions, answers, judge, **rule)
    if benchmark.judged_files:
        own = "" if args.judge_prompts else ".own-prompt"
        for path in stem.parent.glob(f"{glob.escape(stem.name)}{own}.reviews-*.jsonl"):
            path.unlink()  # there may have been more runs
        for suffix, text in benchmark.judged_files(judged).items():
            write_text(f"{stem}{own}{suffix}", text)
    note = {"model": judge.model, "served": sorted(judge.served), "official": benchmark.official_judge}
    return judged, note | {"comparable": bool(args.judge_prompts) or not judge.served}


@contextlib.contextmanager
def prefix_errors(file):
    """Prefixes errors about the content of a file with its name."""
    try:
        yield
    except JudgeError:
        raise
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


# ---------------------------------------------------------------- scores


def compute_scores(args, benchmark, questions, answers, stem, source, descriptions):
    """The scores, by a judge if the flags say so. Raises InputError; `source` is the file that is scored.

    descriptions: {image: record}, None if the questions were asked directly.
    """
    options = {"rule": args.rule} if args.rule else {}
    if benchmark.judge:
        options["judged"], note = get_verdicts(args, benchmark, questions, answers, stem, source)
    with prefix_errors(source):
        scores = benchmark.score(questions, answers, **options)
        audit.check_unread(scores, args.allow_unread, args.judge)
    if answers:
        audit.warn_of_sameness([record["text"] for record in answers])
        scores["answers"] = audit.count_endings(answers, "text")
    if descriptions is not None:
        scores["descriptions"] = audit.count_descriptions(questions, descriptions)
    if options.get("judged") is not None:
        scores["judge"] = note
    return scores


def read_saved_run(path):
    """The `run` of a .scores.json, {} if there is no usable one."""
    try:
        run = read_json(path)["run"]
        usable = type(run["limit"]) in (int, type(None)) and type(run["seed"]) is int
    except (InputError, KeyError, TypeError):
        return {}
    return run if usable else {}


def save_scores(benchmark, stem, settings, limit, questions, scores, descriptions):
    """Writes stem.scores.json: the settings, the prompt of item 1 (with its uncut description), the scores.

    The score of a complete benchmark is not overwritten by that of a subset of the same answers.
    """
    path = f"{stem}.scores.json"
    saved = read_saved_run(path)
    if limit and saved and saved["limit"] is None and settings.items() <= saved.items():
        print(f"{path} already has the score of all questions and is kept", file=sys.stderr)
        return
    first = questions[0]
    texts = {image: record["description"] for image, record in (descriptions or {}).items()}
    description = find_description(first, texts)
    text = first["text"] if description is None else with_description(description, first["text"])
    prompt = TEMPLATES[settings["template"]].prompt(with_image(text) if first["image"] is not None else text)
    if settings["mode"] != "direct" and first["image"] is not None and description is None:
        prompt = "(its description is not available)"
    run = settings | {"limit": limit, "prompt": prompt}
    result = {"benchmark": benchmark.name, "run": run} | scores
    write_text(path, json.dumps(result, indent=2) + "\n")


def print_scores(benchmark, scores, settings):
    """Prints the scores, and the published ones if comparable. settings: the run's, {} if unknown."""
    lines = [benchmark.report(scores)]
    if settings.get("limit"):
        lines.append(f"a subset: --limit {settings['limit']}")
    lines += [audit.summarize(name, scores[name]) for name in ("answers", "descriptions") if name in scores]
    if "suffix" in settings:
        lines.append(f"prompt suffix: {settings['suffix']!r}")
    if "unread" in scores:
        lines.append(f"unreadable verdicts of the judge: {scores['unread']} ({scores['unread_share']:.1%})")
    note = scores.get("judge")
    if note and "model" in note:
        judges = ", ".join(note["served"]) or note["model"]
        lines.append(f"judged by {judges} (the official judge is {note['official']})")
    if note and not note["comparable"]:
        reason = "the judge's prompt was in our own words (see --judge-prompts)"
        lines.append(f"not comparable with published numbers: {reason}")
    elif benchmark.name in published.BENCHMARKS:
        base = published.guess_base([settings.get("model") or ""])
        rows = published.rows(benchmark.name, base)
        lines += ["published:", *(f"  {label:<44}{value:>6}" for label, value in rows)]
    print("\n".join(lines))


def read_settings(answers):
    """The settings in the first record of evaluate.py's answers; {} for any other answers."""
    first = answers[0] if answers else {}
    texts = ("benchmark", "mode", "model", "fingerprint", "template")
    if not all(isinstance(first.get(name), str) for name in texts) or first["template"] not in TEMPLATES:
        return {}
    return {k: v for k, v in first.items() if k not in ("key", "question_id", "prompt", "text", "finish")}
