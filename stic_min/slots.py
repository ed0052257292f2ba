"""Decoding in the slots of a KV cache, one token per slot and step: the part of the sampler on the device.

Shapes: B slots, C channels, V vocabulary.
"""

import torch
from torch import Tensor

from stic_min.batch import Example, collate
from stic_min.cache import Decode, KVCache, Prefill
from stic_min.runtime.work import to_device

# By device. 8 steps instead of 1 before the host looks at the sampled tokens: a GPU never waits for the host.
STRIDES = {"cpu": 1}
# Attention covers a multiple of 128 positions instead of 8: a GPU needs a graph for each number of positions.
WIDTHS = {"cpu": 8}
# Prompts are prefilled together up to this number of tokens, to keep a GPU busy; a CPU is with one.
PREFILLED = {"cpu": 1}
GRAPHED = {"cuda"}


def random_numbers(seed: int | None, count: int) -> Tensor:
    """`count` numbers in [0, 1): one per token, so that a sample depends on its own seed alone. Without a
    seed they are -1, for which sampler.pick is greedy."""
    if seed is None:
        return torch.full((count,), -1.0, dtype=torch.float64)
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fp32_logits(llava, x: Tensor) -> Tensor:
    """Hidden states (B, C) -> logits (B, V) float32.

    On a GPU they come unrounded from the product's fp32 accumulator: bf16 rounds logits near 20 to eighths.
    """
    if x.is_cuda and torch.version.cuda and x.dtype != torch.float32:
        return torch.mm(x, llava.lm_head.weight.t(), out_dtype=torch.float32)
    return llava.lm_head(x).float()


class Graphs:
    """Runs step(longest) as a CUDA graph, one for each `longest`.

    The host takes longer to launch the thousand kernels of a step than the GPU to run them. `step` must only
    update its tensors in place; call `clear` after reallocating any of them.
    """

    def __init__(self):
        self.clear()

    def run(self, step, longest: int):
        if longest not in self.graphs:
            step(longest)  # the first time without a graph: libraries initialize, which can't be captured
            self.graphs[longest] = None
            return
        if self.graphs[longest] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # records the kernels without running them
                step(longest)
            self.graphs[longest] = graph
            self.pool = graph.pool()  # all graphs use the same scratch memory
        self.graphs[longest].replay()

    def clear(self):
        self.graphs = {}
        self.pool = None


class SlotDecoder:
    """The KV cache of B slots, and everything that a decoding step reads or writes, on the model's device.

    choose(logits (B, V), uniform (B,)) -> ids (B,) samples from the logits with one random number per slot.
    """

    def __init__(self, llava, slots: int, max_new_tokens: int, choose):
        self.llava = llava
        self.choose = choose
        self.max_new_tokens = max_new_tokens
        config, device = llava.config.decoder, llava.device
        self.max_positions = config.max_positions
        self.cache = KVCache(config, slots, device, llava.lm_head.weight.dtype)
        self.logits = torch.zeros(slots, config.vocab_size, device=device)  # (B, V), for the next token
        self.positions = torch.zeros(slots, dtype=torch.int64, device=device)  # (B,), where that token goes
        # (B, max_new_tokens), one random number per token
        self.uniforms = torch.zeros(slots, max(1, max_new_tokens), dtype=torch.float64, device=device)
        self.steps = torch.zeros(slots, dtype=torch.int64, device=device)  # (B,), tokens sampled so far
        self.ids = torch.zeros(slots, dtype=torch.int64, device=device)  # (B,), the tokens just sampled
        self.logps = torch.zeros(slots, device=device)  # (B,), their log p_theta
        self.stride = STRIDES.get(device.type, 8)
        self.width = WIDTHS.get(device.type, 128)
        self.prefilled = PREFILLED.get(device.type, 8192)
        self.graphs = Graphs() if device.type in GRAPHED else None

    def step(self, longest: int):
        """Samples a token in each slot and computes the logits after it, attending to `longest` positions."""
        uniform = self.uniforms.gather(1, self.steps[:, None])[:, 0]  # (B,)
        self.ids.copy_(self.choose(self.logits, uniform))
        logps = self.logits.log_softmax(dim=-1).gather(-1, self.ids[:, None])[:, 0]  # (B,)
        # 0 * their sum is 0, or NaN if any logit is not finite: the host only looks at these numbers.
        self.logps.copy_(logps + 0 * self.logits.sum(-1))
        self.positions.clamp_(max=longest - 1)  # free slots run along, and may have passed it
        x = self.llava.model.embed_tokens(self.ids)  # (B, C)
        x = self.llava.model(x, self.positions, Decode(self.cache, self.positions, longest))
        self.logits.copy_(fp32_logits(self.llava, x))
        self.positions.add_(1)
        self.steps.add_(1).clamp_(max=self.uniforms.shape[1] - 1)

    def num_tokens(self, group) -> int:
        """Number of positions that a group's prefill takes in the flat row."""
        shared = group[0].shared_length() if len(group) > 1 else 0
        images = sum(self.llava.config.image_tokens(tiles.size) - 1 for tiles in group[0].tiles)
        return images + shared + sum(len(request.ids) - shared for request in group)

    def admit(self, groups, slots: list[int]) -> list[int]:
        """Starts the requests of some groups in these slots -> their prompts' lengths."""
        requests = [request for group in groups for request in group]
        lengths = self.prefill(groups, slots)
        uniforms = torch.stack([random_numbers(r.seed, self.uniforms.shape[1]) for r in requests])
        slots, positions = to_device(torch.tensor([slots, lengths]), self.llava.device)
        self.uniforms[slots] = to_device(uniforms, self.llava.device)
        self.positions[slots] = positions
        self.steps.index_fill_(0, slots, 0)  # an assignment of 0 would make the host wait
        return lengths

    def prefill(self, groups, slots: list[int]) -> list[int]:
        """Fills the cache and the logits of these slots with the prompts of the groups -> the prompts'
        lengths.

        The prefix that a group shares is computed once (see batch.Batch) and copied into each slot.
        """
        examples, tiles = [], []
        for group in groups:
            prefix, texts = group[0].ids, []
            if len(group) > 1:
                shared = group[0].shared_length()
                prefix, texts = group[0].ids[:shared], [request.ids[shared:] for request in group]
            examples.append(Example("prompt", [(prefix, False)], texts))
            tiles.append(group[0].tiles)
        batch = collate(examples, tiles, self.llava.config, self.llava.device)
        prompts = batch.attend.prompts()  # one per request
        lengths = [span.prefix[1] - span.prefix[0] + span.end - span.start for span in prompts]
        allocated = self.cache.length
        self.cache.reserve(min(max(lengths) + self.max_new_tokens, self.max_positions))
        if self.graphs and self.cache.length != allocated:
            self.graphs.clear()  # the cache has moved
        attend = Prefill(batch.attend.spans, self.cache, slots)
        ends = torch.tensor([[span.end - 1 for span in prompts], slots])
        batch.scored, slots = to_device(ends, self.llava.device)
        self.logits[slots] = fp32_logits(self.llava, self.llava.hidden_states(batch, attend))
        return lengths

    def advance(self, length: int) -> tuple[list[list[int]], list[list[float]]]:
        """`stride` steps in all slots, the fullest of which holds `length` tokens -> ids, logps: (B, stride).

        A response that ends before the last of these steps runs on; the caller ignores those tokens.
        """
        longest = -(-(length + self.stride) // self.width) * self.width  # rounded up
        longest = min(longest, self.cache.length)
        ids, logps = [], []
        for _ in range(self.stride):
            if self.graphs:
                self.graphs.run(self.step, longest)
            else:
                self.step(longest)
            ids.append(self.ids.clone())
            logps.append(self.logps.clone())
        return torch.stack(ids, 1).tolist(), torch.stack(logps, 1).tolist()  # here the host waits for the GPU
