"""Adapters on disk: written for peft and read from it with the same logits, and refused where they do not fit."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from test_loader import TEXT, TOWER, V15, V16, read_tensors, refuse

from stic_min import lora
from stic_min.formats import adapters
from stic_min.loader import load_llava

LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
CLIP_LAYER = f"base_model.model.{TOWER}encoder.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def base(tiny):
    return {name: load_llava(tiny / name) for name in (V16, V15)}


@pytest.fixture
def adapter(base, tmp_path):
    """Folder with an adapter for V16 whose B is not zero."""
    made = lora.fresh(base[V16], r=4, alpha=8, dropout=0.0, seed=0)
    made.tensors |= {name: 0.1 + t for name, t in made.tensors.items() if name.endswith("B")}
    adapters.write_adapter(tmp_path / "adapter", made)
    return tmp_path / "adapter"


def change(folder, tensors=None, **config):
    """Rewrites some of an adapter's configuration, or all of its tensors."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def peft_model(tiny, name):
    """The decoder of a tiny checkpoint in transformers."""
    hf, old = pytest.importorskip("transformers"), json.loads((tiny / name / "config.json").read_text())
    kind = "Mistral" if name == V16 else "Llama"
    shared = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps"
    numbers = {key: old[key] for key in shared.split()} | {"vocab_size": 600, "rope_theta": old.get("rope_theta", 1e4)}
    model = getattr(hf, kind + "ForCausalLM")(getattr(hf, kind + "Config")(**numbers)).eval()
    decoder = r"lm_head|model\.(embed_tokens|layers|norm)\."
    model.load_state_dict({k: t.float() for k, t in read_tensors(tiny / name).items() if re.match(decoder, k)})
    return model


def peft_logits(model, llava):
    with torch.no_grad():
        return model(input_ids=torch.tensor([llava.tokenizer.encode_prompt(TEXT)])).logits[0]


def test_peft_reads_ours(tiny, base, adapter):
    peft, llava = pytest.importorskip("peft"), load_llava(tiny / V16, adapter=adapter)
    theirs = peft.PeftModel.from_pretrained(peft_model(tiny, V16), adapter)
    logits = llava.logits(TEXT, [])
    torch.testing.assert_close(logits, peft_logits(theirs, llava), atol=1e-4, rtol=0)
    with theirs.disable_adapter(), lora.disabled(llava):
        plain = llava.logits(TEXT, [])
        torch.testing.assert_close(plain, peft_logits(theirs, llava), atol=1e-4, rtol=0)
    assert torch.equal(plain, base[V16].logits(TEXT, [])) and (plain - logits).abs().max() > 0.1


@pytest.mark.parametrize("name, rslora", [(V16, False), (V16, True), (V15, False)])
def test_ours_reads_pefts(tiny, base, tmp_path, name, rslora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)  # r 4 and alpha 6: the scale is 1.5, or 3 with rslora
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=list(lora.TARGETS),
                             init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    theirs = peft.get_peft_model(peft_model(tiny, name), config).eval()
    theirs.save_pretrained(tmp_path)
    if name == V15:  # as older versions saved it
        torch.save(read_tensors(tmp_path), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    llava = load_llava(tiny / name, adapter=tmp_path)
    logits = llava.logits(TEXT, [])
    assert (logits - base[name].logits(TEXT, [])).abs().max() > 0.1
    torch.testing.assert_close(logits, peft_logits(theirs, llava), atol=1e-4, rtol=0)
    again = adapters.read_adapter(tmp_path, base[name])
    adapters.write_adapter(tmp_path / "again", again)
    assert torch.equal(load_llava(tiny / name, adapter=tmp_path / "again").logits(TEXT, []), logits)


def test_published_adapters_hold_idle_clip_tensors(tiny, adapter):
    """Also checks that the adapter acts at all: without its tensors the logits are others."""
    logits, tensors = load_llava(tiny / V16, adapter=adapter).logits(TEXT, []), read_tensors(adapter)
    idle = {f"{CLIP_LAYER}A.weight": torch.ones(4, 32), f"{CLIP_LAYER}B.weight": torch.zeros(32, 4)}
    torch.save({}, adapter / "non_lora_trainables.bin")
    assert torch.equal(load_llava(tiny / V16, adapter=change(adapter, tensors | idle)).logits(TEXT, []), logits)
    idle[f"{CLIP_LAYER}B.weight"][3, 1] = 1e-8
    refuse(f"{re.escape(CLIP_LAYER)}B.weight.* vision tower", tiny / V16, adapter=change(adapter, tensors | idle))


def test_projector_beside_the_adapter(tiny, base, adapter):
    names = [f"mm_projector.{i}.{x}" for i in "02" for x in ("weight", "bias")]
    new = {name: base[V16].get_parameter(name).detach() + 1 for name in names}
    llava_style = {f"base_model.model.model.{name}": t.half() for name, t in new.items()}
    file = adapter / "non_lora_trainables.bin"
    torch.save(llava_style, file)
    llava = load_llava(tiny / V16, adapter=adapter)
    assert all(torch.equal(llava.get_parameter(name), new[name].half().float()) for name in names)
    for match, wrong in {
        "unknown key base_model.model.lm_head": {"base_model.model.lm_head.weight": torch.ones(600, 32)},
        r"0.bias is \(31,\)": {"base_model.model.model.mm_projector.0.bias": torch.ones(31)},
    }.items():
        torch.save(llava_style | wrong, file)
        refuse(f"non_lora_trainables.bin: .*{match}", tiny / V16, adapter=adapter)
    torch.save(dict(list(llava_style.items())[1:]), file)
    refuse("mm_projector.0.weight is missing", tiny / V16, adapter=adapter)
    for broken in (b"", b"no pickle"):
        file.write_bytes(broken)
        refuse("can't read .*non_lora_trainables.bin", tiny / V16, adapter=adapter)
    file.unlink()

    read = adapters.read_adapter(adapter, base[V16])
    read.tensors |= new
    adapters.write_adapter(adapter, read)
    llava = load_llava(tiny / V16, adapter=adapter)  # ours
    assert all(torch.equal(llava.get_parameter(name), new[name]) for name in names)
    torch.save(llava_style, file)
    refuse("projector.safetensors and non_lora_trainables.bin both hold a projector", tiny / V16, adapter=adapter)
    torch.save({}, file)
    assert torch.equal(load_llava(tiny / V16, adapter=adapter).mm_projector[0].bias, new["mm_projector.0.bias"])


def test_a_fresh_adapter(base, tmp_path):
    """As PEFT starts one: A uniform in +- 1 / sqrt(in), B zero, everything from the seed."""
    make = lambda seed: lora.fresh(base[V16], r=8, alpha=16, dropout=0.0, seed=seed).tensors
    for name, tensor in make(0).items():
        bound = tensor.shape[1] ** -0.5  # (r, in)
        assert tensor.abs().max() <= bound and tensor.std() > 0.5 * bound if "lora_A" in name else not tensor.any()
    assert all(torch.equal(tensor, make(0)[name]) for name, tensor in make(0).items())
    assert not any(torch.equal(tensor, make(1)[name]) for name, tensor in make(0).items() if "lora_A" in name)


def test_others_can_read_what_is_written(adapter):
    (adapter / "plain").touch()
    assert {file.stat().st_mode for file in adapter.iterdir()} == {(adapter / "plain").stat().st_mode}


def test_wrong_adapters(tiny, adapter):
    tensors = read_tensors(adapter)
    for match, wrong in {
        r"q_proj.lora_A.weight is \(5, 32\), this model needs \(4, 32\)": {f"{LAYER}A.weight": torch.ones(5, 32)},
        r"q_proj.lora_B.weight is \(48, 4\)": {f"{LAYER}B.weight": torch.ones(48, 4)},
        "layers.7.*another model": {LAYER.replace(".0.", ".7.") + "A.weight": torch.ones(4, 32)},
        "unknown key .*lora_C": {f"{LAYER}C.weight": torch.ones(4, 32)},
        "unknown key base_model.model.lm_head": {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)},
    }.items():
        refuse(f"adapter_model.safetensors: .*{match}", tiny / V16, adapter=change(adapter, tensors | wrong))
    zero = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}
    refuse("changes nothing", tiny / V16, adapter=change(adapter, zero))
    half = {key: t for key, t in tensors.items() if key != f"{LAYER}B.weight"}
    refuse("layers.0.self_attn.q_proj.lora_B is missing", tiny / V16, adapter=change(adapter, half))
    refuse("another model|this model needs", tiny / V15, adapter=change(adapter, tensors))  # other key heads
    for option in ("use_dora", "rank_pattern", "fan_in_fan_out"):
        refuse(f"adapter_config.json: {option}", tiny / V16, adapter=change(adapter, **{option: {"q_proj": 2}}))
        change(adapter, **{option: None})
    refuse("adapter_config.json", tiny / V16, adapter=change(adapter, r=None))
    (adapter / "adapter_config.json").write_text("{\n")
    refuse("adapter_config.json", tiny / V16, adapter=adapter)
    (adapter / "adapter_config.json").unlink()
    refuse("no adapter in .*adapter: ", tiny / V16, adapter=adapter)
    refuse("nowhere", tiny / V16, adapter=adapter / "nowhere")
