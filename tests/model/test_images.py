"""Images: token counts, how tiles are cut and arranged, the corruptions h(v), unreadable files."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter

from stic_min import InputError
from stic_min.formats.image_folder import foreign_images, image_path, list_images
from stic_min.images import (
    best_resolution,
    corrupt,
    image_size,
    image_tokens,
    jitter,
    make_tiles,
    open_image,
    place_on,
)
from stic_min.llava import arrange
from stic_min.runtime.files import brief

SIDE, PATCH = 336, 14
PATCHES = SIDE // PATCH  # 24 along a side
BACKGROUND = 122, 116, 104  # CLIP's mean color, rounded down
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-v1.6's


def noise(width, height, mode="RGB", seed=0):
    return Image.frombytes(mode, (width, height), random.Random(seed).randbytes(width * height * len(mode)))


def color(tile):
    """The middle pixel of a normalized tile (3, side, side) as its original 8-bit color."""
    middle = tile[:, tile.shape[1] // 2, tile.shape[2] // 2]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return tuple(round(255 * (v * s + m)) for v, m, s in zip(middle.tolist(), mean, std))


def test_import_is_quick_and_leaves_warning_filters_alone():
    """torchvision takes seconds to import, and only corruptions need it."""
    code = """
import sys, warnings, numpy, torch, PIL.Image
filters = list(warnings.filters)
import stic_min.images
print(filters == warnings.filters, "torchvision" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


# ---------------------------------------------------------------- image tokens


@pytest.mark.parametrize(
    "size, tokens",
    [
        *[((640, 480), 2340), ((480, 640), 2352), ((640, 427), 2144), ((427, 640), 2160)],
        *[((337, 337), 2928), ((1000, 1000), 2928), ((336, 336), 1176), ((20, 20), 1176), ((1, 1), 1176)],
        ((2000, 20), 576),
        ((26, 20), 1026),  # 640x480 in low resolution
    ],
)
def test_tokens_of_v16(size, tokens):
    assert image_tokens(size, "anyres", SIDE, PATCH, PINPOINTS) == tokens
    assert image_tokens(size, "pad", SIDE, PATCH, PINPOINTS) == 576


def upstream_layout(size):
    """The official arithmetic, reimplemented: the best resolution, and the features that remain after
    unpadding."""
    width, height = size
    best, most, least_waste = None, 0, float("inf")
    for full_w, full_h in PINPOINTS:
        scale = min(full_w / width, full_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = full_w * full_h - effective
        if effective > most or (effective == most and waste < least_waste):
            best, most, least_waste = (full_w, full_h), effective, waste
    columns, rows = best[0] // PATCH, best[1] // PATCH
    index = torch.arange(rows * columns).view(rows, columns)
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return best, index[padding : rows - padding, :]
    padding = (columns - int(width * (rows / height))) // 2
    return best, index[:, padding : columns - padding]


def sizes(count):
    rng = random.Random(0)
    yield from [(1, 1), (1, 3000), (3000, 1), (3000, 3000), (336, 336), (337, 336), (671, 673), (3000, 125)]
    for _ in range(count - 8):
        top = rng.choice([8, 40, 700, 3000])
        yield rng.randint(1, top), rng.randint(1, rng.choice([top, 3000]))


def test_token_counts_and_order_for_1000_sizes():
    """Counts and order: the features of the tiled map are numbered row by row, newlines are -1, tile 0 is
    -2."""
    for size in sizes(1000):
        resolution = best_resolution(size, PINPOINTS)
        best, kept = upstream_layout(size)
        assert resolution == best, size
        columns, rows = resolution[0] // SIDE, resolution[1] // SIDE
        number = torch.arange(rows * columns * PATCHES**2).view(rows, PATCHES, columns, PATCHES)
        tiles = number.transpose(1, 2).reshape(rows * columns, PATCHES**2)  # cut row by row
        features = torch.cat([torch.full((1, PATCHES**2), -2), tiles]).float()[..., None]  # (N, S, 1)
        laid = arrange(features, SimpleNamespace(grid=(columns, rows), size=size), -torch.ones(1))
        assert len(laid) == image_tokens(size, "anyres", SIDE, PATCH, PINPOINTS), size
        expected = torch.cat([kept, torch.full((len(kept), 1), -1)], dim=1).flatten().float()
        assert torch.equal(laid[:576, 0], torch.full((576,), -2.0)), size
        assert torch.equal(laid[576:, 0], expected), size


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("mode", ["pad", "anyres"])
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (900, 2), (337, 336), (26, 20)])
def test_tiles_agree_with_the_token_count(size, mode):
    tiles = make_tiles(noise(*size), mode, SIDE, PINPOINTS)
    number = 1 if mode == "pad" else 1 + tiles.grid[0] * tiles.grid[1]
    assert tiles.pixels.shape == (number, 3, SIDE, SIDE) and tiles.pixels.dtype == torch.float32
    laid = arrange(torch.zeros(number, PATCHES**2, 2), tiles, torch.zeros(2))
    assert tiles.size == size and len(laid) == image_tokens(size, mode, SIDE, PATCH, PINPOINTS)


def test_pad_centers_the_image_on_the_mean_color():
    wide, tall = (make_tiles(Image.new("RGB", s, "white"), "pad", 80).pixels[0] for s in ((80, 40), (40, 80)))
    for tile in (wide, tall.transpose(1, 2)):
        assert color(tile) == (255, 255, 255) and color(tile[:, :18]) == color(tile[:, 62:]) == BACKGROUND


def test_best_fit_wastes_least_and_rounds_up():
    assert best_resolution((100, 100), [[672, 672], [336, 672], [672, 336]]) == (336, 672)
    canvas = place_on(Image.new("RGB", (500, 333), "white"), (672, 672))  # 333 * 672 / 500 = 447.6
    assert canvas.getbbox() == (0, 112, 672, 112 + 448)


def test_anyres_puts_the_whole_image_first_then_tiles_row_by_row():
    image = Image.new("RGB", (672, 600))
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    for i, rgb in enumerate(colors):
        image.paste(rgb, (336 * (i % 2), 300 * (i // 2), 336 * (i % 2) + 336, 300 * (i // 2) + 300))
    tiles = make_tiles(image, "anyres", SIDE, PINPOINTS)
    assert tiles.grid == (2, 2) and [color(t) for t in tiles.pixels[1:]] == colors
    top, bottom = tiles.pixels[1][:, :30], tiles.pixels[3][:, -30:]
    assert color(top) == color(bottom) == (0, 0, 0)  # bars of (672 - 600) / 2 = 36 black rows
    quarters = [tiles.pixels[0][:, y : y + 168, x : x + 168] for y in (0, 168) for x in (0, 168)]
    assert [color(q) for q in quarters] == colors  # the whole image, without bars


# ---------------------------------------------------------------- h(v)


def test_corrupt_uses_both_kinds_equally_and_depends_only_on_its_seed():
    image, before = noise(64, 48), noise(64, 48).tobytes()
    state = torch.get_rng_state()
    corrupted = [corrupt(image, seed) for seed in range(200)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    again = [corrupt(image, seed) for seed in range(200)]
    assert [(p.tobytes(), d) for p, d in corrupted] == [(p.tobytes(), d) for p, d in again]
    assert image.tobytes() == before
    low = [p for p, d in corrupted if d["kind"] == "low_resolution"]
    jittered = [(p, d) for p, d in corrupted if d["kind"] == "color_jitter"]
    assert 86 < len(low) < 114 and len(low) + len(jittered) == 200
    assert {p.size for p in low} == {(26, 20)} and {p.size for p, _ in jittered} == {(64, 48)}
    assert len({p.tobytes() for p, _ in jittered}) == len(jittered)  # each has its own colors
    assert all(0.5 <= d["brightness"] <= 1.5 and -0.3 <= d["hue"] <= 0.3 for _, d in jittered)
    assert {d["brightness_first"] for _, d in jittered} == {True, False}


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 200), (20, 20)])
def test_corrupt_any_size(size):
    for seed in range(6):  # both kinds occur
        image, parameters = corrupt(noise(*size), seed)
        assert image.mode == "RGB" and (image.size == size or min(image.size) == 20)
        assert min(image.size) == 20 or parameters["kind"] == "color_jitter"


@pytest.mark.parametrize("seed", range(4))
def test_jitter_equals_torchvisions(seed):
    image = noise(30, 20)
    ours, _ = jitter(image, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = ColorJitter(brightness=0.5, hue=0.3)(image)
    assert ours.tobytes() == theirs.tobytes() != image.tobytes()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "mode, suffix", [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png")]
)
def test_every_mode_opens_as_rgb(tmp_path, mode, suffix):
    original = noise(40, 30).convert(mode)
    path = tmp_path / f"x.{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    original.save(path, **options)
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == image_size(path) == (40, 30)
    if suffix == "png":
        assert opened.tobytes() == original.convert("RGB").tobytes()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_opens_as_its_high_byte(tmp_path, dtype, suffix):
    """Pillow's own conversion turns all of it white (Pillow#2574)."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 40)).astype(dtype)
    mode = "I;16" if dtype == "<u2" or suffix == "png" else "I;16B"
    raw = pixels.astype("<u2" if mode == "I;16" else ">u2").tobytes()
    Image.frombytes(mode, (40, 30), raw).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as opened:
        assert opened.mode == mode
    opened = open_image(tmp_path / f"x.{suffix}")
    assert opened.mode == "RGB" and opened.size == image_size(tmp_path / f"x.{suffix}") == (40, 30)
    assert (np.asarray(opened) == (pixels >> 8).astype(np.uint8)[..., None]).all()


@pytest.mark.parametrize("mode, kind", [("I", "integer"), ("F", "float")])
def test_32_bit_pixels_are_rejected_by_their_header(tmp_path, mode, kind):
    Image.new(mode, (40, 30), 70000).save(tmp_path / "x.tif")
    for read in (open_image, image_size):
        message = rf"can't read image \S+x.tif: its pixels are 32-bit {kind}s: convert it"
        with pytest.raises(InputError, match=message):
            read(tmp_path / "x.tif")


def test_transparency_is_dropped_and_palettes_are_read(tmp_path):
    Image.new("RGBA", (4, 4), (10, 200, 30, 0)).save(tmp_path / "hidden.png")
    assert open_image(tmp_path / "hidden.png").getpixel((0, 0)) == (10, 200, 30)
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.ADAPTIVE)
    palette.save(tmp_path / "palette.gif")
    assert open_image(tmp_path / "palette.gif").getpixel((0, 0)) == (10, 200, 30)


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    noise(40, 20).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (40, 20)


def test_unreadable_images_are_named(tmp_path, monkeypatch):
    noise(200, 100).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:4000])
    (tmp_path / "text.jpg").write_text("this is not an image\nbut two lines of text\n")
    (tmp_path / "empty.png").touch()
    noise(100, 100).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for name in ("cut.jpg", "text.jpg", "empty.png", "missing.jpg", "bomb.png"):
        with pytest.raises(InputError, match=rf"{name}: \S") as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_image_path_stays_in_its_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub", tmp_path):
        noise(4, 4).save(place / "a.png")
    assert image_path(folder, "sub/../sub/a.png").samefile(folder / "sub" / "a.png")
    for name in ("../a.png", "sub/../../a.png", str(tmp_path / "a.png"), ".."):
        with pytest.raises(InputError, match="outside") as error:
            image_path(folder, name)
        assert f"'{brief(name)}'" in str(error.value)
    for name in ("b.png", "sub", ""):
        with pytest.raises(InputError, match="no such image"):
            image_path(folder, name)


def test_links_stay_in_the_folder_too(tmp_path):
    folder, real = tmp_path / "images", tmp_path / "real"
    (real / "sub").mkdir(parents=True)
    folder.symlink_to(real)  # the folder itself may be a link: the user chose it
    for place in (real, real / "sub", tmp_path):
        noise(4, 4).save(place / "a.png")
    links = {"near.png": "sub/a.png", "far.png": "../a.png", "up": tmp_path, "loop.png": "loop.png"}
    for name, target in links.items():
        (real / name).symlink_to(target)
    assert image_path(folder, "near.png").samefile(real / "sub" / "a.png")
    for name in ("far.png", "up/a.png"):
        message = f"image '{name}' is a link that leads outside the image folder {folder}"
        with pytest.raises(InputError, match=message):
            image_path(folder, name)
    with pytest.raises(InputError, match="no such image"):
        image_path(folder, "loop.png")


@pytest.mark.parametrize("side, limit, fits", [(64, 4096, True), (65, 4096, False)])
def test_more_pixels_than_pillows_limit_is_an_error(tmp_path, monkeypatch, side, limit, fits):
    """Pillow itself only warns, up to twice its limit."""
    noise(64, side).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (open_image, image_size):
        if fits:
            assert read(tmp_path / "a.png")
        else:
            with pytest.raises(InputError, match=r"can't read image \S+a.png: 64x65 is too many pixels"):
                read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a\0b.png", "a caption instead of a file name " * 10])
def test_impossible_file_names(tmp_path, name):
    with pytest.raises(InputError):
        image_path(tmp_path, name)


def test_list_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.jpg").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{folder}$"):
            list_images(folder)
    for name in ("b.JPG", "a.png"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.png", "b.JPG"]


def test_list_images_explains_what_is_there_instead(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match="--images .*a.jpg is a file, not a folder of images"):
        list_images(tmp_path / "a.jpg")
    (tmp_path / "coco/train2014").mkdir(parents=True)
    for name in ("coco/1.jpg", "coco/train2014/1.jpg", "coco/train2014/2.jpg", "coco/notes.txt"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.jpg"] and foreign_images(tmp_path) == ""
    (tmp_path / "a.jpg").unlink()
    message = "no images directly in .*, but 3 in its subfolders such as coco/train2014/: "
    with pytest.raises(InputError, match=message):
        list_images(tmp_path)
    for name in ("1.HEIC", "2.heic", "3.avif"):
        (tmp_path / name).touch()
    assert foreign_images(tmp_path) == "1 .avif file and 2 .heic files"
    with pytest.raises(InputError, match="no images in .*, only 1 .avif file and 2 .heic files: convert them"):
        list_images(tmp_path)


def test_narrow_strips_are_rejected_before_they_take_gigabytes(tmp_path):
    for size, fits in (((500, 1), True), ((501, 1), False), ((1, 700), False), ((20_000, 100), False)):
        Image.new("RGB", size).save(tmp_path / "strip.png")
        if fits:
            assert open_image(tmp_path / "strip.png").size == size
        else:
            with pytest.raises(InputError, match=f"strip.png is {size[0]}x{size[1]}, too long"):
                open_image(tmp_path / "strip.png")


def test_names_that_are_not_text(tmp_path):
    with pytest.raises(InputError, match="not valid Unicode"):
        image_path(tmp_path, "bad\udcff.jpg")
