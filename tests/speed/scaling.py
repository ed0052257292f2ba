"""How the cost of generation scales, for stic_min alone: tokens per second by number of parallel sequences,
response length and image size; memory by number of images.

  python tests/speed/scaling.py --size small
"""

import argparse

import torch
from common import VOCABULARY, alternate, build_ours, median, resident_memory, synthetic_images, table

from stic_min import sampler
from stic_min.images import make_tiles
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.text import IMAGE


def generate(llava, size, slots, tokens, count):
    """Two prompts on each of `count` images; returns the number of generated tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (160, 20)]
    config = llava.config
    side = config.vision.image_size

    def requests():
        for number in range(count):
            [image] = synthetic_images(1, size, number)
            tiles = make_tiles(image, config.image_mode, side, config.pinpoints)
            for text in texts:
                yield sampler.Request((number, len(text)), [1, 2, IMAGE, *text], [tiles], number)

    return sum(len(s.ids) for _, s in sampler.stream(llava, requests(), slots=slots, max_new_tokens=tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small", help="size of the model")
    parser.add_argument("--repeat", type=int, default=3, help="number of measured rounds")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32", help="precision of the weights")
    args = parser.parse_args()
    llava = build_ours(args.size, "anyres", start_device(args.device), getattr(torch, args.dtype))
    defaults = {"size": (640, 480), "slots": 8, "tokens": 64}
    sweeps = [
        ("parallel sequences", "slots", (1, 8, 32, 64, 128) if args.device == "cuda" else (1, 2, 4, 8, 16)),
        ("tokens per response", "tokens", (16, 64, 256)),
        ("image size", "size", ((336, 336), (640, 480), (1344, 1008))),
    ]
    for title, name, values in sweeps:
        rows = []
        for value in values:
            settings = defaults | {name: value}
            count = max(4, settings["slots"] // 2)
            run = lambda settings=settings, count=count: generate(llava, count=count, **settings)
            seconds = median(alternate({title: run}, args.repeat)[title])
            rows.append([str(value), f"{2 * count * settings['tokens'] / seconds:.1f}"])
        table([title, "tokens/s"], rows)

    rows = []
    for count in (8, 32, 128):
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        generate(llava, (640, 480), 8, 2, count)
        memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident_memory()
        rows.append([str(count), f"{memory / 2**20:.0f} MiB"])
    table(["images in one run", "memory"], rows)


if __name__ == "__main__":
    main()
