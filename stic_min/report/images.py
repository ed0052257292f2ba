"""Where the images of a page are, and small copies of them."""

import warnings
from pathlib import Path

from PIL import Image

from stic_min import InputError
from stic_min.formats.image_folder import image_path
from stic_min.report import record as records
from stic_min.report.options import recorded_folder
from stic_min.report.page import data_uri, plural
from stic_min.runtime.console import Progress
from stic_min.runtime.files import brief
from stic_min.runtime.work import prefetch


def image_folders(path: str | Path, given: list[Path], name) -> list[Path]:
    """Where the images of a file are looked up: `given`, or the folder of the recorded command, or the one
    called `name` next to the file; as far as these exist."""
    if given:
        return given
    path = Path(path)
    record = records.of_output(path)
    folders = [recorded_folder(record, flag) for flag in ("--images", "--data")]
    if name and isinstance(name, str) and name == Path(name).name:
        folders.append(path.parent / name)
    return [folder for folder in folders if folder and folder.is_dir()][:1]


def find_folder(name: str, folders: list[Path]) -> Path:
    """The first of `folders` with this image. Raises InputError if there is none."""
    for folder in folders:
        try:
            image_path(folder, name)
            return folder
        except InputError:
            continue
    raise InputError(f"no such image: '{brief(name)}'")


def find_image(name: str, folders: list[Path]) -> Path:
    """Raises InputError if none of `folders` has this image."""
    return image_path(find_folder(name, folders), name)


def missing_line(missing: int, total: int, noun: str, folders: list[Path], given: list[Path]) -> str:
    """What the page says about missing images. Only folders that were `given` are shown with their paths."""
    if not missing:
        return ""
    names = ", ".join(str(folder) if folder in given else folder.name for folder in folders)
    reason = f"not found in {names}, or not readable" if names else "pass their folder with --images"
    return f"The images of {missing:,} of {plural(total, noun)} are missing: {reason}."


def thumbnail(image: Image.Image, side: int, enlarge: bool = False) -> str:
    """A data URI of an image whose long side has at most `side` pixels, or exactly so many with `enlarge`."""
    scale = side / max(image.size)
    if scale >= 1 and not enlarge:
        return data_uri(image, "PNG")
    size = [max(1, round(length * scale)) for length in image.size]
    small = image.resize(size, Image.BICUBIC, reducing_gap=3)
    return data_uri(small, "JPEG", quality=70, optimize=True)


def read_thumbnail(source, side: int) -> str:
    """A thumbnail of an image file, or of an open one. Raises InputError if it can't be read. (Unlike
    `stic_min.images.open_image`, this does without torch.)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.draft("RGB", (side, side))
                return thumbnail(image.convert("RGB"), side)
    except Exception as error:  # whatever Pillow raises for a damaged file
        raise InputError(f"can't read an image: {error}") from None


def in_threads(what: str, task, items) -> list:
    """[task(item), ...], with a progress line."""
    progress = Progress(what, len(items))
    results = []
    for result in prefetch(task, items):
        results.append(result)
        progress.add()
    return results
