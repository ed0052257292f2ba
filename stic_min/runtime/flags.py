"""The flags that the commands share: their types, defaults and help."""

import argparse
from pathlib import Path

import torch

from stic_min.runtime.console import one_line
from stic_min.runtime.files import fingerprint
from stic_min.text import TEMPLATES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default, the description as it was written."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def number(kind, test, what):
    """A flag's type: text -> `kind`, if it passes `test`."""

    def parse(text):
        try:
            if test(value := kind(text)):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{one_line(text, 60)} is not {what}")

    return parse


positive = number(int, lambda n: n >= 1, "a whole number of at least 1")
not_negative = number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
probability = number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
top_p_value = number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
seed_value = number(int, lambda n: 0 <= n < 2**63, "a whole number in [0, 2^63)")


def add_model_flags(parser, image_mode="the checkpoint's", adapter=True):
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="LLaVA checkpoint folder, as published")
    if adapter:
        group.add_argument("--adapter", metavar="DIR", help="LoRA adapter: a folder of ours, or any in PEFT's format")
        group.add_argument("--other-base", action="store_true", help="use --adapter though its base had other weights")
    group.add_argument("--vision", metavar="DIR", help="CLIP's folder, where the checkpoint neither holds nor finds it")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, if not the checkpoint's")
    group.add_argument("--template", choices=sorted(TEMPLATES), help="chat template (default: the checkpoint's)")
    group.add_argument("--image-mode", choices=["pad", "anyres"], help=f"(default: {image_mode})")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="(default: bfloat16 on a GPU, else float32)")
    group.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one; this rank's under torchrun)")
    parser.add_argument("--seed", type=seed_value, default=0, help="of everything random")


def add_check_flag(parser):
    text = "read all input, report on it and on what the run will take, and end; with status 1 if it would fail"
    parser.add_argument("--check", action="store_true", help=text)


def add_limit_flag(parser):
    parser.add_argument("--limit", type=positive, metavar="N", help="only a random subset of N, drawn with --seed")


def add_sampling_flags(parser, temperature, batch_size=None, max_new_tokens=1024):
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=not_negative, default=temperature, help="0 is greedy")
    group.add_argument("--top-p", type=top_p_value, help="keep the most probable tokens up to this mass (default: all)")
    group.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, help="per response")
    if batch_size:
        group.add_argument("--batch-size", type=positive, default=batch_size, help="responses sampled together")


def model_options(args, ranks):
    """The flags of `add_model_flags` as arguments of loader.open_llava and load_llava."""
    default = "bfloat16" if ranks.device.type == "cuda" else "float32"
    return {
        "vision": args.vision,
        "tokenizer": args.tokenizer,
        "template": args.template,
        "image_mode": args.image_mode,
        "dtype": DTYPES[args.dtype or default],
        "other_base": getattr(args, "other_base", False),
    }


def run_settings(args, llava):
    """What an output file was made with, for `files.Output`. Folders count by what is in them, not by their name."""
    return {
        "model": Path(args.model).resolve().name,
        "adapter": args.adapter and Path(args.adapter).resolve().name,
        "fingerprint": fingerprint(args.model, args.adapter, args.vision, args.tokenizer),
        "template": llava.config.template,
        "image_mode": llava.config.image_mode,
        "dtype": str(llava.lm_head.weight.dtype).removeprefix("torch."),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
