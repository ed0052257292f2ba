"""Which of several processes this one is, and on which device it computes."""

import os
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from stic_min import InputError, first_line
from stic_min.runtime.console import print_line, warn
from stic_min.runtime.files import wait_until

JOINING = timedelta(minutes=10)  # for all ranks to find each other
WAITING = timedelta(days=7)  # for each other at the end, however unequal their shares; the default is half an hour


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    begin: float = field(default_factory=time.time, compare=False)  # of the command

    @property
    def first(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def gather(self, value):
        """[rank 0's value, rank 1's, ...], on every rank."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def check_shared(self, lock, out, settings):
        """Raises InputError on every rank if one of them does not see the file `lock`, which the first rank has made
        beside `out`, or has other settings: nodes may have disks, and copies of the input, of their own."""
        if self.world == 1:
            return
        token = self.gather(f"{time.time_ns()}".encode())[0]  # an earlier run may have left a lock behind

        def sees_it():
            try:
                return lock.read_bytes() == token
            except OSError:
                return False

        if self.first:
            lock.write_bytes(token)
        self.barrier()
        seen = self.gather(wait_until(sees_it))
        if not all(seen):
            raise InputError(f"--out has to be on a disk that all nodes share: rank {seen.index(False)} does not see "
                             f"what rank 0 writes beside {out}")  # fmt: skip
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            for name in first:
                if other.get(name) != first[name]:
                    raise InputError(f"rank {rank} has {name} {other.get(name)!r}, rank 0 has {first[name]!r}: the "
                                     "same command has to find the same input on all nodes")  # fmt: skip

    def say(self, text):
        if self.first:
            print_line(text)


def place():
    """(rank, world) of this process, by the variables that torchrun sets; (0, 1) without them.

    Set by hand they do as well, as under mpirun. Raises InputError if they are not complete: then they are left over,
    and a process that took itself for one of many would do a part of the work, or none.
    """
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    rank, world, address, port = (os.environ.get(name) for name in names)
    if rank in (None, "0") and world in (None, "1"):
        return 0, 1
    numbers = [int(text) for text in (rank, world, port) if text and text.isdecimal()]
    if len(numbers) < 3 or not address or numbers[0] >= numbers[1]:
        values = (f"{name}={os.environ[name]}" if name in os.environ else f"no {name}" for name in names)
        raise InputError("RANK and WORLD_SIZE are set, but this was not started by torchrun: unset them, or use "
                         f"torchrun ({', '.join(values)})")  # fmt: skip
    return numbers[0], numbers[1]


def gpu_index():
    """Which of this node's GPUs is this rank's."""
    local = os.environ.get("LOCAL_RANK")
    if local is None:  # not torchrun; the launchers that there are fill one node after the other
        return place()[0] % max(1, torch.cuda.device_count())
    if not local.isdecimal():
        raise InputError(f"LOCAL_RANK={local} is not the number of a GPU: unset it, or use torchrun")
    return int(local)


def start_device(name=None):
    """torch.device of --device; by default a GPU, this rank's under torchrun, or the CPU where there is none."""
    with warnings.catch_warnings(record=True) as found:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    for warning in found:  # a driver that is too old, say
        warn(f"no GPU is used: {first_line(warning.message)}")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", gpu_index() if device.index is None else device.index)
            torch.cuda.set_device(device)
            # cuDNN's attention is planned anew for every length, and differently with and without gradients.
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.empty(1, device=device).fill_(1).tolist()  # it can be had, computes and can be read
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {first_line(error)}") from None
    return device


def start_ranks(device=None, backend="gloo"):
    """This process's place: one of many under torchrun, else the only one. gloo is enough where ranks only meet at
    barriers; training asks for its device's own backend."""
    rank, world = place()
    device = start_device(device)
    if world > 1 and not dist.is_initialized():
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(WAITING)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAITING)
        except (RuntimeError, ValueError, OSError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"rank {rank} of {world} can't join the rest at {address}: {first_line(error)}") from None
    return Ranks(rank, world, device)
