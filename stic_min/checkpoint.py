"""Checkpoints of a training run. Each is a folder that is whole or not there: written beside and renamed.

checkpoint-N holds the adapter as after step N, in PEFT's format and usable as it is, Adam's two moments, and run.json:
the step, the settings that the run's result depends on, and the run's record so far (provenance.py). Learning rate,
order of the data and dropout follow from step and settings, so nothing else is needed. Tensors are whole, whatever the
ranks that wrote them held, and are read by any number of ranks.
"""

import errno
import json
import os
import shutil

from stic_min import InputError
from stic_min.formats.adapters import read_written, write_adapter
from stic_min.formats.tensors import read_tensors, write_tensors
from stic_min.runtime.files import printable, read_json

DRAWS = "ranks", "micro_batch"  # settings that change nothing but which inputs dropout hits
NAME, OPTIMIZER, BESIDE = "checkpoint-", "optimizer.safetensors", "checkpoint.new"


def folders(out):
    """The checkpoints in a folder, oldest first."""
    found = [p for p in out.glob(f"{NAME}*") if p.name.removeprefix(NAME).isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(NAME)))


def save(out, step, adapter, moments, settings, keep):
    """Writes checkpoint-`step` and removes all but the newest `keep`. Where it can't be written (a full disk), raises
    InputError; the older ones are whole then."""
    beside = out / BESIDE
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_adapter(beside, adapter)
        write_tensors(moments, beside / OPTIMIZER)
        (beside / "run.json").write_text(json.dumps(settings | {"step": step}, indent=2) + "\n", encoding="utf-8")
        for path in [*beside.iterdir(), beside]:
            sync(path)
    except (OSError, InputError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        older = folders(out)
        kept = f"{older[-1]} is whole, and the same command goes on from there" if older else "there is none before it"
        raise InputError(f"can't write a checkpoint of step {step} to {out} ({error}); {kept}") from None
    beside.rename(out / f"{NAME}{step}")
    sync(out)
    for old in folders(out)[:-keep]:
        shutil.rmtree(old)


def sync(path):
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does this for files only
            raise
    finally:
        os.close(handle)


def compare(folder, settings):
    """The step of a checkpoint, and what of DRAWS differs. Raises InputError naming it if anything else does."""
    saved = read_json(folder / "run.json")
    names = [*settings, *(name for name in saved if name not in settings and name not in ("step", "record"))]
    differ = [name for name in names if saved.get(name) != settings.get(name)]
    for name in differ:
        if name not in DRAWS:
            raise InputError(f"{folder} is of a run with {printable(name)} {saved.get(name)!r}, this one has "
                             f"{settings.get(name)!r}; name another --out, or delete it")
    step = int(folder.name.removeprefix(NAME))
    if saved.get("step") != step:
        raise InputError(f"{folder / 'run.json'}: step {saved.get('step')!r}, but its folder is of step {step}")
    return step, [f"{name} {saved.get(name)!r} before" for name in differ]


def recorded(folder):
    """What a checkpoint's run.json says beside the settings, {} if nothing."""
    record = read_json(folder / "run.json").get("record")
    return record if isinstance(record, dict) else {}


def newest(out, settings, say):
    """(step, {parameter: tensor}, {exp_avg.parameter and exp_avg_sq.parameter: tensor}), or None if there is none.

    Raises InputError if it is of a run with other settings, or damaged.
    """
    if not (found := folders(out)):
        return None
    step, differ = compare(found[-1], settings)
    if differ:
        say(f"with {' and '.join(differ)}: LoRA's dropout draws differently from here on")
    tensors, moments = read_written(found[-1]), read_tensors(found[-1] / OPTIMIZER)
    trained = {name for name in tensors if ".lora_" in name} | {name.partition(".")[2] for name in moments}
    for name in sorted(trained):
        values = tensors.get(name), moments.get(f"exp_avg.{name}"), moments.get(f"exp_avg_sq.{name}")
        if len({value if value is None else value.shape for value in values}) > 1:
            raise InputError(f"{found[-1]}: {name} is not the same in the adapter and in {OPTIMIZER}")
    return step, tensors, moments

