"""The paper's seven benchmarks, direct and with describe-and-respond (DaR), and questions about one picture.

  python evaluate.py scienceqa --model M --adapter runs/stage2 --data ScienceQA --out results/          direct
  python evaluate.py scienceqa --model M --adapter runs/stage2 --data ScienceQA --out results/ --dar    describes first
  python evaluate.py score scienceqa --answers results/scienceqa-stage2-dar.jsonl --data ScienceQA      no model
  python evaluate.py table results/                                        the paper's tables, as text and as a page
  python evaluate.py ask --model M --adapter runs/stage2 --image pic.jpg "What is in the picture?"
  torchrun --nproc_per_node=4 evaluate.py scienceqa ...      the questions shared out over four GPUs

Answers are greedy and go to results/BENCHMARK-ADAPTER-{direct,dar}.jsonl, one line each, written at once; descriptions
to ...-dar.descriptions.jsonl, one a picture; scores to .scores.json. The same command again skips what is there.
MM-Vet and LLaVA-Bench need a judge model, MathVista and MMBench are better with one: --judge asks it over the network.
The paper's numbers were made with --preset released (Vicuna's template; on MMBench the describer is blind) and anyres.
"""

import argparse
import io
import json
import os
from pathlib import Path

from stic_min import InputError, cli, report
from stic_min.files import Output, read_records, subset
from stic_min.images import image_path, open_image
from stic_min.scorers import (
    chartqa,
    llavabench,
    mathvista,
    mmbench,
    mmvet,
    published,
    read_json,
    scienceqa,
    textvqa,
    toy_captions,
    toy_vqa,
)
from stic_min.scorers.judge import Judge
from stic_min.text import TEMPLATES, infused, with_image, without_marks

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
DESCRIPTION_TOKENS = 1024
JUDGED = [name for name, scorer in SCORERS.items() if hasattr(scorer, "judge")]
RULED = [name for name, scorer in SCORERS.items() if hasattr(scorer, "RULES")]


# ---------------------------------------------------------------- questions


def questions_of(args, benchmark):
    """The benchmark's questions, or --limit of them: whole groups, where a question comes in several orders."""
    scorer = SCORERS[benchmark]
    suffix = {"suffix": args.suffix} if benchmark == "chartqa" and "suffix" in args else {}
    questions = scorer.load(args.data, **suffix)
    if args.command == benchmark and not any(q["image"] for q in questions):
        raise InputError(f"{args.data}: not a question in it has a picture")
    group = lambda q: q.get("group", q[key_of(scorer)])
    chosen = set(subset(list(dict.fromkeys(map(group, questions))), args.limit, args.seed))
    return [q for q in questions if group(q) in chosen]


def key_of(scorer):
    return getattr(scorer, "KEY", "question_id")  # of a question and of its line in the answers file


def recorded(question):
    """The prompt in the answers file. Never the description: scorers read it."""
    if "prompt" in question:
        return question["prompt"]
    return with_image(question["text"]) if question["image"] else question["text"]


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
            if not isinstance(texts, dict) or not isinstance(texts.get(field), str):
                raise InputError(f"{args.judge_prompts}: has no text {scorer.PROMPTS}.{field}")
    return Judge(
        args.judge_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
        key,
        args.judge_model or scorer.OFFICIAL_JUDGE,
        f"{stem}.judge.jsonl",
        texts=texts,
        runs=args.judge_runs or getattr(scorer, "RUNS", 1),
        timeout=args.judge_timeout,
        progress=lambda total: cli.Progress("judge", total, cli.Ranks(0, 1, None)),
        say=cli.warn,
    )


def write(path, text):
    beside = Path(f"{path}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def judge_of(args, scorer, questions, answers, stem):
    """What --judged holds or --judge says -> (verdicts, a note on who gave them); (None, None) without either.

    Verdicts by our own wording of the judge's prompt go to files that say so: they don't compare with published ones.
    """
    if args.judged and not hasattr(scorer, "read_judged"):
        raise InputError("--judged: there are no published verdicts of that benchmark to read")
    if args.judged:
        own = any(".own-prompt." in Path(path).name for path in args.judged)
        return scorer.read_judged(args.judged), {"files": args.judged, "comparable": not own}
    if not args.judge:
        return None, None
    judge = start_judge(args, scorer, stem)
    rule = {"rule": args.rule} if args.rule and scorer is mmbench else {}  # what goes unmatched depends on it
    judged = scorer.judge(questions, answers, judge, **rule)
    if hasattr(scorer, "judged_files"):
        own = "" if args.judge_prompts else ".own-prompt"
        for suffix, text in scorer.judged_files(judged).items():
            write(f"{stem}{own}{suffix}", text)
    note = {"model": judge.model, "served": sorted(judge.served), "official": scorer.OFFICIAL_JUDGE}
    return judged, note | {"comparable": bool(args.judge_prompts) or not judge.served}


def scores_of(args, benchmark, questions, answers, stem):
    scorer, options = SCORERS[benchmark], {}
    if benchmark not in JUDGED and (args.judge or args.judged):
        raise InputError(f"{benchmark} has no judge")
    if benchmark in JUDGED:
        options["judged"], note = judge_of(args, scorer, questions, answers, stem)
    if benchmark in RULED and args.rule:
        if args.rule not in scorer.RULES:
            raise InputError(f"--rule {args.rule}: {benchmark} has {' and '.join(scorer.RULES)}")
        options["rule"] = args.rule
    scores = scorer.score(questions, answers, **options)
    return scores | ({"judge": note} if options.get("judged") is not None else {})


def save(stem, settings, args, benchmark, questions, scores, descriptions):
    """stem.scores.json: the settings, what item 1 was asked, the scores."""
    first = questions[0]
    description = description_of(first, descriptions)
    text = first["text"] if description is None else infused(description, first["text"])
    prompt = TEMPLATES[settings["template"]].prompt(with_image(text) if first["image"] is not None else text)
    run = settings | {"limit": args.limit, "prompt": prompt}
    result = {"benchmark": benchmark, "run": run} | scores
    write(f"{stem}.scores.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def base_of(model):
    """Which of the paper's base models a folder's name stands for."""
    return "v1.5" if "1.5" in Path(model or "").name else "v1.6"


def show(benchmark, scores, settings):
    """The scores as text, the published ones below if they can be compared. settings: the run's, {} if unknown."""
    lines = [SCORERS[benchmark].report(scores)]
    if "suffix" in settings:
        lines.append(f"each question was followed by {settings['suffix']!r}")
    note = scores.get("judge")
    if note and "model" in note:
        by = ", ".join(note["served"]) or note["model"]
        lines.append(f"judged by {by} (the official judge is {note['official']})")
    if note and not note["comparable"]:
        lines.append("not comparable with published numbers: the judge's prompt was our own wording (--judge-prompts)")
    elif benchmark in published.BENCHMARKS:
        rows = published.rows(benchmark, base_of(settings.get("model")))
        lines += ["published:", *(f"  {label:<44}{value:>6}" for label, value in rows)]
    print("\n".join(lines))


# ---------------------------------------------------------------- commands


def new_tokens(benchmark):
    return getattr(SCORERS[benchmark], "MAX_NEW_TOKENS", 1024)


def mode_of(args):
    return ("blind-dar" if args.blind else "dar") if args.dar else "direct"


def run_benchmark(args):
    from stic_min import dar  # here, so that scoring and tables do without the model
    from stic_min.loader import load_llava

    benchmark, scorer = args.command, SCORERS[args.command]
    if args.preset == "released":
        args.template = args.template or "vicuna_v1"
        args.blind = args.blind or (args.dar and benchmark == "mmbench")  # the one DaR script it has is MMBench's
    if args.blind and not args.dar:
        raise InputError("--blind is about the description: it needs --dar")
    label = Path(args.adapter).resolve().name if args.adapter else "base"
    stem = Path(args.out) / f"{benchmark}-{label}-{mode_of(args)}"
    questions = questions_of(args, benchmark)
    if args.judge:
        start_judge(args, scorer, stem)  # says now, not after hours, what it lacks
    ranks = cli.start_ranks(args.device)
    cli.say_loading(args, ranks)
    llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **cli.model_options(args, ranks))
    settings = {"mode": mode_of(args), **cli.run_settings(args, llava)}
    settings |= {"suffix": args.suffix} if benchmark == "chartqa" else {}
    read = lambda question: open_picture(question, scorer, args.data)

    descriptions = {}
    if args.dar:
        limit = DESCRIPTION_TOKENS if args.max_new_tokens == new_tokens(benchmark) else args.max_new_tokens
        output = Output(f"{stem}.descriptions.jsonl", "image", settings | {"max_new_tokens": limit}, ranks)
        shown = {"": {"image": None}} if args.blind else {q["image"]: q for q in questions if q["image"] is not None}
        descriptions = dar.describe_pictures(llava, shown, read, output, args, limit)
    key = key_of(scorer)
    entries = {  # what the answers file says of a question before its answer
        q[key]: {key: q[key], "question_id": q["question_id"], "prompt": recorded(q)} for q in questions
    }
    output = Output(f"{stem}.jsonl", key, settings, ranks)
    behind = {q[key]: description_of(q, descriptions) for q in questions}
    answers = dar.answer_questions(llava, {q[key]: q for q in questions}, behind, entries, read, output, args)
    if not ranks.first:
        return
    print(output.path)
    if hasattr(scorer, "official"):
        suffix, text = scorer.official(questions, answers)
        write(f"{stem}{suffix}", text)
        print(f"{stem}{suffix}")
    if benchmark in ("mmvet", "llavabench") and not args.judge:
        part = f" --limit {args.limit} --seed {args.seed}" if args.limit else ""
        print(f"no score yet: {benchmark} is graded by a judge model. With a key for one in OPENAI_API_KEY:")
        print(f"  python evaluate.py score {benchmark} --answers {output.path} --data {args.data} --judge{part}")
        return
    scores = scores_of(args, benchmark, questions, answers, stem)
    save(stem, settings, args, benchmark, questions, scores, descriptions)
    show(benchmark, scores, settings)


def run_score(args):
    if int(os.environ.get("RANK", 0)):
        return  # no work for several ranks
    if not args.answers and not args.judged:
        raise InputError("score needs --answers FILE" + (" or --judged FILE" if args.benchmark in JUDGED else ""))
    benchmark, scorer, answers = args.benchmark, SCORERS[args.benchmark], None
    questions = questions_of(args, benchmark)
    if args.answers:
        read = getattr(scorer, "read_answers", lambda path: [record for _, record in read_records(path)])
        answers = read(args.answers)
    stem = Path(args.answers or args.judged[0]).with_suffix("")
    try:
        scores = scores_of(args, benchmark, questions, answers, stem)
    except InputError as error:
        raise InputError(f"{args.answers or args.judged[0]}: {error}") from None
    settings = settings_of(answers)
    if settings and not args.rule:
        found = Path(f"{stem}.descriptions.jsonl")
        found = [r for _, r in read_records(found)] if found.is_file() else []
        descriptions = {r["image"]: r["description"] for r in found}
        save(stem, settings, args, benchmark, questions, scores, descriptions)
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        show(benchmark, scores, settings or {})


def settings_of(answers):
    """What an answers file of ours was made with, from its first line; None for one made elsewhere."""
    if not answers or "fingerprint" not in answers[0]:
        return None
    return {k: v for k, v in answers[0].items() if k not in ("key", "question_id", "prompt", "text")}


def run_table(args):
    if int(os.environ.get("RANK", 0)):
        return  # no work for several ranks
    report.write(Path(args.dir))


def run_ask(args):
    from stic_min import dar
    from stic_min.loader import load_llava

    if int(os.environ.get("RANK", 0)):
        return  # no work for several ranks
    if args.dar and not args.image:
        raise InputError("--dar describes a picture first: it needs --image")
    ranks = cli.Ranks(0, 1, cli.start_device(args.device))
    pictures = [open_image(path) for path in args.image]
    cli.say_loading(args, ranks)
    llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **cli.model_options(args, ranks))
    question, description = without_marks(args.question), None
    if (over := dar.excess(llava, question, pictures, args)) > 0:
        raise InputError(f"the question is {over} tokens longer than the model's sequence holds")
    if args.dar:
        [description] = dar.describe(llava, ["picture"], [pictures], args, args.max_new_tokens)
        print(f"Description: {description}\n")
    print(*dar.respond(llava, ["question"], [question], [pictures], [description], args))


# ---------------------------------------------------------------- flags


def add_judge_flags(parser):
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", action="store_true", help="grade with a judge model over the network")
    group.add_argument("--judge-model", metavar="NAME", help="(default: the benchmark's official judge)")
    url = "an OpenAI-compatible API (default: OPENAI_BASE_URL, else https://api.openai.com/v1)"
    group.add_argument("--judge-url", metavar="URL", help=url)
    key = "its key (default: OPENAI_API_KEY, which other users of the machine can't see)"
    group.add_argument("--judge-key", metavar="KEY", help=key)
    prompts = "the official prompts, see README.md; without them scores don't compare with published ones"
    group.add_argument("--judge-prompts", metavar="FILE", help=prompts)
    runs = "how often each answer is graded (default: the benchmark's: MM-Vet 5, LLaVA-Bench 3)"
    group.add_argument("--judge-runs", type=cli.positive, metavar="N", help=runs)
    group.add_argument("--judge-timeout", type=cli.positive, default=60, metavar="SECONDS", help="of one request")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, summary, run, text=None):
        sub = commands.add_parser(name, help=summary, description=text or summary, formatter_class=cli.HelpFormatter)
        sub.set_defaults(run=run, judge=False, judged=None, rule=None)
        return sub

    for name, scorer in SCORERS.items():
        summary = scorer.__doc__.split("\n")[0].split("): ")  # "ScienceQA (test, ...): the prompt, ..."
        sub = command(name, summary[0] + ")" * (len(summary) > 1), run_benchmark, scorer.__doc__)
        sub.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files, as published")
        sub.add_argument("--out", required=True, metavar="DIR", help="answers and scores")
        tokens = f"(section 4); in up to {DESCRIPTION_TOKENS} tokens, or --max-new-tokens if that is given"
        sub.add_argument("--dar", action="store_true", help=f"describe the picture first, then answer {tokens}")
        sub.add_argument("--blind", action="store_true", help="with --dar: describe without the picture (as released)")
        preset = "released: --template vicuna_v1, and on MMBench with --dar also --blind"
        sub.add_argument("--preset", choices=["paper", "released"], default="paper", help=preset)
        cli.add_model_flags(sub)
        cli.add_limit_flag(sub)
        cli.add_sampling_flags(sub, temperature=0.0, batch_size=8, max_new_tokens=new_tokens(name))
        if name == "chartqa":
            sub.add_argument("--suffix", default=chartqa.SUFFIX, help="the line below each question")
        if name in JUDGED:
            add_judge_flags(sub)

    sub = command("score", "scores an existing answers file; needs no model", run_score)
    sub.add_argument("benchmark", choices=sorted(SCORERS))
    sub.add_argument("--answers", metavar="FILE", help="JSON lines of question_id, prompt, text, or the official form")
    sub.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files, as published")
    judged = "the judge's published grades (MM-Vet), reviews (LLaVA-Bench, one file a run) or extractions (MathVista)"
    sub.add_argument("--judged", nargs="+", metavar="FILE", help=judged)
    rules = "; ".join(f"{name}: {', '.join(SCORERS[name].RULES)}" for name in RULED)
    sub.add_argument("--rule", help=f"where official scorers differ (default: the first). {rules}")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
    cli.add_limit_flag(sub)
    sub.add_argument("--seed", type=cli.seed, default=0, help="of --limit")
    add_judge_flags(sub)

    sub = command("table", "the paper's tables with the scores in a folder, as text and as a page", run_table)
    sub.add_argument("dir", metavar="DIR", help="the benchmarks' --out; tables.md and report.html are written to it")

    sub = command("ask", "one question about one picture (or several, or none)", run_ask)
    sub.add_argument("question")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given again")
    sub.add_argument("--dar", action="store_true", help="describe the picture first, then answer (section 4)")
    cli.add_model_flags(sub)
    cli.add_sampling_flags(sub, temperature=0.0)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
