"""Adapters on disk: written for PEFT and read from it with the same logits; those that do not fit are an
error."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import PROMPT, TEXT, TOWER, V15, V16, copy, read_tensors, refuse
from PIL import Image
from safetensors.torch import save_file

from stic_min import lora
from stic_min.formats import adapters
from stic_min.loader import load_llava
from stic_min.merge import merge

LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
CLIP_LAYER = f"base_model.model.{TOWER}encoder.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def base(tiny):
    return {name: load_llava(tiny / name) for name in (V16, V15)}


@pytest.fixture
def adapter(base, tmp_path):
    """Folder with an adapter for V16 whose B is not zero."""
    adapter = lora.new_adapter(base[V16], r=4, alpha=8, dropout=0.0, seed=0)
    adapter.tensors |= {name: 0.1 + t for name, t in adapter.tensors.items() if name.endswith("B")}
    adapters.write_adapter(tmp_path / "adapter", adapter)
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
    shared = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps"
    )
    numbers = {key: old[key] for key in shared.split()} | {
        "vocab_size": 600,
        "rope_theta": old.get("rope_theta", 1e4),
    }
    model = getattr(hf, kind + "ForCausalLM")(getattr(hf, kind + "Config")(**numbers)).eval()
    decoder = r"lm_head|model\.(embed_tokens|layers|norm)\."
    model.load_state_dict(
        {k: t.float() for k, t in read_tensors(tiny / name).items() if re.match(decoder, k)}
    )
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


def test_idle_clip_tensors_of_published_adapters(tiny, adapter):
    """Adapters with LoRA on CLIP load if its B is zero, as in the published ones."""
    logits, tensors = load_llava(tiny / V16, adapter=adapter).logits(TEXT, []), read_tensors(adapter)
    idle = {f"{CLIP_LAYER}A.weight": torch.ones(4, 32), f"{CLIP_LAYER}B.weight": torch.zeros(32, 4)}
    torch.save({}, adapter / "non_lora_trainables.bin")
    assert torch.equal(
        load_llava(tiny / V16, adapter=change(adapter, tensors | idle)).logits(TEXT, []), logits
    )
    idle[f"{CLIP_LAYER}B.weight"][3, 1] = 1e-8
    refuse(
        f"{re.escape(CLIP_LAYER)}B.weight.* vision tower", tiny / V16, adapter=change(adapter, tensors | idle)
    )


def test_projector_next_to_the_adapter(tiny, base, adapter):
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
    refuse(
        "both projector.safetensors and non_lora_trainables.bin contain a projector",
        tiny / V16,
        adapter=adapter,
    )
    torch.save({}, file)
    assert torch.equal(
        load_llava(tiny / V16, adapter=adapter).mm_projector[0].bias, new["mm_projector.0.bias"]
    )


def test_a_new_adapter(base, tmp_path):
    """Initialized as in PEFT: A uniform in +- 1 / sqrt(in), B zero, everything determined by the seed."""
    make = lambda seed: lora.new_adapter(base[V16], r=8, alpha=16, dropout=0.0, seed=seed).tensors
    for name, tensor in make(0).items():
        bound = tensor.shape[1] ** -0.5  # (r, in)
        assert (
            tensor.abs().max() <= bound and tensor.std() > 0.5 * bound
            if "lora_A" in name
            else not tensor.any()
        )
    assert all(torch.equal(tensor, make(0)[name]) for name, tensor in make(0).items())
    assert not any(torch.equal(tensor, make(1)[name]) for name, tensor in make(0).items() if "lora_A" in name)


def test_written_files_have_the_usual_permissions(adapter):
    (adapter / "plain").touch()
    assert {file.stat().st_mode for file in adapter.iterdir()} == {(adapter / "plain").stat().st_mode}


def test_wrong_adapters(tiny, adapter):
    tensors = read_tensors(adapter)
    for match, wrong in {
        r"q_proj.lora_A.weight is \(5, 32\), but this model needs \(4, 32\)": {
            f"{LAYER}A.weight": torch.ones(5, 32)
        },
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
        refuse(
            f"adapter_config.json: {option}", tiny / V16, adapter=change(adapter, **{option: {"q_proj": 2}})
        )
        change(adapter, **{option: None})
    refuse("adapter_config.json", tiny / V16, adapter=change(adapter, r=None))
    (adapter / "adapter_config.json").write_text("{\n")
    refuse("adapter_config.json", tiny / V16, adapter=adapter)
    (adapter / "adapter_config.json").unlink()
    refuse("no adapter in .*adapter: ", tiny / V16, adapter=adapter)
    refuse("nowhere", tiny / V16, adapter=adapter / "nowhere")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something"]
)
def test_initializations_that_change_the_base_are_an_error(tiny, adapter, init):
    change(adapter, init_lora_weights=init)
    refuse(f"init_lora_weights '{init}'.*path_initial_model", tiny / V16, adapter=adapter)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_keep_the_base_load(tiny, base, adapter, init):
    adapters.read_adapter(change(adapter, init_lora_weights=init), base[V16])


def test_options_of_peft(tiny, base, adapter):
    """All options that the installed version writes for plain LoRA are known, and unknown ones are an
    error."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").to_dict()
    change(adapter, **options | {"target_modules": ["q_proj"], "peft_type": "LORA"})
    adapters.read_adapter(adapter, base[V16])
    for option, value in {
        "alora_invocation_tokens": [1, 2], "lora_bias": True, "layer_replication": [[0, 2]], "invented": 3,
        "modules_to_save": ["lm_head"], "bias": "all", "peft_type": "LOHA", "lora_alpha": "8",
        "lora_dropout": 1.5,
        "use_rslora": "yes", "r": 4.0,
    }.items():  # fmt: skip
        before = json.loads((adapter / "adapter_config.json").read_text())
        refuse(f"adapter_config.json: {option} ", tiny / V16, adapter=change(adapter, **{option: value}))
        (adapter / "adapter_config.json").write_text(json.dumps(before))
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.replace('"r": 4', '"r": 8, "r": 4'))
    refuse("adapter_config.json: 'r' appears twice", tiny / V16, adapter=adapter)
    (adapter / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    adapters.read_adapter(adapter, base[V16])


# ---------------------------------------------------------------- the base


def test_an_adapter_of_another_base(tiny, base, adapter, tmp_path):
    """Our adapters record the base's weights: it may be renamed or moved, but not changed."""
    read = adapters.read_adapter(adapter, base[V16])
    read.base = replace(base[V16].base, folder="models/llava-v1.6-mistral-7b")
    adapters.write_adapter(adapter, read)
    assert not warnings(
        load_llava(
            copy(tiny, V16, tmp_path / "renamed", form="model-0000%d-of-00003.safetensors"),
            adapter=unsigned(adapter, "renamed"),
        )
    )
    same = tmp_path / "same"
    shutil.copytree(tiny / V16, same)
    (same / "config.json").write_text(
        (same / "config.json").read_text().replace("clip-tiny", str(tiny / "clip-tiny"))
    )
    assert not warnings(load_llava(same, adapter=adapter))
    tensors = read_tensors(tiny / V16)
    tensors["model.norm.weight"] += 1
    other = copy(tiny, V16, tmp_path / "other", tensors)
    refuse(
        "adapter was trained on weights .*llava-v1.6-mistral-7b.*other than.*--other-base",
        other,
        adapter=adapter,
    )
    [warning] = warnings(load_llava(other, adapter=adapter, other_base=True))
    assert "models/llava-v1.6-mistral-7b" in warning and str(other) in warning


def unsigned(folder, base):
    """The adapter as other tools write it: without a record of the base's weights, but with its name."""
    others = shutil.copytree(folder, folder.with_name(f"of-{base.replace('/', '-')}"), dirs_exist_ok=True)
    return change(others, read_tensors(folder), base_model_name_or_path=base)


def warnings(llava):
    return [note for note in llava.notes if note.startswith("warning: ")]


@pytest.mark.parametrize("path, name, warns", [
    ("llava-v1.6-tiny", "someone/llava-v1.6-tiny", False),
    ("llava-v1.6-tiny", "/data/LLaVA-v1.6-tiny/", False),
    ("models--someone--llava-x/snapshots/0123", "someone/llava-x", False), ("llava-v1.6-tiny", "", False),
    ("llava-v1.6-tiny", "cache/models--a--llava-v1.6-tiny/snapshots/12", False),
    ("llava-v1.6-tiny", "someone/llava-v1.5-tiny", True), ("models--a--b/snapshots/c", "a/c", True),
])  # fmt: skip
def test_names_of_the_base(tiny, adapter, tmp_path, path, name, warns):
    model = copy(tiny, V16, tmp_path / "m" / path)
    notes = warnings(load_llava(model, adapter=unsigned(adapter, name)))
    assert len(notes) == warns and all(name in note and str(model) in note for note in notes)


# ---------------------------------------------------------------- other files in the folder


def test_notes_on_used_files(tiny, adapter):
    note = load_llava(tiny / V16, adapter=adapter).notes[-1]
    assert note == f"{adapter}: LoRA on 14 modules; projector: the base's"
    torch.save(read_tensors(adapter), adapter / "adapter_model.bin")
    torch.save(
        {
            f"model.mm_projector.{i}.{x}": torch.ones(32, 32)[0 if x == "bias" else slice(None)].clone()
            for i in "02"
            for x in ("weight", "bias")
        },
        adapter / "mm_projector.bin",
    )
    llava = load_llava(tiny / V16, adapter=adapter)  # from LLaVA's pretraining
    assert llava.notes[-1].endswith("projector: the adapter's; adapter_model.bin is not read")
    assert llava.mm_projector[0].weight.eq(1).all()
    torch.save(torch.load(adapter / "mm_projector.bin"), adapter / "non_lora_trainables.bin")
    refuse(
        "both non_lora_trainables.bin and mm_projector.bin contain a projector", tiny / V16, adapter=adapter
    )


def test_a_newline_next_to_the_adapter(tiny, adapter, base):
    """LLaVA's non_lora_trainables.bin from an anyres run contains one."""
    newline, image = torch.linspace(-1, 1, 32), Image.new("RGB", (300, 200), "red")
    torch.save({"base_model.model.model.image_newline": newline}, adapter / "non_lora_trainables.bin")
    llava = load_llava(tiny / V16, adapter=adapter)
    assert torch.equal(llava.image_newline, newline) and "image_newline: the adapter's" in llava.notes[-1]
    (adapter / "non_lora_trainables.bin").rename(adapter.with_name("newline.bin"))
    without = load_llava(tiny / V16, adapter=adapter)
    assert (llava.logits(PROMPT, [image]) - without.logits(PROMPT, [image])).abs().max() > 0.01
    with torch.no_grad():
        without.image_newline.copy_(newline)
    assert torch.equal(llava.logits(PROMPT, [image]), without.logits(PROMPT, [image]))
    adapter.with_name("newline.bin").rename(adapter / "non_lora_trainables.bin")
    assert "not used in pad mode" in load_llava(tiny / V16, adapter=adapter, image_mode="pad").notes[-1]
    read = adapters.read_adapter(adapter, base[V16])
    adapters.write_adapter(adapter.with_name("again"), read)  # as stage 2 does
    assert torch.equal(load_llava(tiny / V16, adapter=adapter.with_name("again")).image_newline, newline)
    merge(tiny / V16, adapter, adapter.with_name("merged"), torch.float32)
    torch.testing.assert_close(read_tensors(adapter.with_name("merged"))["model.image_newline"], newline)

    made = lora.new_adapter(base[V15], r=4, alpha=8, dropout=0.0, seed=0)
    made.tensors |= {name: 0.1 + t for name, t in made.tensors.items() if name.endswith("B")}
    made.tensors["image_newline"] = newline
    adapters.write_adapter(adapter.with_name("v15"), made)  # on a model that knows only pad
    assert "not used" in load_llava(tiny / V15, adapter=adapter.with_name("v15")).notes[-1]


def test_numbers_that_are_none(tiny, adapter):
    tensors = read_tensors(adapter)
    wrong = {key: t.clone() for key, t in tensors.items()}
    wrong[f"{LAYER}A.weight"][1, 2] = float("inf")
    refuse("q_proj.lora_A.weight contains NaN or infinite", tiny / V16, adapter=change(adapter, wrong))
    zero = {key: torch.zeros_like(t) if "lora_A" in key else t for key, t in tensors.items()}
    refuse("changes nothing: lora_A or lora_B is zero", tiny / V16, adapter=change(adapter, zero))
    change(adapter, tensors)
    torch.save({"model.mm_projector.0.bias": torch.full((32,), float("nan"))}, adapter / "mm_projector.bin")
    refuse("mm_projector.bin: model.mm_projector.0.bias contains NaN", tiny / V16, adapter=adapter)
