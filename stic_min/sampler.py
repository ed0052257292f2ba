"""KV-cached batched sampling.

Requests stream through the slots of a static cache. Those that follow each other with the same pictures share one
prefill of all that stands in front of their texts, without padding; then all slots take one token a step, and a slot
whose row has ended takes the next request. A row draws from a generator of its own, so its sample does not depend on
the rows beside it (beyond rounding, which in bf16 can tip a close call). Sampling from p_theta alone: temperature,
then top-p; no top-k.
"""

import math
from dataclasses import dataclass

import torch

from stic_min import InputError
from stic_min.cache import Decode, KVCache, Prefill
from stic_min.text import IMAGE


@dataclass
class Sample:
    ids: list  # generated ids, the end token included where it ended by it
    logps: list  # log p_theta of each id (temperature 1, nothing filtered): what the loss would score
    finish: str  # stop or length


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


def fp32_logits(llava, x):
    """Hidden states (B, C) -> logits (B, V) float32: on a GPU straight from the product's fp32 accumulator, as bf16
    rounds logits near 20 to eighths."""
    if x.is_cuda and torch.version.cuda and x.dtype != torch.float32:
        return torch.mm(x, llava.lm_head.weight.t(), out_dtype=torch.float32)
    return llava.lm_head(x).float()


@dataclass
class Request:
    """One response to sample. `tiles` are the pictures (images.Tiles) of its <image> marks, `key` the caller's own."""

    key: object
    ids: list  # the prompt's, with one IMAGE a picture
    tiles: list
    seed: int

    def shared(self):
        """How many leading ids other texts on the same pictures may share: up to the last picture, if text follows."""
        if self.ids[-1] == IMAGE:
            return 0
        return max((i + 1 for i, id in enumerate(self.ids) if id == IMAGE), default=0)


def groups(requests, most):
    """Lists of up to `most` requests in a row that share their pictures and all in front of their texts."""
    group, prefix = [], None
    for request in requests:
        shared = request.shared()
        own = request.ids[:shared], [id(tiles) for tiles in request.tiles]
        if group and (not shared or own != prefix or len(group) == most):
            yield group
            group = []
        group.append(request)
        prefix = own
    if group:
        yield group


# ---------------------------------------------------------------- a step, fast

STRIDES = {"cpu": 1}  # steps between two looks at what was drawn; 8 on other devices
WIDTHS = {"cpu": 8}  # attention runs over a multiple of this many positions; of 256 on other devices, one graph each
GRAPHED = {"cuda"}


class Graphs:
    """`step(longest)` as a CUDA graph, one for each `longest`: the host takes longer to launch the thousand kernels of
    a step than the GPU to run them. `step` may change nothing but the same tensors, in place; `clear` when it has
    others. What it computes is all in `step`, which the CPU runs as it is."""

    def __init__(self, step):
        self.step, self.graphs, self.pool = step, {}, None

    def __call__(self, longest):
        if longest not in self.graphs:
            self.step(longest)  # the first time as it is: what libraries set up on their first use can't be captured
            self.graphs[longest] = None
            return
        if self.graphs[longest] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # records, without running it
                self.step(longest)
            self.graphs[longest], self.pool = graph, graph.pool()  # all take their scratch from the same memory
        self.graphs[longest].replay()

    def clear(self):
        self.graphs, self.pool = {}, None


# ---------------------------------------------------------------- streaming


@torch.no_grad()
def stream(llava, requests, *, slots, max_new_tokens, temperature=0.0, top_p=None):
    """Samples a response to each request, `slots` at a time -> yields (key, Sample) as they end.

    `requests` is read as slots become free. temperature 0 is greedy. A row ends with the end token (finish "stop"), or
    after max_new_tokens or at the model's last position ("length").
    """
    config, device = llava.config.decoder, llava.device
    max_new_tokens = min(max_new_tokens, config.max_positions)
    drawn = max(1, max_new_tokens)
    cache = KVCache(config, slots, device, llava.lm_head.weight.dtype)
    logits = torch.zeros(slots, config.vocab_size, device=device)
    positions = torch.zeros(slots, dtype=torch.int64, device=device)  # where the next token goes
    draws = torch.zeros(slots, drawn, dtype=torch.float64, device=device)
    steps = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens drawn so far
    ids, logps = torch.zeros_like(steps), torch.zeros(slots, device=device)  # the tokens just drawn

    def step(longest):
        """Draws a token in each slot and computes what follows it; `longest` positions of the cache are looked at."""
        ids.copy_(pick(logits, temperature, top_p, draws.gather(1, steps[:, None])[:, 0]))  # (B,)
        # 0 * their sum is 0, or NaN where a logit is not finite: the host looks at these numbers alone.
        logps.copy_(logits.log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0] + 0 * logits.sum(-1))  # (B,)
        positions.clamp_(max=longest - 1)
        x = llava.model(llava.model.embed_tokens(ids), positions, Decode(cache, positions, longest))  # (B, C)
        logits.copy_(fp32_logits(llava, x))  # (B, V)
        positions.add_(1)
        steps.add_(1).clamp_(max=drawn - 1)

    graphs = Graphs(step)
    advance = graphs if device.type in GRAPHED else step
    stride, width = STRIDES.get(device.type, 8), WIDTHS.get(device.type, 256)
    rows, ends = [None] * slots, [0] * slots  # who is in a slot: (key, Sample, limit); where its text stands
    # A group starts when it has room as a whole: a small part of the slots, lest they stand empty till then.
    waiting = groups(requests, min(slots, max(2, slots // 4)))
    group = next(waiting, None)
    while group or any(rows):
        free, room = [slot for slot in range(slots) if rows[slot] is None], cache.length
        while group and len(free) >= len(group):
            own, free = free[: len(group)], free[len(group) :]
            lengths = prefill(llava, group, cache, own, logits, max_new_tokens)
            for slot, request, length in zip(own, group, lengths):
                generator = torch.Generator().manual_seed(request.seed)
                draws[slot] = torch.rand(drawn, dtype=torch.float64, generator=generator)
                positions[slot], steps[slot], ends[slot] = length, 0, length
                limit = max(0, min(max_new_tokens, config.max_positions - length))
                rows[slot] = request.key, Sample([], [], "length"), limit
            group = next(waiting, None)
        if cache.length != room:
            graphs.clear()  # the cache has moved

        # A few steps without looking at what was drawn, so that a GPU never waits for the host. A row that ends among
        # them draws on, into a slot that no one reads any more.
        longest = max(end for end, row in zip(ends, rows) if row) + stride
        longest = min(-(-longest // width) * width, cache.length)
        said, scored = [], []
        for _ in range(stride):
            advance(longest)
            said.append(ids.clone())
            scored.append(logps.clone())
        said, scored = torch.stack(said, 1).tolist(), torch.stack(scored, 1).tolist()  # (B, stride)
        for slot, row in enumerate(rows):
            if row is None:
                continue
            ends[slot] += stride
            key, sample, limit = row
            own = said[slot][: limit - len(sample.ids)]
            if llava.tokenizer.eos in own:
                own, sample.finish = own[: own.index(llava.tokenizer.eos) + 1], "stop"
            sample.ids += own
            sample.logps += scored[slot][: len(own)]
            if math.isnan(sum(sample.logps[-stride:])):
                raise InputError(not_finite(key, llava.lm_head.weight.dtype))
            if sample.finish == "stop" or len(sample.ids) == limit:
                rows[slot] = None
                yield key, sample


def not_finite(key, dtype):
    """What to say when the model's logits overflow or hold NaN. A pair's key is (image, which of its two)."""
    name, dtype = key[0] if isinstance(key, tuple) else key, str(dtype).removeprefix("torch.")
    cause = "try --dtype bfloat16" if dtype == "float16" else "the checkpoint or the adapter may be damaged"
    return f"{name}: the model's logits in {dtype} are NaN or infinite; {cause}"


def prefill(llava, group, cache, slots, logits, max_new_tokens):
    """Writes the group's prompts to the cache and what follows each to `logits[slots]` (B, V) -> their lengths."""
    shared = group[0].shared() if len(group) > 1 else 0
    first = group[0].ids[:shared] if shared else group[0].ids
    branches = [request.ids[shared:] for request in group] if shared else []
    batch = llava.single_batch(first, branches, group[0].tiles)
    spans = batch.attend.spans[1:] or batch.attend.spans
    last = [span.end - 1 for span in spans]
    lengths = [span.prefix[1] - span.prefix[0] + span.end - span.start for span in spans]
    cache.reserve(min(max(lengths) + max_new_tokens, llava.config.decoder.max_positions))
    batch.scored = torch.tensor([last], device=llava.device)
    x = llava.hidden_states(batch, attend=Prefill(batch.attend.spans, cache, slots))[0]  # (B, C)
    logits[slots] = fp32_logits(llava, x)
    return lengths


def sample(llava, prompts, images, seeds, *, max_new_tokens, temperature=0.0, top_p=None):
    """Samples one response to each prompt, together -> list[Sample].

    images[i] are the PIL pictures of prompts[i], seeds[i] its integer seed. As `stream`. Raises InputError for a prompt
    that is too long, or whose <image> marks and pictures disagree.
    """
    if not len(prompts) == len(images) == len(seeds):
        raise InputError(f"{len(prompts)} prompts, {len(images)} lists of pictures, {len(seeds)} seeds")
    if not prompts:
        return []
    tiles = {id(picture): llava.tiles(picture) for pictures in images for picture in pictures}
    requests = []
    for i, (prompt, pictures, seed) in enumerate(zip(prompts, images, seeds)):
        requests.append(Request(i, llava.prompt_ids(prompt, pictures), [tiles[id(p)] for p in pictures], seed))
    how = {"slots": len(prompts), "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    samples = dict(stream(llava, requests, **how))
    return [samples[i] for i in range(len(prompts))]
