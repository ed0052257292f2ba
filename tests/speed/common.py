"""What the benchmarks share: models of three sizes with the same random weights in stic_min and transformers, drawn
pictures, and alternating runs with medians."""

import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers as hf
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from stic_min import check
from stic_min.clip import ClipConfig
from stic_min.formats.tensors import canonical
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
    """Prompts are ids here, and no row ends by itself."""

    eos = -1


def configuration(size, image_mode):
    (width, mlp, layers, heads, kv), clip = SIZES[size]
    decoder = DecoderConfig(width, mlp, layers, heads, kv, VOCABULARY + 64, 1e-6, 1e6, 32768)
    pinpoints = PINPOINTS if image_mode == "anyres" else None
    return LlavaConfig(decoder, ClipConfig(*clip), image_mode, pinpoints, "mistral_instruct", 32768)


def build_ours(size, image_mode, device, dtype, seed=0):
    """Ours with random weights."""
    with torch.device(device):
        torch.manual_seed(seed)
        llava = LLaVA(configuration(size, image_mode), Tokenizer())
    torch.nn.init.normal_(llava.vision_tower.embeddings.class_embedding, std=0.02)
    if llava.image_newline is not None:
        torch.nn.init.normal_(llava.image_newline, std=0.02)
    return llava.to(dtype).eval().requires_grad_(False)


def build(size, image_mode, device, dtype, seed=0):
    """(LLaVA, transformers' LlavaNext or Llava) with the same weights."""
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
    with torch.device(device):
        torch.manual_seed(seed)
        if image_mode == "anyres":
            config = hf.LlavaNextConfig(**config, image_grid_pinpoints=[list(p) for p in PINPOINTS])
            theirs = hf.LlavaNextForConditionalGeneration(config)
        else:
            theirs = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**config))
    theirs, ours = theirs.to(dtype).eval(), build_ours(size, image_mode, device, dtype)
    named = {canonical(key): tensor for key, tensor in theirs.state_dict().items()}
    ours.load_state_dict({key: named[key] for key in ours.state_dict()})
    return ours, theirs


def pictures(count, size=(640, 480), seed=0):
    """Drawn pictures; what is on them does not matter, their size does."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        picture = Image.new("RGB", size, tuple(torch.randint(256, (3,), generator=generator).tolist()))
        pen = ImageDraw.Draw(picture)
        for _ in range(8):
            x, y, r, *color = torch.randint(20, 256, (6,), generator=generator).tolist()
            pen.ellipse((2 * x - r, 2 * y - r, 2 * x + r, 2 * y + r), fill=tuple(color))
        made.append(picture)
    return made


def alternate(runs, repeat):
    """{name: function} -> {name: [seconds]}; one round to warm up, then `repeat` rounds of all in turn."""
    times = {name: [] for name in runs}
    for round in range(repeat + 1):
        for name, run in runs.items():
            print(f"\r\x1b[Kround {round}/{repeat}: {name}", end="", file=sys.stderr, flush=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round:
                times[name].append(time.perf_counter() - begin)
    print("\r\x1b[K", end="", file=sys.stderr)
    return times


def median(seconds):
    return statistics.median(seconds)


def peak_memory(step, device):
    """Bytes that a step takes at its peak, over what there was before; the second of two, when all is set up."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    resident = lambda name: int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    step()
    return resident("VmHWM") - before


def memory_of_each(module, names):
    """{name: GiB} of what `module` says with --memory-of, in processes of their own. To be called before this one
    holds the models itself."""
    memory = {}
    for name in names:
        command = [sys.executable, module, *sys.argv[1:], "--memory-of", name]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        memory[name] = json.loads(said.splitlines()[-1]) / 2**30
    return memory


def table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)))


def bandwidth(device):
    """Bytes a second that a plain sum over 1 GiB reads."""
    data = torch.ones(1 << 28, device=device)
    return data.numel() * 4 / median(alternate({"bandwidth": lambda: data.sum().item()}, 5)["bandwidth"])


# ---------------------------------------------------------------- needed arithmetic

# Dense bf16 operations a second, as the data sheets have them.
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device, dtype):
    """(operations a second, where that is from): the data sheet's, or what a large matrix product reaches here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, flops in DATA_SHEET.items():
            if name in torch.cuda.get_device_name(device):
                return flops, f"{name}'s data sheet"
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(alternate({"matrix product": lambda: x @ x}, 5)["matrix product"]), "a large matrix product"


def needed_flops(batch, config, r, reference):
    """Of a training step on `batch`, as check.decoder_flops counts, and CLIP once for each picture."""
    spans = [(span.end - span.start, span.prefix[1] - span.prefix[0]) for span in batch.attend.spans]
    decoder = check.decoder_flops(config.decoder, spans, int((batch.labels != IGNORE).sum()), r, reference)
    vision, C, Cv = config.vision, config.decoder.hidden_size, config.vision.hidden_size
    patches = sum(len(t.pixels) for t in batch.tiles) * vision.patches**2
    layer = 8 * Cv**2 + 4 * Cv * vision.intermediate_size + 4 * vision.patches**2 * Cv
    projector = 2 * Cv * C + 2 * C * C
    return decoder + patches * ((vision.num_hidden_layers - 1) * layer + projector)  # its last layer is not used


def compare(module, names, make, args, title, flops):
    """Median time, its ratio to ours, the share of the peak that the needed `flops` are, and peak memory of the steps
    make(name, args), as a table."""
    memory = memory_of_each(module, names)
    steps = {name: make(name, args) for name in names}
    print("loss:", {name: round(step(), 4) for name, step in steps.items()}, file=sys.stderr)
    times = {name: median(seconds) for name, seconds in alternate(steps, args.repeat).items()}
    whole, (peak, source) = times["stic_min"], peak_flops(torch.device(args.device), getattr(torch, args.dtype))
    rows = [
        [name, f"{s:.3g} s", f"{s / whole:.2f}", f"{flops / s / peak:.0%}", f"{memory[name]:.2f} GiB"]
        for name, s in times.items()
    ]
    table([title, "median", "ratio", "MFU", "peak memory"], rows)
    print(f"needed: {flops / 1e12:.3g} TFLOP; roofline: {flops / peak:.3g} s at {peak / 1e12:.3g} TFLOP/s ({source})")
