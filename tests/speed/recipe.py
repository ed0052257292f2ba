"""How long the paper's whole self-training takes on this device: 6k pairs, stage 1, 5k descriptions, stage 2, each
measured on a few samples and scaled up.

  python tests/speed/recipe.py --size 7b --device cuda --dtype bfloat16 --slots 64 --pictures 96 --micro-batch 4

As the scripts run it by default with LLaVA-v1.6: pictures of 640x480, generated in anyres and trained in pad mode, half
of the rejected answers from a corrupted picture. Random weights, so all answers are as long as --tokens says. Not
counted: reading the checkpoint, checking the pictures, the optimizer's own step.
"""

import argparse
import math
import time
from types import SimpleNamespace

import stage1
import stage2
import torch
from common import VOCABULARY, alternate, build_ours, median, pictures, table

from stic_min import sampler
from stic_min.images import corrupt
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.runtime.work import prefetch
from stic_min.text import IMAGE

PAIRS, INSTRUCTIONS = 6000, 5000


def seconds_a_picture(llava, args, rows):
    """Of generation; rows(picture, number) -> [(text's length, picture)], as generate_pairs.py asks for them."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (200,), generator=generator).tolist()

    def prepare(item):
        number, picture = item
        made = rows(picture, number)
        tiles = {id(p): llava.tiles(p) for _, p in made}
        return [sampler.Request((number, i), [1, 2, IMAGE, *text[:n]], [tiles[id(p)]], i)
                for i, (n, p) in enumerate(made)]  # fmt: skip

    def run(count):
        requests = (request for made in prefetch(prepare, enumerate(pictures(count))) for request in made)
        for _ in sampler.stream(llava, requests, slots=args.slots, max_new_tokens=args.tokens, temperature=0.2):
            pass
        if llava.device.type == "cuda":
            torch.cuda.synchronize()

    run(max(2, args.slots // 4))
    begin = time.perf_counter()
    run(args.pictures)
    return (time.perf_counter() - begin) / args.pictures


def seconds_a_sample(step, args):
    return median(alternate({"training": step}, args.repeat)["training"]) / args.micro_batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=250, help="of each answer")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, choices=range(1, 5), default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32")
    args = parser.parse_args()
    device, dtype = start_device(args.device), getattr(torch, args.dtype)

    llava = build_ours(args.size, "anyres", device, dtype)
    # The step-by-step prompt, and a captioning prompt on the corrupted picture or a prompt that invites invention.
    pair = lambda picture, i: [(160, picture), (20, picture if i % 2 else corrupt(picture, seed=i)[0])]
    pairs = seconds_a_picture(llava, args, pair)
    descriptions = seconds_a_picture(llava, args, lambda picture, i: [(20, picture)])
    tokens = 2 * args.tokens / pairs
    del llava

    how = SimpleNamespace(image_mode="pad", micro_batch=args.micro_batch, text=30, chosen=args.tokens + 1,
                          rejected=args.tokens + 1, r=128)  # fmt: skip
    first = seconds_a_sample(stage1.ours_step(how, build_ours(args.size, "pad", device, dtype)), args)
    second = seconds_a_sample(stage2.ours_step(how, build_ours(args.size, "pad", device, dtype)), args)

    rows, whole = [], 0
    for name, seconds, count in (("pairs", pairs, PAIRS), ("stage 1", first, PAIRS),
                                 ("descriptions", descriptions, INSTRUCTIONS), ("stage 2", second, INSTRUCTIONS)):
        whole += seconds * count
        rows.append([name, f"{seconds:.3g} s", str(count), f"{seconds * count / 60:.1f} min"])
    table(["", "a sample", "samples", "in all"], [*rows, ["whole recipe", "", "", f"{whole / 60:.1f} min"]])
    print(f"pairs: {tokens:.0f} generated tokens/s, end to end; waves of {args.slots} rows, "
          f"{math.ceil(2 * args.pictures / args.slots)} measured")


if __name__ == "__main__":
    main()
