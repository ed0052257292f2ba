"""Copies of the tiny checkpoints with other files, tensors or settings."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stic_min import InputError
from stic_min.loader import load_llava

TEXT = "[INST] What colour is the sail of the boat? [/INST]"
PROMPT = TEXT.replace("[INST] ", "[INST] <image>\n")
V16, V15 = "llava-v1.6-tiny", "llava-v1.5-tiny"
TOWER = "model.vision_tower.vision_tower.vision_model."


def read_tensors(folder):
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def copy(tiny, name, folder, tensors=None, form="model.safetensors", without=(), **config):
    """A copy of the checkpoint `name` in `folder`, in files of another form, with some of its settings changed."""
    tensors, folder = tensors or read_tensors(tiny / name), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tiny / name / file, folder)
    old = json.loads((tiny / name / "config.json").read_text()) | {"mm_vision_tower": str(tiny / "clip-tiny")}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (old | config).items() if k not in without}))
    save = torch.save if form.endswith(".bin") else lambda part, path: save_file(part, path, {"format": "pt"})
    if "0000" not in form:
        save(tensors, folder / form)
        return folder
    names = sorted(tensors)  # model-0000%d-of-00003.safetensors
    where = {key: form % (1 + 3 * i // len(names)) for i, key in enumerate(names)}
    for file in set(where.values()):
        save({key: tensors[key] for key in names if where[key] == file}, folder / file)
    index = re.sub(r"-0000.*(\..+)", r"\1.index.json", form)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def refuse(match, path, **arguments):
    with pytest.raises(InputError, match=match) as error:
        load_llava(path, **arguments)
    assert "\n" not in str(error.value)
