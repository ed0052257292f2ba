"""LoRA adapters on disk in PEFT's format, with the projector trained beside them."""

import json
from pathlib import Path

from stic_min import InputError
from stic_min.formats.options import FLAG, REAL, SIZE, TEXT, check_options
from stic_min.formats.template import model_name
from stic_min.formats.tensors import canonical, published, read_metadata, read_tensors, write_tensors
from stic_min.lora import TARGETS, Adapter
from stic_min.runtime.files import printable, read_json

PREFIX = "base_model.model."  # in front of every key of a PEFT file
PROJECTOR_FILE = "projector.safetensors"  # ours; LLaVA's own lie beside its LoRA, and come from its pretraining
PROJECTOR_FILES = PROJECTOR_FILE, "non_lora_trainables.bin", "mm_projector.bin"

# ---------------------------------------------------------------- adapter_config.json of PEFT up to 0.21

USED = {
    "r": SIZE,
    "lora_alpha": REAL,
    "lora_dropout": (lambda x: type(x) in (int, float) and 0 <= x < 1, "a number in [0, 1)"),
    "use_rslora": FLAG,
    "base_model_name_or_path": TEXT,
    "init_lora_weights": (lambda x: isinstance(x, (bool, str)), "true, false or a name"),
}
REQUIRED = {"peft_type": ("LORA",), "bias": ("none", None)}
REFUSED = {
    "use_dora": "weights are not scaled",
    "rank_pattern": "all modules have one rank",
    "alpha_pattern": "all modules have one scale",
    "modules_to_save": "whole modules are not read",
    "trainable_token_indices": "embeddings are not read",
    "target_parameters": "LoRA is on modules",
    "fan_in_fan_out": "weights are (out, in)",
    "lora_bias": "LoRA has no bias",
    "layer_replication": "the layers are the checkpoint's",
    "use_qalora": "LoRA is on whole inputs",
    "alora_invocation_tokens": "LoRA is on at every token",
    "use_bdlora": "LoRA's matrices are whole",
    "arrow_config": "there is one adapter at a time",
    "kasa_config": "LoRA is two matrices",
    "monteclora_config": "LoRA is not random",
}
HARMLESS = {
    "the tensors show where LoRA is": "target_modules exclude_modules layers_to_transform layers_pattern auto_mapping",
    "records": "task_type inference_mode revision peft_version",
    "of an init_lora_weights that is checked": "eva_config loftq_config corda_config lora_ga_config",
    "of options that are off": "qalora_group_size megatron_core",
    "how PEFT trains": "megatron_config velora_config ensure_weight_tying",
}
# Where LoRA starts from. The others of PEFT (pissa, olora, corda, loftq, lora_ga) take their start out of the weights.
BASE_UNCHANGED = True, False, "gaussian", "eva", "orthogonal", "mica"


def read_settings(file):
    """(r, alpha, dropout, name of the base or None) of an adapter_config.json."""
    options = check_options(read_json(file), file, USED, REQUIRED, REFUSED, HARMLESS)
    for name in ("r", "lora_alpha"):
        if name not in options:
            raise InputError(f"{file}: no {name}: not a LoRA adapter's configuration")
    r, alpha, init = options["r"], float(options["lora_alpha"]), options.get("init_lora_weights", True)
    if init not in BASE_UNCHANGED:
        raise InputError(f"{file}: init_lora_weights {printable(init)[:40]!r} has changed the base's weights; let PEFT "
                         "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    if options.get("use_rslora"):
        alpha *= r**0.5  # its scale is alpha / sqrt(r), ours alpha / r
    return r, alpha, float(options.get("lora_dropout", 0.0)), options.get("base_model_name_or_path")


# ---------------------------------------------------------------- reading


def read_adapter(folder, llava):
    """PEFT's adapter files and the projector beside them -> Adapter, checked against `llava`, whose notes say what was
    read.

    Raises InputError with one line for anything that does not fit: files missing or broken, options that are not
    supported, keys or shapes or weights of another model, an adapter that changes nothing.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file, --adapter has to name the folder of an adapter")
    config_file = folder / "adapter_config.json"
    files = [f for name in ("adapter_model.safetensors", "adapter_model.bin") if (f := folder / name).is_file()]
    if not config_file.is_file() or not files:
        raise InputError(f"no adapter in {folder}: needs adapter_config.json and adapter_model.safetensors (or .bin)")
    r, alpha, dropout, base_name = read_settings(config_file)

    tensors, file, parameters = {}, files[0], dict(llava.named_parameters())
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
        tensors[f"{module}.{matrix}"] = finite(value, key, file)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    if missing := [f"{m}.{x}" for m in modules for x in ("lora_A", "lora_B") if f"{m}.{x}" not in tensors]:
        raise InputError(f"{file}: {missing[0]} is missing")
    if not any(tensors[f"{m}.lora_A"].count_nonzero() and tensors[f"{m}.lora_B"].count_nonzero() for m in modules):
        raise InputError(f"{file}: the adapter changes nothing, lora_A or lora_B is zero in all of its {len(modules)} "
                         "modules")
    check_base(folder, base_name, read_metadata(file).get("base_fingerprint"), llava)

    beside = read_projector(folder, parameters)
    whose = "the adapter's" if any(name.startswith("mm_projector.") for name in beside) else "the base's"
    note = f"{folder}: LoRA on {len(modules)} modules; projector: {whose}"
    if "image_newline" in beside:
        applied = "image_newline" in parameters and llava.config.image_mode == "anyres"
        note += "; image_newline: " + ("the adapter's" if applied else "not used, as the mode is pad")
        beside = {name: value for name, value in beside.items() if name in parameters}
    llava.notes.append(note + "".join(f"; {f.name} is not read" for f in files[1:]))
    return Adapter(r, alpha, dropout, modules, tensors | beside)


def check_base(folder, base_name, fingerprint, llava):
    """Whether an adapter belongs to the loaded checkpoint: an error where its record of the weights says no, a note
    where there is none and the names differ."""
    base, known_as = llava.base, model_name(base_name or "")
    if fingerprint == base.fingerprint:
        return
    if fingerprint and not base.any_adapter:
        raise InputError(f"{folder} was trained on other weights ({printable(known_as)[:80]}) than those of "
                         f"{base.folder}; --other-base uses it all the same")
    names = {model_name(path).lower() for path in (base.folder, Path(base.folder).resolve())}
    if fingerprint or (base_name and known_as.lower() not in names):
        llava.notes.append(f"warning: {folder} was trained on {printable(base_name or '')[:80]}, this model is "
                           f"{base.folder}")


def read_projector(folder, parameters):
    """{parameter: tensor} of the trained projector beside an adapter, ours or LLaVA's (which may be empty), and of an
    image_newline that was trained with it."""
    files = {f: read_tensors(f) for name in PROJECTOR_FILES if (f := folder / name).is_file()}
    files = {file: tensors for file, tensors in files.items() if tensors}
    if len(files) > 1:
        raise InputError(f"{folder}: {' and '.join(f.name for f in files)} both hold a projector; delete one")
    tensors = {}
    for file, values in files.items():
        for key, value in values.items():
            name = canonical(key.removeprefix(PREFIX)) or ""
            if name != "image_newline" and not (name.startswith("mm_projector.") and name in parameters):
                raise InputError(f"{file}: unknown key {key}")
            if name in tensors:
                raise InputError(f"{file}: {key} comes twice")
            if name in parameters and value.shape != parameters[name].shape:
                needed = tuple(parameters[name].shape)
                raise InputError(f"{file}: {key} is {tuple(value.shape)}, this model needs {needed}")
            tensors[name] = finite(value, key, file)
        missing = sorted(n for n in parameters if n.startswith("mm_projector.") and n not in tensors)
        if missing and tensors.keys() - {"image_newline"}:
            raise InputError(f"{file}: {missing[0]} is missing")
    return tensors


def finite(value, key, file):
    """A tensor in fp32. Raises InputError if a number of it is NaN or infinite."""
    if not value.isfinite().all():
        raise InputError(f"{file}: {key} holds NaN or infinite numbers")
    return value.float()


# ---------------------------------------------------------------- writing


def write_adapter(folder, adapter):
    """PEFT's two files, and the projector's where `adapter.tensors` holds it. Loads in `load_llava`, and in PEFT on the
    model that `adapter.base` is: LLaVA's own or transformers'."""
    folder, huggingface = Path(folder), adapter.base.huggingface
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({m.rpartition(".")[2] for m in adapter.modules})
    if huggingface:  # by the last part of its name alone, PEFT would put LoRA on the tower's q_proj, too
        targets = rf"model\.language_model\.layers\.\d+\.\w+\.({'|'.join(targets)})"
    config = {
        "base_model_name_or_path": adapter.base.folder,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    tensors = {published(name, huggingface): t.contiguous() for name, t in adapter.tensors.items()}
    matrices = {f"{PREFIX}{name}.weight": t for name, t in tensors.items() if ".lora_" in name}
    projector = {name: t for name, t in tensors.items() if ".lora_" not in name}
    # In the file's own metadata, as older versions of PEFT take no unknown option.
    record = {"base_fingerprint": adapter.base.fingerprint} if adapter.base.fingerprint else {}
    write_tensors(matrices, folder / "adapter_model.safetensors", **record)
    if projector:
        write_tensors(projector, folder / PROJECTOR_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_written(folder):
    """The tensors of `write_adapter`'s files under the names they had. Raises InputError if a file can't be read."""
    tensors = read_tensors(folder / "adapter_model.safetensors")
    if (folder / PROJECTOR_FILE).is_file():
        tensors |= read_tensors(folder / PROJECTOR_FILE)
    name = lambda key: (canonical(key.removeprefix(PREFIX)) or key).removesuffix(".weight" if ".lora_" in key else "")
    return {name(key): value for key, value in tensors.items()}
