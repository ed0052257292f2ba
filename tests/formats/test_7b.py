"""The real LLaVA-v1.6-mistral-7b and v1.5-7b, on the meta device: the published config.json files give models
whose parameters are exactly the published tensors. Keys and shapes are spelled out here, not taken from our
modules."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from published_configs import HF, HF15, HF16, PINPOINTS, V15, V15_13B, V16, V16_VICUNA_7B, V16_VICUNA_13B

from stic_min import loader, lora
from stic_min.clip import ClipConfig
from stic_min.formats.config import read_config
from stic_min.formats.tensors import canonical
from stic_min.llava import LLaVA, LlavaConfig
from stic_min.mistral import DecoderConfig

CONFIGS = {"v1.6": V16, "v1.5": V15, "v1.6-hf": HF16, "v1.5-hf": HF15}

# ---------------------------------------------------------------- keys and shapes as published

# The key prefixes of each layout. In transformers' files the projector's two layers are linear_1 and
# linear_2.
HF_PROJECTOR = {"0": "multi_modal_projector.linear_1", "2": "multi_modal_projector.linear_2"}
LAYOUTS = {
    "original": dict(
        decoder="model.", lm_head="lm_head", newline="model.image_newline",
        tower="model.vision_tower.vision_tower.vision_model.",
        projector={"0": "model.mm_projector.0", "2": "model.mm_projector.2"},
    ),
    "hf": dict(  # as published, and as every version of transformers saves a loaded checkpoint
        decoder="language_model.model.", lm_head="language_model.lm_head", newline="image_newline",
        tower="vision_tower.vision_model.", projector=HF_PROJECTOR,
    ),
    "hf-memory": dict(  # module names of 4.52 to 4.57, in state dicts written directly
        decoder="model.language_model.", lm_head="lm_head", newline="model.image_newline",
        tower="model.vision_tower.vision_model.",
        projector={i: "model." + p for i, p in HF_PROJECTOR.items()},
    ),
}  # fmt: skip
LAYOUTS["hf-fresh-5"] = LAYOUTS["hf"] | {"tower": "vision_tower."}  # 5.x, saved without having been loaded
LAYOUTS["hf-memory-5"] = LAYOUTS["hf-memory"] | {"tower": "model.vision_tower."}


def tower_keys(prefix):
    """CLIP-L/14-336: 24 layers of 16 tensors, 3 embeddings, 2 norms."""
    square, modules = (1024, 1024), {"pre_layrnorm": (1024,), "post_layernorm": (1024,)}
    for i in range(24):
        layer = f"encoder.layers.{i}."
        modules |= {f"{layer}self_attn.{name}": square for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        modules |= {f"{layer}mlp.fc1": (4096, 1024), f"{layer}mlp.fc2": (1024, 4096)}
        modules |= {f"{layer}layer_norm1": (1024,), f"{layer}layer_norm2": (1024,)}
    keys = {
        f"{prefix}embeddings.class_embedding": (1024,),
        f"{prefix}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{prefix}embeddings.position_embedding.weight": (577, 1024),
    }
    for name, shape in modules.items():
        keys |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    return keys


def published(version, layout):
    """{key: shape} of all tensors in the checkpoint. Original v1.5 has no tower; transformers pads the
    vocabulary."""
    (kv, mlp), at = {"v1.6": (1024, 14336), "v1.5": (4096, 11008)}[version], LAYOUTS[layout]
    vocabulary = 32000 if layout == "original" else 32064
    keys = {f"{at['decoder']}embed_tokens.weight": (vocabulary, 4096), f"{at['decoder']}norm.weight": (4096,)}
    keys |= {f"{at['lm_head']}.weight": (vocabulary, 4096)}
    for i in range(32):
        layer = f"{at['decoder']}layers.{i}."
        keys |= {
            f"{layer}self_attn.q_proj.weight": (4096, 4096),
            f"{layer}self_attn.k_proj.weight": (kv, 4096),
            f"{layer}self_attn.v_proj.weight": (kv, 4096),
            f"{layer}self_attn.o_proj.weight": (4096, 4096),
            f"{layer}mlp.gate_proj.weight": (mlp, 4096),
            f"{layer}mlp.up_proj.weight": (mlp, 4096),
            f"{layer}mlp.down_proj.weight": (4096, mlp),
            f"{layer}input_layernorm.weight": (4096,),
            f"{layer}post_attention_layernorm.weight": (4096,),
        }
    for i, width in (("0", 1024), ("2", 4096)):
        keys |= {f"{at['projector'][i]}.weight": (4096, width), f"{at['projector'][i]}.bias": (4096,)}
    if version == "v1.6":
        keys |= {at["newline"]: (4096,)}
    return keys | (tower_keys(at["tower"]) if (version, layout) != ("v1.5", "original") else {})


# Our names of the 18 tensors that the model does not use.
UNUSED = {
    name for name in tower_keys("vision_tower.") if "encoder.layers.23." in name or "post_layernorm" in name
}


def count(shapes):
    return sum(map(math.prod, shapes))


def config_of(folder, name):
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return read_config(folder)


def shapes_of(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LLaVA(config).named_parameters()}


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, tmp_path):
    """Every number, also of sparse files, whose missing keys are transformers' class defaults."""
    mistral, huggingface = name.startswith("v1.6"), name.endswith("hf")
    expected = LlavaConfig(
        DecoderConfig(
            hidden_size=4096,
            intermediate_size=14336 if mistral else 11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8 if mistral else 32,
            vocab_size=32064 if huggingface else 32000,
            rms_norm_eps=1e-5,
            rope_theta=1e6 if mistral else 1e4,
            max_positions=32768 if mistral else 4096,
        ),
        ClipConfig(1024, 4096, 24, 16, 336, 14, 1e-5),
        image_mode="anyres" if mistral else "pad",
        pinpoints=tuple(map(tuple, PINPOINTS)) if mistral else None,
        template="mistral_instruct" if mistral else "vicuna_v1",
        max_length=32768 if name == "v1.6-hf" else 4096,
    )
    *read, reason = config_of(tmp_path, name)
    assert read == [expected, None, huggingface]
    base = {"v1.6": "Mistral-7B-Instruct-v0.2", "v1.5": "llava-v1.5-7b", "v1.5-hf": "vicuna-7b-v1.5"}
    assert reason.endswith(f"decoder built on {base.get(name, base['v1.6'])}")
    assert expected.image_tokens((640, 480)) == (2340 if mistral else 576)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", ["v1.6", "v1.5"])
def test_every_published_tensor_is_a_parameter_or_ignored(version, layout, tmp_path):
    parameters = shapes_of(config_of(tmp_path, version if layout == "original" else f"{version}-hf")[0])
    keys = published(version, layout)
    if (version, layout) == ("v1.5", "original"):
        keys |= tower_keys("vision_model.")  # from CLIP's own folder
    names = [canonical(key) for key in keys]
    assert len(set(names)) == len(names)
    assert set(names) - set(parameters) == UNUSED and len(UNUSED) == 18
    assert {name: shape for name, shape in zip(names, keys.values()) if name not in UNUSED} == parameters


def test_parameter_counts(tmp_path):
    v16, v15 = (shapes_of(config_of(tmp_path, name)[0]) for name in ("v1.6", "v1.5"))
    assert count(published("v1.6", "original").values()) == 7_566_223_360
    assert count(v16.values()) == 7_553_625_088 == 7_566_223_360 - 12_598_272
    # Vicuna-7B 6,738,415,616 = 32 (4 * 4096^2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096,
    # the projector 20,979,712 = 4096 (1024 + 1) + 4096 (4096 + 1), the tower 303,507,456 less 12,598,272.
    assert count(published("v1.5", "original").values()) == 6_738_415_616 + 20_979_712
    assert count(v15.values()) == 6_738_415_616 + 20_979_712 + 303_507_456 - 12_598_272 == 7_050_304_512
    assert count(v16[f"mm_projector.{i}.{x}"] for i in "02" for x in ("weight", "bias")) == 20_979_712


@pytest.mark.parametrize("options, C, F, layers, newline", [
    (V16_VICUNA_7B, 4096, 11008, 32, 4096), (V16_VICUNA_13B, 5120, 13824, 40, 5120), (V15_13B, 5120, 13824, 40, 0)
], ids=["v1.6-vicuna-7b", "v1.6-vicuna-13b", "v1.5-13b"])  # fmt: skip
def test_other_llava_checkpoints(options, C, F, layers, newline, tmp_path):
    """The other LLaVA models with Vicuna: 7.06 and 13.35 billion parameters with CLIP's last layer."""
    (tmp_path / "config.json").write_text(json.dumps(options))
    config, *_ = read_config(tmp_path)
    assert (config.template, config.image_mode) == ("vicuna_v1", "anyres" if newline else "pad")
    decoder = layers * (4 * C * C + 3 * C * F + 2 * C) + 2 * 32000 * C + C
    projector = C * (1024 + 1) + C * (C + 1)
    assert count(shapes_of(config).values()) == decoder + projector + 303_507_456 - 12_598_272 + newline


@pytest.mark.parametrize("version, expected", [("v1.6", 335_544_320), ("v1.5", 319_815_680)])
def test_lora_counts(version, expected, tmp_path):
    with torch.device("meta"):
        llava = LLaVA(config_of(tmp_path, version)[0])
    modules = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(32) for x in "qkvo"]
    modules += [f"model.layers.{i}.mlp.{x}_proj" for i in range(32) for x in ("gate", "up", "down")]
    before = set(dict(llava.named_parameters()))
    lora.attach(llava, lora.Adapter(r=128, alpha=256, dropout=0.0, modules=modules, tensors={}))
    added = {name: p for name, p in llava.named_parameters() if name not in before}
    assert set(added) == {f"{m}.lora_{x}" for m in modules for x in "AB"}
    assert count(p.shape for p in added.values()) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_open_llava_opens_full_checkpoints(name, tiny, tmp_path, monkeypatch):
    """The loader on complete folders, whose tensors have shapes but no data."""
    folder, tower = tmp_path / name, tmp_path / V15["mm_vision_tower"]
    version, layout = name[:4], "hf" if name.endswith("hf") else "original"
    contents = {folder: published(version, layout)}
    if name == "v1.5":
        contents[folder] |= {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(32)
        }  # 4.31
        contents[tower] = tower_keys("vision_model.") | {"vision_model.embeddings.position_ids": (1, 577)}
        contents[tower] |= {
            "text_model.final_layer_norm.weight": (768,),
            "visual_projection.weight": (768, 1024),
        }
    for place in contents:
        place.mkdir(parents=True)
        (place / "model.safetensors").touch()
        (place / "config.json").write_text(json.dumps({"vision_config": HF["vision_config"]}))
    shutil.copy(tiny / "llava-v1.6-tiny" / "tokenizer.model", folder)
    hollow = lambda keys: {key: partial(torch.empty, shape, device="meta") for key, shape in keys.items()}
    monkeypatch.setattr(loader, "open_shard", lambda file: hollow(contents[file.parent]))

    parameters = shapes_of(config_of(folder, name)[0])
    if layout == "hf":  # of the padded vocabulary only the tokenizer's rows, here those of the tiny one
        parameters |= dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], (600, 4096))
    llava, weights = loader.open_llava(folder, dtype=torch.bfloat16)
    assert {n: tuple(p.shape) for n, p in llava.named_parameters()} == parameters
    assert {n: tuple(weight.read().shape) for n, weight in weights.items()} == parameters
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in llava.parameters())
