"""The flags of evaluate.py, and whether they fit the benchmark and each other."""

import argparse
import os

from stic_min import InputError
from stic_min.runtime import flags, preset
from stic_min.scorers import audit, harness
from stic_min.scorers.plan import DESCRIPTION_TOKENS


def add_benchmark_flags(parser, benchmark):
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder of the benchmark's files, as published")
    add("--out", required=True, metavar="DIR", help="output folder for answers and scores")
    add("--dar", action="store_true",
        help="describe the image first, then answer (section 4); a description has up to "
        f"{DESCRIPTION_TOKENS} tokens, or --max-new-tokens if given")
    add("--blind", action=argparse.BooleanOptionalAction,
        help="with --dar: generate descriptions without the image, as in the release")
    flags.add_model_flags(parser)
    flags.add_check_flag(parser)
    flags.add_limit_flag(parser)
    flags.add_sampling_flags(parser, temperature=0.0, max_new_tokens=benchmark.max_new_tokens)
    if benchmark.suffix is not None:
        add("--suffix", default=benchmark.suffix, metavar="TEXT", help="last line of each prompt")
    if benchmark.judge:
        add_judge_flags(parser)
    preset.add_flags(parser, blind=True, template="vicuna_v1", top_k=50)


def add_score_flags(parser, benchmarks):
    add = parser.add_argument
    add("benchmark", choices=sorted(harness.MODULES), help="benchmark that the answers are for")
    add("--answers", metavar="FILE",
        help="file of answers: JSON Lines with question_id, prompt and text, or the official format")
    add("--data", required=True, metavar="DIR", help="folder of the benchmark's files, as published")
    add("--judged", nargs="+", metavar="FILE",
        help="files of published verdicts: grades (MM-Vet), reviews (LLaVA-Bench, one file per run) or "
        "extractions (MathVista)")
    rules = "; ".join(f"{b.name}: {', '.join(b.rules)}" for b in benchmarks if b.rules)
    add("--rule", metavar="NAME",
        help=f"scoring rule, where official scorers differ (default: the first listed). {rules}")
    add("--json", action="store_true", help="print the scores as JSON")
    flags.add_limit_flag(parser)
    add("--seed", type=flags.seed_value, default=0, help="random seed for --limit")
    add_judge_flags(parser)


EMBED_HELP = """Computes CLIP features of the images in a folder and its subfolders, for `tsne`.

Each image is padded to a square and encoded by the checkpoint's own vision tower in float32. Its feature is
the mean of hidden state -2, which LLaVA's projector reads, over the patches that show the image, not padding.
Features and image names are written to a safetensors file. The name of this file labels its images in the
plot, so choose scienceqa.safetensors rather than test.safetensors. Unreadable images are skipped with a
warning.
"""

TSNE_HELP = """Plots the features of several image folders with t-SNE, and computes how much they overlap.

The paper's Figures 8 and 14 compare stage 1's images (MSCOCO) with those of four benchmarks, 1,000 images
each. The more a benchmark's images overlap with them, the more it tends to gain; ChartQA is an exception.
The first file is the reference, so start with the images of stage 1. The overlap of each other file with it
is computed in feature space, not in the plot: among each image's 10 nearest neighbors (cosine similarity,
equally many images per file), the share from the other file, divided by the share expected if the file made
no difference. 1 means indistinguishable, 0 disjoint. FILE.json, next to the plot, has the overlaps and the
position of each image. Needs scikit-learn (pip install scikit-learn).
"""


def add_embed_flags(parser):
    add = parser.add_argument
    add("--model", required=True, metavar="DIR",
        help="LLaVA checkpoint folder, as published; only its vision tower is loaded")
    add("--vision", metavar="DIR",
        help="CLIP folder, needed only if the checkpoint has no vision tower and its config.json does not "
        "point to one")
    add("--tokenizer", metavar="FILE", help="tokenizer.model file (default: the checkpoint's)")
    add("--images", required=True, metavar="DIR", help="folder of the images; includes its subfolders")
    add("--out", required=True, dest="file", metavar="FILE", help="features file to write (safetensors)")
    flags.add_limit_flag(parser)
    add("--seed", type=flags.seed_value, default=0, help="random seed for --limit")
    add("--device", help="torch device, such as cuda or cpu (default: a GPU if available)")


def add_tsne_flags(parser):
    parser.add_argument("features", nargs="+", metavar="FEATURES",
                        help="features files written by embed, at most eight; the first is the reference")
    parser.add_argument("--out", required=True, dest="file", metavar="FILE.svg", help="plot to write")


def add_judge_flags(parser):
    group = parser.add_argument_group("judge")
    add = group.add_argument
    add("--judge", action="store_true", help="grade the answers with a judge model over the network")
    add("--judge-model", metavar="NAME", help="judge model (default: the benchmark's official judge)")
    add("--judge-url", metavar="URL",
        help="base URL of an OpenAI-compatible API (default: OPENAI_BASE_URL, else "
        "https://api.openai.com/v1)")
    add("--judge-key", metavar="KEY",
        help="API key (default: OPENAI_API_KEY, which, unlike a flag, other users of the machine cannot see)")
    add("--judge-prompts", metavar="FILE",
        help="JSON file with the official prompts (see stic_min/scorers/README.md); without it, scores are "
        "not comparable with published ones")
    add("--judge-runs", type=flags.positive, metavar="N",
        help="number of times each answer is graded (default: 5 for MM-Vet, 3 for LLaVA-Bench)")
    add("--judge-max-tokens", type=flags.positive, metavar="N",
        help="maximum length of a reply in tokens; a reasoning model needs a higher limit (default: the "
        "benchmark's)")
    add("--judge-token-field", choices=["max_tokens", "max_completion_tokens"],
        help="the endpoint's name for that limit; newer OpenAI models accept only the second (default: "
        "max_tokens)")
    add("--judge-no-temperature", action="store_true",
        help="omit the temperature from requests, because OpenAI's reasoning models reject it")
    seconds = flags.number(int, lambda n: 1 <= n <= 3600, "a whole number of seconds, at most 3600")
    add("--judge-timeout", type=seconds, default=60, metavar="SECONDS",
        help="number of seconds before a request times out")
    percent = f"{audit.UNREAD:.0%}".replace("%", "%%")
    add("--allow-unread", action="store_true",
        help=f"score even if more than {percent} of the judge's verdicts are unreadable")


def check_paths(args):
    """Raises InputError for a file where a folder is expected, and vice versa."""
    for name in ("model", "adapter", "vision", "data", "out", "dir"):
        if (path := getattr(args, name, None)) and os.path.isfile(path):
            raise InputError(f"{'' if name == 'dir' else f'--{name} '}{path} is a file, not a folder")
    for name in ("tokenizer", "answers", "judged", "judge_prompts", "image"):
        paths = getattr(args, name, None) or []
        for path in paths if isinstance(paths, list) else [paths]:
            if os.path.isdir(path):
                raise InputError(f"--{name.replace('_', '-')} {path} is a folder, not a file")


def check_flags(args, benchmark):
    """Raises InputError for flags of `score` and of the judge that do not fit the benchmark or each other."""
    names = ("model", "url", "key", "prompts", "runs", "max_tokens", "token_field", "no_temperature")
    given = [name for name in names if getattr(args, f"judge_{name}", None)]
    if args.rule and args.rule not in benchmark.rules:
        rules = " and ".join(benchmark.rules) or "no second rule"
        raise InputError(f"--rule {args.rule}: {benchmark.name} has {rules}")
    if args.judge and not benchmark.judge:
        raise InputError(f"--judge: {benchmark.name} is scored without a judge")
    if args.judged and not benchmark.read_judged:
        raise InputError(f"--judged: there are no published verdicts for {benchmark.name}")
    if args.judged and args.judge:
        raise InputError("--judged reads verdicts and --judge requests them: use only one")
    if given and not args.judge:
        raise InputError(f"--judge-{given[0].replace('_', '-')} requires --judge")
    if "runs" in given and not benchmark.runs:
        raise InputError(f"--judge-runs: {benchmark.name} is judged only once")
