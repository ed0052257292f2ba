"""LoRA adapters on disk in PEFT's format, and the projector trained with them."""

import json
from pathlib import Path

from stic_min import InputError
from stic_min.formats.options import FLAG, REAL, SIZE, TEXT, check_options
from stic_min.formats.template import model_name
from stic_min.formats.tensors import canonical, published, read_metadata, read_tensors, write_tensors
from stic_min.lora import TARGETS, Adapter
from stic_min.runtime.files import printable, read_json

PREFIX = "base_model.model."  # of every key in a PEFT file
PROJECTOR_FILE = "projector.safetensors"  # ours; LLaVA's come with its LoRA or from its pretraining
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
    "use_dora": "LoRA does not rescale weights here",
    "rank_pattern": "all modules have one rank",
    "alpha_pattern": "all modules have one scale",
    "modules_to_save": "full modules are not read",
    "trainable_token_indices": "embeddings are not read",
    "target_parameters": "LoRA is on modules only",
    "fan_in_fan_out": "weights are (out, in)",
    "lora_bias": "LoRA has no bias",
    "layer_replication": "the layers are the checkpoint's",
    "use_qalora": "LoRA sees the full input",
    "alora_invocation_tokens": "LoRA is active at every token",
    "use_bdlora": "LoRA's matrices are not block-diagonal here",
    "arrow_config": "one adapter at a time is supported",
    "kasa_config": "LoRA is two matrices",
    "monteclora_config": "LoRA is deterministic",
}
HARMLESS = {
    "the tensors show where LoRA is": "target_modules exclude_modules layers_to_transform layers_pattern "
    "auto_mapping",
    "records": "task_type inference_mode revision peft_version",
    "for an init_lora_weights that is checked": "eva_config loftq_config corda_config lora_ga_config",
    "for options that are off": "qalora_group_size megatron_core",
    "how PEFT trains": "megatron_config velora_config ensure_weight_tying",
}
# Initializations that leave the base's weights alone. PEFT's others (pissa, olora, corda, loftq, lora_ga)
# change them.
BASE_UNCHANGED = True, False, "gaussian", "eva", "orthogonal", "mica"


def read_settings(file):
    """(r, alpha, dropout, name of the base or None) of an adapter_config.json."""
    options = check_options(read_json(file), file, USED, REQUIRED, REFUSED, HARMLESS)
    for name in ("r", "lora_alpha"):
        if name not in options:
            raise InputError(f"{file}: no {name}: not the configuration of a LoRA adapter")
    r = options["r"]
    alpha = float(options["lora_alpha"])
    init = options.get("init_lora_weights", True)
    if init not in BASE_UNCHANGED:
        remedy = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise InputError(f"{file}: init_lora_weights {printable(init)[:40]!r} changes the base's weights; "
                         f"convert it with PEFT: {remedy}")
    if options.get("use_rslora"):
        alpha *= r**0.5  # its scale is alpha / sqrt(r), ours alpha / r
    return r, alpha, float(options.get("lora_dropout", 0.0)), options.get("base_model_name_or_path")


# ---------------------------------------------------------------- reading


def read_adapter(folder: str | Path, llava) -> Adapter:
    """PEFT's adapter files and the projector in the same folder -> Adapter; adds a line on what was read to
    llava's notes.

    Anything that does not fit `llava` is an error: missing or broken files, unsupported options, keys, shapes
    or weights of another model, an adapter that changes nothing.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file; --adapter must be an adapter folder")
    config_file = folder / "adapter_config.json"
    candidates = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    files = [file for file in candidates if file.is_file()]
    if not config_file.is_file() or not files:
        raise InputError(f"no adapter in {folder}: needs adapter_config.json and adapter_model.safetensors "
                         "(or .bin)")  # fmt: skip
    r, alpha, dropout, base_name = read_settings(config_file)

    file, *other_files = files
    parameters = dict(llava.named_parameters())
    tensors = {}
    for key, value in read_tensors(file).items():
        name = canonical(key.removeprefix(PREFIX).removesuffix(".weight").replace(".default", "") + ".weight")
        module, _, matrix = (name or "").removesuffix(".weight").rpartition(".")
        if module.startswith("vision_tower."):
            # Published STIC adapters have LoRA on CLIP's q/k/v; the tower got no gradients, so their B is
            # zero.
            if matrix == "lora_B" and value.count_nonzero():
                raise InputError(f"{file}: {key} changes the vision tower, which is not supported")
            continue
        if matrix not in ("lora_A", "lora_B") or module.rpartition(".")[2] not in TARGETS:
            raise InputError(f"{file}: unknown key {key}")
        if f"{module}.weight" not in parameters:
            raise InputError(f"{file}: {key} belongs to another model: this one has no {module}")
        out_features, in_features = parameters[f"{module}.weight"].shape
        expected = (r, in_features) if matrix == "lora_A" else (out_features, r)
        if tuple(value.shape) != expected:
            raise InputError(f"{file}: {key} is {tuple(value.shape)}, but this model needs {expected}")
        tensors[f"{module}.{matrix}"] = finite(value, key, file)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    for name in (f"{module}.{matrix}" for module in modules for matrix in ("lora_A", "lora_B")):
        if name not in tensors:
            raise InputError(f"{file}: {name} is missing")
    nonzero = {name for name, tensor in tensors.items() if tensor.count_nonzero()}
    if not any({f"{module}.lora_A", f"{module}.lora_B"} <= nonzero for module in modules):
        raise InputError(f"{file}: the adapter changes nothing: lora_A or lora_B is zero in each of its "
                         f"{len(modules)} modules")
    check_base(folder, base_name, read_metadata(file).get("base_fingerprint"), llava)

    projector = read_projector(folder, parameters)
    owner = "the adapter's" if any(name.startswith("mm_projector.") for name in projector) else "the base's"
    note = f"{folder}: LoRA on {len(modules)} modules; projector: {owner}"
    if "image_newline" in projector:
        used = "image_newline" in parameters and llava.config.image_mode == "anyres"
        note += "; image_newline: " + ("the adapter's" if used else "not used in pad mode")
        projector = {name: value for name, value in projector.items() if name in parameters}
    llava.notes.append(note + "".join(f"; {other.name} is not read" for other in other_files))
    return Adapter(r, alpha, dropout, modules, tensors | projector)


def check_base(folder, base_name, fingerprint, llava):
    """Checks that an adapter belongs to the loaded checkpoint: an error if its record of the base's weights
    differs, a note if it has no record and the names differ."""
    base = llava.base
    trained_on = model_name(base_name or "")
    if fingerprint == base.fingerprint:
        return
    if fingerprint and not base.any_adapter:
        raise InputError(f"{folder} was trained on weights ({printable(trained_on)[:80]}) other than those "
                         f"of {base.folder}; to use it anyway, pass --other-base")
    names = {model_name(path).lower() for path in (base.folder, Path(base.folder).resolve())}
    if fingerprint or (base_name and trained_on.lower() not in names):
        name = printable(base_name or "")[:80]
        llava.notes.append(f"warning: {folder} was trained on {name}, but this model is {base.folder}")


def read_projector(folder, parameters):
    """{parameter: tensor} of the trained projector in an adapter folder, ours or LLaVA's (whose file may be
    empty), and of an image_newline trained with it."""
    candidates = [folder / name for name in PROJECTOR_FILES]
    files = {file: read_tensors(file) for file in candidates if file.is_file()}
    files = {file: tensors for file, tensors in files.items() if tensors}
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise InputError(f"{folder}: both {names} contain a projector; delete one")
    tensors = {}
    for file, values in files.items():
        for key, value in values.items():
            name = canonical(key.removeprefix(PREFIX)) or ""
            if name != "image_newline" and not (name.startswith("mm_projector.") and name in parameters):
                raise InputError(f"{file}: unknown key {key}")
            if name in tensors:
                raise InputError(f"{file}: {key} appears twice")
            if name in parameters and value.shape != parameters[name].shape:
                needed = tuple(parameters[name].shape)
                raise InputError(f"{file}: {key} is {tuple(value.shape)}, but this model needs {needed}")
            tensors[name] = finite(value, key, file)
        missing = sorted(n for n in parameters if n.startswith("mm_projector.") and n not in tensors)
        if missing and tensors.keys() - {"image_newline"}:
            raise InputError(f"{file}: {missing[0]} is missing")
    return tensors


def finite(value, key, file):
    """The tensor in fp32, after checking that it has no NaN or infinite values."""
    if not value.isfinite().all():
        raise InputError(f"{file}: {key} contains NaN or infinite values")
    return value.float()


# ---------------------------------------------------------------- writing


def write_adapter(folder: str | Path, adapter: Adapter):
    """Writes PEFT's two files, and the projector's if `adapter.tensors` includes one. They load in
    `load_llava`, and in PEFT on the model that `adapter.base` is, LLaVA's own or transformers'."""
    folder = Path(folder)
    huggingface = adapter.base.huggingface
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({module.rpartition(".")[2] for module in adapter.modules})
    if huggingface:  # given only the last part of the name, PEFT would put LoRA on the tower's q_proj, too
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
    # In the file's metadata, because older versions of PEFT reject unknown options in adapter_config.json.
    record = {"base_fingerprint": adapter.base.fingerprint} if adapter.base.fingerprint else {}
    write_tensors(matrices, folder / "adapter_model.safetensors", **record)
    if projector:
        write_tensors(projector, folder / PROJECTOR_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_written(folder):
    """The tensors in `write_adapter`'s files, by their names in llava."""
    tensors = read_tensors(folder / "adapter_model.safetensors")
    if (folder / PROJECTOR_FILE).is_file():
        tensors |= read_tensors(folder / PROJECTOR_FILE)

    def llava_name(key):
        name = canonical(key.removeprefix(PREFIX)) or key
        return name.removesuffix(".weight") if ".lora_" in key else name

    return {llava_name(key): value for key, value in tensors.items()}
