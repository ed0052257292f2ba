"""The sampler's KV cache, and the two ways in which the decoder attends to it."""


import torch
from torch.nn import functional as F

from stic_min.mistral import Packed


class KVCache:
    """Keys and values of B slots, S positions each; a static tensor a layer, longer only when a longer row comes."""

    chunk = 256  # grows by a multiple of this

    def __init__(self, config, slots, device, dtype):
        self.length, heads = 0, (config.num_key_value_heads, config.head_dim)
        empty = lambda: torch.zeros((slots, 0, *heads), device=device, dtype=dtype)  # (B, S, K, D)
        self.keys = [empty() for _ in range(config.num_hidden_layers)]
        self.values = [empty() for _ in range(config.num_hidden_layers)]

    def reserve(self, length):
        """Makes room for rows of `length` positions. Filled with zeros: a masked position weighs 0, and 0 times the NaN
        that empty memory may hold would be NaN."""
        if length > self.length:
            more = -(-length // self.chunk) * self.chunk - self.length
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = F.pad(tensor, (0, 0, 0, 0, 0, more))
            self.length += more


class Prefill(Packed):
    """Whole prompts, written into the cache. `spans` are a prefix and its branches, or a prompt alone; the i-th of
    `slots` takes the i-th branch, behind a copy of the prefix."""

    def __init__(self, spans, cache, slots):
        super().__init__(spans)
        self.cache, self.slots = cache, slots

    def __call__(self, layer, q, k, v):
        branches = self.spans[1:] or self.spans
        for slot, span in zip(self.slots, branches):
            for cached, new in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
                (a, b), end = span.prefix, span.end - span.start
                cached[slot, : b - a] = new[a:b]
                cached[slot, b - a : b - a + end] = new[span.start : span.end]
                cached[slot, b - a + end :] = 0  # what another row left; were it NaN, a mask would not hide it
        return super().__call__(layer, q, k, v)


class Decode:
    """One token a slot: the flat row holds token b of slot b, at position `positions[b]`."""

    def __init__(self, cache, positions, longest):
        self.cache, self.rows, self.positions = cache, torch.arange(len(positions), device=positions.device), positions
        unseen = torch.arange(longest, device=positions.device) > positions[:, None]  # (B, S)
        # As the kernels want it, once for all layers: added to the scores, in their dtype.
        mask = torch.zeros(unseen.shape, device=positions.device, dtype=cache.keys[0].dtype)
        self.mask = mask.masked_fill_(unseen, float("-inf"))[:, None, None]  # (B, 1, 1, S)

    def __call__(self, layer, q, k, v):
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, self.positions] = k
        values[self.rows, self.positions] = v
        longest = self.mask.shape[-1]
        keys, values = keys[:, :longest].transpose(1, 2), values[:, :longest].transpose(1, 2)  # (B, K, S, D)
        # The H / K query heads of a key head are its rows: no kernel with a mask has to expand the cache for them.
        q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H / K, D)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).flatten(1, 2)  # (B, H, D)
