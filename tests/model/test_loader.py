"""Checkpoints on disk: every layout and every file format gives the same model, with transformers as the
oracle where installed. Errors are in test_loader_strict.py, adapters in test_adapters.py."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import PROMPT, TOWER, V15, V16, copy, read_tensors, refuse
from PIL import Image

from stic_min.formats.config import MISTRAL_7B, decoder_config
from stic_min.images import make_tiles
from stic_min.loader import load_llava


@pytest.fixture(scope="module")
def image(tiny):
    return Image.open(tiny / "images" / "scene_01.jpg").convert("RGB")  # 300 x 200


@pytest.fixture(scope="module")
def base(tiny, image):
    """name -> (the model, its logits)."""
    models = {name: load_llava(tiny / name) for name in (V16, V15)}
    return {name: (llava, llava.logits(PROMPT, [image])) for name, llava in models.items()}


# ---------------------------------------------------------------- layouts

HF = [  # (original key, transformers' key) as published; below, what other versions change in these
    (re.escape(TOWER), "vision_tower.vision_model."),
    (r"model\.mm_projector\.0", "multi_modal_projector.linear_1"),
    (r"model\.mm_projector\.2", "multi_modal_projector.linear_2"),
    (r"model\.image_newline", "image_newline"),
    (r"lm_head", "language_model.lm_head"),
    (r"model\.(embed_tokens|layers|norm)", r"language_model.model.\1"),
]
FRESH_5 = [*HF, (r"vision_tower\.vision_model\.", "vision_tower.")]
MEMORY = [*HF, (r"language_model\.model", "language_model"), ("", "model."), (r".+\.lm_head", "lm_head")]
MEMORY_5 = [*MEMORY, (r"model\.vision_tower\.vision_model\.", "model.vision_tower.")]


def rename(key, rules):
    for pattern, name in rules:
        key = re.sub(f"^{pattern}", name, key)
    return key


@pytest.mark.parametrize("name", [V16, V15])
@pytest.mark.parametrize(
    "rules", [HF, FRESH_5, MEMORY, MEMORY_5], ids=["hf", "fresh-5", "memory", "memory-5"]
)
def test_layouts_of_transformers_equal_the_original(tiny, base, image, tmp_path, name, rules):
    """Renamed, with 64 more rows of vocabulary as transformers pads it, and the tower inside."""
    tensors = read_tensors(tiny / name)
    if name == V15:
        tower = read_tensors(tiny / "clip-tiny").items()
        tensors |= {
            key.replace("vision_model.", TOWER): t for key, t in tower if key.startswith("vision_model.")
        }
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.ones(64, 32, dtype=tensors[key].dtype)])
    old = json.loads((tiny / name / "config.json").read_text())
    llava_only = ("mm_", "image_", "tokenizer_", "unfreeze_", "use_mm_proj")
    text = {k: v for k, v in old.items() if not k.startswith(llava_only)} | {"vocab_size": 664}
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
    torch.testing.assert_close(llava.logits(PROMPT, [image]), base[name][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["v1.5", "v1.6"])
@pytest.mark.parametrize("size", [(300, 200), (120, 300), (1000, 90)])
def test_same_logits_as_transformers(tiny, tmp_path, kind, size):
    """A checkpoint saved by transformers. The images are larger than a tile: for smaller ones transformers
    chooses other grids than LLaVA, because it reads the pinpoints as (height, width)."""
    hf = pytest.importorskip("transformers")
    numbers = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    vision = hf.CLIPVisionConfig(**numbers | {"num_hidden_layers": 3}, image_size=56, patch_size=14)
    if kind == "v1.5":
        text = hf.LlamaConfig(**numbers, vocab_size=664)
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=660)
    else:
        text = hf.MistralConfig(**numbers, vocab_size=664, num_key_value_heads=2, rope_theta=1e6)
        pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
        config = dict(
            vision_config=vision, text_config=text, image_token_index=660, image_grid_pinpoints=pinpoints
        )
        config = hf.LlavaNextConfig(**config)
    torch.manual_seed(0)
    kind_of_model = (
        hf.LlavaForConditionalGeneration if kind == "v1.5" else hf.LlavaNextForConditionalGeneration
    )
    theirs = kind_of_model(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    shutil.copy(tiny / V16 / "tokenizer.model", tmp_path)
    ours = load_llava(tmp_path)
    image = Image.effect_noise(size, 80).convert("RGB")

    tiles = make_tiles(image, ours.config.image_mode, 56, ours.config.pinpoints)
    ids = [
        [660] * ours.config.image_tokens(size) if i < 0 else [i] for i in ours.tokenizer.encode_prompt(PROMPT)
    ]
    inputs = {"input_ids": torch.tensor([sum(ids, [])]), "pixel_values": tiles.pixels}
    if kind == "v1.6":
        inputs |= {"pixel_values": tiles.pixels[None], "image_sizes": torch.tensor([size[::-1]])}
    with torch.no_grad():
        expected = theirs(**inputs).logits[0, :, :600]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.logits(PROMPT, [image]), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- file formats


@pytest.mark.parametrize("form", ["model.safetensors", "model-0000%d-of-00003.safetensors",
                                  "pytorch_model.bin", "pytorch_model-0000%d-of-00003.bin"])  # fmt: skip
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_every_file_format_and_dtype(tiny, base, image, tmp_path, form, stored):
    tensors = {key: t.to(stored) for key, t in read_tensors(tiny / V16).items()}
    llava = load_llava(copy(tiny, V16, tmp_path, tensors, form))
    for name, parameter in base[V16][0].named_parameters():  # stored in bfloat16, read as float32
        assert torch.equal(llava.get_parameter(name), parameter.to(stored).float()), name
    if stored != torch.float16:
        assert torch.equal(llava.logits(PROMPT, [image]), base[V16][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(tiny, base, image, dtype):
    llava, (_, expected) = load_llava(tiny / V15, dtype=dtype), base[V15]
    assert {p.dtype for p in llava.parameters()} == {dtype} and not any(
        p.requires_grad for p in llava.parameters()
    )
    logits = llava.logits(PROMPT, [image])
    difference = (logits - expected).abs().max()
    assert logits.dtype == torch.float32 and 0 < difference < 0.3


def test_places_where_the_tower_is_found(tiny, base, image, tmp_path):
    clip, hub = tiny / "clip-tiny", "openai/clip-vit-large-patch14-336"
    absolute = copy(tiny, V15, tmp_path / "a", mm_vision_tower=str(clip))
    inside = copy(tiny, V15, tmp_path / "b", mm_vision_tower="tower")
    shutil.copytree(clip, inside / "tower")
    next_to = copy(tiny, V15, tmp_path / "c", mm_vision_tower=hub)
    shutil.copytree(clip, tmp_path / hub)
    named = copy(tiny, V15, tmp_path / "d" / "d", mm_vision_tower=hub)
    (tmp_path / "bin").mkdir()
    shutil.copy(clip / "config.json", tmp_path / "bin")
    torch.save(read_tensors(clip), tmp_path / "bin" / "pytorch_model.bin")
    for path, vision in (
        (absolute, None),
        (inside, None),
        (next_to, None),
        (named, clip),
        (named, tmp_path / "bin"),
    ):
        assert torch.equal(load_llava(path, vision=vision).logits(PROMPT, [image]), base[V15][1]), path
    refuse(f"{hub}.*--vision", named)
    refuse("nowhere", named, vision=tmp_path / "nowhere")


@pytest.mark.parametrize("name", [V16, V15])
def test_an_embedded_tower_takes_precedence(tiny, tmp_path, name):
    tensors, key = read_tensors(tiny / name), "embeddings.class_embedding"
    embedded = {k: t for k, t in read_tensors(tiny / V16).items() if k.startswith(TOWER)}
    llava = load_llava(copy(tiny, name, tmp_path, tensors | embedded), vision=tiny / "clip-tiny")
    loaded, clips = llava.vision_tower.embeddings.class_embedding, read_tensors(tiny / "clip-tiny")
    assert torch.equal(loaded, embedded[TOWER + key].float()) and not torch.equal(
        loaded, clips["vision_model." + key]
    )


def test_a_newline_that_pad_mode_never_reads_is_ignored(tiny, base, image, tmp_path):
    tensors = read_tensors(tiny / V15) | {"model.image_newline": torch.ones(32)}
    assert torch.equal(load_llava(copy(tiny, V15, tmp_path, tensors)).logits(PROMPT, [image]), base[V15][1])


def test_a_sliding_window_limits_the_sequence(tiny, tmp_path):
    longest = lambda path: load_llava(path).config.decoder.max_positions
    assert longest(tiny / V16) == 4096
    assert longest(copy(tiny, V16, tmp_path / "narrow", sliding_window=512)) == 512
    assert longest(copy(tiny, V16, tmp_path / "wide", sliding_window=8192)) == 4096
    # transformers omits it from a Mistral text_config, where it is 4096 of 131072 positions
    assert decoder_config(MISTRAL_7B, "config.json").max_positions == 4096


MEASURE = r"""
import re, sys, threading, torch
from stic_min.loader import load_llava

def anonymous():  # bytes of memory not backed by a file
    return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

load_llava(sys.argv[2])  # a tiny one first: torch imports parts of itself when they are needed
for dtype in torch.float32, torch.bfloat16:
    start, peak, done = anonymous(), 0, threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    llava = load_llava(sys.argv[1], dtype=dtype)
    done.set(), thread.join()
    print((max(peak, anonymous()) - start) / sum(p.nbytes for p in llava.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory(tiny, tmp_path):
    """The process's peak anonymous memory, relative to the size of the loaded model: almost none for tensors
    mapped directly from the file, and never a second copy of converted ones."""
    bigger = {32: 1024, 64: 4096}
    wide = {
        key: torch.ones([bigger.get(n, n) for n in t.shape]) for key, t in read_tensors(tiny / V15).items()
    }
    wide["model.mm_projector.0.weight"] = torch.ones(1024, 32)
    copy(tiny, V15, tmp_path, wide, hidden_size=1024, intermediate_size=4096)  # 140 MB
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", MEASURE, tmp_path, tiny / V15]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    mapped, converted = map(float, run.stdout.split())
    assert mapped < 0.2 and converted < 1.2
