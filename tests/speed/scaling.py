"""How the cost scales, for stic_min alone: tokens per second by number of parallel sequences, response length
and image size; memory by number of images; and, with --ranks, samples per second by number of processes.

  python tests/speed/scaling.py --size small
  python tests/speed/scaling.py --size small --ranks 1 2 4

With --ranks, each process has one thread (on a CPU) or one GPU, and its own samples: four images to generate
pairs for, and four stage-1 steps on one pair each, with LoRA's gradients summed over the processes after each
step, as in training with --shard none.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import generation
import stage1
import torch
import torch.distributed as dist
from common import build_ours, free_memory, fused, resident_memory, seconds_of, synthetic_images, table

from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device, start_ranks


def generate(llava, size, slots, tokens, count):
    """Two responses to each of `count` images of `size`."""
    images = (synthetic_images(1, size, number)[0] for number in range(count))
    generation.ours(llava, images, slots, tokens)


# ---------------------------------------------------------------- by number of processes


def seconds_of_rank(args):
    """Prints, from the first rank, the seconds of one generation and of one training step, and of the step's
    sum over the ranks."""
    ranks = start_ranks(args.device, backend=None)
    dtype = getattr(torch, args.dtype)

    def timed(run):  # until the last rank is done
        times = []
        for _ in range(args.repeat + 1):  # the first warms up
            ranks.barrier()
            begin = time.perf_counter()
            run()
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            ranks.barrier()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    llava = fused(build_ours(args.size, "pad", ranks.device, dtype))
    with torch.no_grad():
        seconds = [timed(lambda: generate(llava, (640, 480), 8, 64, 4))]
    del llava
    free_memory()

    settings = argparse.Namespace(micro_batch=1, image_mode="pad", text=30, chosen=270, rejected=230, r=128)
    llava = build_ours(args.size, "pad", ranks.device, dtype).train()
    step = stage1.ours_step(settings, llava)
    lora = [p for p in llava.parameters() if p.requires_grad]

    def sum_gradients():
        if ranks.world > 1:
            dist.all_reduce(torch.cat([p.grad.flatten() for p in lora]))

    def steps():
        for _ in range(4):
            step()
            sum_gradients()

    seconds += [timed(steps) / 4, timed(sum_gradients)]
    if ranks.first:
        print(json.dumps(seconds))
    if ranks.world > 1:
        dist.destroy_process_group()


def compare_ranks(args):
    rows, first = [], None
    for count in args.ranks:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
        command = [*torchrun, *sys.argv, "--rank"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, env=one_thread, stdout=subprocess.PIPE, text=True, check=True).stdout
        pairs, step, reduce = json.loads(output.splitlines()[-1])
        speeds = 4 * count / pairs, count / step
        first = first or [speed / count for speed in speeds]  # per process
        share = [f"{speed / count / one:.0%}" for speed, one in zip(speeds, first)]
        columns = [f"{speeds[0]:.3g}", share[0], f"{speeds[1]:.3g}", share[1], f"{reduce:.3f} s"]
        rows.append([str(count), *columns])
    header = ["pairs generated/s", "efficiency", "pairs trained/s", "efficiency", "sum of gradients"]
    table(["processes", *header], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small", help="size of the model")
    parser.add_argument("--repeat", type=int, default=3, help="number of measured rounds")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32", help="precision of the weights")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N",
                        help="compare these numbers of processes instead")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return seconds_of_rank(args)
    if args.ranks:
        return compare_ranks(args)
    llava = fused(build_ours(args.size, "anyres", start_device(args.device), getattr(torch, args.dtype)))
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
            seconds = seconds_of(run, args.repeat)
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
