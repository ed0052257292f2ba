"""What run.json says of a training run beside its settings: the command, the code, the machine, time and memory."""

import platform
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = "torch", "torchvision", "safetensors", "sentencepiece", "pillow", "numpy"


def commit():
    """The commit of this code, with "-dirty" if it has been changed since; None if there is none to be found."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None  # `git` would take that of a repository around it
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def start(args, ranks):
    """The part of it that is known at once. Every rank has to call it."""
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    else:
        device = f"{platform.machine()} {ranks.device.type}, threads: {torch.get_num_threads()}"
    places = ranks.gather((socket.gethostname(), device))
    return {
        "command": shlex.join(sys.argv),
        "commit": commit() if ranks.first else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": "; ".join(f"{count} x {name}" for name, count in Counter(name for _, name in places).items()),
        "ranks": ranks.world,
        "nodes": len({host for host, _ in places}),
        "model": args.model,
        "start": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ranks.begin)),
    }


def so_far(record, before, ranks, memory):
    """All of it. Every rank has to call it, with its peak `memory` in GB; `before`: the record that was resumed, or {}.

    It starts where that does, and time adds up; code and machine are those of the last part.
    """
    number = lambda name: before[name] if isinstance(before.get(name), (int, float)) else 0
    return record | {
        "start": before.get("start", record["start"]),
        "wall_seconds": round(number("wall_seconds") + time.time() - ranks.begin, 1),
        "peak_memory_gb": round(max(number("peak_memory_gb"), *ranks.gather(memory)), 3),
    }
