"""LLaVA checkpoints, strictly: every key is used once or ignored by name with a reason, every parameter filled once.

Weights are memory-mapped and go to their parameters one by one, so loading never holds two copies; a sharded
parameter (FSDP) takes only its own rows from the file.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stic_min import InputError, lora
from stic_min.formats.adapters import finite, read_adapter
from stic_min.formats.config import read_config
from stic_min.formats.tensors import canonical, check_index, open_shard, shards
from stic_min.formats.tokenizer import read_tokenizer
from stic_min.llava import LLaVA
from stic_min.runtime.files import fingerprint, read_json

# Names (after RENAMES) that a checkpoint may hold and we have no use for, with the reason.
IGNORED = {
    r"vision_tower\.post_layernorm\..+": "hidden state -2 comes before it",
    r"vision_tower\.embeddings\.position_ids": "a buffer 0..n",
    r".+\.rotary_emb\.inv_freq": "computed from rope_theta",
}
IGNORED_IN_CLIP = {r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale": "CLIP's text side"}
READ = {"config.json", "tokenizer_config.json", "added_tokens.json"}


def open_weights(folder, ignored, only=""):
    """{our name: (key, file, function)} of a folder's tensors whose name starts with `only`."""
    weights, places = {}, {}
    for file in shards(folder):
        for key, read in open_shard(file).items():
            name = canonical(key)
            places[key] = file.name
            if any(re.fullmatch(pattern, name or key) for pattern in ignored):
                continue
            if name is None or not name.startswith(only):
                raise InputError(f"{file}: unknown key {key}")
            if name in weights:
                raise InputError(f"{file}: {key} and {weights[name][0]} are the same parameter")
            weights[name] = key, file, read
    check_index(folder, places)
    return weights


# ---------------------------------------------------------------- model


def open_llava(
    path, *, vision=None, tokenizer=None, image_mode=None, template=None, dtype=torch.float32, other_base=False
):
    """A LLaVA on the meta device, and the source of its parameters: {name: (key, file, function)}.

    For those who shard the model before `load_weights`; everybody else calls `load_llava`. Its `base` is for adapters, its
    `notes` are lines on what was used and what was not.
    """
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{folder} is a file, --model has to name the folder of a checkpoint")
    if not folder.is_dir():
        raise InputError(f"no such checkpoint folder: {folder} (nothing is downloaded; README.md says how to get one)")
    if not (folder / "config.json").is_file():
        raise InputError(f"no LLaVA checkpoint: there is no {folder / 'config.json'}")
    config, vision_folder, huggingface, reason = read_config(folder, vision, image_mode, template)
    tokenizer = read_tokenizer(folder, tokenizer)

    last = config.vision.num_hidden_layers - 1
    ignored = IGNORED | {rf"vision_tower\.encoder\.layers\.{last}\..+": "hidden state -2 comes before it"}
    if config.pinpoints is None:
        ignored |= {"image_newline": "pad mode has no rows to end"}
    source = open_weights(folder, ignored)
    files, tower = shards(folder), "the checkpoint's"
    if not any(name.startswith("vision_tower.") for name in source):
        # Weights embedded in the checkpoint win: LLaVA-1.6 carries its own tuned CLIP.
        if vision_folder is None:
            named = read_json(folder / "config.json").get("mm_vision_tower")
            raise InputError(f"{folder} holds no vision weights and {named!r} is no folder near it; name it: --vision")
        source |= open_weights(vision_folder, ignored | IGNORED_IN_CLIP, only="vision_tower.")
        tower = vision_folder
    elif vision_folder is None and not huggingface:
        # Its own tower, of unknown geometry (heads and patches are no tensors): CLIP-L/14-336 if the shapes fit.
        _, file, read = source.get("vision_tower.embeddings.position_embedding.weight", (None, None, None))
        if read and tuple(read().shape) != (config.vision.patches**2 + 1, config.vision.hidden_size):
            raise InputError(f"{file}: the vision tower is not CLIP-L/14-336 and there is no configuration of it near "
                             f"{folder}; name its folder: --vision")
    unit = config.vision.image_size
    if any(side % unit or not 0 < side <= 100 * unit for pinpoint in config.pinpoints or () for side in pinpoint):
        raise InputError(f"{folder / 'config.json'}: image_grid_pinpoints {config.pinpoints} are not 1 to 100 "
                         f"times the vision tower's {unit}")
    if huggingface:
        # transformers pads the vocabulary (32064) for <image> and <pad>, tokens that never occur here.
        rows = min(config.decoder.vocab_size, tokenizer.size)
        config = replace(config, decoder=replace(config.decoder, vocab_size=rows))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in source:
                key, file, read = source[name]
                source[name] = key, file, lambda read=read: read()[:rows]
    if config.decoder.vocab_size < tokenizer.size:
        vocabulary = config.decoder.vocab_size
        raise InputError(f"{tokenizer.path}: {tokenizer.size} pieces, but {folder} has a vocabulary of {vocabulary}")
    # First, as a model of all the layers that a wrong configuration may name takes forever to make.
    for stack, layers in (("model", config.decoder.num_hidden_layers), ("vision_tower.encoder", last)):
        deepest = f"{stack}.layers.{layers - 1}."
        if layers and not any(name.startswith(deepest) for name in source):
            raise InputError(f"{folder}: no tensor for {deepest}*, the configuration has {layers} layers")
    with torch.device("meta"):
        llava = LLaVA(config, tokenizer).to(dtype).requires_grad_(False).eval()
    check_keys(llava, source, folder)
    llava.base = lora.Base(str(path), fingerprint(*files), huggingface, other_base)
    weights = f"{files[0].name}{f' and {len(files) - 1} more' * (len(files) > 1)}"
    llava.notes = [f"{folder}: {weights}; vision tower: {tower}; tokenizer: {tokenizer.path}; "
                   f"template: {config.template} ({reason}); images: {config.image_mode}"]
    if rest := unread(folder, files, huggingface):
        more = f" and {len(rest) - 5} more" * (len(rest) > 5)
        llava.notes.append(f"{folder}: not read: {', '.join(rest[:5])}{more}")
    return llava, source


def unread(folder, files, huggingface):
    """Names of the files of weights and of settings in a checkpoint folder that nothing was taken from."""
    names = {file.name for file in folder.iterdir() if file.suffix in (".json", ".bin", ".safetensors", ".pt", ".pth")}
    indices = {f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")}
    pixels = {"preprocessor_config.json"} if huggingface else set()  # LLaVA's own layout has CLIP's folder for it
    return sorted(names - READ - indices - pixels - {file.name for file in files})


def check_keys(llava, source, folder):
    """Every tensor has its parameter, every parameter its tensor, of one shape. Raises InputError naming the first."""
    parameters = dict(llava.named_parameters())
    for name, (key, file, read) in source.items():
        if name not in parameters:
            raise InputError(f"{file}: unknown key {key}")
        if (shape := tuple(read().shape)) != (expected := tuple(parameters[name].shape)):
            raise InputError(f"{file}: {key} is {shape}, the configuration makes it {expected}")
    for name in parameters:
        if name not in source:
            raise InputError(f"{folder}: no tensor for {name}")


def own_rows(value, like):
    """The rows of a whole tensor that this rank holds of `like`: all of them, or FSDP2's ceil(n / ranks) a rank."""
    if not isinstance(like, DTensor):
        return value
    mesh, rows = like.device_mesh, len(like.to_local())
    start = mesh.get_local_rank() * -(-len(value) // mesh.size())
    return value[start : start + rows]


@torch.no_grad()
def load_weights(llava, source, device="cpu"):
    """Gives every parameter of `llava` its values, in the parameter's own dtype.

    `source` maps names to (key, file, function) or, for what no checkpoint holds, to tensors. Parameters on the meta
    device are made on `device`; those already sharded by FSDP are filled with this rank's rows.
    """
    for name, parameter in list(llava.named_parameters()):
        value = source[name]
        if isinstance(value, tuple):
            key, file, read = value
            value = finite(read(), key, file) if name.startswith("mm_projector.") else read()
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(own_rows(value, parameter))
        else:
            module, _, leaf = name.rpartition(".")
            # What is trained must not share memory with the file, or with the reference made from the same tensor.
            value = value.to(device, parameter.dtype, copy=parameter.requires_grad)
            setattr(llava.get_submodule(module), leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return llava


def load_llava(
    path,
    *,
    vision=None,
    adapter=None,
    tokenizer=None,
    image_mode=None,
    template=None,
    device="cpu",
    dtype=torch.float32,
    other_base=False,
):
    """A LLaVA checkpoint folder -> LLaVA, ready for inference.

    path        config.json, safetensors or pytorch_model*.bin in one or more shards, tokenizer.model
    vision      CLIP's folder, where the checkpoint neither holds the tower nor names a folder that is there
    adapter     a PEFT folder; the projector file beside it is applied too
    tokenizer   another tokenizer.model
    image_mode  pad or anyres; template: mistral_instruct or vicuna_v1; None takes the checkpoint's
    other_base  also takes an adapter that was trained on other weights
    Raises InputError, one line naming the file and the key, for whatever does not fit exactly.
    """
    options = {"image_mode": image_mode, "template": template, "dtype": dtype, "other_base": other_base}
    llava, source = open_llava(path, vision=vision, tokenizer=tokenizer, **options)
    if adapter is not None:
        adapter = read_adapter(adapter, llava)
        lora.attach(llava, adapter)
        llava.to(dtype)  # LoRA too: it would be rounded to it in each forward anyway
        source |= adapter.tensors
    return load_weights(llava, source, device).requires_grad_(False)
