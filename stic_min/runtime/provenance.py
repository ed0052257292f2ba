"""The record of a run in run.json or, next to NAME.jsonl, NAME.run.json: command, code, machine, costs."""

import platform
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from stic_min.runtime.files import read_json

PACKAGES = "torch", "torchvision", "safetensors", "sentencepiece", "pillow", "numpy"


def commit():
    """The git commit of this code, with "-dirty" if files have changed since; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # git would report the commit of a repository around it
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.decode(errors="replace").strip() or None


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_memory_gb(device):
    """Peak memory of this rank so far, in GB: the GPU's, or the process's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1000  # bytes on macOS, KB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def start_record(model, ranks):
    """The part of the record that is known at the start. Every rank must call it."""
    import torch  # here, because scores and pages do without

    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    else:
        device = f"{platform.machine()} {ranks.device.type}, threads: {torch.get_num_threads()}"
    machines = ranks.gather((socket.gethostname(), device))
    devices = Counter(device for _, device in machines)
    command = re.sub("(\0--judge-k[a-z]*[=\0])[^\0]*", r"\1***", "\0".join(sys.argv))  # without the API key
    command = re.sub("(://)[^/@\0]+@", r"\1***@", command)  # nor the password in a --judge-url
    return {
        "command": shlex.join(command.split("\0")),
        "commit": commit() if ranks.first else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": "; ".join(f"{count} x {device}" for device, count in devices.items()),
        "ranks": ranks.world,
        "nodes": len({host for host, _ in machines}),
        "model": model,
        "start": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ranks.begin)),
    }


def record_file(output):
    """NAME.run.json of NAME.jsonl. Other suffixes stay: pairs-0.4 and pairs-0.7 are different outputs."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.run.json")


def read_record(path):
    """The record in a run.json; {} without one."""
    record = read_json(path).get("record") if path.is_file() else None
    return record if isinstance(record, dict) else {}


def current_record(record, previous, ranks, memory):
    """The complete record so far. Every rank must call it, with its peak `memory` in GB.

    `previous` is the record of the run that was resumed, or {}: its start time is kept, wall time and the
    number of parts add up, and code and machine are those of the latest part.
    """

    def number(name):
        value = previous.get(name)
        return value if isinstance(value, (int, float)) and 0 <= value < 1e12 else 0  # it may be damaged

    return record | {
        "start": previous.get("start", record["start"]),
        "parts": number("parts") + 1,
        "wall_seconds": round(number("wall_seconds") + time.time() - ranks.begin, 1),
        "peak_memory_gb": round(max(number("peak_memory_gb"), *ranks.gather(memory)), 3),
    }
