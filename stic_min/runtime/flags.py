"""The flags that several commands share: types, defaults, help."""

import argparse
from pathlib import Path

from stic_min.runtime import preset
from stic_min.runtime.console import one_line
from stic_min.runtime.files import fingerprint
from stic_min.text import TEMPLATES

DTYPES = "bfloat16", "float16", "float32"  # by name: importing torch would delay --help


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default unless its help gives one, and keeps the line breaks of the description."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        given = "(default:" in (action.help or "")
        return action.help if silent or given else super()._get_help_string(action)


# ---------------------------------------------------------------- types


def number(kind, test, description):
    """An argparse type: text -> `kind`, which must pass `test`."""

    def parse(text):
        try:
            value = kind(text)
            valid = test(value)
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"{one_line(text, 60)} is not {description}")
        return value

    return parse


positive = number(int, lambda n: n >= 1, "a whole number of at least 1")
not_negative = number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
probability = number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
top_p_value = number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
seed_value = number(int, lambda n: 0 <= n < 2**63, "a whole number in [0, 2^63)")

# ---------------------------------------------------------------- groups of flags


def add_model_flags(parser, image_mode="the checkpoint's"):
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="LLaVA checkpoint folder, as published")
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter folder, ours or any in PEFT's format")
    group.add_argument("--other-base", action="store_true",
                       help="accept an --adapter that was trained on other base weights")
    group.add_argument("--vision", metavar="DIR",
                       help="CLIP folder, needed only if the checkpoint has no vision tower and its "
                            "config.json does not point to one")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model file (default: the checkpoint's)")
    # PAPER vs RELEASED (F): the release generates in [INST], but trains and evaluates in Vicuna's template.
    group.add_argument("--template", choices=sorted(TEMPLATES),
                       help="chat template (default: the checkpoint's)")
    group.add_argument("--image-mode", choices=["pad", "anyres"],
                       help="image layout: pad takes 576 tokens per image, anyres up to 2,880 "
                            f"(default: {image_mode})")
    group.add_argument("--dtype", choices=DTYPES,
                       help="precision of the weights (default: bfloat16 on a GPU, else float32)")
    group.add_argument("--device",
                       help="torch device, such as cuda or cpu (default: a GPU if available; under torchrun, "
                            "this rank's)")
    parser.add_argument("--seed", type=seed_value, default=0, help="random seed")


def add_check_flag(parser):
    parser.add_argument("--check", action="store_true",
                        help="validate all inputs, estimate memory and time, then exit without running; the "
                             "exit status is 1 if the run would fail")  # fmt: skip


def add_limit_flag(parser):
    parser.add_argument("--limit", type=positive, metavar="N",
                        help="size of a random subset to use, sampled with --seed (default: all)")


def add_sampling_flags(parser, temperature, parallel=True, max_new_tokens=1024, top_p=None):
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=not_negative, default=temperature, metavar="T",
                       help="sampling temperature; 0 is greedy")
    group.add_argument("--top-k", type=positive, metavar="K",
                       help="number of most probable tokens to sample from, before --top-p (default: all)")
    group.add_argument("--top-p", type=top_p_value, default=top_p, metavar="P",
                       help="total probability of the most probable tokens to sample from "
                            f"(default: {top_p or 1})")  # fmt: skip
    group.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, metavar="N",
                       help="maximum length of a response in tokens")
    if parallel:
        group.add_argument("--batch-size", type=positive, metavar="N",
                           help="number of responses sampled in parallel (default: what fits in the GPU's "
                                "memory, up to 64; 8 on a CPU)")


def add_training_flags(parser, *, lr, batch_size, dropout, max_length):
    """The training flags of both stages. `max_length` is the default in pad mode (anyres: 4096)."""
    add_check_flag(parser)
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=not_negative, default=lr, help="peak learning rate for LoRA")
    # PAPER vs RELEASED (H): the release freezes the projector by wrapping the model a second time.
    add("--projector-lr", type=not_negative, default=2e-5, metavar="LR",
        help="peak learning rate for the projector; 0 freezes it")
    add("--epochs", type=positive, default=1, metavar="N",
        help="number of passes over the samples, each in its own order")
    # PAPER vs RELEASED (I): in stage 1 (4 in Table 4), the release's script has 4 GPUs x 1 x 2 = 8.
    # PAPER vs RELEASED (K): in stage 2 (64), 2 GPUs x 16 = 32.
    add("--batch-size", type=positive, default=batch_size, metavar="N",
        help="number of samples per optimizer step, over all ranks")
    add("--micro-batch", type=positive, metavar="N",
        help="number of samples per forward pass on each rank (default: what fits in the GPU's memory, up to "
             "8; 1 on a CPU)")  # fmt: skip
    # PAPER vs RELEASED (J): 1,024 in stage 1 (Table 4), 1,048 in the release, image tokens included.
    add("--max-length", type=positive, metavar="N",
        help="maximum sequence length in tokens, image tokens included; longer responses are truncated "
             f"(default: {max_length}; 4096 in anyres mode)")  # fmt: skip
    add("--lora-r", type=positive, metavar="N",
        help="LoRA rank (default: 128; a loaded adapter keeps its own)")
    add("--lora-alpha", type=positive, metavar="N",
        help="LoRA alpha; updates are scaled by alpha / rank (default: 2 * rank; a loaded adapter keeps "
             "its own)")  # fmt: skip
    add("--lora-dropout", type=probability, default=dropout, metavar="P",
        help="dropout probability on LoRA's input")
    add("--shard", choices=["full", "none"],
        help="sharding under torchrun: full is FSDP; none replicates the weights on every rank and "
             "all-reduces the gradients of LoRA and projector (default: none if that fits on each GPU, else "
             "full)")  # fmt: skip
    add("--checkpoint-activations", action="store_true",
        help="recompute activations in the backward pass: less memory, but about a third more time")
    add("--save-every", type=positive, metavar="STEPS",
        help="number of steps between checkpoints to resume from (default: one every five minutes)")
    add("--keep", type=positive, metavar="N", default=2, help="number of most recent checkpoints to keep")


# ---------------------------------------------------------------- from flags to arguments and records


def model_options(args, ranks):
    """The flags of `add_model_flags` as keyword arguments of loader.open_llava and load_llava."""
    import torch

    default = "bfloat16" if ranks.device.type == "cuda" else "float32"
    return {
        "vision": args.vision,
        "tokenizer": args.tokenizer,
        "template": args.template,
        "image_mode": args.image_mode,
        "dtype": getattr(torch, args.dtype or default),
        "other_base": getattr(args, "other_base", False),
    }


def model_settings(args, llava):
    """The part of `run_settings` that identifies the model."""
    return {
        "model": Path(args.model).resolve().name,
        "adapter": args.adapter and Path(args.adapter).resolve().name,
        "fingerprint": fingerprint(args.model, args.adapter, args.vision, args.tokenizer),
        "template": llava.config.template,
        "image_mode": llava.config.image_mode,
        "dtype": str(llava.lm_head.weight.dtype).removeprefix("torch."),
    }


def run_settings(args, llava):
    """The settings that `output.Output` stores with each record. Folders are identified by name and contents,
    not by path."""
    return {
        **model_settings(args, llava),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        **preset.recorded(args),
    }
