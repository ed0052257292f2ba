"""config.json of both 7B models as published, by their authors and for transformers, and of three relatives."""

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

V16 = dict(  # liuhaotian/llava-v1.6-mistral-7b
    _name_or_path="mistralai/Mistral-7B-Instruct-v0.2", architectures=["LlavaMistralForCausalLM"],
    attention_dropout=0.0, bos_token_id=1, eos_token_id=2, freeze_mm_mlp_adapter=False,
    freeze_mm_vision_resampler=False, hidden_act="silu", hidden_size=4096, image_aspect_ratio="anyres",
    image_crop_resolution=224, image_grid_pinpoints=PINPOINTS, image_split_resolution=224, initializer_range=0.02,
    intermediate_size=14336, max_position_embeddings=32768, mm_hidden_size=1024, mm_patch_merge_type="spatial_unpad",
    mm_projector_lr=None, mm_projector_type="mlp2x_gelu", mm_resampler_type=None, mm_use_im_patch_token=False,
    mm_use_im_start_end=False, mm_vision_select_feature="patch", mm_vision_select_layer=-2,
    mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_tower_lr=2e-06, model_type="llava_mistral",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=1000000.0,
    sliding_window=None, tie_word_embeddings=False, tokenizer_model_max_length=4096, tokenizer_padding_side="right",
    torch_dtype="bfloat16", transformers_version="4.36.2", tune_mm_mlp_adapter=False, tune_mm_vision_resampler=False,
    unfreeze_mm_vision_tower=True, use_cache=True, use_mm_proj=True, vision_tower_pretrained="", vocab_size=32000,
)  # fmt: skip
V15 = dict(  # liuhaotian/llava-v1.5-7b
    _name_or_path="llava-v1.5-7b", architectures=["LlavaLlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    freeze_mm_mlp_adapter=False, freeze_mm_vision_resampler=False, hidden_act="silu", hidden_size=4096,
    image_aspect_ratio="pad", initializer_range=0.02, intermediate_size=11008, max_length=4096,
    max_position_embeddings=4096, mm_hidden_size=1024, mm_projector_type="mlp2x_gelu", mm_resampler_type=None,
    mm_use_im_patch_token=False, mm_use_im_start_end=False, mm_vision_select_feature="patch",
    mm_vision_select_layer=-2, mm_vision_tower="openai/clip-vit-large-patch14-336", model_type="llava_llama",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pad_token_id=0, pretraining_tp=1,
    rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16",
    transformers_version="4.31.0", tune_mm_mlp_adapter=False, tune_mm_vision_resampler=False,
    unfreeze_mm_vision_tower=False, use_cache=True, use_mm_proj=True, vocab_size=32000,
)  # fmt: skip
HF = dict(  # what the two transformers files share; everything absent is a class default
    ignore_index=-100, image_token_index=32000, projector_hidden_act="gelu", tie_word_embeddings=False,
    torch_dtype="float16", vision_feature_layer=-2, vision_feature_select_strategy="default", vocab_size=32064,
    vision_config=dict(
        hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model",
        num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768, vocab_size=32000,
    ),
)  # fmt: skip
HF16 = HF | dict(  # llava-hf/llava-v1.6-mistral-7b-hf
    architectures=["LlavaNextForConditionalGeneration"], image_grid_pinpoints=PINPOINTS, model_type="llava_next",
    transformers_version="4.39.0.dev0", use_image_newline_parameter=True,
    text_config=dict(
        _name_or_path="mistralai/Mistral-7B-Instruct-v0.2", architectures=["MistralForCausalLM"],
        intermediate_size=14336, max_position_embeddings=32768, model_type="mistral", num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None, torch_dtype="bfloat16", vocab_size=32064,
    ),
)  # fmt: skip
HF15 = HF | dict(  # llava-hf/llava-1.5-7b-hf
    architectures=["LlavaForConditionalGeneration"], model_type="llava", pad_token_id=32001,
    transformers_version="4.36.0.dev0",
    text_config=dict(
        _name_or_path="lmsys/vicuna-7b-v1.5", architectures=["LlamaForCausalLM"], max_position_embeddings=4096,
        model_type="llama", rms_norm_eps=1e-05, torch_dtype="float16", vocab_size=32064,
    ),
)  # fmt: skip
LLAMA_13B = dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40,
                 num_key_value_heads=40)  # fmt: skip
V16_VICUNA_7B = V16 | dict(  # liuhaotian/llava-v1.6-vicuna-7b
    _name_or_path="lmsys/vicuna-7b-v1.5", architectures=["LlavaLlamaForCausalLM"], attention_bias=False,
    intermediate_size=11008, max_length=4096, max_position_embeddings=4096, model_type="llava",
    num_key_value_heads=32, pad_token_id=0, pretraining_tp=1, rope_scaling=None, rope_theta=10000.0,
)  # fmt: skip
V16_VICUNA_13B = V16_VICUNA_7B | LLAMA_13B | dict(_name_or_path="lmsys/vicuna-13b-v1.5")
V15_13B = V15 | LLAMA_13B | dict(_name_or_path="llava-v1.5-13b")
