"""Checkpoints and adapters on disk: every layout and file form gives the same model, and whatever does not fit is refused
in one line. transformers and peft are the oracles where they are installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stic_min import InputError, lora
from stic_min.images import make_tiles
from stic_min.loader import canonical, load_llava

TEXT = "[INST] What colour is the sail of the boat? [/INST]"
PROMPT = TEXT.replace("[INST] ", "[INST] <image>\n")
V16, V15 = "llava-v1.6-tiny", "llava-v1.5-tiny"
TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def picture(tiny):
    return Image.open(tiny / "images" / "scene_01.jpg").convert("RGB")  # 300 x 200


@pytest.fixture(scope="module")
def base(tiny, picture):
    """name -> (the model as it is, its logits)."""
    models = {name: load_llava(tiny / name) for name in (V16, V15)}
    return {name: (llava, llava.logits(PROMPT, [picture])) for name, llava in models.items()}


def read_tensors(folder):
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def copy(tiny, name, folder, tensors=None, form="model.safetensors", without=(), **config):
    """A checkpoint like `name` in `folder`, its files in another form, with some of its configuration changed."""
    tensors, folder = tensors or read_tensors(tiny / name), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tiny / name / file, folder)
    old = json.loads((tiny / name / "config.json").read_text()) | {"mm_vision_tower": str(tiny / "clip-tiny")}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (old | config).items() if k not in without}))
    save = torch.save if form.endswith(".bin") else lambda part, path: save_file(part, path, {"format": "pt"})
    if "0000" not in form:
        save(tensors, folder / form)
        return folder
    names = sorted(tensors)  # model-0000%d-of-00003.safetensors
    where = {key: form % (1 + 3 * i // len(names)) for i, key in enumerate(names)}
    for file in set(where.values()):
        save({key: tensors[key] for key in names if where[key] == file}, folder / file)
    index = re.sub(r"-0000.*(\..+)", r"\1.index.json", form)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def refuse(match, path, **arguments):
    with pytest.raises(InputError, match=match) as error:
        load_llava(path, **arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- layouts

HF = [  # (original key, transformers' key) as published; then the changes that other versions make
    (re.escape(TOWER), "vision_tower.vision_model."),
    (r"model\.mm_projector\.0", "multi_modal_projector.linear_1"),
    (r"model\.mm_projector\.2", "multi_modal_projector.linear_2"),
    (r"model\.image_newline", "image_newline"),
    (r"lm_head", "language_model.lm_head"),
    (r"model\.(embed_tokens|layers|norm)", r"language_model.model.\1"),
]
FRESH_5 = [*HF, (r"vision_tower\.vision_model\.", "vision_tower.")]
MEMORY = [*HF, (r"language_model\.model", "language_model"), (r"(?!language_model.lm_head)", "model."), (r"language_model\.lm_head", "lm_head")]
MEMORY_5 = [*MEMORY, (r"model\.vision_tower\.vision_model\.", "model.vision_tower.")]


def rename(key, rules):
    for pattern, name in rules:
        key = re.sub(f"^{pattern}", name, key)
    return key


@pytest.mark.parametrize("name", [V16, V15])
@pytest.mark.parametrize("rules", [HF, FRESH_5, MEMORY, MEMORY_5], ids=["hf", "fresh-5", "memory", "memory-5"])
def test_layouts_of_transformers_equal_the_original(tiny, base, picture, tmp_path, name, rules):
    """Renamed, with 64 more rows of vocabulary as transformers pads it, and the tower inside."""
    tensors = read_tensors(tiny / name)
    if name == V15:
        tower = read_tensors(tiny / "clip-tiny").items()
        tensors |= {key.replace("vision_model.", TOWER): t for key, t in tower if key.startswith("vision_model.")}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.ones(64, 32, dtype=tensors[key].dtype)])
    old = json.loads((tiny / name / "config.json").read_text())
    text = {k: v for k, v in old.items() if not k.startswith(("mm_", "image_"))} | {"vocab_size": 664}
    config = {
        "model_type": "llava_next" if name == V16 else "llava",
        "text_config": text | {"model_type": "mistral" if name == V16 else "llama"},
        "vision_config": json.loads((tiny / "clip-tiny" / "config.json").read_text())["vision_config"],
        "image_grid_pinpoints": old.get("image_grid_pinpoints"),
    }
    copy(tiny, name, tmp_path, {rename(key, rules): t for key, t in tensors.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    llava = load_llava(tmp_path)
    assert llava.config.template == base[name][0].config.template
    torch.testing.assert_close(llava.logits(PROMPT, [picture]), base[name][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["v1.5", "v1.6"])
@pytest.mark.parametrize("size", [(300, 200), (120, 300), (1000, 90)])
def test_same_logits_as_transformers(tiny, tmp_path, kind, size):
    """A checkpoint that transformers made and saved. Its pictures are bigger than a tile: with smaller ones it picks
    other grids than LLaVA, for it reads the pinpoints as (height, width)."""
    hf = pytest.importorskip("transformers")
    numbers = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    vision = hf.CLIPVisionConfig(**numbers | {"num_hidden_layers": 3}, image_size=56, patch_size=14)
    if kind == "v1.5":
        text = hf.LlamaConfig(**numbers, vocab_size=664)
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=660)
    else:
        text = hf.MistralConfig(**numbers, vocab_size=664, num_key_value_heads=2, rope_theta=1e6)
        pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
        config = dict(vision_config=vision, text_config=text, image_token_index=660, image_grid_pinpoints=pinpoints)
        config = hf.LlavaNextConfig(**config)
    torch.manual_seed(0)
    kind_of_model = hf.LlavaForConditionalGeneration if kind == "v1.5" else hf.LlavaNextForConditionalGeneration
    theirs = kind_of_model(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    shutil.copy(tiny / V16 / "tokenizer.model", tmp_path)
    ours = load_llava(tmp_path)
    picture = Image.effect_noise(size, 80).convert("RGB")

    tiles = make_tiles(picture, ours.config.image_mode, 56, ours.config.pinpoints)
    ids = [[660] * ours.config.image_tokens(size) if i < 0 else [i] for i in ours.tokenizer.encode_prompt(PROMPT)]
    inputs = {"input_ids": torch.tensor([sum(ids, [])]), "pixel_values": tiles.pixels}
    if kind == "v1.6":
        inputs |= {"pixel_values": tiles.pixels[None], "image_sizes": torch.tensor([size[::-1]])}
    with torch.no_grad():
        expected = theirs(**inputs).logits[0, :, :600]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.logits(PROMPT, [picture]), expected, atol=1e-4, rtol=0)
