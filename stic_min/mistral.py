"""The decoder: Mistral-7B and Llama/Vicuna-7B are the same blocks with different sizes.

Its modules have the names of `model.*` in LLaVA checkpoints. All sequences are concatenated in one flat
(T, C) tensor, without padding. The `attend` object that is passed in decides which token attends to which:
`Packed` below for training and scoring, `Prefill` and `Decode` in cache.py for sampling. Not here: attention
windows (a checkpoint that has one is limited to sequences that fit it), rope scaling, biases.

Shapes: T tokens, C channels, H query heads, K key/value heads of D channels each; B sequences of S cached
positions.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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
    """positions (T,) -> cos, sin (T, 1, D). Channels i and i + D/2 form a pair, as in the checkpoints."""
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D  # (D / 2,)
    frequencies = config.rope_theta**-exponents
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)[:, None]  # (T, 1, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):  # (T, H, D)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


# ---------------------------------------------------------------- who attends to whom


def attention(q, k, v, **mask):  # q (B, T, H, D); k, v (B, S, K, D); H / K query heads share one key head
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2)  # (B, T, H, D)


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) attend to all tokens [a, b) of `prefix` and, causally, to each other."""

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)


class Packed:
    """Many sequences in one flat row (see the diagram in batch.Batch). `spans` cover it in order.

    The branches of one prompt have it as their prefix: it is computed once, and the branches do not see each
    other.
    """

    def __init__(self, spans: list[Span]):
        self.spans = spans

    def __call__(self, layer, q, k, v):  # q (T, H, D); k, v (T, K, D)
        from torch.nn.attention.bias import causal_lower_right  # here, as it takes a second to import

        out = []
        for span in self.spans:
            tokens = slice(span.start, span.end)
            prefix = slice(*span.prefix)
            if prefix.start == prefix.stop:
                y = attention(q[None, tokens], k[None, tokens], v[None, tokens], is_causal=True)
            else:  # R tokens after a prefix of P
                keys = torch.cat([k[prefix], k[tokens]])  # (P + R, K, D)
                values = torch.cat([v[prefix], v[tokens]])
                # Causal, aligned at the bottom right: token i attends to all P of the prefix and to 0..i of
                # its span.
                mask = causal_lower_right(span.end - span.start, len(keys))
                y = attention(q[None, tokens], keys[None], values[None], attn_mask=mask)
            out.append(y[0])
        return torch.cat(out)  # (T, H, D)


# ---------------------------------------------------------------- the blocks


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.index = index  # which layer's cache to use
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, rope, attend):  # (T, C)
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (T, H, D)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        return self.o_proj(attend(self.index, q, k, v).flatten(1))  # (T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


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
