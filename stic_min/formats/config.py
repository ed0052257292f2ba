"""config.json of a LLaVA checkpoint, in LLaVA's own layout or in transformers', -> LlavaConfig.

Strict: unsupported options and implausible values are errors. The tables list every option that the published
files and transformers 4 and 5 are known to write.
"""

import contextlib
import json
import os
from pathlib import Path

from stic_min import InputError
from stic_min.clip import ClipConfig
from stic_min.formats.options import (
    HARMLESS,
    NAMES,
    OBJECT,
    REAL,
    REFUSED,
    SIZE,
    TEXT,
    check_options,
    heads_fit,
)
from stic_min.formats.template import chat_template
from stic_min.formats.tower import check_pixels, clip_config, read_tower
from stic_min.llava import LlavaConfig
from stic_min.mistral import DecoderConfig
from stic_min.runtime.files import printable, read_json
from stic_min.text import TEMPLATES

IMAGE_MODES = "pad", "anyres"

# Values that transformers omitted from old text_configs: its class defaults at the time.
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

# ---------------------------------------------------------------- options of the decoder

DECODER = {
    "architectures": NAMES,
    "model_type": TEXT,
    "_name_or_path": TEXT,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "vocab_size": SIZE,
    "max_position_embeddings": SIZE,
    "sliding_window": SIZE,
    "rms_norm_eps": REAL,
    "rope_theta": REAL,
    "rope_scaling": OBJECT,  # transformers 4
    "rope_parameters": OBJECT,  # transformers 5
}
DECODER_REQUIRED = {
    "hidden_act": ("silu",),
    "bos_token_id": (1, None),
    "eos_token_id": (2, [2], None),
    "partial_rotary_factor": (1, None),
}
DECODER_REFUSED = REFUSED | {
    "tie_word_embeddings": "lm_head must be a tensor of its own",
    "attention_bias": "the decoder has no biases",
    "mlp_bias": "the decoder has no biases",
    "attention_dropout": "only LoRA has dropout in training",
}
DECODER_HARMLESS = HARMLESS | {"only the order of summation": "pretraining_tp"}
ROPE = {"rope_theta": REAL}
ROPE_REQUIRED = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "partial_rotary_factor": (1, None),
}

# ---------------------------------------------------------------- options in LLaVA's own layout

ORIGINAL = {
    "mm_vision_tower": TEXT,
    "mm_hidden_size": SIZE,
    "mm_patch_merge_type": (lambda x: x in ("flat", "spatial_unpad"), "flat or spatial_unpad"),
    "image_aspect_ratio": TEXT,
    "image_grid_pinpoints": (lambda x: isinstance(x, (list, str)), "a list of [width, height]"),
    "tokenizer_model_max_length": SIZE,
}
ORIGINAL_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_vision_select_layer": (-2,),
}
ORIGINAL_REFUSED = {
    "mm_use_im_start_end": "prompts here have no <im_start> and <im_end>",
    "mm_resampler_type": "image features go through the projector alone",
    "s2": "images are encoded at one scale",
}
ORIGINAL_HARMLESS = {
    "how it was trained": "tune_mm_mlp_adapter freeze_mm_mlp_adapter pretrain_mm_mlp_adapter mm_projector_lr "
    "tune_mm_vision_resampler freeze_mm_vision_resampler unfreeze_mm_vision_tower mm_vision_tower_lr "
    "use_mm_proj vision_tower_pretrained",
    "no prompt contains <im_patch>": "mm_use_im_patch_token",
    "for image modes that LLaVA has dropped": "image_crop_resolution image_split_resolution",
    "sequences are not padded": "tokenizer_padding_side",
    "for s2 only": "s2_scales",
}

# ---------------------------------------------------------------- options in transformers' layout

HUGGINGFACE = {
    "model_type": (lambda x: x in ("llava", "llava_next"), "llava or llava_next"),
    "_name_or_path": TEXT,
    "text_config": OBJECT,
    "vision_config": OBJECT,
    "image_grid_pinpoints": ORIGINAL["image_grid_pinpoints"],
}
HUGGINGFACE_REQUIRED = {
    "vision_feature_layer": (-2,),
    "vision_feature_select_strategy": ("default",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "use_image_newline_parameter": (True,),
}
HUGGINGFACE_REFUSED = REFUSED | {"tie_word_embeddings": DECODER_REFUSED["tie_word_embeddings"]}
HUGGINGFACE_HARMLESS = HARMLESS | {
    "images are placed by their size, not by a token": "image_token_index image_token_id image_seq_length",
    "labels follow from segments": "ignore_index",
    "text_config sets it": "vocab_size bos_token_id eos_token_id",
    "the class follows from model_type": "architectures",
}


def decoder_config(options, source):
    """DecoderConfig from the checked options of a config.json (or its text_config)."""
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    rope = check_options(rope, f"{source}: rope_scaling", ROPE, ROPE_REQUIRED, {}, {})
    heads = options["num_attention_heads"]
    width = options["hidden_size"]
    if options.get("head_dim", width // heads) != width // heads:
        raise InputError(f"{source}: head_dim {options['head_dim']} is not hidden_size / num_attention_heads")
    # Within its first window, sliding-window attention is full attention.
    longest = min(options["max_position_embeddings"], options.get("sliding_window", 2**20))
    decoder = DecoderConfig(
        hidden_size=width,
        intermediate_size=options["intermediate_size"],
        num_hidden_layers=options["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=options.get("num_key_value_heads", heads),
        vocab_size=options["vocab_size"],
        rms_norm_eps=options["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", options.get("rope_theta", 10000.0))),
        max_positions=longest,
    )
    return heads_fit(decoder, source)


def find_vision_folder(folder, tower, vision):
    """CLIP's folder: `vision`, else where mm_vision_tower, `tower`, points: an absolute path, or a folder
    next to or inside the checkpoint. None if there is no such folder, as with a hub id."""
    if vision is not None:
        if not (Path(vision) / "config.json").is_file():
            raise InputError(f"no vision tower (config.json) in {vision}")
        return Path(vision)
    candidates = folder / tower, folder.parent / tower  # an absolute path stays as it is
    return next((path for path in candidates if os.path.isfile(path / "config.json")), None)


def read_pinpoints(value, source):
    """image_grid_pinpoints as a tuple of (width, height); LLaVA's training flag writes a string."""
    pairs = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            pairs = json.loads(value)
    is_size, _ = SIZE
    is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(is_size, pair))
    if not isinstance(pairs, list) or not all(map(is_pair, pairs)):
        text = printable(repr(value))[:60]
        raise InputError(f"{source}: image_grid_pinpoints {text} is not a list of [width, height]")
    return tuple(map(tuple, pairs))


def read_original(config, folder, vision):
    """config.json in LLaVA's own layout -> (options, DecoderConfig, ClipConfig, CLIP's folder or None, image
    mode, longest sequence)."""
    source = folder / "config.json"
    lists = DECODER | ORIGINAL, DECODER_REQUIRED | ORIGINAL_REQUIRED, DECODER_REFUSED | ORIGINAL_REFUSED
    options = check_options(config, source, *lists, DECODER_HARMLESS | ORIGINAL_HARMLESS)
    if "mm_vision_tower" not in options and vision is None:
        raise InputError(f"{source}: no mm_vision_tower: not a LLaVA checkpoint? If it is, pass its CLIP "
                         "folder with --vision")  # fmt: skip
    vision_folder = find_vision_folder(folder, options.get("mm_vision_tower"), vision)
    clip = ClipConfig()
    if vision_folder is not None:
        clip = read_tower(vision_folder)
        check_pixels(vision_folder)
        if options.get("mm_hidden_size", clip.hidden_size) != clip.hidden_size:
            raise InputError(f"{source}: mm_hidden_size {options['mm_hidden_size']}, but the tower in "
                             f"{vision_folder} has {clip.hidden_size}")
    decoder = decoder_config(options, source)
    if options.get("mm_patch_merge_type") != "spatial_unpad":  # only 1.6's anyres is both
        options.pop("image_grid_pinpoints", None)
    longest = min(decoder.max_positions, options.get("tokenizer_model_max_length", decoder.max_positions))
    return options, decoder, clip, vision_folder, options.get("image_aspect_ratio"), longest


def read_huggingface(config, folder):
    """The same from the config.json of transformers' Llava and LlavaNext classes."""
    source = folder / "config.json"
    lists = HUGGINGFACE, HUGGINGFACE_REQUIRED, HUGGINGFACE_REFUSED, HUGGINGFACE_HARMLESS
    options = check_options(config, source, *lists)
    text = options["text_config"]
    text = (MISTRAL_7B if text.get("model_type") == "mistral" else LLAMA_7B) | text
    lists = DECODER, DECODER_REQUIRED, DECODER_REFUSED, DECODER_HARMLESS
    text = check_options(text, f"{source}: text_config", *lists)
    decoder = decoder_config(text, source)
    clip = clip_config(options.get("vision_config", {}), f"{source}: vision_config")
    check_pixels(folder)
    anyres = options.get("model_type") == "llava_next"  # these files have no image_aspect_ratio
    if not anyres:
        options.pop("image_grid_pinpoints", None)
    text["_name_or_path"] = text.get("_name_or_path") or options.get("_name_or_path", "")
    text["image_grid_pinpoints"] = options.get("image_grid_pinpoints")
    return text, decoder, clip, None, "anyres" if anyres else "pad", decoder.max_positions


def read_config(folder, vision=None, image_mode=None, template=None):
    """config.json of a LLaVA folder -> (LlavaConfig, CLIP's folder or None, whether the layout is
    transformers', the reason for the template). Errors name the file and the key."""
    source = folder / "config.json"
    if folder.is_file():
        raise InputError(f"{folder} is a file; --model must be a checkpoint folder")
    if not folder.is_dir():
        raise InputError(f"no such checkpoint folder: {folder} (nothing is downloaded; see README.md for "
                         "how to get one)")  # fmt: skip
    if not source.is_file():
        raise InputError(f"not a LLaVA checkpoint: {source} is missing")
    config = read_json(source)
    huggingface = "text_config" in config
    try:
        read = read_huggingface(config, folder) if huggingface else read_original(config, folder, vision)
    except KeyError as key:
        raise InputError(f"{source}: no {key.args[0]}") from None
    options, decoder, clip, vision_folder, mode, longest = read
    pinpoints = options.get("image_grid_pinpoints")
    pinpoints = read_pinpoints(pinpoints, source) if pinpoints else None
    for argument, choices in ((image_mode, IMAGE_MODES), (template, tuple(TEMPLATES))):
        if argument is not None and argument not in choices:
            raise InputError(f"{argument!r} is not one of {', '.join(choices)}")
    mode = image_mode or mode
    if mode not in IMAGE_MODES:
        raise InputError(f"{source}: image_aspect_ratio {mode!r} is not supported; use --image-mode")
    if mode == "anyres" and not pinpoints:
        raise InputError(f"{folder} can't do anyres: its config.json has no spatial_unpad with "
                         "image_grid_pinpoints")  # fmt: skip
    template, reason = (template, "as given") if template else chat_template(options, decoder, folder)
    if template is None:
        raise InputError(f"{folder}: {reason}; its chat template is not available here; choose one with "
                         "--template")  # fmt: skip
    return LlavaConfig(decoder, clip, mode, pinpoints, template, longest), vision_folder, huggingface, reason
