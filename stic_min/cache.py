"""The sampler's KV cache, and the two ways in which the decoder (mistral.py) uses it.

`Prefill` runs complete prompts and stores their keys and values. `Decode` then runs one token per slot, which
attends to what its slot has stored. Both are passed to the decoder as its `attend` object.

Shapes: B slots of S positions, H query heads, K key/value heads of D channels, T tokens in the flat row.
"""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stic_min.mistral import Packed, Span, has_fused_attention
from stic_min.runtime.work import to_device


class KVCache:
    """Keys and values of B slots with S positions each: for each layer two static tensors (B, S, K, D).

    They are replaced only when a longer sequence arrives, because CUDA graphs refer to their memory.
    """

    chunk = 256  # S is a multiple of this

    def __init__(self, config, slots: int, device, dtype):
        self.length = 0  # S
        shape = (slots, 0, config.num_key_value_heads, config.head_dim)
        empty = lambda: torch.zeros(shape, device=device, dtype=dtype)
        self.keys = [empty() for _ in range(config.num_hidden_layers)]
        self.values = [empty() for _ in range(config.num_hidden_layers)]

    def reserve(self, length: int) -> None:
        """Makes room for sequences of `length` positions.

        New positions are zero: attention gives masked ones weight 0, but 0 times a NaN in empty memory would
        be NaN.
        """
        if length <= self.length:
            return
        extra = -(-length // self.chunk) * self.chunk - self.length  # rounded up to whole chunks
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = F.pad(tensor, (0, 0, 0, 0, 0, extra))  # pads S
        self.length += extra


class Prefill(Packed):
    """Complete prompts, attended to as in `Packed` and written into the cache.

    Each prompt is a span that is no other span's prefix; it goes to the next of `slots`. A prompt after a
    shared prefix takes a copy of it into its slot.
    """

    def __init__(self, spans: list[Span], cache: KVCache, slots: list[int]):
        super().__init__(spans)
        self.cache = cache
        tokens, slot_of, positions = [], [], []  # the flat row's tokens to write, and where they go
        for slot, span in zip(slots, self.prompts()):
            prompt = [*range(*span.prefix), *range(span.start, span.end)]
            tokens += prompt
            slot_of += [slot] * len(prompt)
            positions += range(len(prompt))
            # What an earlier request left behind: if it were NaN, a mask would not hide it.
            torch._foreach_zero_([tensor[slot, len(prompt) :] for tensor in (*cache.keys, *cache.values)])
        device = cache.keys[0].device
        self.tokens, self.slots, self.positions = to_device(
            torch.tensor([tokens, slot_of, positions]), device
        )

    def __call__(self, layer, q, k, v):  # q (T, H, D); k, v (T, K, D)
        self.cache.keys[layer][self.slots, self.positions] = k[self.tokens]
        self.cache.values[layer][self.slots, self.positions] = v[self.tokens]
        return super().__call__(layer, q, k, v)


class Decode:
    """One token per slot: token b of the flat row belongs to slot b, at position `positions[b]`.

    Attention covers the first `longest` positions of the cache.
    """

    def __init__(self, cache: KVCache, positions: torch.Tensor, longest: int):
        self.cache = cache
        self.positions = positions  # (B,)
        self.slots = torch.arange(len(positions), device=positions.device)  # (B,)
        future = torch.arange(longest, device=positions.device) > positions[:, None]  # (B, S)
        # Additive mask in the cache's dtype, as the SDPA kernels expect; built once and shared by all layers.
        mask = torch.zeros(future.shape, device=positions.device, dtype=cache.keys[0].dtype)
        self.mask = mask.masked_fill_(future, float("-inf"))[:, None, None]  # (B, 1, 1, S)
        is_half = mask.is_cuda and mask.dtype != torch.float32
        self.cudnn = is_half and has_fused_attention(mask.device)

    def __call__(self, layer, q, k, v):  # q (B, H, D); k, v (B, K, D)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, self.positions] = k
        values[self.slots, self.positions] = v
        longest = self.mask.shape[-1]
        keys = keys[:, :longest].transpose(1, 2)  # (B, K, S, D)
        values = values[:, :longest].transpose(1, 2)
        if self.cudnn:  # reads the cache once, at the speed of the memory
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                y = F.scaled_dot_product_attention(
                    q[:, :, None], keys, values, attn_mask=self.mask, enable_gqa=True
                )
            return y[:, :, 0]
        # The H / K query heads that share a key head become the rows of one attention problem. With
        # grouped-query heads instead, every kernel that takes a mask would first expand the cache to H heads.
        q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H / K, D)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).flatten(1, 2)  # (B, H, D)
