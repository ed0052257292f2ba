"""KV-cached batched sampling.

Each prompt is prefilled alone, without padding, into its slot of a static cache; then all rows take one token a
step. A row draws from a generator of its own, so its sample does not depend on the batch it sat in (beyond rounding,
which in bf16 can tip a close call). Sampling from p_theta alone: temperature, then top-p; no top-k.
"""

import hashlib
from dataclasses import dataclass

import torch

from stic_min import InputError
from stic_min.mistral import Decode, KVCache, Prefill


@dataclass
class Sample:
    ids: list  # generated ids, the end token included where it ended by it
    logps: list  # log p_theta of each id (temperature 1, nothing filtered): what the loss would score
    finish: str  # stop or length


def row_seed(*parts):
    """A 63-bit seed hashed from (seed, image name, role) or the like."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def filtered_probs(logits, temperature, top_p=None):
    """logits (B, V) -> probabilities (B, V) after temperature, then nucleus filtering.

    top_p keeps the fewest most probable tokens whose probabilities reach it, always at least one.
    """
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        values, order = probs.sort(dim=-1, descending=True)
        before = values.cumsum(dim=-1) - values  # what the more probable ones already hold
        values = values.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, values)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def pick(logits, temperature, top_p, uniform):
    """logits (B, V) and one uniform number a row (B,) -> ids (B,), by the inverse of the distribution function."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    steps = filtered_probs(logits, temperature, top_p).double().cumsum(dim=-1)  # (B, V)
    target = uniform[:, None] * steps[:, -1:]
    return torch.searchsorted(steps, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample(llava, prompts, images, seeds, *, max_new_tokens, temperature=0.0, top_p=None):
    """Samples one response to each prompt, together. Returns list[Sample].

    images[i] are the PIL pictures of prompts[i], seeds[i] its integer seed. temperature 0 is greedy. A row ends with
    the end token (finish "stop"), or after max_new_tokens or at the model's last position ("length"). Raises InputError
    for a prompt that is too long, or whose <image> marks and pictures disagree.
    """
    if not len(prompts) == len(images) == len(seeds):
        raise InputError(f"{len(prompts)} prompts, {len(images)} lists of pictures, {len(seeds)} seeds")
    if not prompts:
        return []
    config, device, rows = llava.config.decoder, llava.device, range(len(prompts))
    batches = [llava.batch(prompt, pictures) for prompt, pictures in zip(prompts, images)]
    lengths = [len(batch.ids) for batch in batches]
    limits = [min(max_new_tokens, config.max_positions - length) for length in lengths]
    size = max(length + limit for length, limit in zip(lengths, limits))
    cache = KVCache(config, len(prompts), size, device, llava.lm_head.weight.dtype)
    draws = torch.stack([
        torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds
    ])  # (B, max_new_tokens)
    draws = draws.to(device)

    last = []
    for slot, batch in enumerate(batches):
        batch.rows = torch.tensor([[lengths[slot] - 1]], device=device)
        last.append(llava(batch, attend=Prefill(cache, slot))[0])  # (1, V)
    logits = torch.cat(last)  # (B, V)

    positions = torch.tensor(lengths, device=device).clamp_max(size - 1)  # where the next token goes
    samples = [Sample([], [], "length") for _ in rows]
    done = [limit <= 0 for limit in limits]
    for step in range(max_new_tokens):
        if all(done):
            break
        ids = pick(logits, temperature, top_p, draws[:, step])  # (B,)
        logps = logits.log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]  # (B,)
        for row, i, logp in zip(rows, ids.tolist(), logps.tolist()):
            if done[row]:
                continue
            samples[row].ids.append(i)
            samples[row].logps.append(logp)
            if i == llava.tokenizer.eos:
                samples[row].finish = "stop"
            done[row] = i == llava.tokenizer.eos or step + 1 == limits[row]
        if not all(done):
            attend = Decode(cache, positions, longest=min(max(lengths) + step + 1, size))
            x = llava.model(llava.model.embed_tokens(ids), positions, attend)  # (B, C)
            logits = llava.lm_head(x).float()
            positions = (positions + 1).clamp_max(size - 1)  # rows that are done stay inside the cache
    return samples
