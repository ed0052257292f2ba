"""Projects how long the paper's whole recipe takes on this device: 6k pairs, stage 1, 5k descriptions,
stage 2. Each step is measured on a few samples and scaled up, then extrapolated to more images and GPUs.

  python tests/speed/recipe.py --size 7b --device cuda --dtype bfloat16 --slots 64 --pictures 128 \\
      --micro-batch 4

Settings are the scripts' defaults for LLaVA-v1.6: images of 640x480, anyres for generation and pad mode for
training, half of the rejected responses from a corrupted image. With random weights, every response has
--tokens tokens. Not included: loading the checkpoint, verifying the images, the optimizer step.
"""

import argparse
import math
import time
from types import SimpleNamespace

import stage1
import stage2
import torch
from common import (
    VOCABULARY,
    build_ours,
    configuration,
    free_memory,
    fused,
    lines,
    seconds_of,
    synthetic_images,
)

from stic_min import sampler
from stic_min.images import corrupt
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.runtime.work import prefetch
from stic_min.text import IMAGE

COUNTS = {"pairs": 6000, "stage 1": 6000, "descriptions": 5000, "stage 2": 5000}  # the paper's
R = 128  # LoRA rank

# Assumptions of `larger_runs`. Bytes per second of an all-reduce by number of GPUs: NVLink within a node of
# eight, 400 Gbit/s per GPU between nodes. Samples per GPU and optimizer step.
ALL_REDUCE = {1: None, 8: 300e9, 64: 40e9}
SAMPLES = 4


def seconds_per_image(llava, args, queries):
    """Generation time. queries(image, number) -> [(tokens of the prompt, image)], as in generate_pairs.py."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (200,), generator=generator).tolist()

    def prepare(item):
        number, image = item
        prompts = queries(image, number)
        tiles = {id(im): llava.tiles(im) for _, im in prompts}
        return [sampler.Request((number, i), [1, 2, IMAGE, *text[:n]], [tiles[id(im)]], i)
                for i, (n, im) in enumerate(prompts)]  # fmt: skip

    def run(count):
        groups = prefetch(prepare, enumerate(synthetic_images(count)))
        requests = (request for group in groups for request in group)
        sampling = {"max_new_tokens": args.tokens, "temperature": 0.2}
        for _ in sampler.stream(llava, requests, slots=args.slots, **sampling):
            pass
        if llava.device.type == "cuda":
            torch.cuda.synchronize()

    run(max(2, args.slots // 4))
    begin = time.perf_counter()
    run(args.pictures)
    return (time.perf_counter() - begin) / args.pictures


def measure(size, device, dtype, args):
    """Yields (what, seconds per sample). args: pictures, tokens, slots, micro_batch, repeat."""
    llava = fused(build_ours(size, "anyres", device, dtype))
    # Step-by-step prompt; captioning prompt on the corrupted image, or hallucination-inducing prompt.
    pair = lambda image, i: [(160, image), (20, image if i % 2 else corrupt(image, seed=i)[0])]
    description = lambda image, i: [(20, image)]
    yield "pairs", seconds_per_image(llava, args, pair)
    yield "descriptions", seconds_per_image(llava, args, description)
    del llava
    settings = SimpleNamespace(image_mode="pad", micro_batch=args.micro_batch, text=30,
                               chosen=args.tokens + 1, rejected=args.tokens + 1, r=R)  # fmt: skip
    for name, stage in (("stage 1", stage1), ("stage 2", stage2)):
        free_memory()
        step = stage.ours_step(settings, build_ours(size, "pad", device, dtype).train())
        yield name, seconds_of(step, args.repeat) / args.micro_batch
        del step


def paper_run(seconds):
    """Lines of a table of the paper's recipe. seconds: per sample, by the names in COUNTS."""
    minutes = {name: seconds[name] * count / 60 for name, count in COUNTS.items()}
    rows = [[name, f"{seconds[name]:.3g} s", str(count), f"{minutes[name]:.1f} min"]
            for name, count in COUNTS.items()]  # fmt: skip
    rows.append(["whole recipe", "", "", f"{sum(minutes.values()):.1f} min"])
    return lines(["", "per sample (measured)", "samples", "total (extrapolated)"], rows)


def duration(seconds):
    if seconds < 5400:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:.1f} h"


def larger_runs(seconds, config):
    """Lines of a table of larger runs, with five instructions for six images, as in the paper. Only the costs
    per sample are measured; the table multiplies them.

    Generation needs no communication. Training sums the fp32 gradients of LoRA once per optimizer step
    (--shard none), over SAMPLES samples per GPU: its --batch-size grows with the GPUs.
    """
    C, F = config.hidden_size, config.intermediate_size
    kv_width = config.num_key_value_heads * config.head_dim
    widths = [2 * C, C + kv_width, C + kv_width, 2 * C, C + F, C + F, F + C]  # in + out of each linear
    gradient = 4 * R * config.num_hidden_layers * sum(widths)  # bytes
    rows = []
    for images in (6000, 100_000, 1_000_000):
        for gpus, bandwidth in ALL_REDUCE.items():
            samples = {name: count * images / 6000 / gpus for name, count in COUNTS.items()}  # per GPU
            total = {name: samples[name] * seconds[name] for name in COUNTS}
            if bandwidth:  # a ring sends each byte twice
                reduce = 2 * gradient * (gpus - 1) / gpus / bandwidth
                for name in ("stage 1", "stage 2"):
                    total[name] += samples[name] / SAMPLES * reduce
            whole = duration(sum(total.values()))
            rows.append([f"{images:,}", str(gpus), *(duration(total[name]) for name in COUNTS), whole])
    return lines(["images", "GPUs", *COUNTS, "whole recipe"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small", help="size of the model")
    parser.add_argument("--pictures", type=int, default=8, help="number of images for the measurement")
    parser.add_argument("--tokens", type=int, default=250, help="length of each response in tokens")
    parser.add_argument("--slots", type=int, default=8, help="number of sequences that the sampler decodes in parallel")
    parser.add_argument("--micro-batch", type=int, choices=range(1, 5), default=1, help="number of samples per step")
    parser.add_argument("--repeat", type=int, default=5, help="number of measured training rounds")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32", help="precision of the weights")
    args = parser.parse_args()
    device, dtype = start_device(args.device), getattr(torch, args.dtype)
    seconds = dict(measure(args.size, device, dtype, args))
    print("\n".join(paper_run(seconds)))
    waves = math.ceil(2 * args.pictures / args.slots)
    print(f"pairs: {2 * args.tokens / seconds['pairs']:.0f} generated tokens/s, end to end; "
          f"measured waves of {args.slots} sequences: {waves}")
    print("\nextrapolated from the costs per sample:")
    print("\n".join(larger_runs(seconds, configuration(args.size, "pad").decoder)))


if __name__ == "__main__":
    main()
