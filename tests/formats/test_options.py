"""Options in the JSON files of published and current models: each is used, required, refused or harmless; and
the chat template follows from the model."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import V15 as TINY
from checkpoints import copy, refuse
from published_configs import HF, HF15, HF16, V15, V16

from stic_min import InputError
from stic_min.formats.config import read_config
from stic_min.formats.template import model_name
from stic_min.formats.tokenizer import read_tokenizer
from stic_min.formats.tower import check_pixels, read_tower

# ---------------------------------------------------------------- config.json of other published models

LARGER = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
ANYRES = {k: V16[k] for k in ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type")}
V15_13B = V15 | LARGER | dict(num_key_value_heads=40, _name_or_path="llava-v1.5-13b")
V16_VICUNA = V15 | ANYRES | dict(
    _name_or_path="lmsys/vicuna-7b-v1.5", attention_bias=False, attention_dropout=0.0, model_type="llava",
    rope_theta=10000.0, tokenizer_model_max_length=4096, tokenizer_padding_side="right",
    torch_dtype="bfloat16", image_crop_resolution=224, image_split_resolution=224, mm_projector_lr=None,
    mm_vision_tower_lr=2e-06,
)  # fmt: skip
V16_34B = V16_VICUNA | dict(
    _name_or_path="NousResearch/Nous-Hermes-2-Yi-34B", hidden_size=7168, intermediate_size=20480,
    vocab_size=64000, num_attention_heads=56, num_hidden_layers=60, num_key_value_heads=8,
    rope_theta=5000000.0, eos_token_id=7,
)  # fmt: skip
VICUNA_TEXT = HF15["text_config"]
BAKLLAVA = VICUNA_TEXT | dict(
    model_type="mistral", architectures=["MistralForCausalLM"], _name_or_path="mistralai/Mistral-7B-v0.1",
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=32768,
)  # fmt: skip


def read(folder, config, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder, **options)


@pytest.mark.parametrize("name, config, expected", [
    ("llava-v1.5-7b", V15, "vicuna_v1"), ("llava-v1.5-13b", V15_13B, "vicuna_v1"),
    ("llava-v1.6-vicuna-7b", V16_VICUNA, "vicuna_v1"), ("llava-v1.6-mistral-7b", V16, "mistral_instruct"),
    ("llava-v1.6-vicuna-13b", V16_VICUNA | LARGER | {"num_key_value_heads": 40}, "vicuna_v1"),
    ("llava-1.5-7b-hf", HF15, "vicuna_v1"), ("llava-v1.6-mistral-7b-hf", HF16, "mistral_instruct"),
    ("llava-1.5-13b-hf", HF15 | {"text_config": VICUNA_TEXT | LARGER}, "vicuna_v1"),
    ("llava-v1.6-vicuna-7b-hf", HF16 | {"text_config": VICUNA_TEXT}, "vicuna_v1"),
    ("models--liuhaotian--llava-v1.6-mistral-7b/snapshots/0a1b", V16, "mistral_instruct"),
    ("stic-merged", V16 | {"_name_or_path": "liuhaotian/llava-v1.6-mistral-7b"}, "mistral_instruct"),
])  # fmt: skip
def test_templates_of_published_models(tmp_path, name, config, expected):
    config, _, _, reason = read(tmp_path / name, config)
    assert config.template == expected and "decoder built on" in reason


@pytest.mark.parametrize("name, config, reason", [
    ("llava-v1.6-34b", V16_34B | {"eos_token_id": 2}, "Nous-Hermes-2-Yi-34B has chatml"),
    ("renamed", V16_34B | {"eos_token_id": 2, "_name_or_path": ""}, "vocabulary of 64000"),
    ("llava-v1.6-34b-hf", HF16 | {"text_config": VICUNA_TEXT | {"vocab_size": 64064}}, "34b-hf has chatml"),
    ("BakLLaVA-1", V15 | {"architectures": ["LlavaMistralForCausalLM"]}, "BakLLaVA-1 has"),
    ("bak-hf", HF15 | {"text_config": BAKLLAVA}, "Mistral-7B-v0.1 has no template"),
    ("bak-hf", HF15 | {"text_config": BAKLLAVA | {"_name_or_path": ""}}, "built on Mistral-7B-v0.1"),
    ("chat", V15 | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}, "Llama-2-7b-chat-hf has Llama's"),
    ("llava-llama-2-13b-chat-lightning-preview", V15_13B, "chat-lightning-preview has Llama's"),
    ("qwen", V15 | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen"},
     "is LlavaQwenForCausalLM"),
    ("mpt", V15 | {"architectures": ["LlavaMptForCausalLM"]}, "is LlavaMptForCausalLM"),
    ("qwen-hf", HF15 | {"text_config": VICUNA_TEXT | {"architectures": [], "model_type": "qwen2"}},
     "is qwen2"),
])  # fmt: skip
def test_other_templates_are_an_error_unless_one_is_chosen(tmp_path, name, config, reason):
    with pytest.raises(InputError, match=f"{reason}.*--template"):
        read(tmp_path / name, config)
    config, _, _, reason = read(tmp_path / name, config, template="vicuna_v1")
    assert (config.template, reason) == ("vicuna_v1", "as given")


@pytest.mark.parametrize("name", ["llava-v1.5-7b-merged-v0", "llava-philosophy", "stic-134b"])
def test_a_users_folder_may_have_any_name(tmp_path, name):
    assert read(tmp_path / name, V15)[0].template == "vicuna_v1"


def test_names_of_models():
    snapshot = "a/models--liuhaotian--llava-v1.5-7b/snapshots/4481"
    paths = "liuhaotian/llava-v1.5-7b", "/data/llava-v1.5-7b/", snapshot
    assert {model_name(path) for path in paths} == {"llava-v1.5-7b"}


# ---------------------------------------------------------------- options

FULL = dict(  # what transformers 4 wrote for every configuration when it did not omit defaults
    add_cross_attention=False, bad_words_ids=None, begin_suppress_tokens=None, chunk_size_feed_forward=0,
    cross_attention_hidden_size=None, decoder_start_token_id=None, diversity_penalty=0.0, do_sample=False,
    early_stopping=False, encoder_no_repeat_ngram_size=0, exponential_decay_length_penalty=None,
    finetuning_task=None, forced_bos_token_id=None, forced_eos_token_id=None,
    id2label={"0": "LABEL_0", "1": "LABEL_1"}, is_decoder=False, is_encoder_decoder=False,
    label2id={"LABEL_0": 0, "LABEL_1": 1}, length_penalty=1.0, max_length=20, min_length=0,
    no_repeat_ngram_size=0, num_beam_groups=1, num_beams=1, num_return_sequences=1, output_attentions=False,
    output_hidden_states=False, output_scores=False, prefix=None, problem_type=None, pruned_heads={},
    remove_invalid_values=False, repetition_penalty=1.0, return_dict=True, return_dict_in_generate=False,
    sep_token_id=None, suppress_tokens=None, task_specific_params=None, temperature=1.0, tf_legacy_loss=False,
    tie_encoder_decoder=False, tokenizer_class=None, top_k=50, top_p=1.0, torch_dtype=None, torchscript=False,
    transformers_version="4.21.3", typical_p=1.0, use_bfloat16=False,
)  # fmt: skip
CLIP = HF["vision_config"] | FULL | dict(  # openai/clip-vit-large-patch14-336
    _name_or_path="", architectures=None, attention_dropout=0.0, dropout=0.0, hidden_act="quick_gelu",
    initializer_factor=1.0, initializer_range=0.02, layer_norm_eps=1e-05, num_channels=3,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def test_full_files_are_read(tmp_path):
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    text = VICUNA_TEXT | FULL | tokens | dict(tie_word_embeddings=False)
    whole = read(tmp_path / "full", HF15 | {"text_config": text, "vision_config": CLIP})[0]
    assert whole == read(tmp_path / "sparse", HF15)[0]
    (tmp_path / "config.json").write_text(json.dumps(dict(
        architectures=["CLIPModel"], initializer_factor=1.0, logit_scale_init_value=2.6592, model_type="clip",
        projection_dim=768, text_config=FULL, text_config_dict=FULL, torch_dtype="float32",
        vision_config=CLIP, vision_config_dict=HF["vision_config"], transformers_version=None)))  # fmt: skip
    assert read_tower(tmp_path) == whole.vision


def test_options_of_the_installed_transformers_are_known(tmp_path):
    hf = pytest.importorskip("transformers")
    sliding = dict(sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    for kind, text in ((hf.LlavaConfig, hf.LlamaConfig()), (hf.LlavaNextConfig, hf.MistralConfig(**sliding))):
        config = kind(text_config=text)
        read(tmp_path, json.loads(config.to_json_string(use_diff=False)))
        read(tmp_path, json.loads(config.to_json_string()))


WRONG = {  # message: (base, changes)
    "quantization_config .*quantized weights can't be read": (V15, dict(quantization_config={"bits": 4})),
    "attention_bias True is not supported": (V15, dict(attention_bias=True)),
    "attention_dropout 0.1 .*only LoRA has dropout": (V16, dict(attention_dropout=0.1)),
    "tie_word_embeddings True": (V15, dict(tie_word_embeddings=True)),
    "partial_rotary_factor 0.5": (V15, dict(partial_rotary_factor=0.5)),
    "rope_scaling: factor 2.0 is an unknown option": (V15, dict(rope_scaling={"factor": 2.0})),
    "rope_scaling: rope_type 'llama3'": (V15, dict(rope_parameters={"rope_type": "llama3"})),
    "eos_token_id 7 is not supported": (V16_34B, {}),
    "head_dim 64 is not hidden_size": (V15, dict(head_dim=64)),
    "mm_use_im_start_end True": (V15, dict(mm_use_im_start_end=True)),
    "mm_projector_type 'linear'": (V15, dict(mm_projector_type="linear")),
    "mm_vision_select_feature 'cls_patch'": (V15, dict(mm_vision_select_feature="cls_patch")),
    "mm_patch_merge_type 'spatial' is not flat or spatial_unpad": (V16, dict(mm_patch_merge_type="spatial")),
    "mm_resampler_type 'perceiver'": (V15, dict(mm_resampler_type="perceiver")),
    "s2 True": (V15, dict(s2=True)),
    "invented 3 is an unknown option": (V15, dict(invented=3)),
    r"image_grid_pinpoints '\(1x1\),...,\(6x6\)' is not a list of \[width, height\]": (
        V16, dict(image_grid_pinpoints="(1x1),...,(6x6)")),
    r"image_grid_pinpoints \[\[336\]\] is not a list": (V16, dict(image_grid_pinpoints=[[336]])),
    "image_grid_pinpoints 3 is not a list": (V16, dict(image_grid_pinpoints=3)),
    "no mm_vision_tower": (V15, dict(mm_vision_tower=None)),
    "mm_vision_tower 3 is not text": (V15, dict(mm_vision_tower=3)),
    "hidden_size '4096' is not a whole number": (V15, dict(hidden_size="4096")),
    "hidden_size True is not a whole number": (V15, dict(hidden_size=True)),
    "rms_norm_eps -1 is not a positive number": (V15, dict(rms_norm_eps=-1)),
    "no rms_norm_eps": (V15, dict(rms_norm_eps=None)),
    "rope_scaling 'linear' is not a JSON object": (V15, dict(rope_scaling="linear")),
    "architectures 'LlavaLlamaForCausalLM' is not a list": (V15, dict(architectures="LlavaLlamaForCausalLM")),
    "tokenizer_model_max_length 1.5 is not a whole number": (V15, dict(tokenizer_model_max_length=1.5)),
    "text_config: mlp_bias True": (HF15, dict(text_config=VICUNA_TEXT | {"mlp_bias": True})),
    "text_config 3 is not a JSON object": (HF15, dict(text_config=3)),
    "vision_config: model_type 'siglip'": (HF15, dict(vision_config={"model_type": "siglip"})),
    "vision_config: hidden_act 'gelu'": (HF15, dict(vision_config={"hidden_act": "gelu"})),
    "projector_hidden_act 'relu'": (HF15, dict(projector_hidden_act="relu")),
    "multimodal_projector_bias False": (HF15, dict(multimodal_projector_bias=False)),
    "vision_feature_select_strategy 'full'": (HF15, dict(vision_feature_select_strategy="full")),
    "vision_feature_layer -1": (HF15, dict(vision_feature_layer=-1)),
    "model_type 'vipllava' is not llava or llava_next": (HF15, dict(model_type="vipllava")),
}


@pytest.mark.parametrize("match", WRONG)
def test_unsupported_options_are_named(tmp_path, match):
    config, changes = WRONG[match]
    with pytest.raises(InputError, match=f"config.json: {match}") as error:
        read(tmp_path, config | changes)
    assert len(str(error.value)) < 300


def test_other_spellings(tmp_path):
    expected = read(tmp_path, V16)[0]
    as_text = json.dumps(V16["image_grid_pinpoints"])
    assert read(tmp_path, V16 | {"image_grid_pinpoints": as_text})[0] == expected
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    rope = dict(rope_theta=None, rope_parameters=rope, dtype="bfloat16")
    assert read(tmp_path, V16 | rope)[0] == expected
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(V16), encoding="utf-8")
    assert read_config(tmp_path)[0] == expected
    (tmp_path / "config.json").write_text(json.dumps(V16)[:-1] + ', "rope_theta": 1.0}')
    with pytest.raises(InputError, match="config.json: 'rope_theta' appears twice"):
        read_config(tmp_path)


def test_a_tower_of_another_width(tiny, tmp_path):
    folder = copy(tiny, TINY, tmp_path, mm_hidden_size=1024)
    refuse("mm_hidden_size 1024, but the tower in .*clip-tiny has 32", folder)


def test_pixels_normalized_differently(tiny, tmp_path):
    file = Path(shutil.copy(tiny / "clip-tiny" / "preprocessor_config.json", tmp_path))
    right = json.loads(file.read_text())
    check_pixels(tmp_path)
    wrong = {"image_mean": [0.5, 0.5, 0.5], "resample": 2, "do_normalize": False, "odd": 1}
    for name, value in wrong.items():
        file.write_text(json.dumps(right | {name: value}))
        with pytest.raises(InputError, match=f"preprocessor_config.json: {name} "):
            check_pixels(tmp_path)


# ---------------------------------------------------------------- tokenizer

VICUNA = dict(  # llava-v1.5
    add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False, legacy=False,
    model_max_length=2048, bos_token={"__type": "AddedToken", "content": "<s>", "normalized": False},
    eos_token="</s>", pad_token=None, padding_side="right", sp_model_kwargs={},
    tokenizer_class="LlamaTokenizer", unk_token="<unk>",
)  # fmt: skip
LLAVA_HF = VICUNA | dict(
    added_tokens_decoder={
        str(i): {"content": token, "special": True}
        for i, token in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (32000, "<image>"), (32001, "<pad>"))
    },
    additional_special_tokens=[], chat_template="{{ messages }}",
    extra_special_tokens={"image_token": "<image>"}, image_token="<image>", pad_token="<pad>",
    processor_class="LlavaProcessor", trust_remote_code=False, add_prefix_space=None,
    spaces_between_special_tokens=False, use_default_system_prompt=False,
)  # fmt: skip


@pytest.fixture
def tokenizer(tiny, tmp_path):
    shutil.copy(tiny / TINY / "tokenizer.model", tmp_path)

    def tokenizer(settings, added=None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / "added_tokens.json").write_text(json.dumps(added or {}))
        return read_tokenizer(tmp_path)

    return tokenizer


def test_published_tokenizers(tokenizer):
    assert tokenizer(VICUNA).legacy is False
    assert tokenizer(LLAVA_HF, {"<image>": 32000, "<pad>": 32001}).legacy is False
    assert tokenizer(VICUNA | {"legacy": None}).legacy is True  # transformers' default


@pytest.mark.parametrize("option, value", [
    ("add_bos_token", False), ("add_eos_token", True), ("tokenizer_class", "GPT2Tokenizer"), ("legacy", "no"),
    ("clean_up_tokenization_spaces", True), ("add_prefix_space", False), ("eos_token", "<|im_end|>"),
    ("bos_token", {"content": "<|begin|>"}), ("sp_model_kwargs", {"enable_sampling": True}), ("invented", 1),
])  # fmt: skip
def test_settings_that_change_ids_or_text(tokenizer, option, value):
    with pytest.raises(InputError, match=f"tokenizer_config.json: {option} "):
        tokenizer(VICUNA | {option: value})


def test_added_tokens_that_text_may_contain(tokenizer):
    for settings, added in ((VICUNA, {"<|im_start|>": 32000}), (VICUNA | {"added_tokens_decoder": {
            "32000": {"content": "<|im_start|>"}}}, {})):  # fmt: skip
        with pytest.raises(InputError, match="the token '<|im_start|>' was added"):
            tokenizer(settings, added)
