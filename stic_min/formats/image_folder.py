"""A folder of image files, as given with --images: which names are valid, and which files are images."""

import os
from collections import Counter
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import brief

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOREIGN = {".heic", ".heif", ".avif"}  # written by phones; not every Pillow reads them


def image_path(folder: str | Path, name: str) -> Path:
    """The file `name` in `folder`, which must not lead out of it, whether by ".." or through a link."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise InputError(f"image name {brief(ascii(name))} is not valid Unicode") from None
    path = Path(folder) / str(name)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise InputError(f"image '{brief(name)}' points outside the image folder {folder}")
    try:
        exists = path.is_file()
        outside = exists and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):  # not a possible file name
        exists = False
    if not exists:
        raise InputError(f"no such image: '{Path(folder) / brief(name)}'")
    if outside:
        raise InputError(f"image '{brief(name)}' is a link that leads outside the image folder {folder}")
    return path


def check_folder(folder: str | Path) -> None:
    """Raises InputError unless `folder`, the value of --images, is a folder."""
    if Path(folder).is_file():
        raise InputError(f"--images {folder} is a file, not a folder of images")
    if not Path(folder).is_dir():
        raise InputError(f"no such image folder: {folder}")


def foreign_images(folder: str | Path) -> str:
    """Counts the images in `folder` whose format is not supported: "12 .heic files"; "" if there are none."""
    count = Counter(p.suffix.lower() for p in Path(folder).iterdir() if p.suffix.lower() in FOREIGN)
    plural = lambda n: "file" if n == 1 else "files"
    return " and ".join(f"{n} {suffix} {plural(n)}" for suffix, n in sorted(count.items()))


def list_images(folder: str | Path) -> list[str]:
    """Sorted names of the images in `folder`. If there are none, the error explains what it contains."""
    check_folder(folder)
    readable = lambda path: path.suffix.lower() in SUFFIXES and path.is_file()
    names = sorted(path.name for path in Path(folder).iterdir() if readable(path))
    if names:
        return names
    if foreign := foreign_images(folder):
        raise InputError(f"no images in {folder}, only {foreign}: convert them to JPEG or PNG")
    nested = [path.relative_to(folder) for path in Path(folder).rglob("*") if readable(path)]
    if nested:
        largest = Counter(path.parent for path in nested).most_common(1)[0][0]
        raise InputError(f"no images directly in {folder}, but {len(nested)} in its subfolders such as "
                         f"{largest}/: pass one of these, or list the images with --names")
    raise InputError(f"no images ({' '.join(sorted(SUFFIXES))}) in {folder}")
