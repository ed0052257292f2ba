"""Sampling responses from p_theta: temperature, top-k, then top-p. `sample_naively` is the definition.

`stream` computes the same, fast, in the fixed number of slots of a KV cache (see slots.py). Consecutive
requests with the same images share one prefill of everything that precedes their texts. Then all slots
advance together, one token per step, and a slot whose response has ended takes the next request. Each request
has its own random generator, so that its sample does not depend on the other requests (except through
rounding: in bf16 a near-tie can flip).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stic_min import InputError
from stic_min.slots import SlotDecoder, random_numbers
from stic_min.text import IMAGE


@dataclass
class Sample:
    ids: list[int] = field(default_factory=list)  # with the end token, if it was generated
    logps: list[float] = field(default_factory=list)  # log p_theta of each id, unfiltered, as the loss has it
    finish: str = "length"  # or "stop"


# ---------------------------------------------------------------- one token


def filtered_probs(
    logits: Tensor, temperature: float, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """logits (B, V) -> probabilities (B, V) after temperature, then top-k, then nucleus filtering.

    top_k keeps the k most probable tokens and any that tie with the k-th, as transformers does. top_p keeps
    the fewest most probable tokens whose probabilities sum to at least top_p, and always one.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:  # PAPER vs RELEASED (Q): no top-k; the release has 50
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        values, order = probs.sort(dim=-1, descending=True)
        before = values.cumsum(dim=-1) - values  # the total probability of the more probable tokens
        values = values.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, values)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def pick(logits: Tensor, temperature: float, top_p: float | None, uniform: Tensor, top_k=None) -> Tensor:
    """logits (B, V) and random numbers in [0, 1) (B,) -> ids (B,), by inverting the cumulative distribution.

    Rows whose number is negative are greedy, as all are if the temperature is 0.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = filtered_probs(logits, temperature, top_p, top_k).double().cumsum(dim=-1)  # (B, V)
    target = uniform[:, None] * cumulative[:, -1:]  # the last is not exactly 1
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    ids = ids.clamp_max(logits.shape[-1] - 1)  # rounding, or NaN, may lead one past the last
    return torch.where(uniform < 0, logits.argmax(dim=-1), ids)


@torch.no_grad()
def sample_naively(
    llava, prompt, images, seed, *, max_new_tokens, temperature=0.0, top_p=None, top_k=None
) -> Sample:
    """One response without a cache, recomputing the whole sequence for each token; the tests' reference."""
    prompt_ids = llava.prompt_ids(prompt, images)
    tiles = [llava.tiles(image) for image in images]
    sample = Sample()
    for uniform in random_numbers(seed, max_new_tokens).to(llava.device).split(1):
        batch = llava.single_batch(prompt_ids + sample.ids, [], tiles)
        batch.scored = torch.tensor([[len(batch.ids) - 1]], device=llava.device)
        logits = llava(batch)[0]  # (1, V)
        token = pick(logits, temperature, top_p, uniform, top_k).item()
        sample.ids.append(token)
        sample.logps.append(logits.log_softmax(dim=-1)[0, token].item())
        if token == llava.tokenizer.eos:
            sample.finish = "stop"
            break
    return sample


# ---------------------------------------------------------------- requests


@dataclass
class Request:
    """One response to sample, as the sampler takes it: token ids and tiles."""

    key: object  # the caller's own
    ids: list[int]  # of the prompt, with one IMAGE per image
    tiles: list  # images.Tiles of these images
    seed: int | None  # None: greedy, whatever the temperature

    def shared_length(self) -> int:
        """Number of leading ids that other prompts may share: up to the last image, if text follows it."""
        if self.ids[-1] == IMAGE:
            return 0
        return max((i + 1 for i, token in enumerate(self.ids) if token == IMAGE), default=0)


def groups(requests: Iterable[Request], max_size: int) -> Iterator[list[Request]]:
    """Lists of consecutive requests that share their images (the same objects) and the ids up to the last."""
    group, prefix = [], None
    for request in requests:
        length = request.shared_length()
        request_prefix = request.ids[:length], [id(tiles) for tiles in request.tiles]
        if group and (length == 0 or request_prefix != prefix or len(group) == max_size):
            yield group
            group = []
        group.append(request)
        prefix = request_prefix
    if group:
        yield group


# ---------------------------------------------------------------- streaming


@dataclass
class ActiveRequest:
    """A request in its slot, and what has been sampled for it."""

    key: object
    length: int  # tokens in the slot so far, the prompt included
    limit: int  # most tokens to sample
    sample: Sample = field(default_factory=Sample)

    def collect(self, ids, logps, end_token) -> bool:
        """Appends the tokens of one `advance`, up to where the response ends -> whether it does."""
        self.length += len(ids)
        ids = ids[: self.limit - len(self.sample.ids)]
        if end_token in ids:
            ids = ids[: ids.index(end_token) + 1]
            self.sample.finish = "stop"
        self.sample.ids += ids
        self.sample.logps += logps[: len(ids)]
        return self.sample.finish == "stop" or len(self.sample.ids) == self.limit


@torch.no_grad()
def stream(
    llava,
    requests: Iterable[Request],
    *,
    slots: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Iterator[tuple[object, Sample]]:
    """Samples a response to each request, `slots` at a time; yields (key, Sample) as each one ends.

    `requests` is read as slots become free. temperature 0 is greedy. A response ends with the end token
    (finish "stop"), or after max_new_tokens or at the model's last position (finish "length").
    """
    max_positions = llava.config.decoder.max_positions
    choose = lambda logits, uniform: pick(logits, temperature, top_p, uniform, top_k)
    decoder = SlotDecoder(llava, slots, min(max_new_tokens, max_positions), choose)
    active: list[ActiveRequest | None] = [None] * slots  # the one in each slot
    # A group is admitted only when every member has a free slot. Groups are kept small so that slots do not
    # sit idle waiting.
    waiting = groups(requests, min(slots, max(2, slots // 4)))
    group = next(waiting, None)
    while group or any(active):
        free = [slot for slot in range(slots) if active[slot] is None]
        while group and len(group) <= len(free):
            admitted, requests, tokens = [], [], 0  # groups, their members, and the length of their prefill
            while group and len(requests) + len(group) <= len(free) and tokens < decoder.prefilled:
                admitted.append(group)
                requests += group
                tokens += decoder.num_tokens(group)
                group = next(waiting, None)
            taken, free = free[: len(requests)], free[len(requests) :]
            for slot, request, length in zip(taken, requests, decoder.admit(admitted, taken)):
                limit = max(0, min(max_new_tokens, max_positions - length))
                active[slot] = ActiveRequest(request.key, length, limit)

        longest = max(request.length for request in active if request)
        ids, logps = decoder.advance(longest)  # (B, steps)

        for slot, request in enumerate(active):
            if request is None:
                continue
            ended = request.collect(ids[slot], logps[slot], llava.tokenizer.eos)
            # The decoder returns NaN as log p if any logit is NaN or infinite.
            if math.isnan(sum(request.sample.logps[-len(ids[slot]) :])):
                raise InputError(not_finite(request.key, llava.lm_head.weight.dtype))
            if ended:
                active[slot] = None
                yield request.key, request.sample


def not_finite(key, dtype):
    """The message for logits that overflow or hold NaN. A pair's key is (image, which of its responses)."""
    name = key[0] if isinstance(key, tuple) else key
    dtype = str(dtype).removeprefix("torch.")
    cause = "try --dtype bfloat16" if dtype == "float16" else "the checkpoint or the adapter may be damaged"
    return f"{name}: the model's logits in {dtype} are NaN or infinite; {cause}"


def sample(
    llava,
    prompts: list[str],
    images: list[list],
    seeds: list[int | None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> list[Sample]:
    """Samples one response to each prompt, all at the same time; images[i] are the PIL images of prompts[i].
    Those without a seed are greedy.

    Otherwise as `stream`. Raises InputError if a prompt is too long or disagrees with its images in number.
    """
    if not len(prompts) == len(images) == len(seeds):
        raise InputError(f"{len(prompts)} prompts, {len(images)} lists of images, {len(seeds)} seeds")
    if not prompts:
        return []
    tiles = {id(image): llava.tiles(image) for row in images for image in row}  # each image object once
    requests = []
    for i, (prompt, row, seed) in enumerate(zip(prompts, images, seeds)):
        requests.append(Request(i, llava.prompt_ids(prompt, row), [tiles[id(image)] for image in row], seed))
    samples = dict(stream(llava, requests, slots=len(prompts), max_new_tokens=max_new_tokens,
                          temperature=temperature, top_p=top_p, top_k=top_k))  # fmt: skip
    return [samples[i] for i in range(len(prompts))]
