"""Tensor files in and out, and the names of tensors in published checkpoints.

Three key layouts are in use: the original LLaVA one, and the two that transformers has written over time.
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
    (r"(?:language_model\.model\.|model\.language_model\.|model\.)((?:embed_tokens|layers|norm)\..+)", r"model.\1"),
]

def canonical(key):
    """Our name of a published key, None if the key is unknown."""
    for pattern, name in RENAMES:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return None


# Our name -> transformers', of modules in memory since its version 4.52: what PEFT's adapters name.
IN_MEMORY = {
    "model.": "model.language_model.",
    "mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "image_newline": "model.image_newline",
}


def published(name, huggingface):
    """The name of our parameter in LLaVA's own model, or in transformers'."""
    if huggingface:
        return next(theirs + name.removeprefix(ours) for ours, theirs in IN_MEMORY.items() if name.startswith(ours))
    return name if name.startswith("model.") else f"model.{name}"


# ---------------------------------------------------------------- files


def shards(folder):
    """The weight files of a checkpoint folder. Raises InputError if there are none or one of them is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            if (folder / name).is_file():
                raise InputError(f"{folder}: {name} and {index.name} are two sets of weights; delete one")
            files = sorted(set(read_index(index).values()))
            if missing := [f for f in files if not os.path.isfile(folder / f)]:
                raise InputError(f"missing shard {folder / printable(missing[0])}, named by {index}")
            return [folder / f for f in files]
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def read_index(file):
    """{key: shard} of an index of shards."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file}: no weight_map")
    return {key: str(shard) for key, shard in weight_map.items()}


def check_index(folder, places):
    """Raises InputError if the index of shards, where there is one, and the shards disagree. places: {key: shard}"""
    for index in folder.glob("*.index.json"):
        for key, shard in read_index(index).items():
            if shard in places.values() and places.get(key) != shard:
                where = places.get(key, "no shard")
                raise InputError(f"{index}: {printable(key)} is not in {printable(shard)}, but in {where}")


def open_shard(file):
    """{key: function that returns its tensor}; memory-mapped, so a tensor costs memory when it is read."""
    safe = file.suffix == ".safetensors"
    try:
        if safe:
            opened = safetensors.safe_open(file, framework="pt")
        else:
            mapped = zipfile.is_zipfile(file)  # before torch 1.6 they were none, and have to be read whole
            opened = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a truncated or foreign file fails in as many ways as there are formats
        raise InputError(f"can't read {file}: {printable(first_line(error))}") from None
    if safe:
        check_names(opened.keys(), file)
        return {key: lambda key=key: opened.get_tensor(key) for key in opened.keys()}
    check_tensors(opened, file)
    return {key: lambda value=value: value for key, value in opened.items()}


def read_tensors(path):
    """All tensors of a safetensors or torch file. Raises InputError naming it if it can't be read."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, zip or safetensors make of a broken file
        raise InputError(f"can't read {path}: {printable(first_line(error))}") from None
    check_tensors(tensors, path)
    return tensors


def read_metadata(path):
    """{name: text} that a readable safetensors file holds beside its tensors; {} for a torch file."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="pt") as opened:
        return opened.metadata() or {}


def check_tensors(tensors, path):
    """Raises InputError naming the file unless what it held is {name: tensor}."""
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(f"{path}: not a dictionary of tensors")
    check_names(tensors, path)


def check_names(names, path):
    """The same of the names alone."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(f"{path}: unknown key {ascii(name)}")


def write_tensors(tensors, path, **metadata):
    """A safetensors file with the permissions of any other new file (the library makes them its owner's alone).

    Of `metadata`, at most one entry: the order of several is random, and equal runs write equal files. Raises
    InputError where it can't be written.
    """
    Path(path).touch()
    mode = Path(path).stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise InputError(f"can't write {path}: {first_line(error)}") from None
    Path(path).chmod(mode)
