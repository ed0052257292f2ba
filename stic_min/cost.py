"""What a run will cost, estimated for --check: floating-point operations, memory, and time on a typical
GPU."""

from stic_min import lora
from stic_min.runtime import console

# Assumptions of the estimates: 40% of an H100's or H200's peak arithmetic, two thirds of an H200's memory
# bandwidth, and the typical length of LLaVA's descriptions in tokens.
GPU_FLOPS, GPU_BANDWIDTH, ANSWER = 400e12, 3.2e12, 250


def decoder_flops(config, spans, scored, r, reference):
    """Floating-point operations that a training step can't do without, in the decoder; nothing is counted
    twice.

    spans: [(tokens, tokens of the prefix they attend to)]; scored: tokens with logits; r: the LoRA rank.
    Forward and backward of theta, whose base weights need no gradient; with `reference`, also a forward of
    theta_0.
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
    return forward + backward + (base + attention if reference else 0)


def activation_bytes(config, r, size):
    """Bytes per token that all layers keep for the backward pass; measured on a block of true size
    (RUNNING.md)."""
    C, F = config.hidden_size, config.intermediate_size
    kv_width = config.num_key_value_heads * config.head_dim
    return size * config.num_hidden_layers * (4 * F + 9 * C + 2 * kv_width + len(lora.TARGETS) * r)


def count_parameters(llava):
    """Numbers of the base model, and of LoRA and whatever else is trained."""
    extra = [p.numel() for n, p in llava.named_parameters() if ".lora_" in n or p.requires_grad]
    return sum(p.numel() for p in llava.parameters()) - sum(extra), sum(extra)


def training_cost(args, llava, adapter, samples, reference):
    config = llava.config.decoder
    size = 4 if args.dtype == "float32" else 2  # bytes per number
    base, trained = count_parameters(llava)
    longest = sum(sorted((sample.length for sample in samples), reverse=True)[: args.micro_batch])
    scored = max(sample.scored for sample in samples) * args.micro_batch
    if args.checkpoint_activations:
        per_token = config.hidden_size * size * config.num_hidden_layers
    else:
        per_token = activation_bytes(config, adapter.r, size)
    half_copy = trained * size if size < 4 else 0  # LoRA in bf16, for the products
    memory = {
        "weights": base * size,
        "LoRA and projector with gradient and Adam": trained * 16,
        "activations": longest * per_token + half_copy,
        "logits": 3 * 4 * scored * config.vocab_size,
    }
    total = sum(memory.values()) / 1e9
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in memory.items())
    flops = 0
    for sample in samples:
        branches = [len(branch) for branch in sample.branches]
        trunk = sample.length - sum(branches)  # image tokens included
        spans = [(trunk, 0), *((branch, trunk) for branch in branches)]
        flops += decoder_flops(config, spans, sample.scored, adapter.r, reference)
    seconds = flops / GPU_FLOPS * (4 / 3 if args.checkpoint_activations else 1)
    steps = -(-len(samples) // args.batch_size)
    return [
        ("memory", f"about {total:.3g} GB per GPU with --shard none: {parts}; --shard full splits the first "
                   "two over the GPUs"),
        ("time", f"{steps} steps, {flops / 1e15:.3g} PFLOP: about {console.clock(seconds)} on one GPU "
                 f"at {GPU_FLOPS / 1e12:.0f} TFLOP/s (an H100 or H200 at 40%)"),
    ]  # fmt: skip


def generation_cost(args, llava, lengths, answer=ANSWER):
    """Lines on memory and time of responses of about `answer` tokens to prompts of these lengths."""
    config = llava.config.decoder
    size = 4 if args.dtype == "float32" else 2  # bytes per number
    base, extra = count_parameters(llava)
    kv_width = config.num_key_value_heads * config.head_dim
    position = 2 * size * config.num_hidden_layers * kv_width  # bytes in the cache, keys and values
    slots, answer = min(args.batch_size, len(lengths)), min(answer, args.max_new_tokens)
    cache = slots * position * min(max(lengths) + args.max_new_tokens, config.max_positions)
    weights = (base + extra) * size
    # A step reads the weights and the cache once; a prompt costs 2 operations per parameter and token.
    bytes_read = weights + slots * position * (sum(lengths) / len(lengths) + answer / 2)
    steps = len(lengths) * answer / slots
    step_seconds = max(bytes_read / GPU_BANDWIDTH, 2 * base * slots / GPU_FLOPS)
    seconds = 2 * base * sum(lengths) / GPU_FLOPS + steps * step_seconds
    return [
        ("memory", f"about {(weights + cache) / 1e9:.3g} GB per GPU: weights {weights / 1e9:.3g}, KV cache "
                   f"for {slots} responses (--batch-size) {cache / 1e9:.3g}"),
        ("time", f"about {console.clock(seconds)} on one H200 for {len(lengths)} responses, assuming "
                 f"{answer} tokens each"),
    ]  # fmt: skip
