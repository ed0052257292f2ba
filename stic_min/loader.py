"""LLaVA checkpoints, strictly: each key is used once or ignored for a reason, each parameter loaded once.

Weights are memory-mapped and copied to their parameters one by one, so loading never holds two copies; a
sharded parameter (FSDP) reads only its own rows from the file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stic_min import InputError, lora
from stic_min.formats.adapters import finite, read_adapter
from stic_min.formats.config import read_config
from stic_min.formats.tensors import canonical, check_index, open_shard, shards, unread_files
from stic_min.formats.tokenizer import read_tokenizer
from stic_min.llava import LLaVA
from stic_min.runtime.files import fingerprint, read_json

# Names (after RENAMES) that a checkpoint may contain but the model does not use, and why.
IGNORED = {
    r"vision_tower\.post_layernorm\..+": "hidden state -2 is read before it",
    r"vision_tower\.embeddings\.position_ids": "a buffer 0..n",
    r".+\.rotary_emb\.inv_freq": "computed from rope_theta",
}
CLIP_TEXT = r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale"
IGNORED_IN_CLIP = {CLIP_TEXT: "the text side of CLIP"}


@dataclass(frozen=True)
class Weight:
    """A tensor in a checkpoint, not read yet."""

    key: str  # its published name
    file: Path
    read: Callable[[], torch.Tensor]


# ---------------------------------------------------------------- opening a checkpoint


def open_weights(folder, ignored, prefix=""):
    """{our name: Weight} of a folder's tensors, whose names must start with `prefix`."""
    weights = {}
    file_names = {}  # by key
    for file in shards(folder):
        for key, read in open_shard(file).items():
            name = canonical(key)
            file_names[key] = file.name
            if any(re.fullmatch(pattern, name or key) for pattern in ignored):
                continue
            if name is None or not name.startswith(prefix):
                raise InputError(f"{file}: unknown key {key}")
            if name in weights:
                raise InputError(f"{file}: {key} and {weights[name].key} are the same parameter")
            weights[name] = Weight(key, file, read)
    check_index(folder, file_names)
    return weights


def find_tower(weights, folder, vision_folder, huggingface, config, ignored):
    """Adds the vision tower to the checkpoint's `weights` if they have none; returns where it is from.

    A tower in the checkpoint takes precedence: LLaVA-1.6 contains its own fine-tuned CLIP.
    """
    if not any(name.startswith("vision_tower.") for name in weights):
        if vision_folder is None:
            named = read_json(folder / "config.json").get("mm_vision_tower")
            raise InputError(f"{folder} has no vision weights, and its mm_vision_tower {named!r} was not "
                             "found nearby; pass its folder with --vision")
        weights |= open_weights(vision_folder, ignored | IGNORED_IN_CLIP, prefix="vision_tower.")
        return vision_folder
    if vision_folder is None and not huggingface:
        # Without its config.json it must be CLIP-L/14-336, since shapes of tensors do not give the heads.
        positions = weights.get("vision_tower.embeddings.position_embedding.weight")
        expected = (config.vision.patches**2 + 1, config.vision.hidden_size)
        if positions and tuple(positions.read().shape) != expected:
            raise InputError(f"{positions.file}: the vision tower is not CLIP-L/14-336, and its config.json "
                             f"was not found near {folder}; pass its folder with --vision")
    return "the checkpoint's"


def trim_vocabulary(weights, config, tokenizer):
    """Drops the rows for <image> and <pad> with which transformers pads the vocabulary to 32064: these tokens
    never occur here. Changes `weights` and returns the new config."""
    rows = min(config.decoder.vocab_size, tokenizer.size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = replace(weights[name], read=lambda read=weights[name].read: read()[:rows])
    return replace(config, decoder=replace(config.decoder, vocab_size=rows))


def check_depth(weights, config, folder):
    """The deepest layers have tensors: building a model with a wrong, huge layer count would take forever."""
    depths = config.decoder.num_hidden_layers, config.vision.num_hidden_layers - 1
    for stack, layers in zip(("model", "vision_tower.encoder"), depths):
        deepest = f"{stack}.layers.{layers - 1}."
        if layers and not any(name.startswith(deepest) for name in weights):
            raise InputError(f"{folder}: no tensor for {deepest}*, but the configuration has {layers} layers")


def check_keys(llava, weights, folder):
    """Every tensor has its parameter, every parameter its tensor, and their shapes agree."""
    parameters = dict(llava.named_parameters())
    for name, weight in weights.items():
        if name not in parameters:
            raise InputError(f"{weight.file}: unknown key {weight.key}")
        shape, expected = tuple(weight.read().shape), tuple(parameters[name].shape)
        if shape != expected:
            needed = f"but the configuration needs {expected}"
            raise InputError(f"{weight.file}: {weight.key} is {shape}, {needed}")
    for name in parameters:
        if name not in weights:
            raise InputError(f"{folder}: no tensor for {name}")


def open_llava(path, *, vision=None, tokenizer=None, image_mode=None, template=None, dtype=torch.float32,
               other_base=False):  # fmt: skip
    """A LLaVA on the meta device, and {parameter: Weight}. For callers that shard the model before
    `load_weights`; all others use `load_llava`, which explains the arguments. `llava.base` is for adapters,
    `llava.notes` are lines that report which files were used and which were not.
    """
    folder = Path(path)
    config, vision_folder, huggingface, reason = read_config(folder, vision, image_mode, template)
    tokenizer = read_tokenizer(folder, tokenizer)

    last = config.vision.num_hidden_layers - 1
    ignored = IGNORED | {rf"vision_tower\.encoder\.layers\.{last}\..+": "hidden state -2 is read before it"}
    if config.pinpoints is None:
        ignored |= {"image_newline": "pad mode has no rows to end"}
    weights = open_weights(folder, ignored)
    tower = find_tower(weights, folder, vision_folder, huggingface, config, ignored)
    unit = config.vision.image_size
    sides = [side for pinpoint in config.pinpoints or () for side in pinpoint]
    if any(side % unit or not 0 < side <= 100 * unit for side in sides):
        raise InputError(f"{folder / 'config.json'}: image_grid_pinpoints {config.pinpoints} are not 1 to "
                         f"100 times the vision tower's {unit}")
    if huggingface:
        config = trim_vocabulary(weights, config, tokenizer)
    if config.decoder.vocab_size < tokenizer.size:
        raise InputError(f"{tokenizer.path}: {tokenizer.size} pieces, but {folder} has a vocabulary of "
                         f"{config.decoder.vocab_size}")
    check_depth(weights, config, folder)

    with torch.device("meta"):
        llava = LLaVA(config, tokenizer).to(dtype).requires_grad_(False).eval()
    check_keys(llava, weights, folder)
    first, *others = files = shards(folder)
    llava.base = lora.Base(str(path), fingerprint(*files), huggingface, other_base)
    more = f" and {len(others)} more" if others else ""
    llava.notes = [f"{folder}: {first.name}{more}; vision tower: {tower}; tokenizer: {tokenizer.path}; "
                   f"template: {config.template} ({reason}); images: {config.image_mode}"]
    if unread := unread_files(folder, files, huggingface):
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        llava.notes.append(f"{folder}: not read: {', '.join(unread[:5])}{more}")
    return llava, weights


# ---------------------------------------------------------------- loading its weights


def own_rows(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of a full tensor that this rank holds of `like`: all, or FSDP2's ceil(n / ranks) per rank."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    rows = len(like.to_local())
    start = mesh.get_local_rank() * -(-len(value) // mesh.size())
    return value[start : start + rows]


@torch.no_grad()
def load_weights(llava: LLaVA, weights: dict, device="cpu") -> LLaVA:
    """Loads every parameter of `llava` in its own dtype.

    `weights` maps names to a Weight or, for LoRA and a trained projector, to a tensor. Parameters on the meta
    device are created on `device`; those already sharded by FSDP get this rank's rows.
    """
    for name, parameter in list(llava.named_parameters()):
        weight = weights[name]
        value = weight.read() if isinstance(weight, Weight) else weight
        if isinstance(weight, Weight) and name.startswith("mm_projector."):
            value = finite(value, weight.key, weight.file)
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(own_rows(value, parameter))
        else:
            module, _, leaf = name.rpartition(".")
            # A trained parameter must not share memory with the file, or with a reference loaded from it.
            value = value.to(device, parameter.dtype, copy=parameter.requires_grad)
            setattr(llava.get_submodule(module), leaf, nn.Parameter(value, parameter.requires_grad))
    return llava


def load_llava(
    path: str | Path, *, vision: str | None = None, adapter: str | None = None, tokenizer: str | None = None,
    image_mode: str | None = None, template: str | None = None, device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32, other_base: bool = False,
) -> LLaVA:  # fmt: skip
    """A LLaVA checkpoint folder -> LLaVA, ready for inference.

    path        config.json, safetensors or pytorch_model*.bin in one or more shards, tokenizer.model
    vision      CLIP folder, if the checkpoint has no vision tower and names none that exists
    adapter     PEFT folder; a projector file in it is loaded, too
    tokenizer   tokenizer.model to use instead of the checkpoint's
    image_mode  pad or anyres (default: the checkpoint's)
    template    mistral_instruct or vicuna_v1 (default: the checkpoint's)
    other_base  accept an adapter that was trained on other base weights
    Raises InputError, one line that names file and key, for anything that does not fit exactly.
    """
    options = {"image_mode": image_mode, "template": template, "dtype": dtype, "other_base": other_base}
    llava, weights = open_llava(path, vision=vision, tokenizer=tokenizer, **options)
    if adapter is not None:
        adapter = read_adapter(adapter, llava)
        lora.attach(llava, adapter)
        llava.to(dtype)  # LoRA, too: each forward pass would round it to this dtype anyway
        weights |= adapter.tensors
    return load_weights(llava, weights, device).requires_grad_(False)
