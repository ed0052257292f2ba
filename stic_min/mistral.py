"""The decoder: Mistral-7B and Llama/Vicuna-7B are the same blocks with different sizes.

Its modules have the names of `model.*` in LLaVA checkpoints. All sequences are concatenated in one flat
(T, C) tensor, without padding. The `attend` object that is passed in decides which token attends to which:
`Packed` below for training and scoring, `Prefill` and `Decode` in cache.py for sampling. Not here: attention
windows (a checkpoint that has one is limited to sequences that fit it), rope scaling, biases.

Shapes: T tokens, C channels, H query heads, K key/value heads of D channels each; B sequences of S cached
positions.
"""

import functools
import importlib.util
import inspect
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stic_min.runtime.work import to_device


@dataclass(frozen=True)
class DecoderConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int  # longest sequence that the model supports

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# ---------------------------------------------------------------- rotary positions


def rope_angles(positions, config, dtype=torch.float32):
    """positions (T,) -> cos, signed sin (T, 1, D). Channels i and i + D/2 form a pair, as in the checkpoints.

    (a, b) becomes (a cos - b sin, b cos + a sin): the first half of the sines is negated.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D  # (D / 2,)
    frequencies = config.rope_theta**-exponents
    angles = torch.outer(positions.float(), frequencies)[:, None]  # (T, 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, cos, sin):  # (T, H, D)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # (a, b) rolled is (b, a)


# ---------------------------------------------------------------- who attends to whom


def attention(q, k, v, **mask):  # q (B, T, H, D); k, v (B, S, K, D); H / K query heads share one key head
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)  # (B, T, H, D)


@functools.cache
def has_fused_attention(device: torch.device) -> bool:
    """Whether FlashAttention and cuDNN's attention run on this GPU: on NVIDIA's, from Ampere (8.0) on."""
    return bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def flash_varlen():
    """FlashAttention over sequences of different lengths, causal; None in a torch that does not have it."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:  # torch 2.9
        return None
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters  # they differ between torch 2.10, 2.11 and 2.12
    options = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) attend to all tokens [a, b) of `prefix` and, causally, to each other."""

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)


class Packed:
    """Many sequences in one flat row (see the diagram in batch.Batch). `spans` cover it in order.

    The branches of one prompt have it as their prefix: it is computed once, and the branches do not see each
    other. A prefix is always a whole span.
    """

    def __init__(self, spans: list[Span]):
        self.spans = spans
        self.lengths = [span.end - span.start for span in spans]
        index = {(span.start, span.end): i for i, span in enumerate(spans)}
        # Of each span: the spans that it attends to, its prefix and itself.
        self.sources = [[index[s.prefix], i] if s.prefix[1] else [i] for i, s in enumerate(spans)]
        self.offsets = None  # of `varlen`, on the device

    def prompts(self) -> list[Span]:
        """The spans that are not another's prefix: without responses, they end the prompts."""
        prefixes = {span.prefix for span in self.spans}
        return [span for span in self.spans if (span.start, span.end) not in prefixes]

    def __call__(self, layer, q, k, v):  # q (T, H, D); k, v (T, K, D)
        # One split, not a slice per span: the backward of a slice writes a gradient as large as the row.
        ks, vs = k.split(self.lengths), v.split(self.lengths)
        is_half = q.is_cuda and q.dtype != torch.float32
        if is_half and has_fused_attention(q.device) and flash_varlen():
            return self.varlen(q, ks, vs)
        return self.plain(q, ks, vs)

    def plain(self, q, ks, vs):
        """One attention call per span. ks, vs: the spans' keys and values."""
        out = []
        for y, (*prefix, i) in zip(q.split(self.lengths), self.sources):
            if prefix:
                [p] = prefix
                keys, values = torch.cat([ks[p], ks[i]]), torch.cat([vs[p], vs[i]])  # (P + R, K, D)
                # Token i of R attends to all P of the prefix, and to 0..i of its span.
                mask = torch.ones(len(y), len(keys), dtype=torch.bool, device=y.device).tril(len(ks[p]))
                y = attention(y[None], keys[None], values[None], attn_mask=mask)
            else:
                y = attention(y[None], ks[i][None], vs[i][None], is_causal=True)
            out.append(y[0])
        return torch.cat(out)  # (T, H, D)

    def varlen(self, q, ks, vs):
        """The same in one call on a GPU: FlashAttention over sequences of different lengths, whose causal
        mask is aligned at the bottom right as well."""
        if self.offsets is None:
            key_lengths = [sum(self.lengths[i] for i in sources) for sources in self.sources]
            ends = [accumulate(lengths, initial=0) for lengths in (self.lengths, key_lengths)]
            ends = torch.tensor([list(e) for e in ends], dtype=torch.int32)
            self.offsets = *to_device(ends, q.device), max(self.lengths), max(key_lengths)
        order = [i for sources in self.sources for i in sources]
        keys = torch.cat([ks[i] for i in order])
        values = torch.cat([vs[i] for i in order])
        return flash_varlen()(q, keys, values, *self.offsets)


# ---------------------------------------------------------------- the blocks


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.index = index  # which layer's cache to use
        self.head_dim = D
        self.heads = [config.num_attention_heads, config.num_key_value_heads]  # H, K
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, rope, attend):  # (T, C)
        qk, v = self.project(x)
        qk = rotate(qk.unflatten(-1, (-1, self.head_dim)), *rope)  # (T, H + K, D)
        q, k = qk.split(self.heads, dim=1)
        v = v.unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        return self.o_proj(attend(self.index, q, k, v).flatten(1))  # (T, C)

    def project(self, x):  # q and k together, as both are rotated
        return torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1), self.v_proj(x)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)  # SwiGLU

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)


class DecoderLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpoint_activations = False

    def forward(self, x, rope, attend):
        if self.checkpoint_activations and torch.is_grad_enabled():  # keep x alone, recompute in the backward
            return checkpoint(self.block, x, rope, attend, use_reentrant=False)
        return self.block(x, rope, attend)

    def block(self, x, rope, attend):  # (T, C)
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Input embeddings (T, C) at positions (T,) -> hidden states after the final norm (T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, positions, attend):
        rope = rope_angles(positions, self.config, x.dtype)  # the same for all layers
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)
