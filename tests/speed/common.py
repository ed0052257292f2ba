"""Shared by the speed scripts: models of three sizes with the same random weights in stic_min and
transformers, synthetic images, and repeated runs with medians."""

import contextlib
import ctypes
import functools
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the scripts run from any folder

from stic_min import cost
from stic_min.clip import ClipConfig
from stic_min.formats.tensors import canonical
from stic_min.fused import fuse
from stic_min.llava import LLaVA, LlavaConfig
from stic_min.loss import IGNORE
from stic_min.mistral import DecoderConfig

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SIZES = {  # decoder: width, MLP, layers, heads, key-value heads; CLIP: width, MLP, layers, heads
    "tiny": ((128, 384, 4, 4, 2), (64, 256, 3, 4)),
    "small": ((512, 1536, 16, 8, 4), (256, 1024, 6, 4)),
    "7b": ((4096, 14336, 32, 32, 8), (1024, 4096, 24, 16)),
}
VOCABULARY = 32000


class Tokenizer:
    """Stands in for a tokenizer: prompts are token ids already, and no sequence ends by itself."""

    eos = -1


def configuration(size, image_mode):
    (width, mlp, layers, heads, kv), clip = SIZES[size]
    decoder = DecoderConfig(width, mlp, layers, heads, kv, VOCABULARY + 64, 1e-6, 1e6, 32768)
    pinpoints = PINPOINTS if image_mode == "anyres" else None
    return LlavaConfig(decoder, ClipConfig(*clip), image_mode, pinpoints, "mistral_instruct", 32768)


@contextlib.contextmanager
def creating(dtype, device):
    """Inside, modules are created in `dtype`: a 7B model in fp32 takes 30 GB.

    Casting them afterwards would also round the rotary frequencies, which transformers keeps in fp32.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def build_ours(size, image_mode, device, dtype, seed=0):
    """stic_min's LLaVA with random weights."""
    with creating(dtype, device):
        torch.manual_seed(seed)
        llava = LLaVA(configuration(size, image_mode), Tokenizer())
    torch.nn.init.normal_(llava.vision_tower.embeddings.class_embedding, std=0.02)
    if llava.image_newline is not None:
        torch.nn.init.normal_(llava.image_newline, std=0.02)
    return llava.eval().requires_grad_(False)


def build_peer(size, image_mode, device, dtype, seed=0):
    """transformers' LlavaNext or Llava with random weights."""
    import transformers as hf

    (width, mlp, layers, heads, kv), (vision_width, vision_mlp, vision_layers, vision_heads) = SIZES[size]
    vision = hf.CLIPVisionConfig(
        hidden_size=vision_width, intermediate_size=vision_mlp, num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads, image_size=336, patch_size=14,
    )  # fmt: skip
    text = hf.MistralConfig(
        vocab_size=VOCABULARY + 64, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=32768, sliding_window=None,
        rope_theta=1e6, rms_norm_eps=1e-6,
    )  # fmt: skip
    config = {"vision_config": vision, "text_config": text, "image_token_index": VOCABULARY}
    with creating(dtype, device):
        torch.manual_seed(seed)
        if image_mode == "anyres":
            config = hf.LlavaNextConfig(**config, image_grid_pinpoints=[list(p) for p in PINPOINTS])
            theirs = hf.LlavaNextForConditionalGeneration(config)
        else:
            theirs = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**config))
    return theirs.eval().requires_grad_(False)


def build(size, image_mode, device, dtype, seed=0):
    """(LLaVA, transformers' LlavaNext or Llava), which share their weights in memory."""
    theirs = build_peer(size, image_mode, device, dtype, seed)
    named = {canonical(key): tensor for key, tensor in theirs.state_dict().items()}
    with torch.device("meta"):
        ours = LLaVA(configuration(size, image_mode), Tokenizer())
    ours.load_state_dict({key: named[key] for key in ours.state_dict()}, assign=True)
    return ours.eval().requires_grad_(False), theirs


def fused(llava):
    """On a GPU, fuses linear layers for sampling, like generate.open_model."""
    if llava.device.type == "cuda":
        fuse(llava)
    return llava


def free_memory():
    """Returns the memory of deleted models to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synthetic_images(count, size=(640, 480), seed=0):
    """Images of random circles; only their size matters."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        image = Image.new("RGB", size, tuple(torch.randint(256, (3,), generator=generator).tolist()))
        pen = ImageDraw.Draw(image)
        for _ in range(8):
            x, y, r, *color = torch.randint(20, 256, (6,), generator=generator).tolist()
            pen.ellipse((2 * x - r, 2 * y - r, 2 * x + r, 2 * y + r), fill=tuple(color))
        images.append(image)
    return images


def alternate(runs, repeat):
    """{name: function} -> {name: [seconds]}: a warm-up round, then `repeat` rounds that run each in turn.

    On a GPU, whose speed varies little, one after the other instead, so that each has the memory to itself.
    """
    rounds = [(name, i) for i in range(repeat + 1) for name in runs]
    if torch.cuda.is_available():
        rounds = [(name, i) for name in runs for i in range(repeat + 1)]
    times = {name: [] for name in runs}
    for name, round_number in rounds:
        if sys.stderr.isatty():
            print(f"\r\x1b[Kround {round_number}/{repeat}: {name}", end="", file=sys.stderr, flush=True)
        if torch.cuda.is_available():
            if round_number == 0:
                free_memory()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        runs[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if round_number:
            times[name].append(time.perf_counter() - begin)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return times


def median(seconds):
    return statistics.median(seconds)


def seconds_of(run, repeat=5):
    """Median time of run()."""
    return median(alternate({"": run}, repeat)[""])


def peak_memory(step, device):
    """Peak bytes of a step above the memory in use before it; the second of two steps is measured."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    step()
    return resident_memory("VmHWM") - before


def resident_memory(field="VmRSS"):
    """Bytes of this process's memory, from Linux's /proc."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def memory_of_each(module, names):
    """{name: GiB} as printed by `module --memory-of name`, each in a separate process. Call it before this
    process builds the models."""
    memory = {}
    for name in names:
        command = [sys.executable, module, *sys.argv[1:], "--memory-of", name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        memory[name] = json.loads(output.splitlines()[-1]) / 2**30
    return memory


def lines(header, rows):
    """A table as lines of text."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rows = [header, ["-" * w for w in widths], *rows]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def table(header, rows):
    print("\n".join(lines(header, rows)))


# ---------------------------------------------------------------- what the device can do


@functools.cache
def bandwidth(device):
    """Bytes per second read by a plain sum over 1 GiB."""
    data = torch.ones(1 << 28, device=device)
    reads = 10 if device.type == "cuda" else 1
    return reads * data.numel() * 4 / seconds_of(lambda: [data.sum() for _ in range(reads)])


@functools.cache
def product_flops(device, dtype):
    """Operations per second of a large matrix product."""
    n, products = (8192, 10) if device.type == "cuda" else (2048, 1)
    x = torch.randn(n, n, device=device, dtype=dtype)
    return products * 2 * n**3 / seconds_of(lambda: [x @ x for _ in range(products)])


# ---------------------------------------------------------------- required FLOPs


def vision_flops(tiles, config):
    """FLOPs of CLIP and the projector, once for each image."""
    vision, C, Cv = config.vision, config.decoder.hidden_size, config.vision.hidden_size
    patches = sum(len(t.pixels) for t in tiles) * vision.patches**2
    layers = vision.num_hidden_layers - 1  # CLIP's last layer is unused
    layer = 8 * Cv**2 + 4 * Cv * vision.intermediate_size + 4 * vision.patches**2 * Cv
    projector = 2 * Cv * C + 2 * C * C
    return patches * (layers * layer + projector)


def span_lengths(batch):
    """[(tokens, tokens of the prefix they attend to)], as cost.decoder_flops takes them."""
    return [(span.end - span.start, span.prefix[1] - span.prefix[0]) for span in batch.attend.spans]


def needed_flops(batch, config, r, reference):
    """FLOPs of a training step on `batch`: the decoder by cost.decoder_flops, and CLIP once per image."""
    scored = int((batch.labels != IGNORE).sum())
    decoder = cost.decoder_flops(config.decoder, span_lengths(batch), scored, r, reference)
    return decoder + vision_flops(batch.tiles, config)


def prefill_flops(batch, config):
    """FLOPs of a forward pass on prompts, with one position scored for each."""
    count = lambda reference: cost.decoder_flops(
        config.decoder, span_lengths(batch), len(batch.attend.prompts()), 0, reference
    )
    return count(True) - count(False) + vision_flops(batch.tiles, config)  # the reference's forward alone


def compare(module, peers, make, args, title, flops):
    """Prints a table of the steps in make(peer, args) -> {name: step}, of which one is ours: median time,
    ratio to ours, share of a matrix product's FLOP/s for the required `flops`, and peak memory.

    The models of one peer are freed before those of the next are created.
    """
    memory = memory_of_each(module, ["stic_min", *peers])
    times = {name: [] for name in ["stic_min", *peers]}
    for peer in peers:
        steps = make(peer, args)
        print("loss:", {name: round(step(), 4) for name, step in steps.items()}, file=sys.stderr)
        for name, seconds in alternate(steps, args.repeat).items():
            times[name] += seconds
        del steps
        free_memory()
    times = {name: median(seconds) for name, seconds in times.items()}
    ours = times["stic_min"]
    peak = product_flops(torch.device(args.device), getattr(torch, args.dtype))
    rows = [
        [name, f"{s:.3g} s", f"{s / ours:.2f}", f"{flops / s / peak:.0%}", f"{memory[name]:.2f} GiB"]
        for name, s in times.items()
    ]
    table([title, "median", "ratio", "MFU", "peak memory"], rows)
    roofline = f"{flops / peak:.3g} s at the {peak / 1e12:.3g} TFLOP/s of a large matrix product"
    print(f"required: {flops / 1e12:.3g} TFLOP; roofline: {roofline}")
