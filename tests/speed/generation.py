"""Two responses per image, as in `generate_pairs.py`, compared with transformers' `generate`.

  python tests/speed/generation.py --size small --image-mode anyres

Synthetic images of 640x480, random weights, greedy decoding; no sequence ends early. All runs start from the
image and end with token ids, and both implementations use our code to cut images into tiles. The authors'
release uses batch 1. First, the script checks that both generate the same tokens and compares the logits of
one prompt. Peak memory is measured above the weights, on the first four images, in a separate process per
run. Below the table, our decode step is compared with the memory bandwidth: it cannot be faster than reading
the weights and the cache once.
"""

import argparse
import json
import math

import torch
from common import (
    VOCABULARY,
    alternate,
    bandwidth,
    build,
    median,
    memory_of_each,
    peak_memory,
    synthetic_images,
    table,
)

from stic_min import sampler, slots
from stic_min.images import make_tiles
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.text import IMAGE

PROMPTS = (160, 20)  # tokens after the image: the step-by-step prompt, a hallucination-inducing prompt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small", help="size of the model")
    parser.add_argument("--image-mode", choices=["pad", "anyres"], default="anyres", help="image layout")
    parser.add_argument("--pictures", type=int, default=12, help="number of images")
    parser.add_argument("--tokens", type=int, default=128, help="length of each response in tokens")
    parser.add_argument("--slots", type=int, default=8, help="number of sequences that our sampler decodes in parallel")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 2, 4],
                        help="batch sizes for transformers, in sequences")
    parser.add_argument("--repeat", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32", help="precision of the weights")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = {f"transformers, batch {b}": b for b in args.peer_batches}
    memory = {} if args.memory_of else memory_of_each(__file__, ["stic_min", *names])
    args.slots = min(args.slots, 2 * args.pictures)  # like generate_pairs.py
    device = start_device(args.device)
    ours, theirs = build(args.size, args.image_mode, device, getattr(torch, args.dtype))
    images = synthetic_images(min(args.pictures, 4) if args.memory_of else args.pictures)
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
    texts = [ids(n) for n in PROMPTS]
    tiles_of = lambda image: make_tiles(image, args.image_mode, 336, ours.config.pinpoints)

    def stic(tokens=args.tokens):
        def requests():
            for number, image in enumerate(images):
                tiles = tiles_of(image)
                for text in texts:
                    yield sampler.Request((number, len(text)), [1, 2, IMAGE, *text], [tiles], number)

        return dict(sampler.stream(ours, requests(), slots=args.slots, max_new_tokens=tokens))

    def peer_inputs(part):
        """[(tiles, text)] as a left-padded batch, the format that `generate` expects."""
        tiles = [t for t, _ in part]
        image_ids = lambda t: [VOCABULARY] * ours.config.image_tokens(t.size)
        prompts = [[1, 2, *image_ids(t), *text] for t, text in part]
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        pixels = (torch.stack if args.image_mode == "anyres" else torch.cat)([t.pixels for t in tiles])
        inputs = {"input_ids": padded, "attention_mask": mask}
        inputs["pixel_values"] = pixels.to(device, theirs.dtype)
        if args.image_mode == "anyres":
            inputs["image_sizes"] = torch.tensor([t.size[::-1] for t in tiles], device=device)
        return inputs

    @torch.no_grad()
    def peer(batch):
        rows = [(tiles, text) for tiles in map(tiles_of, images) for text in texts]
        responses = []
        for start in range(0, len(rows), batch):
            inputs = peer_inputs(rows[start : start + batch])
            out = theirs.generate(**inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
            responses += out[:, inputs["input_ids"].shape[1] :].tolist()
        return responses

    if args.memory_of:
        step = stic if args.memory_of == "stic_min" else lambda: peer(names[args.memory_of])
        print(json.dumps(peak_memory(step, device)))
        return

    with torch.no_grad():
        tiles = tiles_of(images[0])
        batch = ours.single_batch([1, 2, IMAGE, *texts[0]], [], [tiles])
        batch.scored = torch.arange(len(batch.ids), device=device)[None]
        mine = ours(batch)[0]
        other = theirs(**peer_inputs([(tiles, texts[0])])).logits[0].float()
        difference = mine - other
        rms = lambda x: x.square().mean().sqrt()
        print(f"logits of one prompt: rms {rms(other):.3f}, largest {other.abs().max():.2f}; difference from "
              f"transformers: rms {rms(difference):.2g}, largest {difference.abs().max():.2g}")
    mine = stic()
    keys = [(number, len(text)) for number in range(len(images)) for text in texts]
    same = sum(mine[key].ids == response for key, response in zip(keys, peer(1)))
    print(f"{same} of {len(mine)} responses have the same tokens as transformers'")
    runs = {"stic_min": stic} | {name: (lambda b=b: peer(b)) for name, b in names.items()}
    times = {name: median(seconds) for name, seconds in alternate(runs, args.repeat).items()}
    tokens = args.tokens * len(mine)
    total = times["stic_min"]
    rows = [
        [name, f"{s:.2f} s", f"{tokens / s:.1f}", f"{s / total:.2f}", f"{memory[name]:.2f} GiB"]
        for name, s in times.items()
    ]
    header = f"{len(images)} images, {args.image_mode}, two responses of {args.tokens} tokens"
    table([header, "median", "tokens/s", "ratio", "peak memory"], rows)

    first = median(alternate({"prefill": lambda: stic(1)}, 3)["prefill"])
    stride = slots.STRIDES.get(device.type, 8)
    steps = math.ceil(len(mine) / args.slots) * stride * (math.ceil(args.tokens / stride) - 1)
    config = ours.config.decoder
    size = ours.lm_head.weight.element_size()
    weights = size * sum(p.numel() for p in [*ours.model.layers.parameters(), *ours.lm_head.parameters()])
    position = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    length = 2 + ours.config.image_tokens(images[0].size) + sum(PROMPTS) / len(PROMPTS) + args.tokens / 2
    read = weights + args.slots * length * position  # bytes per decode step
    speed = bandwidth(device)
    step_ms = 1000 * (total - first) / steps
    print(f"ours: {first:.2f} s for images and prefill, then {step_ms:.1f} ms per decode step for "
          f"{args.slots} sequences; reading its {read / 2**20:.0f} MiB at {speed / 2**30:.1f} GiB/s takes "
          f"{1000 * read / speed:.1f} ms")


if __name__ == "__main__":
    main()
