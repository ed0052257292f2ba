"""Pictures in: opening, corrupting h(v) (Algorithm 1), and cutting into tiles for CLIP.

Two layouts, as in LLaVA:
  pad     v1.5 and all of STIC's training: one square tile, the picture centred on CLIP's mean colour;
  anyres  v1.6: the whole picture as tile 0, then the tiles of a grid that fits its shape.
Sizes are (width, height) everywhere, as in PIL. Decoding follows the official code: `.convert("RGB")`,
no EXIF rotation, transparency dropped. Only 16-bit gray differs, see `to_rgb`.
"""

import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import functional as TF

from stic_min import InputError
from stic_min.runtime.files import brief, printable

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = tuple(int(255 * m) for m in CLIP_MEAN)  # (122, 116, 104), what `pad` fills with
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOREIGN = {".heic", ".heif", ".avif"}  # what phones write; not every Pillow reads them
THINNEST = 500  # long side to short side; h(v) makes the short one 20 pixels, and pad mode a square of the long one
LARGEST_SQUARE = 4 * Image.MAX_IMAGE_PIXELS  # about 19,000 pixels a side
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_header` makes it an error
# What Pillow raises for damaged files, all formats together.
UNREADABLE = OSError, SyntaxError, ValueError, TypeError, AttributeError, RuntimeError, Image.DecompressionBombError
LOW_RESOLUTION = 20  # pixels on the short side
BRIGHTNESS, HUE = 0.5, 0.3  # colour jitter: factor in [1 - 0.5, 1 + 0.5], hue shift in [-0.3, 0.3]


# ---------------------------------------------------------------- files


def image_path(folder, name):
    """The file `name` inside `folder`. Raises InputError if it leads out of it, by its name or by a link, or nothing is
    there."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise InputError(f"image name {brief(ascii(name))} is not valid Unicode") from None
    path = Path(folder) / str(name)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise InputError(f"image '{brief(name)}' points outside the image folder {folder}")
    try:
        found = path.is_file()
        outside = found and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise InputError(f"no such image: '{Path(folder) / brief(name)}'")
    if outside:
        raise InputError(f"image '{brief(name)}' is a link that leads outside the image folder {folder}")
    return path


def check_folder(folder):
    """Raises InputError if `folder`, given as --images, is not a folder."""
    if Path(folder).is_file():
        raise InputError(f"--images {folder} is a file, it has to name the folder of the images")
    if not Path(folder).is_dir():
        raise InputError(f"no such image folder: {folder}")


def foreign_images(folder):
    """How many images in `folder` are in formats that are not read: "12 .heic files"; empty if there are none."""
    count = Counter(p.suffix.lower() for p in Path(folder).iterdir() if p.suffix.lower() in FOREIGN)
    return " and ".join(f"{n} {suffix} file{'s' * (n > 1)}" for suffix, n in sorted(count.items()))


def list_images(folder):
    """Names of the images in `folder`, sorted. Raises InputError if there is none, and says what is there instead."""
    check_folder(folder)
    readable = lambda path: path.suffix.lower() in SUFFIXES and path.is_file()
    names = sorted(path.name for path in Path(folder).iterdir() if readable(path))
    if names:
        return names
    if foreign := foreign_images(folder):
        raise InputError(f"no images in {folder} but {foreign}: convert them to JPEG or PNG")
    nested = [path.relative_to(folder) for path in Path(folder).rglob("*") if readable(path)]
    if nested:
        largest = Counter(path.parent for path in nested).most_common(1)[0][0]
        raise InputError(f"no images directly in {folder}, but {len(nested)} in its subfolders such as {largest}/: "
                         "pass one of them, or list them with --names")
    raise InputError(f"no pictures ({' '.join(sorted(SUFFIXES))}) in {folder}")


def check_header(opened):
    """What can be refused before decoding. Raises as Pillow does.

    Pillow only warns between its limit of pixels and twice that; a few KB can unpack to so much. 32-bit and float
    pixels have no range that says what is black and what is white: Pillow would clip them to 0 and 255.
    """
    if opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{opened.width}x{opened.height} are too many pixels, it may be a bomb")
    if opened.mode in ("I", "F"):
        kind = "integer" if opened.mode == "I" else "float"
        raise InputError(f"its pixels are 32-bit {kind}s: convert it to 8 or 16 bits")


def to_rgb(opened):
    """As the official code's `.convert("RGB")`, but for 16-bit gray, which that makes all white: its high byte."""
    if opened.mode.startswith("I;16"):
        opened.load()
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    return opened.convert("RGB")


def open_image(source, name=None):
    """RGB picture, fully decoded, from a path or an open file of this name. Raises InputError naming it."""
    path = printable(str(name or source))
    try:
        with Image.open(source) as opened:
            check_header(opened)
            picture = to_rgb(opened)
    except UNREADABLE as error:
        said = "not a picture that Pillow reads" if isinstance(error, UnidentifiedImageError) and name else error
        raise InputError(f"can't read image {path}: {printable(str(said))}") from None
    if max(picture.size) > THINNEST * min(picture.size) or max(picture.size) ** 2 > LARGEST_SQUARE:
        size = f"{picture.width}x{picture.height}"
        raise InputError(f"image {path} is {size}: too long a strip, padded to a square it would take gigabytes")
    return picture


def image_size(path):
    """(width, height) from the file's header, without decoding it."""
    try:
        with Image.open(path) as picture:
            check_header(picture)
            return picture.size
    except UNREADABLE as error:
        raise InputError(printable(f"can't read image {path}: {error}")) from None


# ---------------------------------------------------------------- h(v), the corruptions of Algorithm 1


def corrupt(picture, seed):
    """h(v): low resolution or colour jitter, half each. Returns the picture and what was drawn.

    All randomness comes from one generator seeded with `seed`; torch's global state is untouched. The jitter draws
    in torchvision's order (a permutation of brightness, contrast, saturation, hue, then the factors), so that
    `jitter(picture, g)` equals `ColorJitter(brightness=.5, hue=.3)` after `torch.manual_seed` of g's seed.
    """
    generator = torch.Generator().manual_seed(seed)
    if torch.rand(1, generator=generator).item() < 0.5:
        return TF.resize(picture, LOW_RESOLUTION), {"kind": "low_resolution", "short_side": LOW_RESOLUTION}
    picture, drawn = jitter(picture, generator)
    return picture, {"kind": "color_jitter", **drawn}


def jitter(picture, generator):
    """torchvision's ColorJitter(brightness=.5, hue=.3), its draws from `generator` -> (picture, what was drawn)."""
    order = [i for i in torch.randperm(4, generator=generator).tolist() if i in (0, 3)]  # contrast, saturation: off
    brightness = torch.empty(1).uniform_(1 - BRIGHTNESS, 1 + BRIGHTNESS, generator=generator).item()
    hue = torch.empty(1).uniform_(-HUE, HUE, generator=generator).item()
    for step in order:
        picture = TF.adjust_brightness(picture, brightness) if step == 0 else TF.adjust_hue(picture, hue)
    return picture, {"brightness": brightness, "hue": hue, "brightness_first": order == [0, 3]}


# ---------------------------------------------------------------- tiles


@dataclass
class Tiles:
    """One picture, ready for CLIP."""

    pixels: torch.Tensor  # (N, 3, side, side) float32, normalised
    size: tuple  # (width, height) of the picture
    grid: tuple | None  # (columns, rows) of the tiles after tile 0; None in pad mode


def normalise(picture):  # (side, side) RGB picture -> (3, side, side)
    pixels = np.asarray(picture, dtype=np.float32) / np.float32(255)  # (side, side, 3)
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, side, side)


def pad_to_square(picture):
    width, height = picture.size
    if width == height:
        return picture
    long = max(width, height)
    square = Image.new("RGB", (long, long), BACKGROUND)
    square.paste(picture, ((long - width) // 2, (long - height) // 2))
    return square


def best_resolution(size, pinpoints):
    """The listed (width, height) that keeps most of the picture's pixels, then wastes least; the first wins ties."""
    width, height = size

    def fit(resolution):
        scale = min(resolution[0] / width, resolution[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - resolution[0] * resolution[1]  # the second: minus the wasted pixels

    return max((tuple(p) for p in pinpoints), key=fit)


def place_on(picture, resolution):
    """The picture scaled to fit `resolution`, centred on black."""
    (width, height), (full_width, full_height) = picture.size, resolution
    scale_w, scale_h = full_width / width, full_height / height
    if scale_w < scale_h:
        new_size = full_width, min(math.ceil(height * scale_w), full_height)
    else:
        new_size = min(math.ceil(width * scale_h), full_width), full_height
    canvas = Image.new("RGB", resolution)
    corner = (full_width - new_size[0]) // 2, (full_height - new_size[1]) // 2
    canvas.paste(picture.resize(new_size, Image.BICUBIC), corner)
    return canvas


def make_tiles(picture, mode, side, pinpoints=None):
    """PIL RGB picture -> Tiles. `mode` is pad or anyres, `side` CLIP's input, `pinpoints` the anyres resolutions."""
    if mode == "pad":
        square = pad_to_square(picture).resize((side, side), Image.BICUBIC)
        return Tiles(normalise(square)[None], picture.size, None)
    resolution = best_resolution(picture.size, pinpoints)
    grid = resolution[0] // side, resolution[1] // side
    canvas = place_on(picture, resolution)
    # Tile 0 is the whole picture without its aspect ratio, as upstream.
    tiles = [picture.resize((side, side), Image.BICUBIC)]
    for y in range(grid[1]):
        for x in range(grid[0]):
            tiles.append(canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)))
    return Tiles(torch.stack([normalise(t) for t in tiles]), picture.size, grid)


def unpadded(size, grid, patches):
    """Rows and columns of the tiled feature map that hold picture, not black bars: (top, bottom, left, right).

    `patches` is the number of patches along a tile's side. Rounds down twice, as upstream; an odd leftover keeps a
    padding row, and a very flat picture keeps none (top == bottom).
    """
    width, height = size
    columns, rows = grid[0] * patches, grid[1] * patches
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - int(width * (rows / height))) // 2
    return 0, rows, margin, columns - margin


def image_tokens(size, mode, side, patch, pinpoints=None):
    """How many positions a picture of `size` takes in the sequence (640x480 in anyres: 2340)."""
    patches = side // patch
    if mode == "pad":
        return patches**2
    resolution = best_resolution(size, pinpoints)
    top, bottom, left, right = unpadded(size, (resolution[0] // side, resolution[1] // side), patches)
    return patches**2 + (bottom - top) * (right - left + 1)  # + 1: one image_newline a row
