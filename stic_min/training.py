"""What both stages share: sharding, optimizer groups, schedule, checkpoints, the step log.

The scripts own the loop and the loss; a `Run` owns everything around them. One optimizer step takes one global batch,
whatever the number of ranks and the size of a micro-batch: the loss is normalised over the global batch, so neither
changes the result. (Dropout does: its draws follow the micro-batches.)
"""

import contextlib
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stic_min import InputError, check, checkpoint, lora
from stic_min.batch import collate
from stic_min.data import global_batches, load_tiles
from stic_min.formats.adapters import PROJECTOR_FILE, read_adapter
from stic_min.llava import Projector
from stic_min.loader import load_weights, open_llava, own_rows
from stic_min.runtime import console, files, flags, process, provenance
from stic_min.runtime.files import append_line
from stic_min.runtime.output import lock, unlock
from stic_min.runtime.ranks import place
from stic_min.runtime.work import prefetch, row_seed

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0  # AdamW, Table 4 and the release
CLIP_NORM = 1.0
WARMUP = 0.03  # of all steps
SHOWN = "loss", "dpo", "alpha_nll", "margin", "accuracy"  # on the terminal; log.jsonl has everything


# ---------------------------------------------------------------- flags


def add_flags(parser, *, lr, batch_size, dropout, max_length):
    """The training flags of both scripts; `max_length` for pad mode, anyres takes 4096."""
    flags.add_check_flag(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=flags.not_negative, default=lr, help="of LoRA")
    group.add_argument("--projector-lr", type=flags.not_negative, default=2e-5, help="0 freezes the projector")
    group.add_argument("--batch-size", type=flags.positive, default=batch_size, help="global, over all ranks")
    group.add_argument("--micro-batch", type=flags.positive, default=1, help="samples a rank computes at once")
    group.add_argument("--max-length", type=flags.positive, metavar="N",
                       help=f"image tokens counted; responses are cut to it (default: {max_length}, in anyres 4096)")
    group.add_argument("--lora-r", type=flags.positive, help="(default: 128; an adapter trained further keeps its own)")
    group.add_argument("--lora-alpha", type=flags.positive, help="(default: 2 * r; likewise)")
    group.add_argument("--lora-dropout", type=flags.probability, default=dropout, help="on LoRA's input")
    group.add_argument("--shard", choices=["full", "none"], default="full",
                       help="under torchrun: full is FSDP; none keeps all weights on each rank, only gradients travel")
    group.add_argument("--checkpoint-activations", action="store_true", help="recompute in the backward: less memory")
    group.add_argument("--save-every", type=flags.positive, metavar="STEPS",
                       help="checkpoint to resume from (default: a tenth of the run)")
    group.add_argument("--keep", type=flags.positive, metavar="N", default=2,
                       help="number of most recent checkpoints to keep")


def length_limit(args, llava, pad, anyres=4096):
    """--max-length or the stage's default, no longer than the model's own sequence."""
    default = pad if llava.config.image_mode == "pad" else anyres
    return min(args.max_length or default, llava.config.decoder.max_positions)


# ---------------------------------------------------------------- pieces


def rate(step, steps):
    """Learning rate of 0-based `step` as a fraction of the peak: linear warm-up over 3 %, then cosine towards 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def micro_batches(batch, ranks, size):
    """This rank's share of one global batch -> [(indices, real?)], as many as every other rank has.

    FSDP's ranks compute in step: one that has run out recomputes a sample that does not count (real is False).
    """
    own = batch[ranks.rank :: ranks.world]
    rounds = math.ceil(math.ceil(len(batch) / ranks.world) / size)
    chunks = [own[i * size : (i + 1) * size] for i in range(rounds)]
    return [(chunk or batch[:1], bool(chunk)) for chunk in chunks]


def memory_gb(device):
    """Peak memory of this rank so far, in GB: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1000  # macOS counts in bytes, Linux in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def full(tensor):
    """The whole of a maybe sharded tensor, on the CPU. Every rank has to call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def local(tensor):
    """This rank's part of a maybe sharded tensor, to write into."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------- the model


def build(args, ranks, keep_reference):
    """Model on its devices with LoRA (and, unless --projector-lr 0, the projector) trainable in fp32.

    `keep_reference`: also theta_0's projector, where the projector trains. Returns (llava, adapter), the adapter for
    its settings: new, or the one that --adapter names. With --check the model has no weights.
    """
    options = flags.model_options(args, ranks)
    options["image_mode"] = args.image_mode or "pad"  # Table 4
    if not args.check:
        console.report_loading(args, ranks)
    llava, source = open_llava(args.model, **options)
    given = getattr(args, "adapter", None)
    if given:
        adapter = read_adapter(given, llava)
        for flag, value in (("--lora-r", adapter.r), ("--lora-alpha", adapter.alpha)):
            wanted = getattr(args, flag[2:].replace("-", "_"))
            if wanted is not None and wanted != value:
                raise InputError(f"{flag} {wanted}: {given} has {value}, and training goes on with it")
        adapter.dropout = args.lora_dropout
    else:
        r = args.lora_r or 128
        adapter = lora.new_adapter(llava, r, args.lora_alpha or 2 * r, args.lora_dropout, args.seed)
    adapter.base = llava.base
    lora.attach(llava, adapter)
    projector = {name: value for name, value in source.items() if name.startswith("mm_projector.")}  # theta_0's
    source |= adapter.tensors
    if args.projector_lr:
        # fp32, as LoRA's: in bf16 most of the steps would be rounded away
        llava.mm_projector.float().requires_grad_(True)
        if keep_reference:
            with torch.device("meta"):
                copy = Projector(llava.config.vision.hidden_size, llava.config.decoder.hidden_size)
            llava.reference_projector = copy.to(options["dtype"]).requires_grad_(False)
            source |= {name.replace("mm_", "reference_"): value for name, value in projector.items()}
    for layer in llava.model.layers:
        layer.checkpoint_activations = args.checkpoint_activations
    if ranks.world > 1 and args.shard == "full" and not args.check:
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for layer in llava.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(llava, mesh=mesh)
        llava.to_empty(device=ranks.device)
    if not args.check:
        load_weights(llava, source, ranks.device)
        console.report_loaded(llava, ranks)
    # LoRA is in the model now. What came beside it is kept: untrained, it is written as it was.
    adapter.tensors = {name: value for name, value in adapter.tensors.items() if ".lora_" not in name}
    return llava, adapter


def settings(args, llava, adapter, max_length, **own):
    """What a run's result depends on: written to run.json, and compared when a run is resumed.

    Files and folders count by their contents, not by their paths; `own` are the stage's own flags and files.
    """
    names = ("lr", "projector_lr", "batch_size", "limit", "seed", "lora_dropout")
    values = {name: getattr(args, name) for name in names} | own
    values |= {"lora_r": adapter.r, "lora_alpha": adapter.alpha, "max_length": max_length}
    values |= {"template": llava.config.template, "image_mode": llava.config.image_mode}
    values |= {"dtype": str(llava.lm_head.weight.dtype).removeprefix("torch.")}
    folders = args.model, getattr(args, "adapter", None), args.vision, args.tokenizer
    values |= {"fingerprint": files.fingerprint(*folders)}
    if args.lora_dropout:  # its draws depend on the micro-batches; nothing else does
        values |= {"micro_batch": args.micro_batch, "ranks": place()[1]}
    return values


def sha256(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# ---------------------------------------------------------------- one training run


class Run:
    """An output folder, an optimizer and the steps in between.

    for step, micro_batches in run.steps():      # of this rank; `real` is False for one that only keeps FSDP in step
        for indices, real in micro_batches:
            loss = ...                           # this rank's part of the global batch's mean
            run.backward(loss * real)
            run.add(real, loss=loss, ...)        # summed over micro-batches and ranks, and logged
        run.update(step)

    A run that was killed goes on from its last checkpoint when the same command is given again, and gives what it would
    have given; SIGTERM and Ctrl-C save one first. `out` holds log.jsonl and checkpoint-N; when the steps have ended,
    the adapter in their place.
    """

    def __init__(self, args, llava, adapter, items, ranks, settings):
        self.args, self.llava, self.adapter, self.ranks, self.items = args, llava, adapter, ranks, items
        self.settings = settings
        self.out = Path(args.out)
        if isinstance(llava, FSDPModule):
            llava.reshard()  # after a forward the root's parameters are whole; the optimizer has to see its shards
        self.batches = global_batches([item.length for item in items], args.batch_size, args.seed)
        self.parameters = {n: p for n, p in llava.named_parameters() if ".lora_" in n}
        projector = {n: p for n, p in llava.named_parameters() if n.startswith("mm_projector.") and p.requires_grad}
        groups = [{"params": list(self.parameters.values()), "peak": args.lr}]
        if projector:
            groups.append({"params": list(projector.values()), "peak": args.projector_lr})
        self.parameters |= projector
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        self.begin, self.shown, self.first_step, self.saved, self.tokens, self.sums = None, 0.0, 0, 0, 0, {}
        self.save_every = args.save_every or math.ceil(len(self.batches) / 10)
        llava.train()

    # ------------------------------------------------------------ steps

    def steps(self):
        """(step, micro-batches) from where the run stands to the end of the epoch."""
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.ranks.first:
                stack.callback(unlock, lock(self.out / ".lock", self.out))
                check.training_out(self.out)  # another run may have ended in it by now
            self.ranks.check_shared(self.out / ".lock", self.out, self.settings)
            self.record, self.before = provenance.start_record(self.args, self.ranks), {}
            self.resume()
            self.stop = stack.enter_context(process.Stop())
            self.begin = self.last = time.monotonic()
            todo = range(self.first_step, len(self.batches))
            shares = [micro_batches(self.batches[step], self.ranks, self.args.micro_batch) for step in todo]
            load = lambda indices: [load_tiles(self.items[i], self.llava) for i in indices]
            tiles = prefetch(load, [indices for share in shares for indices, _ in share])
            self.tiles = stack.enter_context(contextlib.closing(tiles))
            for step, share in zip(todo, shares):
                # Dropout depends on the step alone, so that a resumed run draws the same.
                torch.manual_seed(row_seed(self.args.seed, step, self.ranks.rank))
                yield step, self.until_stopped(step, share)
            self.finish()

    def until_stopped(self, step, share):
        """The micro-batches of a step; on SIGTERM or Ctrl-C, to any rank, all ranks leave before the next one."""
        for micro_batch in share:
            [stops] = self.total(bool(self.stop.signal))
            if stops:
                self.save_checkpoint(step)
                raise KeyboardInterrupt(f"stopped after step {step}; the same command goes on from there")
            yield micro_batch

    def collate(self, indices):
        """The next micro-batch; its pictures were made ready meanwhile."""
        examples = [self.items[i].example for i in indices]
        batch = collate(examples, next(self.tiles), self.llava.config, self.llava.device)
        self.tokens += len(batch.ids)
        return batch

    def total(self, *values):
        """Sums of numbers over the ranks."""
        values = list(map(float, values))
        if self.ranks.world == 1:
            return values
        values = torch.tensor(values, dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(values)
        return values.tolist()

    def backward(self, loss):
        """Adds the gradient of this rank's part of the loss; FSDP averages over ranks, the parts have to be summed."""
        sharded = self.ranks.world > 1 and self.args.shard == "full"
        (loss * self.ranks.world if sharded else loss).backward()

    def add(self, weight, **values):
        """Adds weight * the sum of each value to what this step logs."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value.detach().double().sum()

    def update(self, step):
        """Clips, steps, logs, and saves a checkpoint when it is time."""
        if self.ranks.world > 1 and self.args.shard == "none":
            gradients = [p.grad for p in self.parameters.values()]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        norm = full(norm).item()
        values = dict(zip(self.sums, self.total(*self.sums.values())))
        if not math.isfinite(norm + sum(values.values())):
            self.save_checkpoint(step)
            names = ", ".join(self.items[i].example.name for i in self.batches[step])
            raise InputError(f"step {step + 1}: the loss is {values['loss']} and the gradient {norm}; --lr may be too "
                             f"high, or one of its samples is off: {names}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, len(self.batches))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.log(step, values, norm)
        self.sums = {}
        if (step + 1) % self.save_every == 0 or step + 1 == len(self.batches):
            self.save_checkpoint(step + 1)

    def log(self, step, values, norm):
        now, steps = time.monotonic(), len(self.batches)
        [tokens] = self.total(self.tokens)
        speed, self.tokens, self.last = tokens / (now - self.last), 0, now
        left = (now - self.begin) / (step + 1 - self.first_step) * (steps - step - 1)
        memory, lr = memory_gb(self.ranks.device), self.optimizer.param_groups[0]["lr"]
        record = {"step": step + 1, **values, "grad_norm": norm, "lr": lr, "tokens_per_s": round(speed, 1),
                  "memory_gb": round(memory, 3), "seconds_left": round(left, 1)}
        if self.ranks.first:
            append_line(self.out / "log.jsonl", json.dumps(record))
        shown = "  ".join(f"{name} {values[name]:.4f}" for name in SHOWN if name in values)
        if now - self.shown >= 1 or step + 1 == steps:  # the file has every step; to look at, one a second will do
            self.shown = now
            self.ranks.print(f"step {step + 1}/{steps}  {shown}  grad {norm:.3g}  lr {lr:.2e}  {speed:.0f} tok/s  "
                           f"{memory:.2f} GB  {console.clock(left)} left")

    # ------------------------------------------------------------ checkpoints

    def whole(self, tensors):
        """{name: maybe sharded tensor} -> {name: all of it, on the CPU}, on the first rank; all have to call it."""
        whole = {}
        for name, tensor in tensors.items():
            value = full(tensor).contiguous()
            if self.ranks.first:
                whole[name] = value
        return whole

    def save_checkpoint(self, step):
        """Of the state after `step` steps, unless there is one; every rank has to call it, and leaves it when it is
        written: a rank that ended before would take the others along."""
        if step == self.saved:
            return
        with self.stop.busy():
            settings = self.recorded()
            self.adapter.tensors |= self.whole(self.parameters)
            moments = {
                f"{kind}.{name}": self.optimizer.state[parameter][kind]
                for name, parameter in self.parameters.items()
                for kind in ("exp_avg", "exp_avg_sq")
            }
            moments = self.whole(moments)
            if self.ranks.first:
                checkpoint.save(self.out, step, self.adapter, moments, settings, self.args.keep)
            self.ranks.barrier()
        self.saved = step

    def recorded(self):
        """The settings, and the record of the run so far; every rank has to call it."""
        memory = memory_gb(self.ranks.device)
        return self.settings | {"record": provenance.current_record(self.record, self.before, self.ranks, memory)}

    def resume(self):
        """Continues from the newest checkpoint in `out`, if there is one. Raises InputError if it is of another run."""
        self.ranks.barrier()
        saved = checkpoint.newest(self.out, self.settings, self.ranks.print)
        step = saved[0] if saved else 0
        if self.total(step) != [step * self.ranks.world]:
            raise InputError(f"not all ranks see the same checkpoints: {self.out} has to be one folder for all nodes")
        if saved is None:
            for left_behind in ("log.jsonl", "adapter_model.safetensors", PROJECTOR_FILE):
                (self.out / left_behind).unlink(missing_ok=True)
            return
        self.first_step, tensors, moments = saved
        self.saved, self.before = self.first_step, checkpoint.recorded(checkpoint.folders(self.out)[-1])
        for name, parameter in self.parameters.items():
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            with torch.no_grad():
                local(parameter).copy_(own_rows(tensors[name], parameter))
                for kind, value in state.items():
                    local(value).copy_(own_rows(moments[f"{kind}.{name}"], parameter))
            self.optimizer.state[parameter] = state | {"step": torch.tensor(float(self.first_step))}
        if self.ranks.first:
            log = self.out / "log.jsonl"
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
            files.write_text(log, "".join(lines[: self.first_step]))
        self.ranks.print(f"resuming after step {self.first_step} from {checkpoint.folders(self.out)[-1]}")

    def finish(self):
        """Makes the last checkpoint's adapter that of the run, and removes the checkpoints."""
        with self.stop.busy():
            settings = self.recorded()
            if self.ranks.first:
                *_, last = checkpoint.folders(self.out)
                (self.out / "run.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
                # adapter_config.json, the mark of a finished run, comes last.
                for name in ("adapter_model.safetensors", PROJECTOR_FILE, "adapter_config.json"):
                    if (last / name).is_file():
                        shutil.copyfile(last / name, self.out / f"{name}.new")
                        os.replace(self.out / f"{name}.new", self.out / name)
                for old in (*checkpoint.folders(self.out), self.out / checkpoint.BESIDE):
                    shutil.rmtree(old, ignore_errors=True)
                written = sorted(file.name for file in self.out.iterdir() if file.name != ".lock")
                self.ranks.print(f"wrote {', '.join(written)} to {self.out}")
            self.ranks.barrier()
