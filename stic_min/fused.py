"""Linear layers that read the same input, as one matrix product: q, k and v; gate and up.

For sampling on a GPU. A decoding step has few rows; it takes as long as reading the weights and launching
the kernels, and one large product reads faster than several small ones. The plain layers in mistral.py and
lora.py define the result.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stic_min.lora import LoRALinear

FEW = 256  # rows up to which one product is faster; with more, its outputs would have to be made contiguous


class FusedLinear:
    """x (T, in) -> the outputs of `linears`, concatenated and split into `sizes`; `plain` for many rows.

    The weights take no more memory: each linear's weight becomes a part of the fused one. LoRA's matrices are
    copied, and the adapter is always on.
    """

    def __init__(self, plain, linears: list, sizes: list[int]):
        self.plain = plain
        self.sizes = sizes
        self.weight = torch.cat([linear.weight.data for linear in linears])  # (out, in)
        parts = self.weight.split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts):
            linear.weight.data = part
        self.A = None
        if isinstance(linears[0], LoRALinear):
            dtype = self.weight.dtype
            self.A = torch.cat([linear.lora_A.data for linear in linears]).to(dtype)  # (n r, in)
            # A block per linear; the zeros cost less than a product per linear would.
            self.B = torch.block_diag(*(linear.lora_B.data for linear in linears)).to(dtype)  # (out, n r)
            self.scale = linears[0].scale

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(x) > FEW:
            return self.plain(x)
        if self.A is None:
            y = F.linear(x, self.weight)
        else:  # rounded once, as in LoRALinear
            y = F.linear(F.linear(x, self.A), self.B).addmm_(x, self.weight.t(), beta=self.scale)
        return y.split(self.sizes, -1)


@torch.no_grad()
def fuse(llava) -> None:
    """Fuses the decoder's linears, for sampling only. LoRA's matrices take the dtype of the weights."""
    for layer in llava.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_proj, mlp.up_proj]
        for owner, linears in ((attention, qkv), (mlp, gate_up)):
            if len({isinstance(linear, LoRALinear) for linear in linears}) == 1:  # all have LoRA, or none
                *first, last = (linear.out_features for linear in linears)
                owner.project = FusedLinear(owner.project, linears, [sum(first), last])
        for module in layer.modules():
            if isinstance(module, LoRALinear):  # cast once, not at every step
                module.lora_A.data = module.lora_A.data.to(module.weight.dtype)
                module.lora_B.data = module.lora_B.data.to(module.weight.dtype)
