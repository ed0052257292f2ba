"""The processes of a run: which one this is, its device, and what they exchange.

torch is imported only where it is needed, so that commands without a model start at once.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from stic_min import InputError, first_line
from stic_min.runtime.console import print_line, warn
from stic_min.runtime.files import wait_until

if TYPE_CHECKING:
    import torch

JOINING = timedelta(minutes=10)  # for all ranks to find each other
WAITING = timedelta(days=7)  # for the slowest rank, however unequal the shares (torch's default: 30 minutes)


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    begin: float = field(default_factory=time.time, compare=False)  # when the command started

    @property
    def first(self):
        return self.rank == 0

    def print(self, text):
        if self.first:
            print_line(text)

    def barrier(self):
        import torch.distributed as dist

        if self.world > 1:
            dist.barrier()

    def gather(self, value):
        """[rank 0's value, rank 1's, ...], on every rank."""
        import torch.distributed as dist

        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def sum(self, *values):
        """The sums of numbers over the ranks, as a list of floats."""
        import torch
        import torch.distributed as dist

        values = [float(value) for value in values]
        if self.world > 1:
            values = torch.tensor(values, dtype=torch.float64)  # on the CPU: no rank waits for its GPU
            dist.all_reduce(values)
            values = values.tolist()
        return values

    def check_shared(self, lock, out, settings):
        """Checks that all ranks see the file `lock`, which the first rank has created next to `out`, and have
        the same settings: each node may have its own disk and its own copy of the input. Raises InputError on
        every rank."""
        if self.world == 1:
            return
        token = self.gather(f"{time.time_ns()}".encode())[0]  # the file may be left over from an earlier run

        def has_token():
            try:
                return lock.read_bytes() == token
            except OSError:
                return False

        if self.first:
            lock.write_bytes(token)
        self.barrier()
        visible = self.gather(wait_until(has_token))
        if not all(visible):
            rank = visible.index(False)
            raise InputError(f"--out must be on a disk that all nodes share: rank {rank} does not see what "
                             f"rank 0 writes next to {out}")  # fmt: skip
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            for name in first:
                if other.get(name) != first[name]:
                    raise InputError(f"rank {rank} has {name} {other.get(name)!r}, but rank 0 has "
                                     f"{first[name]!r}: all nodes must run the same command on the same "
                                     "input")  # fmt: skip


def place():
    """(rank, world) of this process, from the variables that torchrun sets; (0, 1) without them.

    Setting them by hand works as well, as under mpirun. An incomplete set is left over from something else,
    and an error: a process that took itself for one of many would do only part of the work, or none.
    """
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    rank, world, address, port = (os.environ.get(name) for name in names)
    if rank in (None, "0") and world in (None, "1"):
        return 0, 1
    numbers = [int(text) for text in (rank, world, port) if text and text.isdecimal()]
    if len(numbers) < 3 or not address or numbers[0] >= numbers[1]:
        values = (f"{name}={os.environ[name]}" if name in os.environ else f"no {name}" for name in names)
        raise InputError("RANK and WORLD_SIZE are set, but this process was not started by torchrun: unset "
                         f"them, or use torchrun ({', '.join(values)})")  # fmt: skip
    return numbers[0], numbers[1]


def gpu_index():
    """The index of this rank's GPU on its node."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if local is None:  # not torchrun; other launchers fill one node after the other
        return place()[0] % max(1, torch.cuda.device_count())
    if not local.isdecimal():
        raise InputError(f"LOCAL_RANK={local} is not the index of a GPU: unset it, or use torchrun")
    return int(local)


def start_device(name=None):
    """--device as a torch.device. The default is a GPU (under torchrun, this rank's) if there is one, else
    the CPU."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    for warning in caught:  # an outdated driver, for example
        warn(f"no GPU is used: {first_line(warning.message)}")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", gpu_index() if device.index is None else device.index)
            torch.cuda.set_device(device)
            # cuDNN's attention makes a new plan for each length, and other plans with gradients than without.
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.empty(1, device=device).fill_(1).tolist()  # the device exists, computes and can be read
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {first_line(error)}") from None
    return device


def gpu_memory(device):
    """Bytes that this process uses or could use on a GPU; None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def memory_per_gpu(args, ranks, assumed):
    """The least `gpu_memory` of all ranks. --check, which runs on a CPU, looks at this machine's GPU, and
    without one assumes so many bytes."""
    import torch

    device = ranks.device
    if args.check and args.device != "cpu":
        if not torch.cuda.is_available():
            ranks.print(f"no GPU here: a GPU of {assumed / 1e9:.0f} GB is assumed")
            return assumed
        device = torch.device("cuda")
    memory = ranks.gather(gpu_memory(device))
    return None if None in memory else min(memory)


def start_ranks(device=None, training=False):
    """This process as one of many under torchrun, else the only one. In generation, ranks only meet at
    barriers, for which gloo suffices; in training, GPUs communicate through NCCL."""
    import torch.distributed as dist

    rank, world = place()
    device = start_device(device)
    if world > 1 and not dist.is_initialized():
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(WAITING)
            options = {"backend": "gloo"}
            if training and device.type == "cuda":  # connected now, on this rank's own GPU
                options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
            elif training:
                options = {"backend": None}  # the device's own
            dist.init_process_group(**options, store=store, rank=rank, world_size=world, timeout=WAITING)
        except (RuntimeError, ValueError, OSError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"rank {rank} of {world} can't join the others at {address}: "
                             f"{first_line(error)}") from None  # fmt: skip
    return Ranks(rank, world, device)
