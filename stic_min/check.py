"""What is checked before a run, and what --check reports instead of one: it needs neither a GPU nor the weights in
memory, and fails where the run would."""

from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from stic_min import InputError, checkpoint, lora
from stic_min.batch import collate
from stic_min.data import each, load_tiles
from stic_min.images import open_image
from stic_min.loss import token_logps
from stic_min.runtime import consistency, console
from stic_min.runtime.files import brief, check_place, read_json

# Assumed for the estimates: 40 % of an H100's or H200's arithmetic, two thirds of an H200's memory bandwidth, and the
# length of LLaVA's descriptions in tokens.
GPU_FLOPS, GPU_BANDWIDTH, ANSWER = 400e12, 3.2e12, 250


def training_out(out):
    """Raises InputError, before anything is loaded, if `out` holds a finished run or can hold none."""
    if (Path(out) / "adapter_config.json").exists():
        raise InputError(f"{out} holds a finished run; name another --out, or delete it")
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"--out {out} is a file, it has to name a folder")
    check_place(out)


def file_out(out):
    """Raises InputError, before anything is loaded, if nothing can be written to the file `out`."""
    if Path(out).is_dir():
        raise InputError(f"--out {out} is a folder, it has to name a file")
    check_place(out)


def pictures(items, ranks, problems=None):
    """Decodes every picture once, shared out over the ranks: better now than in hour three. Raises InputError for the
    first that can't be read, or adds all of them to `problems`."""
    own = sorted({item.image for item in items})[ranks.rank :: ranks.world]
    progress, broken = console.Progress("checking pictures", len(own), ranks), []
    for path in own:
        try:
            open_image(path)
        except InputError as error:
            broken.append(str(error))
        progress.add()
    found = [broken]
    if ranks.world > 1:
        found = [None] * ranks.world
        dist.all_gather_object(found, broken)
    found = [problem for own in found for problem in own]
    if problems is not None:
        problems += found
    elif found:
        raise InputError(found[0])


@torch.no_grad()
def picture_matters(llava, item):
    """A model trained without its pictures learns nothing from them: log p has to differ from that with a blank one.

    Every rank has to call it. Raises InputError if it does not differ.
    """
    tiles = load_tiles(item, llava)
    logps = []
    for blank in (False, True):
        for t in tiles if blank else []:
            t.pixels = torch.zeros_like(t.pixels)  # CLIP's mean colour
        batch = collate([item.example], [tiles], llava.config, llava.device)
        logps.append(token_logps(llava(batch), batch.labels))
    if torch.equal(*logps):
        raise InputError(f"{item.example.name}: log p is the same with a blank picture, so {item.image} has no effect")


# ---------------------------------------------------------------- estimates


def decoder_flops(config, spans, scored, r, reference):
    """Floating point operations that a training step can't do without, in the decoder: forward and gradients of
    activations, LoRA of rank r on all linears, causal attention, logits of `scored` tokens; with `reference`, a forward
    without LoRA. spans: [(tokens, tokens of the prefix that they see)]. Nothing is computed twice."""
    C, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, shared = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    linears = [(C, heads), (C, shared), (C, shared), (heads, C), (C, F), (C, F), (F, C)]
    tokens, seen = sum(n for n, _ in spans), sum(n * (prefix + (n + 1) / 2) for n, prefix in spans)
    base = 2 * tokens * L * sum(i * o for i, o in linears) + 2 * scored * C * config.vocab_size
    attention, lora = 4 * seen * heads * L, 2 * tokens * L * r * sum(i + o for i, o in linears)
    # A linear's backward needs its input's gradient, LoRA's also its weights'; attention's gradients are four products.
    return (2 if reference else 1) * (base + attention) + lora + base + 2 * attention + 2 * lora


def activations(config, r, size):
    """Bytes that one token leaves in all layers for the backward; measured on a block of true size (README.md)."""
    C, F, shared = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    return size * config.num_hidden_layers * (4 * F + 9 * C + 2 * shared + len(lora.TARGETS) * r)


def weights(llava):
    """Numbers in the base model, and in what is trained or was loaded with an adapter."""
    extra = [p.numel() for n, p in llava.named_parameters() if ".lora_" in n or p.requires_grad]
    return sum(p.numel() for p in llava.parameters()) - sum(extra), sum(extra)


def percentiles(values):
    ordered = sorted(values)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]
    return f"{at(0)} to {at(1)}; half up to {at(0.5)}, 90 % up to {at(0.9)}, 99 % up to {at(0.99)}"


# ---------------------------------------------------------------- reports


def names(found, most=5):
    return ", ".join(map(str, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")


def repeated(found):
    """Those that come more than once, in the order of their first coming."""
    return [name for name, count in Counter(map(str, found)).items() if count > 1]


def end(lines, problems):
    """Prints the report. Raises InputError if the run would fail."""
    for name, text in lines:
        print(f"  {name:<12} {text}")
    for problem in problems[:100]:
        print(f"  problem      {problem}")
    if problems:
        more = ", the first 100 of them above" if len(problems) > 100 else ""
        raise InputError(f"the run would fail, for {len(problems)} reason{'s' * (len(problems) > 1)}{more}")
    print("nothing stands in the way of this run")


def training(args, llava, adapter, items, settings, problems, ranks, reference):
    """The report on a stage: what is read, how long it is, what is cut, what it takes."""
    if not ranks.first:
        return
    if found := checkpoint.folders(Path(args.out)):
        if not args.dtype:  # a GPU's default is another than this machine's
            settings["dtype"] = read_json(found[-1] / "run.json").get("dtype")
        each(lambda out: checkpoint.newest(out, settings, print), [Path(args.out)], problems)
    lines = [("samples", f"{len(items)} that can be trained on, {len({i.image for i in items})} pictures")]
    if again := repeated(item.image for item in items):
        lines.append(("repeated", f"{len(again)} pictures come more than once: {names(again)}"))
    if again := consistency.repeats(items):
        lines.append(("repeated", f"{again} samples repeat an earlier one"))
    if equal := [item.example.name for item in items if not item.differs]:
        lines.append(("equal", f"{len(equal)} pairs, no preference to learn from: {names(equal)}"))
    if items:
        cut = [item.example.name for item in items if item.cut]
        lines.append(("tokens", f"a sample: {percentiles([item.length for item in items])}"))
        lines.append(("scored", f"of them: {percentiles([item.scored for item in items])}"))
        lines.append(("cut", f"{len(cut)} to {settings['max_length']} tokens{': ' * bool(cut)}{names(cut)}"))
        lines += training_cost(args, llava, adapter, items, reference)
    end(lines, problems)


def training_cost(args, llava, adapter, items, reference):
    config, size = llava.config.decoder, 4 if args.dtype == "float32" else 2
    base, trained = weights(llava)
    longest = sum(sorted((item.length for item in items), reverse=True)[: args.micro_batch])
    scored = max(item.scored for item in items) * args.micro_batch
    kept = config.hidden_size * size * config.num_hidden_layers if args.checkpoint_activations else 0
    memory = {
        "weights": base * size,
        "LoRA and projector with gradient and Adam": trained * 16,
        "activations": longest * (kept or activations(config, adapter.r, size)) + trained * (size if size < 4 else 0),
        "logits": 3 * 4 * scored * config.vocab_size,
    }
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in memory.items())
    flops = 0
    for item in items:
        branches = [len(branch) for branch in item.example.branches]
        trunk = item.length - sum(branches)  # with its picture
        spans = [(trunk, 0), *((branch, trunk) for branch in branches)]
        flops += decoder_flops(config, spans, item.scored, adapter.r, reference)
    again = 4 / 3 if args.checkpoint_activations else 1
    steps = -(-len(items) // args.batch_size)
    return [
        ("memory", f"about {sum(memory.values()) / 1e9:.3g} GB a GPU with --shard none: {parts}; full shares out the "
                   "first two over the GPUs"),
        ("time", f"{steps} steps, {flops / 1e15:.3g} PFLOP: about {console.clock(again * flops / GPU_FLOPS)} on one "
                 f"GPU that does {GPU_FLOPS / 1e12:.0f} TFLOP/s (an H100 or H200 at 40 %)"),
    ]  # fmt: skip


def generation(args, llava, what, made, left, skipped, asked, problems):
    """The report on generation. made: {key: [tokens of a prompt with its picture, ...]}; skipped: what is wrong with
    the others; asked: all names as they were given; left: how many are not yet in --out."""
    lines = [(what, f"{len(made) + len(skipped)}, {left} of them not yet in {args.out}")]
    lines += [("skipped", f"{len(skipped)}, each with a warning")] if skipped else []
    if again := [brief(name) for name in repeated(asked)]:
        lines.append(("repeated", f"{len(again)} names come more than once and are made once: {names(again)}"))
    lines += [("  skipped", problem) for problem in skipped[:100]]
    if made:
        lengths = [length for rows in made.values() for length in rows]
        lines.append(("tokens", f"a prompt with its picture: {percentiles(lengths)}"))
        lines += generation_cost(args, llava, lengths)
    end(lines, problems if made else [*problems, f"no {what}: every picture would be skipped"])


def generation_cost(args, llava, lengths, answer=ANSWER):
    """Lines on the memory and time of answers to prompts of these lengths, each of about `answer` tokens."""
    config, size = llava.config.decoder, 4 if args.dtype == "float32" else 2
    base, extra = weights(llava)
    position = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    slots, answer = min(args.batch_size, len(lengths)), min(answer, args.max_new_tokens)
    cache = slots * position * min(max(lengths) + args.max_new_tokens, config.max_positions)
    held = (base + extra) * size
    read = held + slots * position * (sum(lengths) / len(lengths) + answer / 2)
    steps = len(lengths) * answer / slots
    seconds = 2 * base * sum(lengths) / GPU_FLOPS + steps * max(read / GPU_BANDWIDTH, 2 * base * slots / GPU_FLOPS)
    return [
        ("memory", f"about {(held + cache) / 1e9:.3g} GB a GPU: weights {held / 1e9:.3g}, cache of {slots} rows "
                   f"(--batch-size) {cache / 1e9:.3g}"),
        ("time", f"{len(lengths)} answers of {answer} tokens, say: about {console.clock(seconds)} on one H200"),
    ]  # fmt: skip
