"""CLIP's own files: config.json -> ClipConfig, and preprocessor_config.json, which must match images.py."""

from stic_min.clip import ClipConfig
from stic_min.formats.options import HARMLESS, OBJECT, REAL, REFUSED, SIZE, check_options, heads_fit
from stic_min.images import CLIP_MEAN, CLIP_STD
from stic_min.runtime.files import read_json

VISION = dict.fromkeys(ClipConfig.__dataclass_fields__, SIZE) | {"layer_norm_eps": REAL}
VISION_REQUIRED = {
    "model_type": ("clip_vision_model", None),
    "hidden_act": ("quick_gelu",),
    "num_channels": (3,),
}
VISION_HARMLESS = HARMLESS | {
    "the tower is never trained": "attention_dropout dropout",
    "for CLIP's text side": "projection_dim vocab_size tie_word_embeddings bos_token_id eos_token_id",
    "names": "architectures _name_or_path",
}
CLIP = {"vision_config": OBJECT, "vision_config_dict": OBJECT}  # the second wins in transformers
CLIP_HARMLESS = HARMLESS | {
    "names": "architectures _name_or_path",
    "for CLIP's text side": "text_config text_config_dict projection_dim logit_scale_init_value",
}
PIXELS_REQUIRED = {
    "image_mean": (list(CLIP_MEAN),),
    "image_std": (list(CLIP_STD),),
    "resample": (3,),
    "rescale_factor": (1 / 255,),
    "do_rescale": (True,),
    "do_normalize": (True,),
}
PIXELS_HARMLESS = {
    "config.json gives the sizes": "size crop_size do_resize do_center_crop do_pad pad_size "
    "image_grid_pinpoints default_to_square aspect_ratio_setting",
    "how transformers computes, not what": "do_convert_rgb data_format input_data_format return_tensors "
    "device disable_grouping image_seq_length",
    "records": "image_processor_type feature_extractor_type processor_class _processor_class "
    "_valid_processor_keys",
}


def clip_config(config, source):
    """ClipConfig from a vision_config. Missing keys take CLIP-L/14-336's values."""
    options = check_options(config, source, VISION, VISION_REQUIRED, REFUSED, VISION_HARMLESS)
    return heads_fit(ClipConfig(**options), source)


def read_tower(folder):
    """ClipConfig from CLIP's own folder, whose config.json describes the full model or only the tower."""
    source = folder / "config.json"
    tower = read_json(source)
    if "vision_config" in tower:
        options = check_options(tower, source, CLIP, {"model_type": ("clip",)}, REFUSED, CLIP_HARMLESS)
        tower = options.get("vision_config", {}) | options.get("vision_config_dict", {})
    return clip_config(tower, source)


def check_pixels(folder):
    """Checks that a folder's preprocessor_config.json normalizes images as CLIP does."""
    source = folder / "preprocessor_config.json"
    if source.is_file():
        check_options(read_json(source), source, {}, PIXELS_REQUIRED, {}, PIXELS_HARMLESS)
