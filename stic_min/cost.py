"""What a run will cost, estimated from shapes: floating-point operations, memory, and time on an H200. The
defaults of --batch-size (generation), --micro-batch and --shard follow from the memory of the GPU."""

import math
from pathlib import Path

from stic_min import lora
from stic_min.checkpoint import folders
from stic_min.runtime import console
from stic_min.runtime.files import read_json
from stic_min.runtime.ranks import memory_per_gpu

# Measured on an H200 in bf16, with random weights of v1.6's true shapes (tests/method/test_cost.py): 375 to
# 410 TFLOP/s in a training step, and 460 to 475 in a prefill. A decoding step takes the time to read weights
# and cache once, and a constant.
TRAINING_FLOPS, PREFILL_FLOPS, DECODE_BANDWIDTH, STEP_SECONDS = 390e12, 465e12, 4.2e12, 2.0e-3
H200_MEMORY = 150e9  # bytes
ANSWER = 250  # typical length of LLaVA's descriptions in tokens

# Where these two defaults end: on an H200, more brings little. On a CPU, they are 8 and 1.
MOST_ROWS, MOST_SAMPLES = 64, 8
USABLE = 0.9  # share of the memory that estimates may fill
WORKSPACE = 2e9  # bytes for a prefill, and for the copies that fused.py makes


def decoder_flops(config, spans, scored, r, reference):
    """Floating-point operations that a training step can't do without, in the decoder; nothing is counted
    twice.

    spans: [(tokens, tokens of the prefix they attend to)]; scored: tokens with logits; r: the LoRA rank.
    Forward and backward of theta, whose base weights need no gradient; and as many forwards without gradient
    as `reference` says, 1 (or True) for that of theta_0.
    """
    C, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    linears = [(C, q_width), (C, kv_width), (C, kv_width), (q_width, C), (C, F), (C, F), (F, C)]  # (in, out)
    tokens = sum(n for n, _ in spans)
    attended = sum(n * (prefix + (n + 1) / 2) for n, prefix in spans)  # pairs of query and key
    # A product of (n, i) by (i, o) takes 2 n i o operations. Attention has two: scores, and weighted values.
    base = 2 * tokens * L * sum(i * o for i, o in linears) + 2 * scored * C * config.vocab_size
    attention = 4 * attended * q_width * L
    lora_flops = 2 * tokens * L * r * sum(i + o for i, o in linears)
    forward = base + attention + lora_flops
    # Backward: one more product per linear for its input's gradient, two per LoRA matrix, four for attention.
    backward = base + 2 * attention + 2 * lora_flops
    return forward + backward + reference * (base + attention)


def activation_bytes(config, r, size, dropout=0.0):
    """Bytes per token that all layers keep for the backward pass, temporary ones of that pass included."""
    C, F = config.hidden_size, config.intermediate_size
    kv_width = config.num_key_value_heads * config.head_dim
    layer = size * (4 * F + 8 * C + 2 * kv_width + len(lora.TARGETS) * r)
    if dropout:  # a dropped copy of each linear's input with a mask of one byte, instead of the inputs
        layer += (size + 1) * (6 * C + F) - size * (3 * C + F)
    return config.num_hidden_layers * layer


def number_size(args):
    """Bytes per number. --check estimates for a GPU, where bfloat16 is the default."""
    return 4 if args.dtype == "float32" else 2


def count_parameters(llava):
    """Numbers of the base model, and of LoRA and whatever else is trained."""
    extra = [p.numel() for n, p in llava.named_parameters() if ".lora_" in n or p.requires_grad]
    return sum(p.numel() for p in llava.parameters()) - sum(extra), sum(extra)


def in_gb(memory):
    """{name: bytes} as text."""
    return ", ".join(f"{name} {value / 1e9:.3g}" for name, value in memory.items())


# ---------------------------------------------------------------- training


def training_memory(args, llava, adapter, samples, micro_batch, shards=1):
    """{part: bytes} per GPU. shards: number of GPUs among which FSDP splits the model."""
    config, size = llava.config.decoder, number_size(args)
    base, trained = count_parameters(llava)
    weights, state = base * size, trained * 16  # fp32 numbers, their gradients, and Adam's two moments
    if shards > 1:  # gathered at the same time: two blocks, and what is outside of the blocks
        blocks = sum(p.numel() for layer in llava.model.layers[2:] for p in layer.parameters())
        weights, state = weights / shards + (base + trained - blocks) * size, state / shards
    longest = sum(sorted((sample.length for sample in samples), reverse=True)[:micro_batch])
    scored = max((sample.scored for sample in samples), default=0) * micro_batch
    per_token = activation_bytes(config, adapter.r, size, adapter.dropout)
    if args.checkpoint_activations:  # every block's input, and the activations of one block at a time
        layers = config.num_hidden_layers
        per_token = per_token / layers + config.hidden_size * size * layers
    half_copy = trained * size if size < 4 else 0  # LoRA in bf16, for the products
    return {
        "weights": weights,
        "LoRA and projector with gradient and Adam": state,
        "activations": longest * per_token + half_copy,
        "logits": 3 * 4 * scored * config.vocab_size,
    }


def choose_training(args, llava, adapter, samples, world, memory):
    """(--micro-batch, --shard, why) where they are not given, for `memory` bytes per GPU (None: a CPU).

    Without sharding, if a micro-batch fits. Then as many samples as fit, in micro-batches of equal size.
    """
    if memory is None:
        return args.micro_batch or 1, args.shard or "full", ""
    limit = USABLE * memory

    def parts(micro_batch, shard):
        shards = world if shard == "full" else 1
        return training_memory(args, llava, adapter, samples, micro_batch, shards)

    def fits(micro_batch, shard):
        return sum(parts(micro_batch, shard).values()) <= limit

    shard = args.shard or ("none" if world == 1 or fits(args.micro_batch or 1, "none") else "full")
    micro_batch = args.micro_batch
    if not micro_batch:
        share = math.ceil(min(args.batch_size, max(1, len(samples))) / world)
        largest = max((n for n in range(1, min(share, MOST_SAMPLES) + 1) if fits(n, shard)), default=1)
        micro_batch = math.ceil(share / math.ceil(share / largest))
    chosen = parts(micro_batch, shard)
    total = f"about {sum(chosen.values()) / 1e9:.3g} of {memory / 1e9:.3g} GB per GPU"
    sharding = f" --shard {shard}" if world > 1 else ""
    why = f"--micro-batch {micro_batch}{sharding}: {total} ({in_gb(chosen)})"
    if not fits(micro_batch, shard) and not args.checkpoint_activations:
        why += "; if memory runs out, add --checkpoint-activations"
    return micro_batch, shard, why


def saved_micro_batch(out):
    """--micro-batch of the run in this folder, if there is a checkpoint and the result depends on it."""
    size = read_json(folders(out)[-1] / "run.json").get("micro_batch") if folders(out) else None
    return size if isinstance(size, int) and size > 0 else None


def fit_training(args, llava, adapter, samples, ranks):
    """Sets --micro-batch and --shard where they are not given, equal on all ranks, and prints why."""
    given = args.micro_batch and args.shard
    if args.lora_dropout and not args.micro_batch:
        args.micro_batch = saved_micro_batch(Path(args.out))
        if args.micro_batch:
            ranks.print(f"--micro-batch {args.micro_batch}, as before: dropout masks depend on it")
    memory = memory_per_gpu(args, ranks, assumed=H200_MEMORY)
    chosen = choose_training(args, llava, adapter, samples, ranks.world, memory)
    args.micro_batch, args.shard, why = chosen
    if why and not given:
        ranks.print(why)


def training_cost(args, llava, adapter, samples, reference):
    """Lines on memory and time."""
    memory = training_memory(args, llava, adapter, samples, args.micro_batch)
    flops = 0
    for sample in samples:
        branches = [len(branch) for branch in sample.branches]
        trunk = sample.length - sum(branches)  # image tokens included
        spans = [(trunk, 0), *((branch, trunk) for branch in branches)]
        flops += decoder_flops(llava.config.decoder, spans, sample.scored, adapter.r, reference)
    flops *= args.epochs
    seconds = flops / TRAINING_FLOPS * (4 / 3 if args.checkpoint_activations else 1)
    steps = args.epochs * -(-len(samples) // args.batch_size)
    return [
        ("memory", f"about {sum(memory.values()) / 1e9:.3g} GB per GPU with --micro-batch {args.micro_batch} "
                   f"--shard none: {in_gb(memory)}; --shard full splits the first two over the GPUs"),
        ("time", f"{steps} steps, {flops / 1e15:.3g} PFLOP: about {console.clock(seconds)} on one H200 "
                 f"at the measured {TRAINING_FLOPS / 1e12:.0f} TFLOP/s"),
    ]  # fmt: skip


# ---------------------------------------------------------------- generation


def generation_memory(args, llava, rows, positions):
    """{part: bytes} of `rows` responses with so many positions each, the prompt included."""
    config, size = llava.config.decoder, number_size(args)
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values
    return {"weights": sum(count_parameters(llava)) * size, "KV cache": rows * positions * position * size}


def choose_rows(args, llava, memory):
    """(--batch-size where it is not given, why), for `memory` bytes on the GPU (None: a CPU)."""
    if memory is None:
        return 8, ""
    config = llava.config
    new_tokens = max(args.max_new_tokens, 1024)  # DaR's descriptions may be longer than its answers
    positions = min(config.max_length + new_tokens, config.decoder.max_positions)
    weights, row = generation_memory(args, llava, 1, positions).values()
    rows = int((USABLE * memory - WORKSPACE - weights) // row)
    rows = max(1, min(rows, MOST_ROWS))
    parts = f"weights {weights / 1e9:.3g}, KV cache of {rows} responses up to {rows * row / 1e9:.3g}"
    return rows, f"--batch-size {rows}: {parts}, of {memory / 1e9:.3g} GB per GPU"


def fit_generation(args, llava, ranks):
    """Sets --batch-size where it is not given, and prints why."""
    if args.batch_size is None:
        memory = memory_per_gpu(args, ranks, assumed=H200_MEMORY)
        args.batch_size, why = choose_rows(args, llava, memory)
        if why:
            ranks.print(why)


def prefill_seconds(llava, tokens):
    """Two operations per parameter and token."""
    return 2 * count_parameters(llava)[0] * tokens / PREFILL_FLOPS


def step_seconds(args, llava, rows, positions):
    """Of a decoding step."""
    return STEP_SECONDS + sum(generation_memory(args, llava, rows, positions).values()) / DECODE_BANDWIDTH


def generation_cost(args, llava, lengths, answer=ANSWER):
    """Lines on memory and time of responses of about `answer` tokens to prompts of these lengths."""
    rows, answer = min(args.batch_size, len(lengths)), min(answer, args.max_new_tokens)
    longest = min(max(lengths) + args.max_new_tokens, llava.config.decoder.max_positions)
    memory = generation_memory(args, llava, rows, longest)
    average = sum(lengths) / len(lengths) + answer / 2
    decoding = len(lengths) * answer / rows * step_seconds(args, llava, rows, average)
    seconds = prefill_seconds(llava, sum(lengths)) + decoding
    return [
        ("memory", f"about {sum(memory.values()) / 1e9:.3g} GB per GPU: {in_gb(memory)} for {rows} responses "
                   "(--batch-size)"),
        ("time", f"about {console.clock(seconds)} on one H200 for {len(lengths)} responses, assuming "
                 f"{answer} tokens each"),
    ]  # fmt: skip
