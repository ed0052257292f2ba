"""Two answers on each picture, as `generate_pairs.py` makes them, against transformers' `generate`.

  python tests/speed/generation.py --size small --image-mode anyres

Pictures are drawn, 640x480; decoding is greedy, with random weights, and no row ends by itself. All start from the
picture and end with token ids; cutting it into tiles is ours for both. Batch 1 is what the authors' release does. First
it is checked that both say the same tokens, and have the same logits on one prompt. Peak memory is over the weights, on
the first four pictures, in a process of its own for each. Below the table, ours against the memory's bandwidth: a
decode step cannot take less than reading the weights and the cache once.
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
    pictures,
    table,
)

from stic_min import sampler, slots
from stic_min.images import make_tiles
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.text import IMAGE

PROMPTS = (160, 20)  # tokens behind the picture: the step-by-step prompt and a bad one


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small")
    parser.add_argument("--image-mode", choices=["pad", "anyres"], default="anyres")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(flags.DTYPES), default="float32")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = {f"transformers, batch {b}": b for b in args.peer_batches}
    memory = {} if args.memory_of else memory_of_each(__file__, ["stic_min", *names])
    args.slots = min(args.slots, 2 * args.pictures)  # as generate_pairs.py
    device = start_device(args.device)
    ours, theirs = build(args.size, args.image_mode, device, flags.DTYPES[args.dtype])
    drawn = pictures(min(args.pictures, 4) if args.memory_of else args.pictures)
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
    texts = [ids(n) for n in PROMPTS]
    tiles_of = lambda picture: make_tiles(picture, args.image_mode, 336, ours.config.pinpoints)

    def stic(tokens=args.tokens):
        def requests():
            for number, picture in enumerate(drawn):
                tiles = tiles_of(picture)
                for text in texts:
                    yield sampler.Request((number, len(text)), [1, 2, IMAGE, *text], [tiles], number)

        how = {"slots": args.slots, "max_new_tokens": tokens}
        return dict(sampler.stream(ours, requests(), **how))

    def peer_inputs(part):
        """(tiles, text) of some rows, padded on the left as `generate` wants them."""
        tiles = [own for own, _ in part]
        marks = lambda t: [VOCABULARY] * ours.config.image_tokens(t.size)
        prompts = [[1, 2, *marks(t), *text] for t, (_, text) in zip(tiles, part)]
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        pixels = (torch.stack if args.image_mode == "anyres" else torch.cat)([t.pixels for t in tiles])
        inputs = {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels.to(device, theirs.dtype)}
        if args.image_mode == "anyres":
            inputs["image_sizes"] = torch.tensor([t.size[::-1] for t in tiles], device=device)
        return inputs

    @torch.no_grad()
    def peer(batch):
        rows = [(tiles, text) for tiles in map(tiles_of, drawn) for text in texts]
        said = []
        for start in range(0, len(rows), batch):
            inputs = peer_inputs(rows[start : start + batch])
            out = theirs.generate(**inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)
            said += out[:, inputs["input_ids"].shape[1] :].tolist()
        return said

    if args.memory_of:
        step = stic if args.memory_of == "stic_min" else lambda: peer(names[args.memory_of])
        print(json.dumps(peak_memory(step, device)))
        return

    with torch.no_grad():
        tiles = tiles_of(drawn[0])
        batch = ours.single_batch([1, 2, IMAGE, *texts[0]], [], [tiles])
        batch.scored = torch.arange(len(batch.ids), device=device)[None]
        mine, other = ours(batch)[0], theirs(**peer_inputs([(tiles, texts[0])])).logits[0].float()
        rms, apart = lambda x: x.square().mean().sqrt(), mine - other
        print(f"logits of one prompt: root mean square {rms(other):.3f}, largest {other.abs().max():.2f}; "
              f"apart from transformers' by {rms(apart):.2g}, at most {apart.abs().max():.2g}")
    mine = stic()
    same = sum(mine[k].ids == a for k, a in zip([(n, len(t)) for n in range(len(drawn)) for t in texts], peer(1)))
    print(f"{same} of {len(mine)} answers are the same tokens as transformers'")
    runs = {"stic_min": stic} | {name: (lambda b=b: peer(b)) for name, b in names.items()}
    times = alternate(runs, args.repeat)
    tokens = args.tokens * len(mine)
    whole = median(times["stic_min"])
    middle = {name: median(seconds) for name, seconds in times.items()}
    rows = [
        [name, f"{s:.2f} s", f"{tokens / s:.1f}", f"{s / whole:.2f}", f"{memory[name]:.2f} GiB"]
        for name, s in middle.items()
    ]
    header = f"{len(drawn)} pictures, {args.image_mode}, two answers of {args.tokens} tokens"
    table([header, "median", "tokens/s", "ratio", "peak memory"], rows)

    first = median(alternate({"prefill": lambda: stic(1)}, 3)["prefill"])
    stride = slots.STRIDES.get(device.type, 8)
    steps = math.ceil(len(mine) / args.slots) * stride * (math.ceil(args.tokens / stride) - 1)
    config, size = ours.config.decoder, ours.lm_head.weight.element_size()
    weights = size * sum(p.numel() for p in [*ours.model.layers.parameters(), *ours.lm_head.parameters()])
    position = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    length = 2 + ours.config.image_tokens(drawn[0].size) + sum(PROMPTS) / len(PROMPTS) + args.tokens / 2
    read, speed = weights + args.slots * length * position, bandwidth(device)
    print(f"ours: {first:.2f} s of prefill and pictures, then {1000 * (whole - first) / steps:.1f} ms a decode step "
          f"of {args.slots} rows; reading its {read / 2**20:.0f} MiB at {speed / 2**30:.1f} GiB/s takes "
          f"{1000 * read / speed:.1f} ms")


if __name__ == "__main__":
    main()
