"""Evaluates a model on the paper's seven benchmarks, directly or with describe-and-respond (DaR).

  python evaluate.py scienceqa --model M --adapter runs/stage2 --data ScienceQA --out results/        direct
  python evaluate.py scienceqa --model M --adapter runs/stage2 --data ScienceQA --out results/ --dar  DaR
  python evaluate.py score scienceqa --answers results/scienceqa-stage2-dar.jsonl --data ScienceQA    no model
  python evaluate.py table results/                 the paper's tables and flipped answers, as text and HTML
  python evaluate.py ask --model M --adapter runs/stage2 --image photo.jpg "What is in the image?"
  python evaluate.py embed --model M --images train2014 --limit 1000 --out features/coco.safetensors
  python evaluate.py tsne features/*.safetensors --out tsne.svg        how image folders overlap (Figure 8)
  torchrun --nproc_per_node=4 evaluate.py scienceqa ...         distributes the questions over four GPUs

Answers are greedy. Each is written to results/BENCHMARK-ADAPTER-{direct,dar}.jsonl as soon as it is complete,
one line per answer; descriptions go to .descriptions.jsonl, one line per image, and scores to .scores.json.
To resume, run the same command again: existing output is skipped. MM-Vet and LLaVA-Bench need a judge model,
and MathVista and MMBench benefit from one; --judge queries it over the network. --check validates a
benchmark's files and images on any machine, and estimates memory and time, without running. --preset released
reproduces the authors' scripts: Vicuna's template and, with --dar, descriptions generated without seeing the
image. For more, see stic_min/scorers/README.md.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from stic_min import InputError
from stic_min.runtime import consistency, console, flags, preset, process
from stic_min.runtime.files import check_place, write_text
from stic_min.runtime.ranks import Ranks, place, start_device, start_ranks
from stic_min.scorers import arguments, audit, grading, harness, plan
from stic_min.text import DESCRIBE_PROMPT, without_marks

# The model is imported where it is used: scoring, tables and --help do without torch.

# ---------------------------------------------------------------- a benchmark: ask, then score


def run_benchmark(args):
    from stic_min.generate import open_model  # here, so that `score` and `table` start without torch

    benchmark = harness.get_benchmark(args.command)
    if args.blind and not args.dar:
        raise InputError("--blind changes how descriptions are generated: it needs --dar")
    arguments.check_flags(args, benchmark)
    consistency.same_preset(args)
    label = Path(args.adapter).resolve().name if args.adapter else "base"
    stem = Path(args.out) / f"{benchmark.name}-{label}-{plan.get_mode(args)}"
    check_place(f"{stem}.jsonl")
    everything = harness.load_questions(benchmark, args.data, getattr(args, "suffix", None))
    if not any(q["image"] for q in everything):
        raise InputError(f"{args.data}: no question has an image")
    questions = harness.sample_questions(benchmark, everything, args.limit, args.seed)
    # A missing key or prompt is an error now, not after hours. --check does not touch the replies on disk.
    judge = grading.start_judge(args, benchmark, os.devnull if args.check else stem) if args.judge else None
    ranks = start_ranks("cpu" if args.check else args.device)
    if ranks.first:
        harness.warn_of_limit(benchmark, everything, args.limit)
    llava = open_model(args, ranks)
    run = plan.plan_run(args, benchmark, questions, stem, llava, ranks)
    if args.check:
        from stic_min.scorers import dry_run

        return dry_run.report(run, llava, judge)
    answers = ask_questions(run, stem, llava)
    if ranks.first:
        score_answers(run, stem, answers)


def ask_questions(run, stem, llava):
    """Describes the images (DaR), then asks the questions -> the answers, on the first rank only."""
    from stic_min import dar
    from stic_min.generate import Sampling

    name, key = run.benchmark.name, run.benchmark.key
    sampling = Sampling.from_args(run.args)
    descriptions = {}
    if run.args.dar:
        longer = replace(sampling, max_new_tokens=run.description_tokens)
        output = run.descriptions.start()
        descriptions = dar.describe_images(llava, run.to_describe, run.read, output, longer, name)
    run.answers.start()
    if run.answers.ranks.first and not run.entries.keys() <= run.answers.done.keys():
        Path(f"{stem}.scores.json").unlink(missing_ok=True)  # those scores are of the previous answers
    questions = {q[key]: q for q in run.questions}
    described = {q[key]: harness.find_description(q, descriptions) for q in run.questions}
    entries, read, output = run.entries, run.read, run.answers
    return dar.answer_questions(llava, questions, described, entries, read, output, sampling, name)


def score_answers(run, stem, answers):
    args, benchmark, questions = run.args, run.benchmark, run.questions
    if not answers:
        raise InputError(f"none of the {len(questions)} questions could be asked")
    print(run.answers.path)
    if benchmark.official:
        suffix, text = benchmark.official(questions, answers)
        write_text(f"{stem}{suffix}", text)
        print(f"{stem}{suffix}")
    if benchmark.name in ("mmvet", "llavabench") and not args.judge:
        if run.settings.items() <= grading.read_saved_run(f"{stem}.scores.json").items():
            print(f"the score is in {stem}.scores.json")
            return
        subset = f" --limit {args.limit} --seed {args.seed}" if args.limit else ""
        command = f"score {benchmark.name} --answers {run.answers.path} --data {args.data} --judge{subset}"
        print(f"no score yet: {benchmark.name} is graded by a judge model. Set OPENAI_API_KEY, then run:")
        print(f"  python evaluate.py {command}")
        return
    descriptions = audit.read_descriptions(stem, run.settings)
    scores = grading.compute_scores(args, benchmark, questions, answers, stem, run.answers.path, descriptions)
    grading.print_scores(benchmark, scores, run.settings | {"limit": args.limit})
    grading.save_scores(benchmark, stem, run.settings, args.limit, questions, scores, descriptions)


# ---------------------------------------------------------------- the other commands


def run_score(args):
    benchmark = harness.get_benchmark(args.benchmark)
    if not args.answers and not args.judged:
        raise InputError("score needs --answers FILE" + (" or --judged FILE" if benchmark.judge else ""))
    if args.judge and not args.answers:
        raise InputError("--judge grades answers: it needs --answers FILE")
    arguments.check_flags(args, benchmark)
    answers = benchmark.read_answers(args.answers) if args.answers else None
    stem = Path(args.answers).with_suffix("") if args.answers else None
    settings = grading.read_settings(answers)
    if settings.get("benchmark", benchmark.name) != benchmark.name:
        raise InputError(f"{args.answers}: answers to {settings['benchmark']}, not to {benchmark.name}")
    everything = harness.load_questions(benchmark, args.data, settings.get("suffix"))
    harness.warn_of_limit(benchmark, everything, args.limit)
    limit, seed = args.limit, args.seed
    if settings:  # written by evaluate.py
        run = grading.read_saved_run(f"{stem}.scores.json") if limit is None else {}
        if run and (name := audit.find_difference(settings, run)):
            difference = f"with {name} {run.get(name)!r}"
            console.warn(f"{stem}.scores.json is from another run, {difference}: it will be replaced")
            run = {}
        limit, seed = run.get("limit", limit), run.get("seed", seed)  # a subset stays a subset
        harness.check_prompts(benchmark, args.answers, answers, harness.make_entries(benchmark, everything))
    questions = harness.sample_questions(benchmark, everything, limit, seed)
    if answers and len(questions) < len(everything):
        ids = [{str(q["question_id"]) for q in group} for group in (everything, questions)]
        answers = [record for record in answers if str(record.get("question_id")) not in ids[0] - ids[1]]
    descriptions = audit.read_descriptions(stem, settings)
    source = args.answers or args.judged[0]
    scores = grading.compute_scores(args, benchmark, questions, answers, stem, source, descriptions)
    if args.json:
        print(json.dumps(scores, indent=2))
    else:
        grading.print_scores(benchmark, scores, settings | {"limit": limit})
    if settings and not args.rule:
        grading.save_scores(benchmark, stem, settings, limit, questions, scores, descriptions)


def run_table(args):
    from stic_min.report import options, scores

    text = scores.text(args.dir)
    file = Path(args.dir, "tables.md")
    write_text(file, f"{text}\n")
    page = scores.write(args.dir, options.Options())
    print(f"{text}\n\nwrote {file} and {page}")


def run_embed(args):
    from stic_min.report import features

    features.embed(args)


def run_tsne(args):
    from stic_min.report import distribution

    distribution.tsne(args)


def run_ask(args):
    from stic_min import dar
    from stic_min.generate import Sampling, open_model
    from stic_min.images import open_image

    if args.dar and not args.image:
        raise InputError("--dar describes the image first: it needs --image")
    ranks = Ranks(0, 1, start_device(args.device))
    images = [open_image(path) for path in args.image]
    llava = open_model(args, ranks)
    sampling = Sampling.from_args(args)
    question = without_marks(args.question)
    if (excess := dar.tokens_over_limit(llava, question, images, sampling)) > 0:
        raise InputError(f"the question is {excess} tokens longer than the model's limit")
    description = None
    if args.dar:
        description = dar.answer_one(llava, DESCRIBE_PROMPT, images, sampling, "describe", "picture")
        print(f"Description: {description}\n", flush=True)
    text = dar.user_text(llava, question, description, images, sampling)
    print(dar.answer_one(llava, text, images, sampling, "answer", "question"))


# ---------------------------------------------------------------- flags


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, summary, run, text=None):
        formatter = flags.HelpFormatter
        sub = commands.add_parser(name, help=summary, description=text or summary, formatter_class=formatter)
        sub.set_defaults(run=run, judge=False, judged=None, rule=None, allow_unread=False)
        return sub

    benchmarks = [harness.get_benchmark(name) for name in harness.MODULES]
    for benchmark in benchmarks:
        sub = command(benchmark.name, benchmark.title, run_benchmark, harness.format_help(benchmark))
        arguments.add_benchmark_flags(sub, benchmark)
    sub = command("score", "score existing answers, without a model", run_score)
    arguments.add_score_flags(sub, benchmarks)
    sub = command("table", "add the scores in a folder to the paper's tables, as text and HTML", run_table)
    sub.add_argument("dir", metavar="DIR", help="folder of scores; the tables are written there")
    sub = command("ask", "ask one question about an image (or several, or none)", run_ask)
    sub.add_argument("question", help="text of the question")
    sub.add_argument("--image", action="append", default=[], metavar="FILE",
                     help="image file; repeat the flag for several images")  # fmt: skip
    sub.add_argument("--dar", action="store_true", help="describe the image first, then answer (section 4)")
    flags.add_model_flags(sub)
    flags.add_sampling_flags(sub, temperature=0.0, parallel=False)
    summary = "compute CLIP features of the images in a folder, for tsne"
    sub = command("embed", summary, run_embed, arguments.EMBED_HELP)
    arguments.add_embed_flags(sub)
    summary = "plot CLIP features of image folders, with their overlaps"
    sub = command("tsne", summary, run_tsne, arguments.TSNE_HELP)
    arguments.add_tsne_flags(sub)
    return preset.parse_args(parser, commands.choices)


def main():
    args = parse_args()
    arguments.check_paths(args)
    rank, _ = place()
    if rank == 0 or args.run is run_benchmark:  # the other commands have no work for several ranks
        args.run(args)


if __name__ == "__main__":
    process.run(main)
