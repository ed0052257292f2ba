"""LLaVA checkpoints, strictly: every key is used once or ignored by name with a reason, every parameter filled once.

Three key layouts are in use: the original LLaVA one, and the two that transformers has written over time. Weights are
memory-mapped and go to their parameters one by one, so loading never holds two copies; a sharded parameter (FSDP)
takes only its own rows from the file.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stic_min import InputError, first_line, lora
from stic_min.clip import ClipConfig
from stic_min.files import printable
from stic_min.llava import LLaVA, LlavaConfig
from stic_min.mistral import DecoderConfig
from stic_min.text import TEMPLATES, Tokenizer

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

# Names (after RENAMES) that a checkpoint may hold and we have no use for, with the reason.
IGNORED = {
    r"vision_tower\.post_layernorm\..+": "hidden state -2 comes before it",
    r"vision_tower\.embeddings\.position_ids": "a buffer 0..n",
    r".+\.rotary_emb\.inv_freq": "computed from rope_theta",
}
IGNORED_IN_CLIP = {r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale": "CLIP's text side"}


def canonical(key):
    """Our name of a published key, None if the key is unknown."""
    for pattern, name in RENAMES:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return None


# ---------------------------------------------------------------- files


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def shards(folder):
    """The weight files of a checkpoint folder. Raises InputError if there are none or one of them is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{index}: no weight_map")
            files = sorted(set(map(str, weight_map.values())))
            if missing := [f for f in files if not os.path.isfile(folder / f)]:
                raise InputError(f"missing shard {folder / printable(missing[0])}, named by {index}")
            return [folder / f for f in files]
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def open_shard(file):
    """{key: function that returns its tensor}; memory-mapped, so a tensor costs memory when it is read."""
    safe = file.suffix == ".safetensors"
    try:
        if safe:
            opened = safetensors.safe_open(file, framework="pt")
        else:
            opened = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a truncated or foreign file fails in as many ways as there are formats
        raise InputError(f"can't read {file}: {printable(first_line(error))}") from None
    if safe:
        lora.check_names(opened.keys(), file)
        return {key: lambda key=key: opened.get_tensor(key) for key in opened.keys()}
    lora.check_tensors(opened, file)
    return {key: lambda value=value: value for key, value in opened.items()}


def open_weights(folder, ignored, only=""):
    """{our name: (key, file, function)} of a folder's tensors whose name starts with `only`."""
    weights = {}
    for file in shards(folder):
        for key, read in open_shard(file).items():
            name = canonical(key)
            if any(re.fullmatch(pattern, name or key) for pattern in ignored):
                continue
            if name is None or not name.startswith(only):
                raise InputError(f"{file}: unknown key {key}")
            if name in weights:
                raise InputError(f"{file}: {key} and {weights[name][0]} are the same parameter")
            weights[name] = key, file, read
    return weights


# ---------------------------------------------------------------- configuration

# What transformers leaves out of an old text_config: its class defaults at the time.
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
MISTRAL_7B = LLAMA_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}


def checked(config, source):
    """A DecoderConfig or ClipConfig as it is. Raises InputError for numbers that no model has."""
    for name, value in vars(config).items():
        real = name in ("rms_norm_eps", "layer_norm_eps", "rope_theta")
        if type(value) not in ((int, float) if real else (int,)) or not 0 < value <= (1e12 if real else 2**20):
            raise InputError(f"{source}: a value of the wrong kind ({name} {str(value)[:60]!r})")
    width, heads = config.hidden_size, config.num_attention_heads
    if width % (2 * heads):
        raise InputError(f"{source}: hidden_size {width} does not split into {heads} heads of even width")
    return config


def decoder_config(config, source):
    """DecoderConfig from a config.json (or its text_config). Raises InputError for what the decoder can't do."""
    if config.get("hidden_act", "silu") != "silu" or config.get("tie_word_embeddings"):
        raise InputError(f"{source}: only silu decoders with untied embeddings are supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"{source}: rope scaling is not supported")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim") not in (None, width // heads):
        raise InputError(f"{source}: head_dim {config['head_dim']} is not hidden_size / num_attention_heads")
    longest = config["max_position_embeddings"]
    if config.get("sliding_window"):  # within one window a sliding one changes nothing
        longest = min(longest, config["sliding_window"])
    decoder = DecoderConfig(
        hidden_size=width,
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        vocab_size=config["vocab_size"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        max_positions=longest,
    )
    return checked(decoder, source)


def clip_config(config, source):
    """ClipConfig from a vision_config. Missing keys take CLIP-L/14-336's values."""
    if not isinstance(config, dict):
        raise InputError(f"{source}: its vision_config is no JSON object")
    if config.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise InputError(f"{source}: only CLIP towers with quick_gelu are supported")
    fields = ClipConfig.__dataclass_fields__
    return checked(ClipConfig(**{key: config[key] for key in fields if key in config}), source)


def find_vision_folder(folder, config, vision):
    """CLIP's folder: `vision`, else where `mm_vision_tower` points (absolute, or beside or inside the checkpoint).

    Returns None if that is only a hub's name here. Raises InputError if `vision` was given and is no folder.
    """
    if vision is not None:
        if not (Path(vision) / "config.json").is_file():
            raise InputError(f"no vision tower (config.json) in {vision}")
        return Path(vision)
    named = config["mm_vision_tower"]
    places = folder / named, folder.parent / named  # an absolute name stays as it is
    return next((p for p in places if os.path.isfile(p / "config.json")), None)


def read_original(config, folder, vision):
    """A config.json of LLaVA's own -> (DecoderConfig, ClipConfig, CLIP's folder or None, pinpoints, mode, longest)."""
    source = folder / "config.json"
    if "mm_vision_tower" not in config and vision is None:
        raise InputError(f"{source}: no mm_vision_tower: no LLaVA checkpoint, or name its CLIP with --vision")
    vision_folder, clip = find_vision_folder(folder, config, vision), ClipConfig()
    if vision_folder is not None:
        tower = read_json(vision_folder / "config.json")
        clip = clip_config(tower.get("vision_config", tower), vision_folder / "config.json")
    for key, needed in (("mm_projector_type", "mlp2x_gelu"), ("mm_vision_select_feature", "patch"),
                        ("mm_vision_select_layer", -2), ("mm_use_im_start_end", False)):
        if config.get(key, needed) != needed:
            raise InputError(f"{source}: {key} {config[key]!r}, only {needed!r} is supported")
    decoder = decoder_config(config, source)
    anyres = "spatial_unpad" in config.get("mm_patch_merge_type", "flat")
    pinpoints = config.get("image_grid_pinpoints") if anyres else None
    longest = min(decoder.max_positions, config.get("tokenizer_model_max_length") or decoder.max_positions)
    return decoder, clip, vision_folder, pinpoints, config.get("image_aspect_ratio"), longest


def read_huggingface(config, folder):
    """The same from a config.json of transformers' Llava and LlavaNext classes."""
    source, text = folder / "config.json", config["text_config"]
    decoder = decoder_config((MISTRAL_7B if text.get("model_type") == "mistral" else LLAMA_7B) | text, source)
    for key, needed in (("vision_feature_layer", -2), ("vision_feature_select_strategy", "default")):
        if config.get(key, needed) != needed:
            raise InputError(f"{source}: {key} {config[key]!r}, only {needed!r} is supported")
    anyres = config.get("model_type") == "llava_next"  # 1.5 files do not say how pictures are laid out; LLaVA's do
    pinpoints = config.get("image_grid_pinpoints") if anyres else None
    clip = clip_config(config.get("vision_config", {}), source)
    return decoder, clip, None, pinpoints, "anyres" if anyres else "pad", decoder.max_positions


def read_config(folder, vision=None, image_mode=None, template=None):
    """config.json of a LLaVA folder -> (LlavaConfig, CLIP's folder or None, whether the layout is transformers').

    Raises InputError naming the file and the key for anything missing or not supported.
    """
    source = folder / "config.json"
    config = read_json(source)
    huggingface = "text_config" in config
    try:
        read = read_huggingface(config, folder) if huggingface else read_original(config, folder, vision)
        decoder, clip, vision_folder, pinpoints, mode, longest = read
        pinpoints = pinpoints and tuple((int(w), int(h)) for w, h in pinpoints)
        text = config["text_config"] if huggingface else config
        mistral = "mistral" in text.get("model_type", "") or "Mistral" in "".join(text.get("architectures") or [])
    except InputError:
        raise
    except KeyError as key:
        raise InputError(f"{source}: no {key.args[0]}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{source}: a value of the wrong kind ({first_line(error)})") from None
    for given, known in ((image_mode, ("pad", "anyres")), (template, tuple(TEMPLATES))):
        if given is not None and given not in known:
            raise InputError(f"{given!r} is none of {', '.join(known)}")
    mode = image_mode or mode
    if mode not in ("pad", "anyres"):
        raise InputError(f"{source}: image_aspect_ratio {mode!r} is not supported, choose with --image-mode")
    if mode == "anyres" and not pinpoints:
        raise InputError(f"{folder} can't do anyres: its config.json has no spatial_unpad with image_grid_pinpoints")
    template = template or ("mistral_instruct" if mistral else "vicuna_v1")
    return LlavaConfig(decoder, clip, mode, pinpoints, template, longest), vision_folder, huggingface


# ---------------------------------------------------------------- model


def open_llava(path, *, vision=None, tokenizer=None, image_mode=None, template=None, dtype=torch.float32):
    """A LLaVA on the meta device, and the source of its parameters: {name: (key, file, function)}.

    For those who shard the model before `fill`; everybody else calls `load_llava`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"no such checkpoint folder: {folder} (nothing is downloaded; README.md says how to get one)")
    if not (folder / "config.json").is_file():
        raise InputError(f"no LLaVA checkpoint: there is no {folder / 'config.json'}")
    config, vision_folder, huggingface = read_config(folder, vision, image_mode, template)
    legacy = True
    if (folder / "tokenizer_config.json").is_file():
        legacy = read_json(folder / "tokenizer_config.json").get("legacy", True) is not False
    tokenizer = Tokenizer(tokenizer or folder / "tokenizer.model", legacy)

    last = config.vision.num_hidden_layers - 1
    ignored = IGNORED | {rf"vision_tower\.encoder\.layers\.{last}\..+": "hidden state -2 comes before it"}
    if config.pinpoints is None:
        ignored |= {"image_newline": "pad mode has no rows to end"}
    source = open_weights(folder, ignored)
    if not any(name.startswith("vision_tower.") for name in source):
        # Weights embedded in the checkpoint win: LLaVA-1.6 carries its own tuned CLIP.
        if vision_folder is None:
            named = read_json(folder / "config.json").get("mm_vision_tower")
            raise InputError(f"{folder} holds no vision weights and {named!r} is no folder near it; name it: --vision")
        source |= open_weights(vision_folder, ignored | IGNORED_IN_CLIP, only="vision_tower.")
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
    return llava, source


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
def fill(llava, source, device="cpu"):
    """Gives every parameter of `llava` its values, in the parameter's own dtype.

    `source` maps names to (key, file, function) or, for what no checkpoint holds, to tensors. Parameters on the meta
    device are made on `device`; those already sharded by FSDP are filled with this rank's rows.
    """
    for name, parameter in list(llava.named_parameters()):
        value = source[name]
        if isinstance(value, tuple):
            value = value[2]()
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
):
    """A LLaVA checkpoint folder -> LLaVA, ready for inference.

    path        config.json, safetensors or pytorch_model*.bin in one or more shards, tokenizer.model
    vision      CLIP's folder, where the checkpoint neither holds the tower nor names a folder that is there
    adapter     a PEFT folder; the projector file beside it is applied too
    tokenizer   another tokenizer.model
    image_mode  pad or anyres; template: mistral_instruct or vicuna_v1; None takes the checkpoint's
    Raises InputError, one line naming the file and the key, for whatever does not fit exactly.
    """
    llava, source = open_llava(
        path, vision=vision, tokenizer=tokenizer, image_mode=image_mode, template=template, dtype=dtype
    )
    if adapter is not None:
        adapter = lora.read_adapter(adapter, llava, canonical)
        lora.attach(llava, adapter)
        llava.to(dtype)  # LoRA too: it would be rounded to it in each forward anyway
        source |= adapter.tensors
    return fill(llava, source, device).requires_grad_(False)
