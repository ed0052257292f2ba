"""LoRA adapters on disk in PEFT's format, with the projector trained beside them."""

import json
import math
import operator
from pathlib import Path

from stic_min import InputError, first_line
from stic_min.formats.tensors import canonical, read_tensors, write_tensors
from stic_min.lora import TARGETS, Adapter

PREFIX = "base_model.model."  # in front of every key of a PEFT file
PROJECTOR_FILE = "projector.safetensors"  # ours; LLaVA's own is non_lora_trainables.bin


def read_adapter(folder, llava):
    """PEFT's adapter files and the projector beside them -> Adapter, checked against `llava`.

    Raises InputError with one line for anything that does not fit: files missing or broken, features that are not
    here, keys or shapes of another model, B zero everywhere.
    """
    folder = Path(folder)
    config_file = folder / "adapter_config.json"
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    file = next((f for f in files if f.is_file()), None)
    if not config_file.is_file() or file is None:
        raise InputError(f"no adapter in {folder}: needs adapter_config.json and adapter_model.safetensors (or .bin)")
    try:
        config = json.loads(config_file.read_text())
        r, alpha = operator.index(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout", 0.0))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{config_file}: not a LoRA adapter's configuration ({said})") from None
    if not 0 < r <= 2**20 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise InputError(f"{config_file}: r {r}, lora_alpha {alpha} or lora_dropout {dropout} is out of range")
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{config_file}: peft_type {config['peft_type']!r} is not supported")
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if config.get(option):
            raise InputError(f"{config_file}: {option} is not supported")
    if config.get("bias", "none") != "none":
        raise InputError(f"{config_file}: bias {config['bias']!r} is not supported")
    if config.get("use_rslora"):
        alpha *= r**0.5  # its scale is alpha / sqrt(r), ours alpha / r

    tensors, parameters = {}, dict(llava.named_parameters())
    for key, value in read_tensors(file).items():
        name = canonical(key.removeprefix(PREFIX).removesuffix(".weight").replace(".default", "") + ".weight")
        module, _, matrix = (name or "").removesuffix(".weight").rpartition(".")
        if module.startswith("vision_tower."):
            # Published STIC adapters carry LoRA on CLIP's q/k/v; the tower ran without gradient, so their B is zero.
            if matrix == "lora_B" and value.count_nonzero():
                raise InputError(f"{file}: {key} changes the vision tower, which is not supported")
            continue
        if matrix not in ("lora_A", "lora_B") or module.rpartition(".")[2] not in TARGETS:
            raise InputError(f"{file}: unknown key {key}")
        if f"{module}.weight" not in parameters:
            raise InputError(f"{file}: {key} belongs to another model, this one has no {module}")
        out_features, in_features = parameters[f"{module}.weight"].shape
        expected = (r, in_features) if matrix == "lora_A" else (out_features, r)
        if tuple(value.shape) != expected:
            raise InputError(f"{file}: {key} is {tuple(value.shape)}, this model needs {expected}")
        tensors[f"{module}.{matrix}"] = value.float()
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    if missing := [f"{m}.{x}" for m in modules for x in ("lora_A", "lora_B") if f"{m}.{x}" not in tensors]:
        raise InputError(f"{file}: {missing[0]} is missing")
    if not any(tensors[f"{m}.lora_B"].count_nonzero() for m in modules):
        raise InputError(f"{file}: the adapter changes nothing, lora_B is zero in all of its {len(modules)} modules")
    tensors |= read_projector(folder, parameters)
    return Adapter(r, alpha, dropout, modules, tensors)


def read_written(folder):
    """The tensors of `write_adapter`'s files under the names they had. Raises InputError if a file can't be read."""
    tensors = read_tensors(folder / "adapter_model.safetensors")
    tensors = {key.removeprefix(PREFIX).removesuffix(".weight"): value for key, value in tensors.items()}
    if (folder / PROJECTOR_FILE).is_file():
        projector = read_tensors(folder / PROJECTOR_FILE)
        tensors |= {key.removeprefix("model."): value for key, value in projector.items()}
    return tensors


def read_projector(folder, parameters):
    """The trained projector beside an adapter: ours, or LLaVA's non_lora_trainables.bin (which may be empty)."""
    file = next((f for f in (folder / PROJECTOR_FILE, folder / "non_lora_trainables.bin") if f.is_file()), None)
    tensors = {}
    for key, value in (read_tensors(file) if file else {}).items():
        name = key.removeprefix(PREFIX).removeprefix("model.")
        if not name.startswith("mm_projector.") or name not in parameters:
            raise InputError(f"{file}: unknown key {key}")
        if value.shape != parameters[name].shape:
            needed = tuple(parameters[name].shape)
            raise InputError(f"{file}: {key} is {tuple(value.shape)}, this model needs {needed}")
        tensors[name] = value.float()
    missing = sorted(n for n in parameters if n.startswith("mm_projector.") and n not in tensors)
    if tensors and missing:
        raise InputError(f"{file}: {missing[0]} is missing")
    return tensors


def write_adapter(folder, adapter):
    """PEFT's two files, and the projector's where `adapter.tensors` holds it. Loads in peft and in `load_llava`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.r,
        "target_modules": sorted({m.rpartition(".")[2] for m in adapter.modules}),
        "task_type": "CAUSAL_LM",
    }
    tensors = {name: t.contiguous() for name, t in adapter.tensors.items()}
    projector = {f"model.{n}": t for n, t in tensors.items() if n.startswith("mm_projector.")}
    matrices = {f"{PREFIX}{n}.weight": t for n, t in tensors.items() if ".lora_" in n}
    write_tensors(matrices, folder / "adapter_model.safetensors")
    if projector:
        write_tensors(projector, folder / PROJECTOR_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
