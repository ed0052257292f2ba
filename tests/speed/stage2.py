"""A stage-2 micro-batch (forward and backward on description, instruction and answer), compared with
transformers and peft.

  python tests/speed/stage2.py --size small --image-mode pad

The peer pads the micro-batch to its longest sequence and computes logits at all positions, like transformers'
Trainer. Ours is one flat sequence without padding, with logits at the answers only. Both losses are printed;
they are the same.
"""

import argparse
import json

import torch
from common import VOCABULARY, build, compare, configuration, needed_flops, peak_memory, synthetic_images
from stage1 import autocast, peft_config, prepared
from torch.nn import functional as F

from stic_min import lora
from stic_min.batch import Example, collate
from stic_min.images import make_tiles
from stic_min.loss import sft_loss
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.text import IMAGE

LENGTHS = ((260, 30), (320, 120), (220, 60), (290, 200))  # tokens: prompt with description, answer


def samples(args, config):
    """[(tiles, prompt ids with one IMAGE, answer ids)]."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
    images = synthetic_images(args.micro_batch)
    tiles = [make_tiles(image, args.image_mode, 336, config.pinpoints) for image in images]
    return [(t, [1, 2, IMAGE, *ids(n)], ids(m)) for t, (n, m) in zip(tiles, LENGTHS)]


def ours_batch(args, config, device="cpu"):
    rows = samples(args, config)
    examples = [Example("row", [(prompt, False), (answer, True)], []) for _, prompt, answer in rows]
    return collate(examples, [[tiles] for tiles, _, _ in rows], config, device)


def ours_step(args, llava, batches=None):
    """Attaches LoRA to `llava` -> a function that trains on the next of `batches` and returns the loss."""
    lora.attach(llava, lora.new_adapter(llava, args.r, 2 * args.r, 0.0, seed=0))
    batches = batches or prepared(lambda: ours_batch(args, llava.config, llava.device))

    def step():
        batch = next(batches)
        nll, tokens = sft_loss(llava(batch), batch.labels)
        (nll / tokens).backward()
        return (nll / tokens).item()

    return step


def peer_step(args, theirs, config):
    from peft import get_peft_model

    model = get_peft_model(theirs, peft_config(args)).train()
    rows = samples(args, config)
    ids, labels = [], []
    for tiles, prompt, answer in rows:
        image_ids = [VOCABULARY] * config.image_tokens(tiles.size)
        prompt = sum(([i] if i != IMAGE else image_ids for i in prompt), [])
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    longest = max(map(len, ids))

    def tensor(rows, pad):
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=args.device)

    inputs = {"input_ids": tensor(ids, 0), "attention_mask": tensor([[1] * len(row) for row in ids], 0)}
    stack = torch.stack if args.image_mode == "anyres" else torch.cat
    inputs["pixel_values"] = stack([tiles.pixels for tiles, _, _ in rows]).to(args.device, theirs.dtype)
    if args.image_mode == "anyres":
        inputs["image_sizes"] = torch.tensor([tiles.size[::-1] for tiles, _, _ in rows], device=args.device)
    labels = tensor(labels, -100)

    def step():
        with autocast(args):
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        return loss.item()

    return step


PEERS = {"transformers + peft": peer_step}


def make(peer, args):
    """{name: step} of stic_min and a peer, on shared weights."""
    ours, theirs = build(args.size, args.image_mode, start_device(args.device), getattr(torch, args.dtype))
    return {"stic_min": ours_step(args, ours.train()), peer: PEERS[peer](args, theirs, ours.config)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small", help="size of the model")
    parser.add_argument("--image-mode", choices=["pad", "anyres"], default="pad", help="image layout")
    parser.add_argument("--micro-batch", type=int, choices=range(1, 5), default=4, help="number of samples per step")
    parser.add_argument("--r", type=int, default=128, help="LoRA rank")
    parser.add_argument("--repeat", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32", help="precision of the weights")
    parser.add_argument("--memory-of", choices=["stic_min", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        [peer] = PEERS
        step = make(peer, args)[args.memory_of]
        print(json.dumps(peak_memory(step, torch.device(args.device))))
        return
    config = configuration(args.size, args.image_mode)
    flops = needed_flops(ours_batch(args, config), config, args.r, reference=False)
    compare(__file__, PEERS, make, args, f"a micro-batch of {args.micro_batch}", flops)


if __name__ == "__main__":
    main()
