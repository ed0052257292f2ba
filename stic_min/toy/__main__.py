"""The method on a toy world, small enough for any machine.

  python -m stic_min.toy          draws pictures and runs the whole recipe on them: pairs, stage 1,
                                  descriptions, stage 2, evaluation, with the scripts of a real run
  python -m stic_min.toy study    the paper's tables and the release's differences from the paper, on several
                                  base models and seeds; one process per core; first prints an estimate of
                                  the time it takes; run the same command again to resume
  python -m stic_min.toy neighbours
                                  STIC, SPIN, SIMA, POVID and triangular consistency, in the same way

The base model (1.3M parameters) comes with the project; `python -m stic_min.toy.pretrain` trains another
from scratch.
"""

import argparse
import os
from pathlib import Path

import torch

from stic_min.runtime import flags, process
from stic_min.runtime.files import read_json
from stic_min.toy import demo, neighbours_study, recipe, study


def main():
    parser = argparse.ArgumentParser(
        prog="python -m stic_min.toy", description=__doc__, formatter_class=flags.HelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["demo", "study", "neighbours"], default="demo",
                        help="command to run")
    parser.add_argument("--model", metavar="DIR", action="append", type=Path,
                        help="base model folder; repeat the flag to study several (default: the project's)")
    parser.add_argument("--seed", type=flags.seed_value, default=0,
                        help="random seed; except for the demo, the first of --seeds")
    parser.add_argument("--images", type=flags.positive, default=1000, metavar="N",
                        help="number of unlabeled pictures, with one pair each for stage 1; stage 2 gets "
                             "half as many instructions")  # fmt: skip
    parser.add_argument("--test-images", type=flags.positive, metavar="N",
                        help="number of pictures for evaluation (default: 300 for the demo, else 500)")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="output folder (default: toy-run, toy-study or toy-neighbours)")
    parser.add_argument_group("neighbours", neighbours_study.overview())
    group = parser.add_argument_group("study and neighbours", study.overview())
    group.add_argument("--bases", type=flags.positive, metavar="N",
                       help="without --model: number of base models, with seeds 0 to N-1 (default: 3; for "
                            "neighbours 2); all but the first are pretrained, half an hour each; the study "
                            "adds one that trusts text")  # fmt: skip
    group.add_argument("--seeds", type=flags.positive, metavar="N",
                       help="number of seeds, each with its own pictures (default: 5)")
    group.add_argument("--split", choices=["dev", "test"], help="scenes to evaluate on (default: test)")
    group.add_argument("--processes", type=flags.positive, metavar="N",
                       help="number of chains to run in parallel, one core each (default: all cores)")
    args = parser.parse_args()
    models = args.model or [recipe.BASE]
    of_study = args.bases, args.seeds, args.split, args.processes
    if args.command == "demo" and (len(models) > 1 or any(of_study)):
        parser.error("--bases, --seeds, --split, --processes and several --model are not for the demo")
    if args.model and args.bases:
        parser.error("--bases pretrains base models: use either --bases or --model")
    for model in models:
        read_json(model / "config.json")  # report a wrong --model before drawing anything
    torch.set_num_threads(1)  # a second thread only slows down a model of this size
    if args.command == "demo":
        demo.run(models[0], args.out or Path("toy-run"), args.seed, args.images, args.test_images or 300)
    else:
        is_study = args.command == "study"
        out = args.out or Path(f"toy-{args.command}")
        seeds = range(args.seed, args.seed + (args.seeds or 5))
        split = args.split or "test"
        test_images = args.test_images or 500
        models = args.model or args.bases or (3 if is_study else 2)
        run = study.run if is_study else neighbours_study.run
        run(models, out, seeds, args.images, split, test_images, args.processes or os.cpu_count())


if __name__ == "__main__":
    process.run(main)
