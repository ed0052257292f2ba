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
--check reads a benchmark's files and images first, on any machine, and reports what the run would lack and take.
--preset released asks as the authors' scripts do: with Vicuna's template, and on MMBench a describer that sees nothing.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from stic_min import InputError
from stic_min.images import open_image
from stic_min.runtime import console, flags, process
from stic_min.runtime.files import check_place, read_records
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import Ranks, place, start_device, start_ranks
from stic_min.scorers import audit, chartqa, harness, report, scienceqa
from stic_min.scorers.harness import JUDGED, SCORERS
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, with_image, without_marks

DESCRIPTION_TOKENS = 1024
SHORT_ANSWER = 5  # tokens of a letter, a word or a phrase, for --check


# ---------------------------------------------------------------- commands


def new_tokens(benchmark):
    return getattr(SCORERS[benchmark], "MAX_NEW_TOKENS", 1024)


def mode_of(args):
    return ("blind-dar" if args.blind else "dar") if args.dar else "direct"


def run_benchmark(args):
    from stic_min import dar, lora  # here, so that scoring and tables do without the model
    from stic_min.formats.adapters import read_adapter
    from stic_min.loader import load_llava, open_llava

    benchmark, scorer = args.command, SCORERS[args.command]
    if args.preset == "released":
        args.template = args.template or "vicuna_v1"
        args.blind = args.blind or (args.dar and benchmark == "mmbench")  # the one DaR script it has is MMBench's
    if args.blind and not args.dar:
        raise InputError("--blind is about the description: it needs --dar")
    harness.check_flags(args, benchmark)
    label = Path(args.adapter).resolve().name if args.adapter else "base"
    stem = Path(args.out) / f"{benchmark}-{label}-{mode_of(args)}"
    check_place(f"{stem}.jsonl")
    everything = harness.load_questions(benchmark, args.data, getattr(args, "suffix", None))
    if not any(q["image"] for q in everything):
        raise InputError(f"{args.data}: not a question in it has a picture")
    questions = harness.limited(benchmark, everything, args.limit, args.seed)
    # Says now, not after hours, what the judge lacks. A check leaves the replies on disk alone.
    judge = harness.start_judge(args, scorer, os.devnull if args.check else stem) if args.judge else None
    ranks = start_ranks("cpu" if args.check else args.device)
    if ranks.first:
        harness.warn_of_limit(benchmark, everything, args.limit)
    options = flags.model_options(args, ranks)
    if args.check:
        llava, _ = open_llava(args.model, **options)  # without its weights
        if args.adapter:
            lora.attach(llava, read_adapter(args.adapter, llava))
    else:
        console.report_loading(args, ranks)
        llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **options)
        console.report_loaded(llava, ranks)
    settings = {"benchmark": benchmark, "mode": mode_of(args), **flags.run_settings(args, llava)}
    settings |= {"suffix": args.suffix} if benchmark == "chartqa" else {}
    if args.check and not args.dtype:
        del settings["dtype"]  # a GPU's default is another than this machine's
    read = lambda question: harness.open_picture(question, scorer, args.data)

    key = harness.key_of(scorer)
    entries = harness.entries_of(questions, key)
    output = Output(f"{stem}.jsonl", key, settings, ranks)
    harness.check_prompts(output.path, output.done.values(), entries, key)
    described, shown, limit = None, {}, args.max_new_tokens
    if args.dar:
        limit = DESCRIPTION_TOKENS if args.max_new_tokens == new_tokens(benchmark) else args.max_new_tokens
        described = Output(f"{stem}.descriptions.jsonl", "image", settings | {"max_new_tokens": limit}, ranks)
        shown = {"": {"image": None}} if args.blind else {q["image"]: q for q in questions if q["image"] is not None}
    if args.check:
        return check_benchmark(args, llava, questions, read, output, described, shown, limit, judge)
    descriptions = dar.describe_pictures(llava, shown, read, described.start(), args, limit) if args.dar else {}
    output.start()
    if ranks.first and not entries.keys() <= output.done.keys():
        Path(f"{stem}.scores.json").unlink(missing_ok=True)  # of other answers than there will be
    behind = {q[key]: harness.description_of(q, descriptions) for q in questions}
    answers = dar.answer_questions(llava, {q[key]: q for q in questions}, behind, entries, read, output, args)
    if not ranks.first:
        return
    if not answers:
        raise InputError(f"none of the {len(questions)} questions could be asked")
    print(output.path)
    if hasattr(scorer, "official"):
        suffix, text = scorer.official(questions, answers)
        harness.write_text(f"{stem}{suffix}", text)
        print(f"{stem}{suffix}")
    if benchmark in ("mmvet", "llavabench") and not args.judge:
        if settings.items() <= harness.saved_run(f"{stem}.scores.json").items():
            print(f"its score is in {stem}.scores.json")
            return
        part = f" --limit {args.limit} --seed {args.seed}" if args.limit else ""
        print(f"no score yet: {benchmark} is graded by a judge model. With a key for one in OPENAI_API_KEY:")
        print(f"  python evaluate.py score {benchmark} --answers {output.path} --data {args.data} --judge{part}")
        return
    told = audit.read_descriptions(stem, settings)
    scores = harness.scores_of(args, benchmark, questions, answers, stem, output.path, told)
    harness.show(benchmark, scores, settings | {"limit": args.limit})
    harness.save(stem, settings, args.limit, benchmark, questions, scores, told)


def check_benchmark(args, llava, questions, read, output, described, shown, limit, judge):
    """The report of --check. Raises InputError if the run would end without answers, or they could not be scored."""
    from stic_min import check, dar

    if not output.ranks.first:
        return
    scorer, key = SCORERS[args.command], harness.key_of(SCORERS[args.command])
    by_key = {q[key]: q for q in questions}
    tokens, describing, broken, unasked = dar.measure(llava, by_key, read, args, output.ranks)
    values = [q[scorer.GROUPED_BY] for q in questions] if hasattr(scorer, "GROUPED_BY") else []
    groups = Counter(v for value in values for v in (value if isinstance(value, list) else [value]) if v)
    left = sum(k not in output.done for k in by_key)
    lines = [
        ("questions", f"{len(questions)}, {left} of them not yet in {output.path}"),
        *([("of them", ", ".join(f"{name} {count}" for name, count in groups.items()))] if groups else []),
        ("images", f"{len(describing) + len(broken)}, {len(broken)} of them can't be read"),
        *(("  unread", error) for error in list(broken.values())[:5]),
    ]
    if unasked:
        lines.append(("not asked", f"{len(unasked)} questions: {check.names(list(unasked))}"))
        lines += [("  reason", error) for error in list(dict.fromkeys(unasked.values()))[:5]]
    if args.dar:
        left = sum(name not in described.done for name in shown)
        lines.append(("descriptions", f"{len(shown)}, {left} of them not yet in {described.path}"))
        lengths = [dar.length(llava, DESCRIBE_PROMPT, [])] if args.blind else list(describing.values())
        if lengths:
            lines.append(("tokens", f"a describer's prompt: {check.percentiles(lengths)}"))
            lines += check.generation_cost(argparse.Namespace(**vars(args) | {"max_new_tokens": limit}), llava, lengths)
    lines.append(("judge", judge_needed(args.command, len(questions), judge)))
    problems = []
    if len(tokens) < len(questions) and getattr(scorer, "COMPLETE", False):
        lost = len(questions) - len(tokens)
        whole = f"{args.command} is scored only as a whole"
        problems.append(f"{lost} of {len(questions)} questions can't be asked; {whole}")
    if tokens:
        description = min(limit, check.ANSWER) if args.dar else 0
        lengths = [n + description * (by_key[k]["image"] is not None) for k, n in tokens.items()]
        lines.append(("tokens", f"a question with its image: {check.percentiles(lengths)}"))
        short = all(by_key[k]["text"].endswith((scienceqa.SUFFIX, chartqa.SUFFIX)) for k in tokens)
        lines += check.generation_cost(args, llava, lengths, SHORT_ANSWER if short else check.ANSWER)
    else:
        problems.append(f"none of the {len(questions)} questions could be asked")
    check.end(lines, problems)


def judge_needed(benchmark, count, judge):
    """Whether a judge will be asked, as text. judge: the one that is to be asked, or None."""
    if benchmark not in JUDGED:
        return "none is needed"
    every = getattr(SCORERS[benchmark], "COMPLETE", False)
    if judge is None:
        return "none is given (--judge): " + ("no score" if every else "what only it can read counts as wrong")
    asked = f"{count * judge.runs} verdicts" if every else "what the rules can't read"
    return f"{judge.model} at {judge.url} is asked for {asked}"


def run_score(args):
    if place()[0]:
        return  # no work for several ranks
    if not args.answers and not args.judged:
        raise InputError("score needs --answers FILE" + (" or --judged FILE" if args.benchmark in JUDGED else ""))
    if args.judge and not args.answers:
        raise InputError("--judge grades answers: it needs --answers FILE")
    benchmark, scorer, answers, limit, seed = args.benchmark, SCORERS[args.benchmark], None, args.limit, args.seed
    harness.check_flags(args, benchmark)
    if args.answers:
        read = getattr(scorer, "read_answers", lambda path: [record for _, record in read_records(path)])
        answers = read(args.answers)
    settings, stem = settings_of(answers), Path(args.answers).with_suffix("") if args.answers else None
    if settings.get("benchmark", benchmark) != benchmark:
        raise InputError(f"{args.answers}: answers to {settings['benchmark']}, not to {benchmark}")
    questions = harness.load_questions(benchmark, args.data, settings.get("suffix"))
    harness.warn_of_limit(benchmark, questions, limit)
    if settings:  # a file of ours
        key, run = harness.key_of(scorer), harness.saved_run(f"{stem}.scores.json") if limit is None else {}
        if run and (name := audit.differing(settings, run)):
            console.warn(f"{stem}.scores.json is of another run, with {name} {run.get(name)!r}: it is replaced")
            run = {}
        limit, seed = run.get("limit", limit), run.get("seed", seed)  # a subset stays one
        harness.check_prompts(args.answers, answers, harness.entries_of(questions, key), key)
    everything, questions = questions, harness.limited(benchmark, questions, limit, seed)
    if answers and len(questions) < len(everything):
        outside = {str(q["question_id"]) for q in everything} - {str(q["question_id"]) for q in questions}
        answers = [record for record in answers if str(record.get("question_id")) not in outside]
    described = audit.read_descriptions(stem, settings)
    scores = harness.scores_of(args, benchmark, questions, answers, stem, args.answers or args.judged[0], described)
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        harness.show(benchmark, scores, settings | {"limit": limit})
    if settings and not args.rule:
        harness.save(stem, settings, limit, benchmark, questions, scores, described)


def settings_of(answers):
    """What an answers file of ours was made with, from its first line; {} for one made elsewhere."""
    first = answers[0] if answers else {}
    texts = ("benchmark", "mode", "model", "fingerprint", "template")
    if not all(isinstance(first.get(name), str) for name in texts) or first["template"] not in TEMPLATES:
        return {}
    return {k: v for k, v in first.items() if k not in ("key", "question_id", "prompt", "text", "finish")}


def run_table(args):
    if place()[0]:
        return  # no work for several ranks
    report.write(Path(args.dir))


def run_ask(args):
    from stic_min import dar
    from stic_min.loader import load_llava

    if place()[0]:
        return  # no work for several ranks
    if args.dar and not args.image:
        raise InputError("--dar describes a picture first: it needs --image")
    ranks = Ranks(0, 1, start_device(args.device))
    pictures = [open_image(path) for path in args.image]
    console.report_loading(args, ranks)
    llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **flags.model_options(args, ranks))
    console.report_loaded(llava, ranks)
    question = without_marks(args.question)
    if (over := dar.excess(llava, question, pictures, args)) > 0:
        raise InputError(f"the question is {over} tokens longer than the model's sequence holds")
    description = None
    if args.dar:
        user = with_image(DESCRIBE_PROMPT, len(pictures))
        description = dar.say(llava, user, pictures, args, "describe", "picture")
        print(f"Description: {description}\n", flush=True)
    user = dar.user_text(llava, question, description, pictures, args)
    print(dar.say(llava, user, pictures, args, "answer", "question"))


# ---------------------------------------------------------------- flags


def check_kinds(args):
    """Raises InputError for a file in the place of a folder, and the other way around."""
    for name in ("model", "adapter", "vision", "data", "out", "dir"):
        if (path := getattr(args, name, None)) and os.path.isfile(path):
            raise InputError(f"{'' if name == 'dir' else f'--{name} '}{path} is a file, expected a folder")
    for name in ("tokenizer", "answers", "judged", "judge_prompts", "image"):
        given = getattr(args, name, None) or []
        for path in given if isinstance(given, list) else [given]:
            if os.path.isdir(path):
                raise InputError(f"--{name.replace('_', '-')} {path} is a folder, expected a file")


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
    group.add_argument("--judge-runs", type=flags.positive, metavar="N", help=runs)
    seconds = flags.number(int, lambda n: 1 <= n <= 3600, "a whole number of seconds, at most 3600")
    tokens = "at most this many tokens in a reply (default: the benchmark's); a reasoning model needs more"
    group.add_argument("--judge-max-tokens", type=flags.positive, metavar="N", help=tokens)
    named = "what the endpoint calls that limit (default: max_tokens); newer OpenAI models take only the second"
    group.add_argument("--judge-token-field", choices=["max_tokens", "max_completion_tokens"], help=named)
    bare = "send no temperature, which OpenAI's reasoning models refuse"
    group.add_argument("--judge-no-temperature", action="store_true", help=bare)
    unread = f"score although more than {audit.UNREAD:.0%} of the verdicts can't be read".replace("%", "%%")
    group.add_argument("--allow-unread", action="store_true", help=unread)
    group.add_argument("--judge-timeout", type=seconds, default=60, metavar="SECONDS", help="of one request")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, summary, run, text=None):
        sub = commands.add_parser(name, help=summary, description=text or summary, formatter_class=flags.HelpFormatter)
        sub.set_defaults(run=run, judge=False, judged=None, rule=None, allow_unread=False)
        return sub

    for name, scorer in SCORERS.items():
        summary = scorer.__doc__.split("\n")[0].split("): ")  # "ScienceQA (test, ...): the prompt, ..."
        sub = command(name, summary[0] + ")" * (len(summary) > 1), run_benchmark, scorer.__doc__)
        sub.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files, as published")
        sub.add_argument("--out", required=True, metavar="DIR", help="answers and scores")
        tokens = f"(section 4), in up to {DESCRIPTION_TOKENS} tokens (a --max-new-tokens of your own is for both)"
        sub.add_argument("--dar", action="store_true", help=f"describe the picture first, then answer {tokens}")
        sub.add_argument("--blind", action="store_true", help="with --dar: describe without the picture (as released)")
        preset = "released: --template vicuna_v1, and on MMBench with --dar also --blind"
        sub.add_argument("--preset", choices=["released"], help=preset)
        flags.add_model_flags(sub)
        flags.add_check_flag(sub)
        flags.add_limit_flag(sub)
        flags.add_sampling_flags(sub, temperature=0.0, batch_size=8, max_new_tokens=new_tokens(name))
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
    rules = "; ".join(f"{name}: {', '.join(s.RULES)}" for name, s in SCORERS.items() if hasattr(s, "RULES"))
    sub.add_argument("--rule", help=f"where official scorers differ (default: the first). {rules}")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")
    flags.add_limit_flag(sub)
    sub.add_argument("--seed", type=flags.seed_value, default=0, help="of --limit")
    add_judge_flags(sub)

    sub = command("table", "the paper's tables with the scores in a folder, as text and as a page", run_table)
    sub.add_argument("dir", metavar="DIR", help="the benchmarks' --out; tables.md and report.html are written to it")

    sub = command("ask", "one question about one picture (or several, or none)", run_ask)
    sub.add_argument("question")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given again")
    sub.add_argument("--dar", action="store_true", help="describe the picture first, then answer (section 4)")
    flags.add_model_flags(sub)
    flags.add_sampling_flags(sub, temperature=0.0)

    args = parser.parse_args()
    check_kinds(args)
    args.run(args)


if __name__ == "__main__":
    process.run(main)
