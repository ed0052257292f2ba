"""Pages to look at: one self-contained HTML page per run, written next to it or into its folder.

  python -m stic_min.report pairs.jsonl            pairs.html: each image with both responses
  python -m stic_min.report runs/stage1            runs/stage1/report.html: curves, also while it runs
  python -m stic_min.report descriptions.jsonl     descriptions.html: descriptions, also inside a prompt
  python -m stic_min.report results                results/report.html: scores, and answers that changed
  python -m stic_min.report .                      report.html and report.md: all steps of the recipe in a
                                                   folder, and one page of text to hand on
  python -m stic_min.report pairs.jsonl --images train2014 --model M --adapter runs/stage1
                                                   also log p of the responses before and after training

What a RUN is, is recognized from its content. Pages need no network.
"""

import argparse
from pathlib import Path

from stic_min import InputError
from stic_min.report import steps
from stic_min.report.options import Options
from stic_min.runtime import flags, process
from stic_min.runtime.files import check_place


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m stic_min.report", description=__doc__, formatter_class=flags.HelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN",
        help="file of pairs or descriptions, folder of a training run or of scores, or a folder with several "
             "of these")
    add("--images", action="append", default=[], type=Path, metavar="DIR",
        help="folder of the images; repeat the flag for several (default: the one in the run's command)")
    add("--data", action="append", default=[], type=Path, metavar="DIR",
        help="folder of a benchmark's data; repeat the flag for several (default: the one in the run's "
             "command)")
    add("--adapter", type=Path, metavar="DIR",
        help="LoRA adapter folder: for pairs, shows log p of the responses before and after training; needs "
             "--model")
    add("--model", type=Path, metavar="DIR", help="LLaVA checkpoint folder, for --adapter")  # fmt: skip
    args = parser.parse_args()
    if args.adapter and not args.model:
        parser.error("--adapter needs --model")
    if args.model and not args.adapter:
        parser.error("--model is only for --adapter")
    return args


def check_out(run):
    """Raises InputError if the page of a RUN can't be written."""
    out = run / "report.html" if run.is_dir() else run.with_suffix(".html")
    if out == run:
        raise InputError(f"{run} would be replaced by its own page: rename it to {run.stem}.jsonl")
    if out.is_dir():
        raise InputError(f"can't write to {out}: it is a folder")
    check_place(out.parent)


def main():
    args = parse_args()
    for folder in (*args.images, *args.data):
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}")
    options = Options(args.images, args.data, args.adapter, args.model)
    modules = [steps.recognize(path) for path in args.runs]  # a wrong one is an error before any work
    for path in args.runs:
        check_out(path)
    for path, module in zip(args.runs, modules):
        print(module.write(path, options))


if __name__ == "__main__":
    process.run(main)
