"""config.json of a LLaVA checkpoint, in LLaVA's own layout or in transformers', -> LlavaConfig. Strictly: what the
model here can't do is an error, and so are numbers that no model has."""

import os
from pathlib import Path

from stic_min import InputError, first_line
from stic_min.clip import ClipConfig
from stic_min.files import read_json
from stic_min.llava import LlavaConfig
from stic_min.mistral import DecoderConfig
from stic_min.text import TEMPLATES

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
