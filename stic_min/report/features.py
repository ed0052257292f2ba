"""CLIP features of the images in a folder, as a safetensors file: evaluate.py embed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stic_min import InputError
from stic_min.formats.image_folder import SUFFIXES, check_folder, foreign_images
from stic_min.runtime import console
from stic_min.runtime.files import check_place, printable
from stic_min.runtime.work import prefetch, subset

if TYPE_CHECKING:
    import numpy as np

# The paper does not describe its features. These are the ones that LLaVA reads.
FEATURES = "CLIP hidden state -2, mean over the patches that show the image, pad mode, float32"
KEY = "stic_min.features"  # of the metadata in a features file
BATCH = 32  # images per forward pass

# ---------------------------------------------------------------- from images to features


def find_images(folder: str | Path) -> list[str]:
    """Names of all images in `folder` and its subfolders, relative to it and sorted: ScienceQA has one
    subfolder per image."""
    check_folder(folder)
    files = (p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if not names:
        foreign = foreign_images(folder)
        hint = f", only {foreign}: convert them to JPEG or PNG" if foreign else " or its subfolders"
        raise InputError(f"no images in {folder}{hint}")
    return names


def load_tower(args, device):
    """The vision tower of a LLaVA checkpoint in float32, its config, and what identifies its weights."""
    from hashlib import sha256

    from stic_min import loader

    llava, weights = loader.open_llava(args.model, vision=args.vision, tokenizer=args.tokenizer)
    prefix = "vision_tower."
    weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    tower = loader.load_weights(llava.vision_tower, weights, device)
    digest = sha256()  # of a sample of each parameter, because all of them are 1.2 GB
    for name, parameter in tower.named_parameters():
        digest.update(name.encode() + parameter.flatten()[:4096].cpu().numpy().tobytes())
    return tower, llava.config.vision, digest.hexdigest()[:12]


def image_features(tower, config, tiles: list) -> "np.ndarray":
    """Tiles in pad mode, one per image -> features (N, C): means of the tower's output over the patches that
    show the image.

    Patches that show only padding do not count, because their number depends on the shape of an image, not on
    its content.
    """
    import torch

    from stic_min.images import unpadded

    device = tower.embeddings.class_embedding.device
    side = config.patches
    with torch.inference_mode():
        patches = tower(torch.cat([t.pixels for t in tiles]).to(device))  # (N, S, C)
        means = []
        for tile, grid in zip(tiles, patches.unflatten(1, (side, side))):  # (side, side, C)
            top, bottom, left, right = unpadded(tile.size, (1, 1), side)
            bottom, right = max(bottom, top + 1), max(right, left + 1)  # a very thin image has one row
            means.append(grid[top:bottom, left:right].mean(dim=(0, 1)))
        return torch.stack(means).cpu().numpy()


def embed(args) -> None:
    """evaluate.py embed: the features of a folder's images, with their names, in a safetensors file."""
    from stic_min.runtime.ranks import start_device

    if Path(args.file).is_dir():
        raise InputError(f"--out {args.file} is a folder, not a file")
    check_place(args.file)
    names = find_images(args.images)
    sample = subset(names, args.limit, args.seed)
    device = start_device(args.device)
    console.print_line(f"loading the vision tower of {args.model} on {device}", "stderr")
    tower, config, identity = load_tower(args, device)
    settings = {
        "features": FEATURES,
        "model": Path(args.model).resolve().name,
        "tower": identity,
        "folder": Path(args.images).resolve().name,
        "images_in_folder": len(names),
        "limit": args.limit,
        "seed": args.seed if args.limit else None,
    }
    if Path(args.file).exists():
        check_existing(args.file, settings)
        console.print_line(f"{args.file} already has these features")
        return
    features, embedded = embed_images(tower, config, args.images, sample)
    write_features(args.file, features, embedded, settings, len(sample) - len(embedded))
    count = f"{len(embedded)} of {len(names)} images" if args.limit else f"{len(embedded)} images"
    skipped = len(sample) - len(embedded)
    console.print_line(f"{count} in {args.file}, {skipped} skipped; {features.shape[1]} features each")


def embed_images(tower, config, folder, sample):
    """(features, names) of the readable images; the others are skipped with a warning."""
    import numpy as np
    import torch

    from stic_min.images import make_tiles, open_image

    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in the patch embedding too
    progress = console.Progress("images", len(sample))

    def read(name):
        try:
            return name, make_tiles(open_image(Path(folder) / name), "pad", config.image_size)
        except InputError as error:
            console.warn(f"skipped: {error}")
            return name, None

    features, embedded, batch = [], [], []
    for i, (name, tiles) in enumerate(prefetch(read, sample), 1):
        if tiles:
            batch.append(tiles)
            embedded.append(name)
        if batch and (len(batch) == BATCH or i == len(sample)):
            features.append(image_features(tower, config, batch))
            batch = []
        progress.add()
    if not embedded:
        raise InputError(f"none of the {len(sample)} images of {folder} could be read")
    features = np.concatenate(features)
    if not np.isfinite(features).all():
        raise InputError("some features are NaN or infinite: the vision tower's weights are damaged")
    return features, embedded


# ---------------------------------------------------------------- the features file


@dataclass
class ImageSet:
    """The content of a features file."""

    label: str
    features: "np.ndarray"  # (N, C) float32
    names: list[str]
    settings: dict

    @property
    def kind(self):
        """What must be equal for features to be compared."""
        return self.settings["tower"], self.settings["features"], self.features.shape[1]


def write_features(path, features, names, settings, skipped):
    from safetensors.numpy import save

    metadata = {KEY: json.dumps({"settings": settings, "skipped": skipped, "names": names})}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(save({"features": features}, metadata))
    temporary.replace(path)


def read_features(path: str | Path) -> ImageSet:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    foreign = InputError(f"{path}: not a file of image features (write one with evaluate.py embed)")
    try:
        with safe_open(path, framework="numpy") as file:
            content = json.loads((file.metadata() or {})[KEY])
            features = file.get_tensor("features")
        settings, names = content["settings"], content["names"]
        words = [settings["tower"], settings["features"], settings["model"], *names]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        raise foreign from None
    if not all(isinstance(word, str) for word in words) or not isinstance(names, list):
        raise foreign
    if features.ndim != 2 or features.dtype != np.float32 or len(names) != len(features):
        raise foreign
    if not (np.abs(features) < 1e15).all():
        raise InputError(f"{path}: some features are NaN or infinite")
    if not (1e-10 < np.abs(features).max(axis=1, initial=0)).all():
        raise InputError(f"{path}: the features of some images are all 0")
    return ImageSet(printable(Path(path).stem), features, names, settings)


def check_existing(path, settings):
    """Raises InputError unless an existing --out has exactly the features that this run would write."""
    try:
        previous = read_features(path).settings
    except InputError:
        raise InputError(f"{path} exists and is not a file of image features; choose another --out") from None
    for name, value in settings.items():
        if previous.get(name) != value:
            raise InputError(f"{path} was written with {name} {previous.get(name)!r}, but this run has "
                             f"{value!r}; choose another --out, or delete the file")  # fmt: skip
