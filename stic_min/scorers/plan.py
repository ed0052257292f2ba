"""What one run of a benchmark asks, and where its answers go."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from stic_min.runtime import flags
from stic_min.runtime.output import Output
from stic_min.scorers import harness

DESCRIPTION_TOKENS = 1024  # default length limit of DaR's descriptions


def get_mode(args):
    return ("blind-dar" if args.blind else "dar") if args.dar else "direct"


@dataclass
class Run:
    """A benchmark asked in one way: what is asked, and where answers go."""

    args: argparse.Namespace
    benchmark: harness.Benchmark
    questions: list[dict]
    settings: dict  # recorded with every answer
    read: Callable  # question -> its images
    entries: dict  # {key: the record of an answer, without the answer}
    answers: Output
    descriptions: Output | None = None  # with --dar, as the next two
    to_describe: dict | None = None  # {image name: a question about it}; {"": no image} for a blind describer
    description_tokens: int = 0


def plan_run(args, benchmark, questions, stem, llava, ranks) -> Run:
    """Opens the output files. Raises InputError if they were made with other settings or questions."""
    settings = {"benchmark": benchmark.name, "mode": get_mode(args), **flags.run_settings(args, llava)}
    if benchmark.suffix is not None:
        settings["suffix"] = args.suffix
    if args.check and not args.dtype:
        del settings["dtype"]  # the default on a GPU may differ from this machine's
    entries = harness.make_entries(benchmark, questions)
    answers = Output(f"{stem}.jsonl", benchmark.key, settings, ranks)
    harness.check_prompts(benchmark, answers.path, answers.done.values(), entries)
    read = lambda question: harness.open_images(benchmark, question, args.data)
    run = Run(args, benchmark, questions, settings, read, entries, answers)
    if args.dar:
        is_default = args.max_new_tokens == benchmark.max_new_tokens
        run.description_tokens = DESCRIPTION_TOKENS if is_default else args.max_new_tokens
        changed = {"max_new_tokens": run.description_tokens}
        run.descriptions = Output(f"{stem}.descriptions.jsonl", "image", settings | changed, ranks)
        pictured = {q["image"]: q for q in questions if q["image"] is not None}
        run.to_describe = {"": {"image": None}} if args.blind else pictured
    return run
