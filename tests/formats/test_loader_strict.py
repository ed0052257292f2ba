"""Checkpoints that do not fit are an error, one line that names the file or the key."""

import json

import pytest
import torch
from checkpoints import TOWER, V15, V16, copy, read_tensors, refuse
from safetensors.torch import save_file

from stic_min.loader import load_llava


def drop(key):
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


WRONG_TENSORS = {
    "unknown key model.layers.0.extra.weight": lambda t: t | {"model.layers.0.extra.weight": torch.ones(2)},
    "unknown key model.layers.2.mlp.up_proj.weight": lambda t: (
        t | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)}
    ),
    "unknown key extra": lambda t: t | {"extra": torch.ones(2)},
    "no tensor for model.norm.weight": drop("model.norm.weight"),
    "no tensor for image_newline": drop("model.image_newline"),
    "no tensor for vision_tower.pre_layrnorm.bias": drop(TOWER + "pre_layrnorm.bias"),
    r"lm_head.weight is \(599, 32\), .* \(600, 32\)": lambda t: t | {"lm_head.weight": torch.ones(599, 32)},
    r"mm_projector.2.bias is \(1, 32\)": lambda t: t | {"model.mm_projector.2.bias": torch.ones(1, 32)},
    "language_model.lm_head.weight.* same": lambda t: (
        t | {"language_model.lm_head.weight": torch.ones(600, 32)}
    ),
}


@pytest.mark.parametrize("match", WRONG_TENSORS)
def test_wrong_tensors(tiny, tmp_path, match):
    refuse(match, copy(tiny, V16, tmp_path, WRONG_TENSORS[match](read_tensors(tiny / V16))))


WRONG_CONFIGS = {
    "config.json: no mm_vision_tower": dict(without=["mm_vision_tower"]),
    "config.json: no num_attention_heads": dict(without=["num_attention_heads"]),
    "config.json: rope_scaling: type 'linear' is not supported": dict(
        rope_scaling={"type": "linear", "factor": 2.0}
    ),
    "config.json: hidden_act 'gelu' is not supported, only 'silu'": dict(hidden_act="gelu"),
    "config.json: mm_projector_type": dict(mm_projector_type="linear"),
    "config.json: mm_vision_select_layer -1": dict(mm_vision_select_layer=-1),
    "config.json: mm_vision_select_feature .cls_patch": dict(mm_vision_select_feature="cls_patch"),
    "config.json: image_aspect_ratio 'square'": dict(image_aspect_ratio="square"),
    "vocabulary of 599": dict(vocab_size=599),
    "config.json: image_grid_pinpoints": dict(image_grid_pinpoints=[[56, 112], [112, 60]]),
    "config.json: no hidden_size": dict(hidden_size=None),
    # The tower's geometry is not in the checkpoint: the error must name the missing folder, not its
    # consequence.
    "model.safetensors: the vision tower .*--vision": dict(mm_vision_tower="clip-missing"),
}


@pytest.mark.parametrize("match", WRONG_CONFIGS)
def test_wrong_configurations(tiny, tmp_path, match):
    refuse(match, copy(tiny, V16, tmp_path, **WRONG_CONFIGS[match]))


def test_broken_folders(tiny, tmp_path):
    good = lambda name, form="model.safetensors": copy(tiny, V15, tmp_path / name, form=form)
    refuse("nowhere", tmp_path / "nowhere")
    (good("json") / "config.json").write_text('{"hidden_size": 32,\n')
    refuse("config.json: not JSON", tmp_path / "json")
    (good("no_config") / "config.json").unlink()
    refuse("config.json", tmp_path / "no_config")
    (good("no_tokenizer") / "tokenizer.model").unlink()
    refuse("tokenizer.model", tmp_path / "no_tokenizer")
    (good("not_tokenizer") / "tokenizer.model").write_text("{}\n")
    refuse("not a sentencepiece model: .*tokenizer.model", tmp_path / "not_tokenizer")
    refuse("other.model", good("other"), tokenizer=tmp_path / "other.model")
    (good("no_weights") / "model.safetensors").unlink()
    refuse("no weights in .*no_weights", tmp_path / "no_weights")
    sharded = good("shards", "model-0000%d-of-00003.safetensors")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuse("missing shard .*model-00002-of-00003.safetensors", sharded)
    for size in (0, 7, 100, 30_000):
        for form in ("model.safetensors", "pytorch_model.bin"):
            file = good(f"cut{size}{form}", form) / form
            file.write_bytes(file.read_bytes()[:size])
            refuse(f"can't read .*{form}: ", file.parent)
    torch.save([torch.ones(2)], good("list", "pytorch_model.bin") / "pytorch_model.bin")
    refuse("pytorch_model.bin", tmp_path / "list")
    refuse("can't do anyres", tiny / V15, image_mode="anyres")


# ---------------------------------------------------------------- contradicting files


def test_a_wrong_index(tiny, tmp_path):
    folder = copy(tiny, V16, tmp_path / "a", form="model-0000%d-of-00003.safetensors")
    index = folder / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    key, first, last = "lm_head.weight", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 3))
    assert right["weight_map"][key] == first
    for wrong, where in {key: first, "model.extra.weight": "no shard"}.items():
        index.write_text(json.dumps(right | {"weight_map": right["weight_map"] | {wrong: last}}))
        refuse(f"index.json: {wrong} is not in {last}, but in {where}", folder)
    index.write_text(json.dumps(right))
    save_file(read_tensors(tiny / V16), folder / "model.safetensors")
    refuse("two sets of weights, model.safetensors and model.safetensors.index.json", folder)


def test_notes_on_unused_files(tiny, tmp_path):
    folder = copy(tiny, V15, tmp_path / "both")
    copy(tiny, V15, folder, form="pytorch_model.bin")
    for name in ("generation_config.json", "mm_projector.bin", "tokenizer.json"):
        (folder / name).write_text("{}")
    used, rest = load_llava(folder).notes
    assert used.startswith(
        f"{folder}: model.safetensors; vision tower: {tiny}/clip-tiny; tokenizer: {folder}/tok"
    )
    assert "template: vicuna_v1 (a Llama decoder); images: pad" in used
    assert rest.endswith(
        "not read: generation_config.json, mm_projector.bin, pytorch_model.bin, tokenizer.json"
    )
    assert load_llava(tiny / V16).notes == [
        f"{tiny}/{V16}: model-00001-of-00002.safetensors and 1 more; vision tower: the checkpoint's; "
        "tokenizer: "
        f"{tiny}/{V16}/tokenizer.model; template: mistral_instruct (a Mistral decoder); images: anyres"
    ]


def test_a_bin_file_from_before_torch_1_6(tiny, tmp_path):
    folder = copy(tiny, V15, tmp_path, form="pytorch_model.bin")
    torch.save(read_tensors(tiny / V15), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    llava, expected = load_llava(folder), load_llava(tiny / V15)
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in llava.named_parameters())


def test_a_projector_with_nan(tiny, tmp_path):
    tensors = read_tensors(tiny / V15)
    tensors["model.mm_projector.2.bias"][3] = float("nan")
    refuse("model.safetensors: model.mm_projector.2.bias contains NaN", copy(tiny, V15, tmp_path, tensors))
