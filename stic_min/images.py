"""From image files to CLIP's input: opening them, the corruptions h(v) of Algorithm 1, cutting into tiles.

Two layouts, as in LLaVA:
  pad     v1.5 and all of STIC's training: one square tile, the image centered on CLIP's mean color;
  anyres  v1.6: the whole image as tile 0, then the tiles of a grid chosen by its aspect ratio.
Sizes are (width, height) everywhere, as in PIL. Decoding follows the official code: `.convert("RGB")`,
no EXIF rotation, transparency dropped. Only 16-bit gray differs, see `to_rgb`.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from stic_min import InputError
from stic_min.runtime.files import printable

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = tuple(int(255 * m) for m in CLIP_MEAN)  # (122, 116, 104), what `pad` fills with
# Limits on the shape. h(v) scales the short side to 20 pixels, and pad mode makes a square of the long side.
THINNEST = 500  # long side / short side
LARGEST_SQUARE = 4 * Image.MAX_IMAGE_PIXELS  # about 19,000 pixels on each side
# What Pillow raises for damaged files, all formats together.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, RuntimeError,
              Image.DecompressionBombError)  # fmt: skip
LOW_RESOLUTION = 20  # pixels on the short side
BRIGHTNESS, HUE = 0.5, 0.3  # color jitter: brightness factor in [1 - 0.5, 1 + 0.5], hue shift in [-0.3, 0.3]


# ---------------------------------------------------------------- opening


@functools.cache  # once: each change of the filters makes Python repeat warnings it has already shown
def silence_bomb_warning():
    """`check_header` raises an error instead. (`catch_warnings` is not thread-safe, threads load images.)"""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_header(opened: Image.Image) -> None:
    """Rejects what the header alone shows to be unusable, before anything is decoded.

    Between its pixel limit and twice that, Pillow only warns, although a few KB can unpack to that much.
    32-bit integer and float pixels do not define black and white: Pillow would clip them to 0 and 255.
    """
    if opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{opened.width}x{opened.height} is too many pixels; it may be a decompression bomb"
        )
    if opened.mode in ("I", "F"):
        kind = "integer" if opened.mode == "I" else "float"
        raise InputError(f"its pixels are 32-bit {kind}s: convert it to 8 or 16 bits")


def to_rgb(opened: Image.Image) -> Image.Image:
    """The official code's `.convert("RGB")`, but 16-bit gray becomes its high byte instead of all white."""
    if opened.mode.startswith("I;16"):
        opened.load()
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    return opened.convert("RGB")


def open_image(source, name: str | None = None) -> Image.Image:
    """Fully decoded RGB image from a path, or from an open file called `name` in messages."""
    silence_bomb_warning()
    path = printable(str(name or source))
    try:
        with Image.open(source) as opened:
            check_header(opened)
            image = to_rgb(opened)
    except UNREADABLE as error:
        reason = str(error)
        if isinstance(error, UnidentifiedImageError) and name:
            reason = "not an image that Pillow can read"  # Pillow's own message would name the file object
        raise InputError(f"can't read image {path}: {printable(reason)}") from None
    long, short = max(image.size), min(image.size)
    if long > THINNEST * short or long**2 > LARGEST_SQUARE:
        size = f"{image.width}x{image.height}"
        raise InputError(
            f"image {path} is {size}, too long and narrow: padded to a square, it would take gigabytes"
        )
    return image


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) from the file's header, without decoding the image."""
    silence_bomb_warning()
    try:
        with Image.open(path) as opened:
            check_header(opened)
            return opened.size
    except UNREADABLE as error:
        raise InputError(printable(f"can't read image {path}: {error}")) from None


# ---------------------------------------------------------------- h(v), the corruptions of Algorithm 1


def corrupt(image: Image.Image, seed: int) -> tuple[Image.Image, dict]:
    """h(v): low resolution or color jitter, each with probability 1/2 -> (image, sampled parameters).

    All randomness comes from one generator seeded with `seed`; torch's global state is untouched. The jitter
    samples in torchvision's order (a permutation of brightness, contrast, saturation, hue; then the factors),
    so that `jitter(image, g)` equals `ColorJitter(brightness=.5, hue=.3)` after `torch.manual_seed` with g's
    seed.
    """
    # Imported here because torchvision pulls in torch._dynamo, which takes seconds.
    from torchvision.transforms import functional as TF

    generator = torch.Generator().manual_seed(seed)
    if torch.rand(1, generator=generator).item() < 0.5:
        return TF.resize(image, LOW_RESOLUTION), {"kind": "low_resolution", "short_side": LOW_RESOLUTION}
    jittered, parameters = jitter(image, generator)
    return jittered, {"kind": "color_jitter", **parameters}


def jitter(image: Image.Image, generator: torch.Generator) -> tuple[Image.Image, dict]:
    """torchvision's ColorJitter(brightness=.5, hue=.3) with a generator -> (image, sampled parameters)."""
    from torchvision.transforms import functional as TF

    order = torch.randperm(4, generator=generator).tolist()
    order = [i for i in order if i in (0, 3)]  # 0: brightness, 3: hue; contrast and saturation are off
    brightness = torch.empty(1).uniform_(1 - BRIGHTNESS, 1 + BRIGHTNESS, generator=generator).item()
    hue = torch.empty(1).uniform_(-HUE, HUE, generator=generator).item()
    for step in order:
        image = TF.adjust_brightness(image, brightness) if step == 0 else TF.adjust_hue(image, hue)
    return image, {"brightness": brightness, "hue": hue, "brightness_first": order == [0, 3]}


# ---------------------------------------------------------------- tiles


@dataclass
class Tiles:
    """One image, ready for CLIP."""

    pixels: torch.Tensor  # (N, 3, side, side) float32, normalized
    size: tuple[int, int]  # (width, height) of the image
    grid: tuple[int, int] | None  # (columns, rows) of the tiles after tile 0; None in pad mode


def normalize(image):  # (side, side) RGB image -> (3, side, side)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # (side, side, 3)
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, side, side)


def pad_to_square(image):
    width, height = image.size
    if width == height:
        return image
    long = max(width, height)
    square = Image.new("RGB", (long, long), BACKGROUND)
    square.paste(image, ((long - width) // 2, (long - height) // 2))
    return square


def best_resolution(size: tuple[int, int], pinpoints) -> tuple[int, int]:
    """The (width, height) in `pinpoints` that keeps most of the image's pixels and wastes least.

    That is: the most pixels kept; among equals the fewest wasted; then the first listed.
    """
    width, height = size

    def fit(resolution):
        scale = min(resolution[0] / width, resolution[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)  # no credit for upscaling
        wasted = resolution[0] * resolution[1] - effective
        return effective, -wasted

    return max((tuple(p) for p in pinpoints), key=fit)


def place_on(image, resolution):
    """The image scaled to fit `resolution`, centered on black."""
    width, height = image.size
    full_width, full_height = resolution
    scale_w, scale_h = full_width / width, full_height / height
    if scale_w < scale_h:
        new_size = full_width, min(math.ceil(height * scale_w), full_height)
    else:
        new_size = min(math.ceil(width * scale_h), full_width), full_height
    canvas = Image.new("RGB", resolution)
    corner = (full_width - new_size[0]) // 2, (full_height - new_size[1]) // 2
    canvas.paste(image.resize(new_size, Image.BICUBIC), corner)
    return canvas


def make_tiles(image: Image.Image, mode: str, side: int, pinpoints=None) -> Tiles:
    """RGB image -> Tiles; mode: pad or anyres, side: CLIP's input size, pinpoints: the anyres resolutions."""
    if mode == "pad":
        square = pad_to_square(image).resize((side, side), Image.BICUBIC)
        return Tiles(normalize(square)[None], image.size, None)
    resolution = best_resolution(image.size, pinpoints)
    columns, rows = resolution[0] // side, resolution[1] // side
    canvas = place_on(image, resolution)
    # Tile 0 is the whole image, stretched to a square, as in LLaVA.
    tiles = [image.resize((side, side), Image.BICUBIC)]
    for y in range(rows):
        for x in range(columns):
            tiles.append(canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)))
    return Tiles(torch.stack([normalize(tile) for tile in tiles]), image.size, (columns, rows))


def unpadded(size: tuple[int, int], grid: tuple[int, int], patches: int) -> tuple[int, int, int, int]:
    """The part of the tiled feature map that shows the image, not black bars: (top, bottom, left, right).

    `patches` is the number of patches along a tile's side. Rounds down twice, as LLaVA does: where
    the two bars together are an odd number of rows, one of these rows stays, and a very flat image keeps no
    row at all (top == bottom).
    """
    width, height = size
    columns, rows = grid[0] * patches, grid[1] * patches
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - int(width * (rows / height))) // 2
    return 0, rows, margin, columns - margin


def image_tokens(size: tuple[int, int], mode: str, side: int, patch: int, pinpoints=None) -> int:
    """Number of positions that an image of `size` takes in the sequence (640x480 in anyres: 2340)."""
    patches = side // patch
    if mode == "pad":
        return patches**2
    width, height = best_resolution(size, pinpoints)
    top, bottom, left, right = unpadded(size, (width // side, height // side), patches)
    return patches**2 + (bottom - top) * (right - left + 1)  # + 1: one image_newline per row
