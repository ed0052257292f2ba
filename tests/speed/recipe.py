"""Projects how long the paper's whole recipe takes on this device: 6k pairs, stage 1, 5k descriptions,
stage 2. Each step is measured on a few samples and scaled up.

  python tests/speed/recipe.py --size 7b --device cuda --dtype bfloat16 --slots 64 --pictures 96 \\
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
from common import VOCABULARY, alternate, build_ours, median, synthetic_images, table

from stic_min import sampler
from stic_min.images import corrupt
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.runtime.work import prefetch
from stic_min.text import IMAGE

PAIRS, INSTRUCTIONS = 6000, 5000


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


def seconds_per_sample(step, args):
    return median(alternate({"training": step}, args.repeat)["training"]) / args.micro_batch


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

    llava = build_ours(args.size, "anyres", device, dtype)
    # Step-by-step prompt; captioning prompt on the corrupted image, or hallucination-inducing prompt.
    pair = lambda image, i: [(160, image), (20, image if i % 2 else corrupt(image, seed=i)[0])]
    description = lambda image, i: [(20, image)]
    seconds = {}
    seconds["pairs"] = seconds_per_image(llava, args, pair)
    seconds["descriptions"] = seconds_per_image(llava, args, description)
    del llava

    settings = SimpleNamespace(image_mode="pad", micro_batch=args.micro_batch, text=30,
                               chosen=args.tokens + 1, rejected=args.tokens + 1, r=128)  # fmt: skip
    for name, stage in (("stage 1", stage1), ("stage 2", stage2)):
        step = stage.ours_step(settings, build_ours(args.size, "pad", device, dtype))
        seconds[name] = seconds_per_sample(step, args)
        del step

    counts = {"pairs": PAIRS, "stage 1": PAIRS, "descriptions": INSTRUCTIONS, "stage 2": INSTRUCTIONS}
    minutes = {name: seconds[name] * count / 60 for name, count in counts.items()}
    rows = [[name, f"{seconds[name]:.3g} s", str(count), f"{minutes[name]:.1f} min"]
            for name, count in counts.items()]  # fmt: skip
    rows.append(["whole recipe", "", "", f"{sum(minutes.values()):.1f} min"])
    table(["", "per sample", "samples", "total"], rows)
    waves = math.ceil(2 * args.pictures / args.slots)
    print(f"pairs: {2 * args.tokens / seconds['pairs']:.0f} generated tokens/s, end to end; "
          f"measured waves of {args.slots} sequences: {waves}")


if __name__ == "__main__":
    main()
