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

import torch
from common import (
    VOCABULARY,
    alternate,
    bandwidth,
    build,
    fused,
    median,
    memory_of_each,
    peak_memory,
    prefill_flops,
    seconds_of,
    synthetic_images,
    table,
)

from stic_min import sampler, slots
from stic_min.batch import Example, collate
from stic_min.images import make_tiles
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.runtime.work import prefetch
from stic_min.text import IMAGE

PROMPTS = (160, 20)  # tokens after the image: the step-by-step prompt, a hallucination-inducing prompt


def prompt_texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]


def tiles_of(image, config):
    return make_tiles(image, config.image_mode, 336, config.pinpoints)


# ---------------------------------------------------------------- stic_min


def requests(llava, images):
    """Two requests per image; tiles are made in threads, ahead of the sampler, as in generate_pairs.py."""
    tiles = prefetch(lambda image: tiles_of(image, llava.config), images)
    for number, image_tiles in enumerate(tiles):
        for text in prompt_texts():
            yield sampler.Request((number, len(text)), [1, 2, IMAGE, *text], [image_tiles], number)


def ours(llava, images, rows, tokens):
    """{(number of the image, length of the text): Sample}, sampled `rows` at a time."""
    return dict(sampler.stream(llava, requests(llava, images), slots=rows, max_new_tokens=tokens))


def slot_decoder(llava, rows, tokens):
    return slots.SlotDecoder(llava, rows, tokens, lambda logits, u: sampler.pick(logits, 0.0, None, u))


@torch.no_grad()
def decode_seconds(llava, rows, positions):
    """Time of a decode step whose rows hold `positions` tokens each."""
    decoder = slot_decoder(llava, rows, 256)
    decoder.cache.reserve(positions + 256)
    for tensor in (*decoder.cache.keys, *decoder.cache.values):
        tensor.normal_(std=0.5)

    def advance():
        decoder.positions.fill_(positions)
        decoder.advance(positions)

    for _ in range(2):  # on a GPU, the first captures the graph
        advance()
    return seconds_of(advance) / decoder.stride


def bytes_read(llava, rows, positions):
    """Bytes of the weights, LoRA's included, and of the cache: a decode step reads them at least once."""
    config = llava.config.decoder
    size = llava.lm_head.weight.element_size()
    weights = sum(p.numel() for p in [*llava.model.layers.parameters(), *llava.lm_head.parameters()])
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * (weights + rows * positions * position)


@torch.no_grad()
def prefill(llava, images, rows):
    """(seconds, FLOPs) per image with two prompts, in the groups in which sampler.stream prefills. Tiles are
    ready."""
    decoder = slot_decoder(llava, rows, 128)
    pending = list(sampler.groups(list(requests(llava, images)), max(2, rows // 4)))
    flops = 0
    for first, *others in pending:
        shared = first.shared_length()
        texts = [request.ids[shared:] for request in (first, *others)]
        example = Example("prompt", [(first.ids[:shared], False)], texts)
        flops += prefill_flops(collate([example], [first.tiles], llava.config), llava.config)

    def run():
        remaining = iter(pending)
        group = next(remaining)
        while group:
            admitted, tokens = [], 0
            while group and tokens < decoder.prefilled:
                admitted.append(group)
                tokens += decoder.num_tokens(group)
                group = next(remaining, None)
            decoder.admit(admitted, list(range(sum(map(len, admitted)))))

    return seconds_of(run, 3) / len(images), flops / len(images)


# ---------------------------------------------------------------- transformers


def peer_inputs(theirs, config, rows):
    """[(tiles, text)] as a left-padded batch, the format that `generate` expects."""
    tiles = [t for t, _ in rows]
    image_ids = lambda t: [VOCABULARY] * config.image_tokens(t.size)
    prompts = [[1, 2, *image_ids(t), *text] for t, text in rows]
    longest = max(map(len, prompts))
    device = theirs.device
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    pixels = (torch.stack if config.image_mode == "anyres" else torch.cat)([t.pixels for t in tiles])
    inputs = {"input_ids": padded, "attention_mask": mask}
    inputs["pixel_values"] = pixels.to(device, theirs.dtype)
    if config.image_mode == "anyres":
        inputs["image_sizes"] = torch.tensor([t.size[::-1] for t in tiles], device=device)
    return inputs


@torch.no_grad()
def peer(theirs, config, images, batch, tokens, **options):
    """Responses as lists of ids, two per image. `options` are generate's."""
    tiles = [tiles_of(image, config) for image in images]
    rows = [(image_tiles, text) for image_tiles in tiles for text in prompt_texts()]
    responses = []
    for start in range(0, len(rows), batch):
        inputs = peer_inputs(theirs, config, rows[start : start + batch])
        out = theirs.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                              eos_token_id=None, pad_token_id=0, **options)  # fmt: skip
        responses += out[:, inputs["input_ids"].shape[1] :].tolist()
    return responses


# ---------------------------------------------------------------- the comparison


@torch.no_grad()
def compare_logits(llava, theirs, image):
    tiles, text = tiles_of(image, llava.config), prompt_texts()[0]
    batch = llava.single_batch([1, 2, IMAGE, *text], [], [tiles])
    batch.scored = torch.arange(len(batch.ids), device=llava.device)[None]
    other = theirs(**peer_inputs(theirs, llava.config, [(tiles, text)])).logits[0].float()
    difference = llava(batch)[0] - other
    rms = lambda x: x.square().mean().sqrt()
    print(f"logits of one prompt: rms {rms(other):.3f}, largest {other.abs().max():.2f}; difference from "
          f"transformers: rms {rms(difference):.2g}, largest {difference.abs().max():.2g}")


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
    llava, theirs = build(args.size, args.image_mode, device, getattr(torch, args.dtype))
    config = fused(llava).config
    images = synthetic_images(min(args.pictures, 4) if args.memory_of else args.pictures)
    runs = {"stic_min": lambda: ours(llava, images, args.slots, args.tokens)}
    for name, batch in names.items():
        runs[name] = lambda batch=batch: peer(theirs, config, images, batch, args.tokens)
    if args.memory_of:
        print(json.dumps(peak_memory(runs[args.memory_of], device)))
        return

    compare_logits(llava, theirs, images[0])
    samples = runs["stic_min"]()
    keys = [(number, n) for number in range(len(images)) for n in PROMPTS]
    responses = peer(theirs, config, images, 1, args.tokens)
    same = sum(samples[key].ids == response for key, response in zip(keys, responses))
    print(f"{same} of {len(samples)} responses have the same tokens as transformers'")
    times = {name: median(seconds) for name, seconds in alternate(runs, args.repeat).items()}
    tokens = args.tokens * len(samples)
    total = times["stic_min"]
    rows = [
        [name, f"{s:.2f} s", f"{tokens / s:.1f}", f"{s / total:.2f}", f"{memory[name]:.2f} GiB"]
        for name, s in times.items()
    ]
    header = f"{len(images)} images, {args.image_mode}, two responses of {args.tokens} tokens"
    table([header, "median", "tokens/s", "ratio", "peak memory"], rows)

    prefilled, _ = prefill(llava, images[: max(1, args.slots // 2)], args.slots)
    length = 2 + config.image_tokens(images[0].size) + sum(PROMPTS) // len(PROMPTS) + args.tokens // 2
    step = decode_seconds(llava, args.slots, length)
    read, speed = bytes_read(llava, args.slots, length), bandwidth(device)
    print(f"ours: {1000 * prefilled:.1f} ms of prefill per image, then {1000 * step:.1f} ms per decode step "
          f"for {args.slots} sequences; reading its {read / 2**20:.0f} MiB at {speed / 2**30:.1f} GiB/s takes "
          f"{1000 * read / speed:.1f} ms")


if __name__ == "__main__":
    main()
