"""LoRALinear against its formula, and how much of a small update survives in bf16. `python
tests/model/test_lora.py` prints README's table: the fraction of an update that reaches the output of a 4096 x
4096 linear."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs as a file

from stic_min import lora

SIZES = (1.5e-4, 5e-4, 1.5e-3, 5e-3)  # of the update relative to y, root mean square
STEPS = (50, 150, 500, 1500)  # of Adam at lr 1e-7, each entry of B always in one direction


def layer(inputs, outputs, r=128, dtype=torch.float32, dropout=0.0):
    """A LoRALinear with the statistics of a decoder's: y near 1, A as `lora.new_adapter` samples it, B
    zero."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False).to(dtype).requires_grad_(False)
    linear.weight.normal_(std=inputs**-0.5)
    lora_layer = lora.LoRALinear(linear, r, 2 * r, dropout)
    nn.init.kaiming_uniform_(lora_layer.lora_A, a=math.sqrt(5))
    return lora_layer


def separate(linear, x):
    """The usual implementation, as in PEFT: added to a y that is already rounded."""
    z = F.linear(F.linear(x.float(), linear.lora_A), linear.lora_B)
    return (F.linear(x, linear.weight) + linear.scale * z).to(x.dtype)


@torch.no_grad()
def slope(linear, x, B, forward):
    """The fraction of the true change by B that is in the change of the rounded output: 1 if nothing is
    lost."""
    linear.lora_B.zero_()
    before = forward(linear, x).double()
    linear.lora_B.copy_(B)
    true = linear.scale * (x.double() @ linear.lora_A.double().T @ B.double().T)
    change = forward(linear, x).double() - before
    return ((change * true).sum() / true.square().sum()).item()


@torch.no_grad()
def B_of_size(linear, x, size):
    """A random B whose update is `size` times y."""
    B = torch.randn_like(linear.lora_B)
    update = linear.scale * F.linear(F.linear(x.float(), linear.lora_A), B)
    return B * (size * F.linear(x.float(), linear.weight.float()).norm() / update.norm())


@pytest.mark.parametrize("inputs, outputs", [(16, 24), (24, 16)])
def test_formula_and_gradients(inputs, outputs):
    linear, x = layer(inputs, outputs, r=4), torch.randn(5, inputs, requires_grad=True)
    linear.lora_B.data.normal_()
    A, B = (t.detach().clone().requires_grad_() for t in (linear.lora_A, linear.lora_B))
    expected = x @ linear.weight.T + 2 * (x @ A.T) @ B.T
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(expected)
    ours = torch.autograd.grad((linear(x) * gradient).sum(), [x, linear.lora_A, linear.lora_B])
    theirs = torch.autograd.grad((expected * gradient).sum(), [x, A, B])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    linear.enabled = False
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight), rtol=1e-6, atol=1e-6)


def test_dropout_only_affects_the_update():
    linear, x = layer(32, 32, r=4, dropout=0.5), torch.randn(64, 32)
    linear.lora_B.data.normal_()
    torch.manual_seed(1)
    ours = linear.train()(x)
    torch.manual_seed(1)
    z = F.dropout(x, 0.5)
    torch.testing.assert_close(ours, F.linear(x, linear.weight) + 2 * z @ linear.lora_A.T @ linear.lora_B.T)
    torch.testing.assert_close(
        linear.eval()(x), F.linear(x, linear.weight) + 2 * x @ linear.lora_A.T @ linear.lora_B.T
    )


@pytest.mark.parametrize("training", [True, False])
def test_an_attached_layer_is_in_its_models_mode(training):
    """A model that samples has no dropout, whatever its adapter was trained with."""
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32, bias=False)}).train(training)
    lora.attach(model, lora.Adapter(4, 8, 0.5, ["q_proj"], {}))
    assert isinstance(model["q_proj"], lora.LoRALinear) and model["q_proj"].training is training


@pytest.mark.parametrize("size", SIZES[:3])
def test_bf16_keeps_a_small_update(size):
    linear, x = layer(512, 512, r=16, dtype=torch.bfloat16), torch.randn(512, 512).bfloat16()
    B = B_of_size(linear, x, size)
    assert 0.9 < slope(linear, x, B, lora.LoRALinear.forward) < 1.1
    assert slope(linear, x, B, separate) < 0.9  # why ours is rounded only once


@torch.no_grad()
def test_peft_loses_small_updates():
    """README's first row is PEFT's arithmetic: fp32 LoRA on a bf16 base, as TRL trains it."""
    peft = pytest.importorskip("peft")
    linear, x = layer(512, 512, r=16, dtype=torch.bfloat16), torch.randn(512, 512).bfloat16()
    base = nn.Sequential(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))
    base[0].weight.copy_(linear.weight)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))
    [lora_layer] = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]
    linear.lora_B.copy_(B_of_size(linear, x, 1.5e-4))
    for ours, name in ((linear.lora_A, "lora_A"), (linear.lora_B, "lora_B")):
        getattr(lora_layer, name)["default"].weight.copy_(ours)
    assert lora_layer.lora_B["default"].weight.dtype == torch.float32
    assert torch.equal(theirs(x), separate(linear, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("inputs, outputs", [(256, 64), (64, 256), (256, 256)])
def test_with_B_zero_it_is_the_reference_bit_for_bit(inputs, outputs, tokens, dtype):
    linear, x = layer(inputs, outputs, r=8, dtype=dtype), torch.randn(tokens, inputs).to(dtype)
    theta = linear(x)
    linear.enabled = False
    assert torch.equal(theta, linear(x))


# ---------------------------------------------------------------- README's table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(f"{'update of a 4096 x 4096 linear in bf16':<42}added to y   one rounding")
    linear = layer(4096, 4096, dtype=torch.bfloat16).to(device)
    x = torch.randn(1024, 4096, device=device).bfloat16()
    Bs = [(f"of size {size:g} relative to y", B_of_size(linear, x, size)) for size in SIZES]
    signs = torch.randn_like(linear.lora_B).sign()
    Bs += [(f"after {k} Adam steps at lr 1e-7, one sign", 1e-7 * k * signs) for k in STEPS]
    for name, B in Bs:
        two_roundings, one_rounding = (slope(linear, x, B, f) for f in (separate, lora.LoRALinear.forward))
        print(f"{name:<42}{two_roundings:>10.2f}{one_rounding:>15.2f}")


if __name__ == "__main__":
    main()
