"""The method on a world of its own, small enough for any machine.

  python -m stic_min.toy            draws pictures and runs the whole recipe on them: pairs, stage 1, descriptions,
                                    stage 2, evaluation, each by the script and the command that a real run uses
  python -m stic_min.toy study      the paper's tables on the toy world, and controls that it lacks: several seeds,
                                    resumed by the same command, one process a core

The base model (1.3 M parameters) comes with the project; `python -m stic_min.toy.pretrain` makes another from nothing.
"""

import argparse
import os
from pathlib import Path

import torch

from stic_min.runtime import flags, process
from stic_min.runtime.files import read_json
from stic_min.toy import demo, recipe, study


def main():
    parser = argparse.ArgumentParser(
        prog="python -m stic_min.toy", description=__doc__, formatter_class=flags.HelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["demo", "study"], default="demo")
    parser.add_argument("--model", metavar="DIR", action="append", type=Path,
                        help="base model (default: the project's own); for a study it may be given again")
    parser.add_argument("--seed", type=flags.seed_value, default=0, help="random seed; a study's first")
    parser.add_argument("--images", type=flags.positive, default=1000, metavar="N",
                        help="pairs that stage 1 trains on, a picture each; half as many instructions")
    parser.add_argument("--test-images", type=flags.positive, metavar="N",
                        help="pictures to evaluate on (default: 300, in the study 1000)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="(default: toy-run, or toy-study)")
    group = parser.add_argument_group("study")
    group.add_argument("--seeds", type=flags.positive, metavar="N",
                       help="how many, each with pictures of its own (default: 5)")
    group.add_argument("--split", choices=["dev", "test"], help="scenes to evaluate on (default: test)")
    group.add_argument("--processes", type=flags.positive, metavar="N",
                       help="chains at a time, a core each (default: all cores)")
    args = parser.parse_args()
    models = args.model or [recipe.BASE]
    if args.command == "demo" and (len(models) > 1 or args.seeds or args.split or args.processes):
        parser.error("several --model, --seeds, --split and --processes are for the study")
    for model in models:
        read_json(model / "config.json")  # a wrong --model is said before anything is drawn
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings
    if args.command == "demo":
        demo.run(models[0], args.out or Path("toy-run"), args.seed, args.images, args.test_images or 300)
    else:
        seeds, out = range(args.seed, args.seed + (args.seeds or 5)), args.out or Path("toy-study")
        pictures, processes = args.test_images or 1000, args.processes or os.cpu_count()
        study.run(models, out, seeds, args.images, args.split or "test", pictures, processes)


if __name__ == "__main__":
    process.run(main)
