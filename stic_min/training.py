"""What both stages share: the model with LoRA and FSDP, the learning rate, and the bookkeeping of a run.

The scripts show the training step; a `Run` does what FSDP, resuming and logging need around it. One optimizer
step processes one global batch, on any number of ranks and with any micro-batch size: the loss is normalized
over the global batch, so neither changes the result. (Dropout is the exception: its masks depend on the
micro-batches.)
"""

import contextlib
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stic_min import InputError, check, lora
from stic_min.batch import collate
from stic_min.checkpoint import Checkpoints, full
from stic_min.formats.adapters import read_adapter
from stic_min.llava import Projector
from stic_min.loader import load_weights, open_llava
from stic_min.runtime import console, flags
from stic_min.runtime.files import append_line
from stic_min.runtime.output import lock, unlock
from stic_min.runtime.process import Stop
from stic_min.runtime.provenance import peak_memory_gb
from stic_min.runtime.work import prefetch, row_seed
from stic_min.samples import counts, global_batches, load_tiles, split_batch

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0  # AdamW, Table 4 and the release
CLIP_NORM = 1.0
WARMUP = 0.03  # share of all steps
SAVE_SECONDS = 300  # between checkpoints
PRINTED = "loss", "dpo", "alpha_nll", "margin", "accuracy"  # in the terminal; log.jsonl has everything


# ---------------------------------------------------------------- before the first step


def build(args, ranks, keep_reference):
    """The model on the meta device (shapes without numbers), with LoRA and projector trainable.

    Returns llava, the adapter (a new one, or --adapter) and the weights for `load`. With `keep_reference`,
    the model also holds the reference's own parts: the LoRA of --reference, and a frozen projector.
    """
    options = flags.model_options(args, ranks)
    options["image_mode"] = args.image_mode or "pad"  # Table 4
    llava, weights = open_llava(args.model, **options)
    if args.adapter:  # stage 2 continues training stage 1's
        adapter = read_adapter(args.adapter, llava)
        given = {"--lora-r": (args.lora_r, adapter.r), "--lora-alpha": (args.lora_alpha, adapter.alpha)}
        for flag, (value, stored) in given.items():
            if value is not None and value != stored:
                raise InputError(f"{flag} {value}: {args.adapter} has {stored}, which training can't change")
        adapter.dropout = args.lora_dropout
    else:
        r = args.lora_r or 128
        adapter = lora.new_adapter(llava, r, args.lora_alpha or 2 * r, args.lora_dropout, args.seed)
    adapter.base = llava.base
    reference = read_adapter(args.reference, llava) if keep_reference and args.reference else None
    lora.attach(llava, adapter, reference)
    if keep_reference:
        with torch.device("meta"):
            projector = Projector(llava.config.vision.hidden_size, llava.config.decoder.hidden_size)
        llava.reference_projector = projector.to(options["dtype"]).requires_grad_(False)
        for name, weight in (weights | (reference.tensors if reference else {})).items():
            own = name.replace(".lora_", ".reference_").replace("mm_projector.", "reference_projector.")
            weights[own] = weight  # the other names are unchanged
    weights |= adapter.tensors  # stage 1's projector replaces the base model's
    if args.projector_lr:
        llava.mm_projector.float().requires_grad_(True)  # fp32, like LoRA: bf16 would round most updates away
    for layer in llava.model.layers:
        layer.checkpoint_activations = args.checkpoint_activations
    # From here on the model holds the LoRA tensors. `adapter.tensors` keeps only the projector of --adapter,
    # which is saved unchanged if it is not trained.
    adapter.tensors = {name: value for name, value in adapter.tensors.items() if ".lora_" not in name}
    return llava, adapter, weights


def shard(llava, args, ranks):
    """FSDP2, under torchrun: splits each decoder block, then everything else, evenly over the ranks."""
    if ranks.world > 1 and args.shard == "full":
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for layer in llava.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(llava, mesh=mesh)
        llava.to_empty(device=ranks.device)


def load(llava, weights, args, ranks):
    """Reads the weights; each rank only the rows of its own shard."""
    console.report_loading(args, ranks)
    load_weights(llava, weights, ranks.device)
    console.report_loaded(llava, ranks)


# ---------------------------------------------------------------- the schedule


def rate(step, steps):
    """Learning rate at 0-based `step` as a fraction of its peak: linear warm-up over 3%, then cosine to 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ---------------------------------------------------------------- a run


class Run:
    """The data order, optimizer, log and checkpoints of all epochs, for the loop in the scripts.

    A run that was killed resumes from its last checkpoint when the same command is run again, with the same
    result; SIGTERM and Ctrl-C save a checkpoint first. The result replaces the checkpoints.
    """

    def __init__(self, args, llava, adapter, samples, ranks, settings):
        self.args, self.llava, self.ranks = args, llava, ranks
        self.out = Path(args.out)
        if isinstance(llava, FSDPModule):
            llava.reshard()  # a forward has gathered the root's parameters; the optimizer must see the shards
        order = global_batches([sample.length for sample in samples], args.batch_size, args.seed, args.epochs)
        self.batches = [[samples[i] for i in indices] for indices in order]
        trainable = {name: p for name, p in llava.named_parameters() if p.requires_grad}
        lora_parameters = {name: p for name, p in trainable.items() if ".lora_" in name}
        projector = {name: p for name, p in trainable.items() if name.startswith("mm_projector.")}
        groups = [{"params": list(lora_parameters.values()), "peak": args.lr}]
        if projector:
            groups.append({"params": list(projector.values()), "peak": args.projector_lr})
        self.parameters = lora_parameters | projector
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        self.checkpoints = Checkpoints(adapter, self.parameters, self.optimizer, settings, args, ranks)
        self.counts = counts(samples)
        self.step = 0
        self.weight = 1.0  # of the current micro-batch; 0 if it only keeps FSDP's ranks in step
        self.sums = {}  # what this step logs, before it is summed over the ranks
        self.tokens = 0  # this rank's, since the last step
        self.printed = 0.0
        llava.train()

    def steps(self):
        """The remaining steps, while holding the folder's lock; in the end, saves the result."""
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.ranks.first:
                stack.callback(unlock, lock(self.out / ".lock", self.out))
                check.out_dir(self.out)  # another run may have finished in it since the first check
            self.ranks.check_shared(self.out / ".lock", self.out, self.checkpoints.settings)
            self.first_step = self.checkpoints.resume()
            self.checkpoints.record |= self.counts | {"steps": len(self.batches)}
            self.stop = stack.enter_context(Stop())
            stack.enter_context(self.checkpoints.thread)  # in the end, waits for it
            self.begin = self.last = self.saved = time.monotonic()
            steps = range(self.first_step, len(self.batches))
            split = lambda step: split_batch(self.batches[step], self.ranks, self.args.micro_batch)
            self.shares = {step: split(step) for step in steps}
            micro_batches = [samples for share in self.shares.values() for samples, _ in share]
            self.prefetched = stack.enter_context(contextlib.closing(prefetch(self.load, micro_batches)))
            for self.step in steps:
                # Dropout depends on the step alone, so that a resumed run draws the same masks.
                torch.manual_seed(row_seed(self.args.seed, self.step, self.ranks.rank))
                yield self.step
            with self.stop.busy():
                self.checkpoints.finish(peak_memory_gb(self.ranks.device))

    def load(self, samples):
        """The Batch of a micro-batch, its images cut into tiles; runs in a thread, ahead of the step."""
        tiles = [load_tiles(sample, self.llava) for sample in samples]
        return collate(samples, tiles, self.llava.config, self.llava.device)

    def micro_batches(self):
        """This rank's Batches of the step. After SIGTERM or Ctrl-C to any rank, all ranks stop here."""
        for _, weight in self.shares[self.step]:
            self.weight = weight
            [stops] = self.ranks.sum(bool(self.stop.signal))
            if stops:
                self.save_checkpoint(self.step, wait=True)
                raise KeyboardInterrupt(f"stopped after step {self.step}; run the same command to resume")
            batch = next(self.prefetched)
            self.tokens += int(self.weight * len(batch.ids))
            yield batch

    def backward(self, loss):
        """Adds the gradients of this rank's part of the global batch's loss. FSDP averages gradients over the
        ranks, but parts must be summed."""
        sharded = self.ranks.world > 1 and self.args.shard == "full"
        (loss * self.weight * (self.ranks.world if sharded else 1)).backward()

    def log(self, count, **values):
        """Logs each value's sum over the step's micro-batches and ranks, divided by `count`."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + self.weight / count * value.detach().double().sum()

    def clip_gradients(self, max_norm):
        """Completes the gradients (--shard none: sums them over the ranks), clips their norm and returns it.

        A NaN or infinite loss or gradient ends the run here, before it reaches the weights.
        """
        if self.ranks.world > 1 and self.args.shard == "none":
            gradients = [p.grad for p in self.parameters.values()]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))
        norm = full(torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm)).item()
        sums = torch.stack(list(self.sums.values())).tolist()  # with the norm, all that the host waits for
        self.values = dict(zip(self.sums, self.ranks.sum(*sums)))
        self.sums = {}
        if not math.isfinite(norm + sum(self.values.values())):
            self.save_checkpoint(self.step, wait=True)
            names = ", ".join(sample.name for sample in self.batches[self.step])
            raise InputError(f"step {self.step + 1}: the loss is {self.values['loss']} and the gradient norm "
                             f"is {norm}; --lr may be too high, or one of these samples is damaged: {names}")
        return norm

    def end_step(self, norm):
        """Writes the step to log.jsonl, prints it, and saves a checkpoint if one is due."""
        now, steps, done = time.monotonic(), len(self.batches), self.step + 1
        due = self.ranks.first and now - self.saved >= SAVE_SECONDS  # the first rank's clock counts
        tokens, due = self.ranks.sum(self.tokens, due)
        speed = tokens / (now - self.last)
        self.tokens, self.last = 0, now
        seconds_left = (now - self.begin) / (done - self.first_step) * (steps - done)
        memory, lr = peak_memory_gb(self.ranks.device), self.optimizer.param_groups[0]["lr"]
        record = {"step": done, **self.values, "grad_norm": norm, "lr": lr, "tokens_per_s": round(speed, 1),
                  "memory_gb": round(memory, 3), "seconds_left": round(seconds_left, 1)}
        if self.ranks.first:
            append_line(self.out / "log.jsonl", json.dumps(record))
        if now - self.printed >= 1 or done == steps:  # at most one line per second
            self.printed = now
            losses = "  ".join(f"{name} {self.values[name]:.4f}" for name in PRINTED if name in self.values)
            self.ranks.print(f"step {done}/{steps}  {losses}  grad {norm:.3g}  lr {lr:.2e}  {speed:.0f} tok/s"
                             f"  {memory:.2f} GB  {console.clock(seconds_left)} left")
        self.checkpoints.check()
        if self.args.save_every:
            due = done % self.args.save_every == 0
        if due or done == steps:
            self.save_checkpoint(done)

    def save_checkpoint(self, step, wait=False):
        with self.stop.busy():
            self.checkpoints.save(step, peak_memory_gb(self.ranks.device))
            self.saved = time.monotonic()
            if wait:
                self.checkpoints.wait()
