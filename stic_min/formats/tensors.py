"""Reading and writing tensor files, and the names of tensors in published checkpoints.

Three layouts of names are in use: LLaVA's own, and two that transformers has written over time.
"""

import os
import re
import zipfile
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stic_min import InputError, first_line
from stic_min.runtime.files import printable, read_json

# ---------------------------------------------------------------- key names

# Published name -> ours. Original LLaVA first, then transformers' (saved files, and module names in memory).
RENAMES = [
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"vision_tower.\1"),
    (r"vision_model\.(.+)", r"vision_tower.\1"),  # a CLIP folder
    (r"(?:model\.)?mm_projector\.(.+)", r"mm_projector.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"mm_projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"mm_projector.2.\1"),
    (r"(?:model\.)?image_newline", r"image_newline"),
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"(?:language_model\.model\.|model\.language_model\.|model\.)((?:embed_tokens|layers|norm)\..+)",
     r"model.\1"),
]


def canonical(key: str) -> str | None:
    """Our name for a published key, None if the key is unknown."""
    for pattern, name in RENAMES:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return None


# Our name -> transformers' name of the module in memory, since version 4.52: PEFT's adapters use these.
IN_MEMORY = {
    "model.": "model.language_model.",
    "mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "image_newline": "model.image_newline",
}


def published(name: str, huggingface: bool) -> str:
    """The name of our parameter in LLaVA's own model, or in transformers' model."""
    if huggingface:
        ours, theirs = next(item for item in IN_MEMORY.items() if name.startswith(item[0]))
        return theirs + name.removeprefix(ours)
    return name if name.startswith("model.") else f"model.{name}"


# ---------------------------------------------------------------- files


WEIGHT_FILES = "model.safetensors", "pytorch_model.bin"  # or their indices of shards
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)
SETTINGS_FILES = "config.json", "tokenizer_config.json", "added_tokens.json"


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            if (folder / name).is_file():
                raise InputError(f"{folder} has two sets of weights, {name} and {index.name}; delete one")
            files = sorted(set(read_index(index).values()))
            if missing := [f for f in files if not os.path.isfile(folder / f)]:
                raise InputError(f"missing shard {folder / printable(missing[0])}, listed in {index}")
            return [folder / f for f in files]
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(f"no weights in {folder}: neither {' nor '.join(WEIGHT_FILES)}, nor an index of shards")


def unread_files(folder, files, huggingface):
    """Names of the weight and settings files in a checkpoint folder that the loader does not use."""
    suffixes = ".json", ".bin", ".safetensors", ".pt", ".pth"
    names = {file.name for file in folder.iterdir() if file.suffix in suffixes}
    if huggingface:
        names.discard("preprocessor_config.json")  # in LLaVA's own layout, the one in CLIP's folder is read
    return sorted(names - {*SETTINGS_FILES, *INDEX_FILES} - {file.name for file in files})


def read_index(file):
    """{key: name of its shard}, from an index of shards."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file}: no weight_map")
    return {key: str(shard) for key, shard in weight_map.items()}


def check_index(folder, locations):
    """Checks that an index of shards, if there is one, agrees with `locations`, {key: its actual shard}."""
    for index in folder.glob("*.index.json"):
        for key, shard in read_index(index).items():
            if shard in locations.values() and locations.get(key) != shard:
                actual = locations.get(key, "no shard")
                raise InputError(f"{index}: {printable(key)} is not in {printable(shard)}, but in {actual}")


def open_shard(file: Path) -> dict:
    """{key: function that reads its tensor}; memory-mapped, so a tensor takes memory only when it is read."""
    safe = file.suffix == ".safetensors"
    try:
        if safe:
            opened = safetensors.safe_open(file, framework="pt")
        else:
            mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 are not, and are read as a whole
            opened = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # each format fails in its own way on a truncated or foreign file
        raise InputError(f"can't read {file}: {printable(first_line(error))}") from None
    if safe:
        check_names(opened.keys(), file)
        return {key: lambda key=key: opened.get_tensor(key) for key in opened.keys()}
    check_tensors(opened, file)
    return {key: lambda value=value: value for key, value in opened.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors or torch file."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each fail in their own way on a broken file
        raise InputError(f"can't read {path}: {printable(first_line(error))}") from None
    check_tensors(tensors, path)
    return tensors


def read_metadata(path):
    """The metadata {name: text} of a readable safetensors file; {} for a torch file."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="pt") as opened:
        return opened.metadata() or {}


def check_tensors(tensors, path):
    """Checks that the content of a file is {name: tensor}."""
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(f"{path}: not a dictionary of tensors")
    check_names(tensors, path)


def check_names(names, path):
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(f"{path}: unknown key {ascii(name)}")


def write_tensors(tensors, path, **metadata):
    """Writes a safetensors file with the usual permissions: the library's own would be the owner's alone.

    `metadata` may have only one entry: safetensors writes several in random order, and equal runs must write
    equal files.
    """
    Path(path).touch()
    mode = Path(path).stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise InputError(f"can't write {path}: {first_line(error)}") from None
    Path(path).chmod(mode)
