"""Hand-written LoRA (Hu et al. 2021), and adapters on disk in PEFT's format.

y = W x + (alpha / r) B A x with W frozen, on every decoder linear but `lm_head` (the paper's lora_target = all).
A and B are fp32 whatever the base is: in bf16, at the paper's lr of 1e-7, A would never move and B stall near 6e-5.
Adapters are used unmerged; `stic_min.merge` folds one into a checkpoint. Not here: biases, DoRA, per-module ranks.
"""

import json
import math
import operator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from stic_min import InputError, first_line
from stic_min.files import printable

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # in front of every key of a PEFT file
PROJECTOR_FILE = "projector.safetensors"  # ours; LLaVA's own is non_lora_trainables.bin


class LoRALinear(nn.Linear):
    """Takes over the weight of `linear`. `enabled` False is the base model, theta_0."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        device = linear.weight.device
        self.weight = linear.weight
        self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features, device=device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))  # (out, r)
        self.scale, self.dropout, self.enabled = alpha / r, dropout, True

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


@contextmanager
def disabled(model):
    """Inside, every LoRA of `model` is off: the reference policy theta_0."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def attach(llava, spec):
    """Puts a LoRALinear in place of every module that `spec` names."""
    for name in spec.modules:
        parent, _, child = name.rpartition(".")
        parent = llava.get_submodule(parent)
        linear = getattr(parent, child)
        setattr(parent, child, LoRALinear(linear, spec.r, spec.alpha, spec.dropout).train(linear.training))


# ---------------------------------------------------------------- adapters


@dataclass
class Adapter:
    r: int
    alpha: float
    dropout: float
    modules: list  # names in llava, "model.layers.0.self_attn.q_proj", ...
    tensors: dict  # llava's parameter names -> CPU tensors: LoRA, and the projector where the folder has one
    base: str = ""  # which checkpoint it belongs to, for the record


def fresh(llava, r, alpha, dropout, seed):
    """A new adapter on all of TARGETS: A uniform as in PEFT (kaiming, a = sqrt 5), B zero, so theta = theta_0."""
    generator = torch.Generator().manual_seed(seed)
    modules = [n for n, m in llava.model.named_modules(prefix="model") if n.rpartition(".")[2] in TARGETS]
    tensors = {}
    for name in modules:
        linear = llava.get_submodule(name)
        bound = linear.in_features**-0.5
        A = torch.empty(r, linear.in_features).uniform_(-bound, bound, generator=generator)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": torch.zeros(linear.out_features, r)}
    return Adapter(r, alpha, dropout, modules, tensors)


def read_tensors(path):
    """All tensors of a safetensors or torch file. Raises InputError naming it if it can't be read."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle, zip or safetensors make of a broken file
        raise InputError(f"can't read {path}: {printable(first_line(error))}") from None
    check_tensors(tensors, path)
    return tensors


def check_tensors(tensors, path):
    """Raises InputError naming the file unless what it held is {name: tensor}."""
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(f"{path}: not a dictionary of tensors")
    check_names(tensors, path)


def check_names(names, path):
    """The same of the names alone."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(f"{path}: unknown key {ascii(name)}")


def write_tensors(tensors, path):
    """A safetensors file with the permissions of any other new file (the library makes them its owner's alone). Raises
    InputError where it can't be written."""
    Path(path).touch()
    mode = Path(path).stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise InputError(f"can't write {path}: {first_line(error)}") from None
    Path(path).chmod(mode)


def read_adapter(folder, llava, canonical):
    """PEFT's adapter files and the projector beside them -> Adapter, checked against `llava`.

    `canonical` maps published key names to ours (loader.canonical). Raises InputError with one line for anything that
    does not fit: files missing or broken, features that are not here, keys or shapes of another model, B zero
    everywhere.
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
