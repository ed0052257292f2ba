"""LoRALinear against its formula, and what bf16 leaves of a small update. `python tests/model/test_lora.py` prints
README's table: the share of an update that reaches the output of a 4096 x 4096 linear."""

import argparse
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stic_min import lora

SIZES = (1.5e-4, 5e-4, 1.5e-3, 5e-3)  # of the update relative to y, root mean square
STEPS = (50, 150, 500, 1500)  # of Adam at lr 1e-7, each entry of B always in one direction


def layer(inputs, outputs, r=128, dtype=torch.float32, dropout=0.0):
    """A LoRALinear with the statistics of a decoder's: y near 1, A as `lora.new_adapter` draws it, B zero."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False).to(dtype).requires_grad_(False)
    linear.weight.normal_(std=inputs**-0.5)
    made = lora.LoRALinear(linear, r, 2 * r, dropout)
    nn.init.kaiming_uniform_(made.lora_A, a=math.sqrt(5))
    return made


def separate(made, x):
    """The usual way, PEFT's: added to a y that is rounded already."""
    z = F.linear(F.linear(x.float(), made.lora_A), made.lora_B)
    return (F.linear(x, made.weight) + made.scale * z).to(x.dtype)


@torch.no_grad()
def slope(made, x, B, forward):
    """How much of the true change that B makes is in the change of the rounded output: 1 if nothing is lost."""
    made.lora_B.zero_()
    before = forward(made, x).double()
    made.lora_B.copy_(B)
    true = made.scale * (x.double() @ made.lora_A.double().T @ B.double().T)
    change = forward(made, x).double() - before
    return ((change * true).sum() / true.square().sum()).item()


@torch.no_grad()
def B_of_size(made, x, size):
    """A random B whose update is `size` times y."""
    B = torch.randn_like(made.lora_B)
    update = made.scale * F.linear(F.linear(x.float(), made.lora_A), B)
    return B * (size * F.linear(x.float(), made.weight.float()).norm() / update.norm())


@pytest.mark.parametrize("inputs, outputs", [(16, 24), (24, 16)])
def test_formula_and_gradients(inputs, outputs):
    made, x = layer(inputs, outputs, r=4), torch.randn(5, inputs, requires_grad=True)
    made.lora_B.data.normal_()
    A, B = (t.detach().clone().requires_grad_() for t in (made.lora_A, made.lora_B))
    expected = x @ made.weight.T + 2 * (x @ A.T) @ B.T
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    seen = torch.randn_like(expected)
    ours = torch.autograd.grad((made(x) * seen).sum(), [x, made.lora_A, made.lora_B])
    theirs = torch.autograd.grad((expected * seen).sum(), [x, A, B])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    made.enabled = False
    torch.testing.assert_close(made(x), F.linear(x, made.weight), rtol=1e-6, atol=1e-6)


def test_dropout_hits_the_update_alone():
    made, x = layer(32, 32, r=4, dropout=0.5), torch.randn(64, 32)
    made.lora_B.data.normal_()
    torch.manual_seed(1)
    ours = made.train()(x)
    torch.manual_seed(1)
    z = F.dropout(x, 0.5)
    torch.testing.assert_close(ours, F.linear(x, made.weight) + 2 * z @ made.lora_A.T @ made.lora_B.T)
    torch.testing.assert_close(made.eval()(x), F.linear(x, made.weight) + 2 * x @ made.lora_A.T @ made.lora_B.T)


@pytest.mark.parametrize("size", SIZES[:3])
def test_bf16_keeps_a_small_update(size):
    made, x = layer(512, 512, r=16, dtype=torch.bfloat16), torch.randn(512, 512).bfloat16()
    B = B_of_size(made, x, size)
    assert 0.9 < slope(made, x, B, lora.LoRALinear.forward) < 1.1
    assert slope(made, x, B, separate) < 0.9  # why it is done so


@torch.no_grad()
def test_peft_loses_it():
    """README's first row is PEFT's arithmetic: fp32 LoRA on a bf16 base, as TRL trains it."""
    peft = pytest.importorskip("peft")
    made, x = layer(512, 512, r=16, dtype=torch.bfloat16), torch.randn(512, 512).bfloat16()
    base = nn.Sequential(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))
    base[0].weight.copy_(made.weight)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))
    [lora_layer] = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]
    made.lora_B.copy_(B_of_size(made, x, 1.5e-4))
    for ours, name in ((made.lora_A, "lora_A"), (made.lora_B, "lora_B")):
        getattr(lora_layer, name)["default"].weight.copy_(ours)
    assert lora_layer.lora_B["default"].weight.dtype == torch.float32
    assert torch.equal(theirs(x), separate(made, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("inputs, outputs", [(256, 64), (64, 256), (256, 256)])
def test_with_B_zero_it_is_the_reference_bit_for_bit(inputs, outputs, tokens, dtype):
    made, x = layer(inputs, outputs, r=8, dtype=dtype), torch.randn(tokens, inputs).to(dtype)
    theta = made(x)
    made.enabled = False
    assert torch.equal(theta, made(x))


# ---------------------------------------------------------------- README's table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(f"{'update of a 4096 x 4096 linear in bf16':<42}added to y   one rounding")
    made = layer(4096, 4096, dtype=torch.bfloat16).to(device)
    x = torch.randn(1024, 4096, device=device).bfloat16()
    Bs = [(f"of size {size:g} relative to y", B_of_size(made, x, size)) for size in SIZES]
    signs = torch.randn_like(made.lora_B).sign()
    Bs += [(f"after {k} Adam steps at lr 1e-7, one sign", 1e-7 * k * signs) for k in STEPS]
    for name, B in Bs:
        print(f"{name:<42}{slope(made, x, B, separate):>10.2f}{slope(made, x, B, lora.LoRALinear.forward):>15.2f}")


if __name__ == "__main__":
    main()
