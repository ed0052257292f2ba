"""Checkpoints of a training run, so that it can be killed at any moment and resumed with the same result.

checkpoint-N holds the adapter after step N in PEFT's format, ready to use; Adam's two moments; and run.json:
the step, the settings that determine the result, and a record of the run so far (runtime/provenance.py).
Learning rate, data order and dropout follow from step and settings, so nothing else is needed. A checkpoint
is written to a temporary folder and then renamed, so it is either complete or absent. Its tensors are not
sharded, so any number of ranks can read them.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from stic_min import InputError
from stic_min.formats.adapters import PROJECTOR_FILE, read_written, write_adapter
from stic_min.formats.tensors import read_tensors, write_tensors
from stic_min.loader import own_rows
from stic_min.report import write_page
from stic_min.runtime import preset, provenance
from stic_min.runtime.files import fingerprint, printable, read_json, sync, write_text
from stic_min.runtime.ranks import place

DRAWS = "ranks", "micro_batch"  # settings that only change dropout's masks
NAME, OPTIMIZER, TEMPORARY = "checkpoint-", "optimizer.safetensors", "checkpoint.new"


def settings_of_run(args, llava, adapter, max_length, **stage_settings):
    """What determines a run's result: written to run.json, and compared when the run is resumed.

    Files and folders count by their contents, not by their paths. `stage_settings` are the stage's own flags
    and files.
    """
    names = ("lr", "projector_lr", "batch_size", "limit", "seed", "lora_dropout")
    values = {name: getattr(args, name) for name in names} | stage_settings | preset.recorded(args)
    values |= {"lora_r": adapter.r, "lora_alpha": adapter.alpha, "max_length": max_length}
    values |= {"template": llava.config.template, "image_mode": llava.config.image_mode}
    values |= {"dtype": str(llava.lm_head.weight.dtype).removeprefix("torch.")}
    folders = args.model, getattr(args, "adapter", None), args.vision, args.tokenizer
    values |= {"fingerprint": fingerprint(*folders)}
    if args.epochs != 1:  # not in the run.json of runs from before this flag
        values |= {"epochs": args.epochs}
    if args.lora_dropout:  # its masks depend on the micro-batches; nothing else does
        values |= {"micro_batch": args.micro_batch, "ranks": place()[1]}
    return values


# ---------------------------------------------------------------- folders


def folders(out):
    """The checkpoints in a folder, oldest first."""
    checkpoints = [p for p in out.glob(f"{NAME}*") if p.name.removeprefix(NAME).isdecimal()]
    return sorted(checkpoints, key=lambda p: int(p.name.removeprefix(NAME)))


def save(out, step, adapter, moments, settings, keep):
    """Writes checkpoint-`step`, then removes all but the newest `keep`. A full disk leaves the older ones."""
    temporary = out / TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_adapter(temporary, adapter)
        write_tensors(moments, temporary / OPTIMIZER)
        run_json = json.dumps(settings | {"step": step}, indent=2)
        (temporary / "run.json").write_text(run_json + "\n", encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
    except (OSError, InputError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        older = folders(out)
        hint = "there is no earlier checkpoint"
        if older:
            hint = f"{older[-1]} is complete; run the same command to resume from it"
        raise InputError(f"can't write a checkpoint of step {step} to {out} ({error}); {hint}") from None
    temporary.rename(out / f"{NAME}{step}")
    sync(out)
    for old in folders(out)[:-keep]:
        shutil.rmtree(old)


def compare(folder, settings):
    """A checkpoint's step, and which of DRAWS have changed since. Any other difference is an error."""
    saved = read_json(folder / "run.json")
    names = [*settings, *(name for name in saved if name not in settings and name not in ("step", "record"))]
    different = [name for name in names if saved.get(name) != settings.get(name)]
    for name in different:
        if name not in DRAWS:
            raise InputError(f"{folder} belongs to a run with {printable(name)} {saved.get(name)!r}, but "
                             f"this run has {settings.get(name)!r}; choose another --out, or delete the "
                             "folder")  # fmt: skip
    step = int(folder.name.removeprefix(NAME))
    if saved.get("step") != step:
        raise InputError(f"{folder / 'run.json'}: step {saved.get('step')!r} contradicts the folder's name")
    return step, [f"{name} (was {saved.get(name)!r})" for name in different]


def newest(out, settings, report):
    """(step, {parameter: tensor}, {exp_avg.parameter and exp_avg_sq.parameter: tensor}), or None without a
    checkpoint.

    Raises InputError if it is damaged or belongs to a run with other settings.
    """
    checkpoints = folders(out)
    if not checkpoints:
        return None
    folder = checkpoints[-1]
    step, different = compare(folder, settings)
    if different:
        report(f"changed since the checkpoint: {', '.join(different)}; dropout masks differ from here on")
    tensors = read_written(folder)
    moments = read_tensors(folder / OPTIMIZER)
    trained = {name for name in tensors if ".lora_" in name} | {name.partition(".")[2] for name in moments}
    for name in sorted(trained):
        values = tensors.get(name), moments.get(f"exp_avg.{name}"), moments.get(f"exp_avg_sq.{name}")
        shapes = [None if value is None else value.shape for value in values]
        if shapes != [shapes[0]] * 3:
            raise InputError(f"{folder}: {name} differs between the adapter and {OPTIMIZER}")
    return step, tensors, moments


# ---------------------------------------------------------------- of a run


def full(tensor):
    """The whole of a possibly sharded tensor. Every rank must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local(tensor):
    """This rank's part of a possibly sharded tensor, to write into."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Checkpoints:
    """The checkpoints of one run in the folder --out. Every rank must call every method.

    The first rank writes them in a thread, from a copy in main memory, so that training goes on meanwhile.
    """

    def __init__(self, adapter, parameters, optimizer, settings, args, ranks):
        self.out = Path(args.out)
        self.adapter, self.parameters, self.optimizer = adapter, parameters, optimizer
        self.settings, self.args, self.ranks = settings, args, ranks
        self.saved_step = 0
        self.copies = {}  # of all tensors, on the first rank; pinned, because copying is then fast
        self.thread = ThreadPoolExecutor(1)
        self.writing = None  # the checkpoint being written, a Future

    def gather(self, tensors):
        """Possibly sharded tensors -> copies of whole ones in main memory, on the first rank."""
        for name, tensor in tensors.items():
            value = full(tensor)
            if self.ranks.first:
                if name not in self.copies:
                    self.copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self.copies[name].copy_(value)
        return {name: self.copies[name] for name in tensors if self.ranks.first}

    def run_json(self, memory):
        return self.settings | {
            "record": provenance.current_record(self.record, self.previous_record, self.ranks, memory)
        }

    def save(self, step, memory):
        """Saves the state after `step` steps, unless that is saved already. It is written when `wait`
        returns."""
        if step == self.saved_step:
            return
        self.wait()  # the thread reads the copies
        run_json = self.run_json(memory)
        self.adapter.tensors |= self.gather(self.parameters)
        moments = self.gather({
            f"{kind}.{name}": self.optimizer.state[parameter][kind]
            for name, parameter in self.parameters.items()
            for kind in ("exp_avg", "exp_avg_sq")
        })  # fmt: skip
        if self.ranks.first:
            arguments = self.out, step, self.adapter, moments, run_json, self.args.keep
            self.writing = self.thread.submit(save, *arguments)
        self.saved_step = step

    def check(self):
        """Ends the run here if writing has failed, as on a full disk."""
        if self.writing and self.writing.done():
            self.writing.result()

    def wait(self):
        """Until the last checkpoint is written. All ranks wait: one that exited earlier would take the others
        down."""
        if self.writing:
            self.writing.result()
        self.ranks.barrier()

    def resume(self):
        """Restores parameters and optimizer from the newest checkpoint -> its step, 0 without one."""
        self.record = provenance.start_record(self.args.model, self.ranks)
        self.previous_record = {}
        self.ranks.barrier()
        checkpoint = newest(self.out, self.settings, self.ranks.print)
        steps = self.ranks.gather(checkpoint[0] if checkpoint else 0)
        if len(set(steps)) > 1:
            raise InputError(f"not all ranks see the same checkpoints: {self.out} must be on a disk that all "
                             "nodes share")  # fmt: skip
        if checkpoint is None:
            for leftover in ("log.jsonl", "adapter_model.safetensors", PROJECTOR_FILE):
                (self.out / leftover).unlink(missing_ok=True)
            return 0
        self.saved_step, tensors, moments = checkpoint
        folder = folders(self.out)[-1]
        self.previous_record = provenance.read_record(folder / "run.json")
        for name, parameter in self.parameters.items():
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            with torch.no_grad():
                local(parameter).copy_(own_rows(tensors[name], parameter))
                for kind, value in state.items():
                    local(value).copy_(own_rows(moments[f"{kind}.{name}"], parameter))
            self.optimizer.state[parameter] = state | {"step": torch.tensor(float(self.saved_step))}
        if self.ranks.first:
            log = self.out / "log.jsonl"
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
            write_text(log, "".join(lines[: self.saved_step]))
        self.ranks.print(f"resuming after step {self.saved_step} from {folder}")
        return self.saved_step

    def finish(self, memory):
        """Moves the last checkpoint's adapter to `out` and removes the checkpoints."""
        self.wait()
        run_json = self.run_json(memory)
        if self.ranks.first:
            *_, last = folders(self.out)
            (self.out / "run.json").write_text(json.dumps(run_json, indent=2) + "\n", encoding="utf-8")
            # adapter_config.json, which marks a finished run, comes last.
            for name in ("adapter_model.safetensors", PROJECTOR_FILE, "adapter_config.json"):
                if (last / name).is_file():
                    shutil.copyfile(last / name, self.out / f"{name}.new")
                    os.replace(self.out / f"{name}.new", self.out / name)
            for old in (*folders(self.out), self.out / TEMPORARY):
                shutil.rmtree(old, ignore_errors=True)
            write_page(self.out)
            written = sorted(file.name for file in self.out.iterdir() if file.name != ".lock")
            self.ranks.print(f"wrote {', '.join(written)} to {self.out}")
        self.ranks.barrier()
