"""Adapters for checkpoints in transformers' layout give the same logits in transformers with PEFT."""

import shutil

import pytest
import torch
from checkpoints import PROMPT, TEXT, V16
from PIL import Image
from safetensors.torch import load_file

from stic_min import lora
from stic_min.formats import adapters
from stic_min.images import make_tiles
from stic_min.loader import load_llava
from stic_min.merge import merge


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def checkpoint(request, tiny, tmp_path_factory):
    """A checkpoint saved by transformers, and an adapter with a projector for it."""
    hf, folder = pytest.importorskip("transformers"), tmp_path_factory.mktemp(request.param)
    numbers = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    vision = hf.CLIPVisionConfig(**numbers | {"num_hidden_layers": 3}, image_size=56, patch_size=14)
    text = hf.LlamaConfig(**numbers, vocab_size=664)
    both = dict(vision_config=vision, text_config=text, image_token_index=660)
    torch.manual_seed(0)
    if request.param == "llava":
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**both))
    else:
        pinpoints = [[56, 112], [112, 56], [112, 112]]
        model = hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(**both, image_grid_pinpoints=pinpoints)
        )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "base")
    shutil.copy(tiny / V16 / "tokenizer.model", folder / "base")
    llava = load_llava(folder / "base")
    adapter = lora.new_adapter(llava, r=4, alpha=8, dropout=0.0, seed=0)
    adapter.base = llava.base
    adapter.tensors |= {name: 0.1 + t for name, t in adapter.tensors.items() if name.endswith("B")}
    adapter.tensors |= {n: p + 0.1 for n, p in llava.mm_projector.named_parameters(prefix="mm_projector")}
    adapters.write_adapter(folder / "adapter", adapter)
    return folder, type(model), adapter


def test_peft_on_transformers_gives_our_logits(checkpoint):
    peft, (folder, kind, _) = pytest.importorskip("peft"), checkpoint
    ours, base = load_llava(folder / "base", adapter=folder / "adapter"), load_llava(folder / "base")
    theirs = kind.from_pretrained(folder / "base").eval()
    result = theirs.load_state_dict(load_file(folder / "adapter" / adapters.PROJECTOR_FILE), strict=False)
    assert not result.unexpected_keys
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter")
    adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 14 and all(
        "language_model.layers" in name for name in adapted
    )  # none on the tower

    image = Image.effect_noise((300, 200), 80).convert("RGB")
    tiles = make_tiles(image, ours.config.image_mode, 56, ours.config.pinpoints)
    n = ours.config.image_tokens(image.size)
    ids = [[660] * n if i < 0 else [i] for i in ours.tokenizer.encode_prompt(PROMPT)]
    inputs = {"input_ids": torch.tensor([sum(ids, [])]), "pixel_values": tiles.pixels}
    if ours.config.pinpoints:
        inputs |= {"pixel_values": tiles.pixels[None], "image_sizes": torch.tensor([[200, 300]])}
    with torch.no_grad():
        expected = theirs(**inputs).logits[0, :, :600]
    logits = ours.logits(PROMPT, [image])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (logits - base.logits(PROMPT, [image])).abs().max() > 0.1


def test_names_are_those_of_transformers(checkpoint):
    folder, _, adapter = checkpoint
    files = (folder / "adapter" / name for name in ("adapter_model.safetensors", adapters.PROJECTOR_FILE))
    keys = [key for file in files for key in load_file(file)]
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "model.multi_modal_projector.linear_1.weight" in keys
    back = adapters.read_written(folder / "adapter")
    assert back.keys() == adapter.tensors.keys() and all(
        torch.equal(t, adapter.tensors[n]) for n, t in back.items()
    )


def test_notes_do_not_mention_preprocessor_config(checkpoint):
    folder, _, _ = checkpoint
    (folder / "base/preprocessor_config.json").write_text('{"resample": 3}')
    assert not [note for note in load_llava(folder / "base").notes if "preprocessor_config" in note]


def test_merged(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    assert merge(folder / "base", folder / "adapter", tmp_path / "merged") > 0.999
    unmerged = load_llava(folder / "base", adapter=folder / "adapter").logits(TEXT, [])
    torch.testing.assert_close(load_llava(tmp_path / "merged").logits(TEXT, []), unmerged, atol=1e-4, rtol=0)
