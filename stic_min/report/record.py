"""What run.json and NAME.run.json record of a run (runtime/provenance.py), in words and as HTML."""

import os
import shlex
from html import escape
from pathlib import Path

from stic_min.report.page import note
from stic_min.runtime.provenance import read_record, record_file

STYLE = """
.facts td, .facts th { text-align: left; white-space: normal; vertical-align: top; font-weight: 400; }
.facts th { color: var(--soft); min-width: 8em; } .facts td { overflow-wrap: anywhere; }
.facts code { font-size: .95em; }
"""
MISSING = "not recorded"
LARGEST = 1e15  # of the numbers that are shown; NaN is not below it


def of_output(path: Path) -> dict:
    """The record of an output file; {} without one."""
    return read_record(record_file(path))


def unfinished(path: str | Path) -> str:
    """What the page of an output file says while its run goes on, or was stopped; else ""."""
    running = Path(f"{path}.lock").exists()
    return "The file is incomplete: its run was stopped or is still writing to it." if running else ""


def number(record: dict, name: str) -> float | None:
    """A number of a record; None without one, or if it makes no sense."""
    value = record.get(name)
    return value if isinstance(value, int | float) and abs(value) < LARGEST else None


def duration(seconds: float) -> str:
    """9.34 -> 9.3 s, 100 -> 1 min 40 s, 10000 -> 2 h 47 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    return f"{hours} h {rest_minutes} min" if hours else f"{minutes} min {rest} s"


# ---------------------------------------------------------------- fields as text


def command(record: dict) -> str:
    """The command line, with the script's name in place of its path."""
    text = record.get("command")
    if not isinstance(text, str) or not text.strip():
        return MISSING
    try:
        script, *words = shlex.split(text)
    except ValueError:  # an unbalanced quote, or nothing
        return text
    ranks, nodes = number(record, "ranks") or 1, number(record, "nodes") or 1
    launcher = f"torchrun --nproc_per_node={ranks // nodes}" if ranks > 1 else "python"
    if nodes > 1:
        launcher = launcher.replace(" ", f" --nnodes={nodes} ")
    return f"{launcher} {os.path.basename(script)} {shlex.join(words)}".strip()


def wall_time(record: dict) -> str:
    seconds, parts = number(record, "wall_seconds"), number(record, "parts") or 1
    if seconds is None:
        return MISSING
    unfinished = "at least " if record.get("finished") is False else ""
    return f"{unfinished}{duration(seconds)}" + (f" in {parts} parts" if parts > 1 else "")


def peak_memory(record: dict) -> str:
    memory = number(record, "peak_memory_gb")
    return MISSING if memory is None else f"{memory:.2f} GB"


def hardware(record: dict) -> str:
    machine, nodes = record.get("hardware"), number(record, "nodes") or 1
    if not machine:
        return MISSING
    return f"{machine}, on {nodes} nodes" if nodes > 1 else str(machine)


def versions(record: dict) -> str:
    found = record.get("versions")
    if not isinstance(found, dict) or not found:
        return MISSING
    return ", ".join(f"{name} {version or '(none)'}" for name, version in found.items())


def commit(record: dict) -> str:
    return str(record.get("commit") or MISSING)


# ---------------------------------------------------------------- HTML


def facts(rows: list[tuple[str, str]], code: tuple[str, ...] = ()) -> str:
    """A table of names and values, both text. code: the names whose values are code."""
    line = lambda name, value: f"<tr><th>{escape(name)}</th><td>{value}</td></tr>"
    cell = lambda name, value: f"<code>{escape(value)}</code>" if name in code else escape(value)
    return f'<table class=facts>{"".join(line(name, cell(name, value)) for name, value in rows)}</table>'


def table(record: dict) -> str:
    """Command, code and machine of a run."""
    if not record:
        return note("Command, commit, versions and hardware were not recorded.")
    rows = [
        ("command", command(record)),
        ("started", str(record.get("start") or MISSING)),
        ("wall time", wall_time(record)),
        ("peak memory", f"{peak_memory(record)} (of the rank that took most)"),
        ("hardware", hardware(record)),
        ("commit", commit(record)),
        ("versions", versions(record)),
    ]
    return facts(rows, code=("command",))
