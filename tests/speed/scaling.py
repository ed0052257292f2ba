"""How generation's cost grows: tokens a second against rows at a time, answer length and picture size; memory against
the number of pictures. Ours alone.

  python tests/speed/scaling.py --size small
"""

import argparse
import re
from pathlib import Path

import torch
from common import VOCABULARY, alternate, build_ours, median, pictures, table

from stic_min import sampler
from stic_min.images import make_tiles
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.text import IMAGE


def generate(llava, size, slots, tokens, count):
    """`count` pictures, each with two prompts."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (160, 20)]
    mode, side, pinpoints = llava.config.image_mode, llava.config.vision.image_size, llava.config.pinpoints

    def requests():
        for number in range(count):
            tiles = make_tiles(pictures(1, size, number)[0], mode, side, pinpoints)
            for text in texts:
                yield sampler.Request((number, len(text)), [1, 2, IMAGE, *text], [tiles], number)

    return sum(len(s.ids) for _, s in sampler.stream(llava, requests(), slots=slots, max_new_tokens=tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32")
    args = parser.parse_args()
    llava = build_ours(args.size, "anyres", start_device(args.device), getattr(torch, args.dtype))
    usual = {"size": (640, 480), "slots": 8, "tokens": 64}
    changes = [
        ("rows at a time", "slots", (1, 8, 32, 64, 128) if args.device == "cuda" else (1, 2, 4, 8, 16)),
        ("tokens an answer", "tokens", (16, 64, 256)),
        ("picture", "size", ((336, 336), (640, 480), (1344, 1008))),
    ]
    for what, name, values in changes:
        rows = []
        for value in values:
            how = usual | {name: value}
            count = max(4, how["slots"] // 2)
            run = lambda how=how, count=count: generate(llava, count=count, **how)
            seconds = median(alternate({what: run}, args.repeat)[what])
            rows.append([str(value), f"{2 * count * how['tokens'] / seconds:.1f}"])
        table([what, "tokens/s"], rows)

    rows, resident = [], lambda: int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    for count in (8, 32, 128):
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        generate(llava, (640, 480), 8, 2, count)
        peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else resident()
        rows.append([str(count), f"{peak:.0f} MiB"])
    table(["pictures in one run", "memory"], rows)


if __name__ == "__main__":
    main()
