"""CLIP's vision transformer up to hidden state -2: f(.) of the paper's section 3, an image as patch features.

Reads the vision half of openai/clip-vit-large-patch14-336, or the tuned tower inside a LLaVA-1.6 checkpoint;
modules keep the names they have there (`pre_layrnorm` is spelled that way). Not here: the last layer and
`post_layernorm`, which hidden state -2 does not depend on; the text tower and the projections.

Shapes: N tiles, S patches, C channels, H heads of D channels.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ClipConfig:  # defaults: CLIP-L/14-336
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        return self.image_size // self.patch_size  # along one side: 24


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.patches**2 + 1, width)

    def forward(self, pixels):  # (N, 3, side, side)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, S, C)
        cls = self.class_embedding.expand(len(pixels), 1, -1)  # (N, 1, C)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight  # (N, 1 + S, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):  # (N, 1 + S, C)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, 1 + S, D)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v)  # no mask: every patch attends to every patch
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (N, 1 + S, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):  # (N, 1 + S, C)
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):  # (N, 1 + S, C)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """All layers but the last: LLaVA reads hidden state -2, the last layer's input."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers - 1))


class VisionTower(nn.Module):
    """pixels (N, 3, side, side) -> patch features (N, S, C): hidden state -2 without the CLS token."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config)

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))  # (N, 1 + S, C)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]  # (N, S, C)
