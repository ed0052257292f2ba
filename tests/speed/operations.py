"""Operations that the host launches per decoding step and per training step: on a GPU, each is about one kernel.

  python tests/speed/operations.py

Counted on a CPU with a tiny model, per decoder layer, as on a GPU: the linears of the sampler are fused. A GPU
launches fewer in packed attention, which is one call per layer there. Views are not counted.
"""

import argparse
import itertools
from collections import Counter

import stage1
import torch
from common import build_ours
from torch.utils._python_dispatch import TorchDispatchMode

from stic_min import lora, sampler, slots
from stic_min.fused import fuse
from stic_min.runtime import flags


class Operations(TorchDispatchMode):
    """Counts the operations that return new or changed numbers."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def count(step, layers):
    step()
    with Operations() as operations:
        step()
    return sum(operations.counts.values()) / layers


@torch.no_grad()
def decoding(adapter):
    llava = build_ours("tiny", "pad", "cpu", torch.float32)
    if adapter:
        lora.attach(llava, lora.new_adapter(llava, 8, 16, 0.0, seed=0))
    fuse(llava)
    decoder = slots.SlotDecoder(llava, 8, 64, lambda logits, uniform: sampler.pick(logits, 0.0, None, uniform))
    decoder.cache.reserve(256)
    return count(lambda: decoder.step(64), llava.config.decoder.num_hidden_layers)


def training(pairs):
    args = argparse.Namespace(micro_batch=pairs, image_mode="pad", text=30, chosen=270, rejected=230, r=8)
    llava = build_ours("tiny", "pad", "cpu", torch.float32).train()
    batch = stage1.ours_batch(args, llava.config)
    step = stage1.ours_step(args, llava, itertools.repeat(batch))
    return count(step, llava.config.decoder.num_hidden_layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.parse_args()
    print(f"decoding step: {decoding(False):.0f} operations per layer, with an adapter {decoding(True):.0f}")
    print(f"stage-1 step on one pair: {training(1):.0f} operations per layer, on four {training(4):.0f}")


if __name__ == "__main__":
    main()
