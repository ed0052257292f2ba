"""Hand-written LoRA (Hu et al. 2021).

y = W x + (alpha / r) B A x with W frozen, on every decoder linear but `lm_head` (the paper's lora_target =
all). A and B are fp32 whatever the base is: in bf16, at the paper's learning rate of 1e-7, A would never move
and B would stall near 6e-5. Adapters are used unmerged; `stic_min.merge` folds one into a checkpoint. Not
here: PEFT's files, which are in `formats/adapters.py`; biases, DoRA, per-module ranks.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from stic_min import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """Wraps the weight of `linear`. With `enabled` False it is the reference's layer: theta_0's, or with
    `reference_A` and `reference_B` another LoRA's."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        device = linear.weight.device
        self.weight = linear.weight
        self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features, device=device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))  # (out, r)
        self.reference_A = self.reference_B = None
        self.scale = alpha / r
        self.dropout = dropout
        self.enabled = True

    def forward(self, x):  # (T, in) -> (T, out)
        if self.enabled:
            z = F.dropout(x, self.dropout, self.training)
            z = F.linear(F.linear(z, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))  # (T, out)
        elif self.reference_A is not None:
            z = F.linear(F.linear(x, self.reference_A), self.reference_B)
        else:
            z = x.new_zeros(len(x), self.out_features)
        # scale * z is added in the matmul's fp32 accumulator, and the sum is rounded once. Added to a W x
        # already rounded to bf16, an update below half of its last bit would vanish: at lr 1e-7, most of
        # stage 1's updates. With LoRA off, the same kernel adds zeros, so theta_0 equals theta at B = 0 bit
        # for bit.
        return z.addmm_(x, self.weight.t(), beta=self.scale)


@contextmanager
def disabled(model):
    """Turns off every LoRALinear of `model`: inside, the model is the reference policy."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter belongs to."""

    folder: str = ""
    fingerprint: str = ""  # of its weights
    huggingface: bool = False  # whether its tensors have transformers' names
    any_adapter: bool = False  # --other-base: accept adapters that were trained on other weights


@dataclass
class Adapter:
    r: int
    alpha: float
    dropout: float
    modules: list[str]  # names in llava: "model.layers.0.self_attn.q_proj", ...
    tensors: dict[str, torch.Tensor]  # by llava's parameter names, on the CPU: LoRA, maybe a projector
    base: Base = Base()


def new_adapter(llava, r: int, alpha: float, dropout: float, seed: int) -> Adapter:
    """A new adapter on all of TARGETS: A uniform as in PEFT (kaiming, a = sqrt 5), B zero (theta_0)."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in llava.model.named_modules(prefix="model")]
    modules = [name for name in names if name.rpartition(".")[2] in TARGETS]
    tensors = {}
    for name in modules:
        linear = llava.get_submodule(name)
        bound = linear.in_features**-0.5
        A = torch.empty(r, linear.in_features).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(linear.out_features, r)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    return Adapter(r, alpha, dropout, modules, tensors)


def attach(llava, adapter: Adapter, reference: Adapter | None = None):
    """Replaces every module that `adapter` names by a LoRALinear. Its tensors are not loaded here, nor are
    those of `reference`, which must have the same modules and scale."""
    form = lambda adapter: (adapter.alpha / adapter.r, sorted(adapter.modules))
    if reference and form(reference) != form(adapter):
        raise InputError("--reference: its LoRA has another scale or other modules than the one to train")
    for name in adapter.modules:
        parent_name, _, child = name.rpartition(".")
        parent = llava.get_submodule(parent_name)
        linear = getattr(parent, child)
        layer = LoRALinear(linear, adapter.r, adapter.alpha, adapter.dropout)
        if reference:
            empty = linear.weight.new_empty
            layer.reference_A = nn.Parameter(empty(reference.r, linear.in_features), False)
            layer.reference_B = nn.Parameter(empty(linear.out_features, reference.r), False)
        setattr(parent, child, layer.train(linear.training))
