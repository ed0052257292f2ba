"""Reading what others wrote, and text fit for a message. No model code."""

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path

from stic_min import InputError


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        hint = " but a parquet file: save it as JSON lines, and its images as files" * (Path(path).suffix == ".parquet")
        raise InputError(f"{path}: not UTF-8 text{hint}") from None


def read_records(path):
    """A JSON list or JSON lines of objects -> [(where, object)], `where` names file and record for messages."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}, record {i}", value) for i, value in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    else:
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    records.append((f"{path}, line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: not JSON ({error})") from None
    for where, value in records:
        if not isinstance(value, dict):
            raise InputError(f"{where}: not a JSON object")
    if not records:
        raise InputError(f"{path}: empty")
    return records


def read_json(path, kind=dict):
    """Reads a JSON value of type `kind`. Raises InputError for anything else, and for a repeated key: the last one
    would silently win."""

    def unique(pairs):
        if len(value := dict(pairs)) < len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise InputError(f"{path}: {printable(name)[:60]!r} comes twice")
        return value

    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark in front
        value = json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: not a JSON object{'' if kind is dict else ' or list'}")
    return value


def field(record, key, where):
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: no {key}")
    check_text(value, f"{where}: {key}")
    return value


def check_text(text, where):
    """JSON can hold halves of surrogate pairs, which neither sentencepiece nor a UTF-8 file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} {ascii(text)[:60]} is not valid Unicode") from None


def printable(text):
    """A text from a file, fit for a message: line breaks, terminal codes and the like as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(text):
    """A name from a file, fit for a message: printable, and both ends of one that is too long for a line."""
    text = str(text)
    return printable(text if len(text) <= 80 else f"{text[:50]}...{text[-27:]}")


def fingerprint(*paths):
    """12 hex digits of what is in checkpoint and adapter folders and files; None is skipped.

    Names do not count, nor do logs. Of each file, its size and 64 samples of it: 15 GB are not read for this.
    """
    digest = hashlib.sha256()
    for path in (Path(p) for p in paths if p):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            wanted = file.suffix in (".bin", ".safetensors", ".model") or file.name.endswith("config.json")
            if file.is_file() and (wanted or file == path):
                size = file.stat().st_size
                digest.update(str(size).encode())
                with open(file, "rb") as opened:
                    for offset in range(0, size, max(1 << 16, size // 64)):
                        opened.seek(offset)
                        digest.update(opened.read(1 << 16))
    return digest.hexdigest()[:12]


def wait_until(true, seconds=10):
    """Whether it becomes true, for as long as a network file system may hide what another node has written."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def check_place(path):
    """Raises InputError if nothing can be written at `path`: better now than when there is something."""
    path = Path(path).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))
    if (nearest != path and not nearest.is_dir()) or not os.access(nearest, os.W_OK):
        inside_a_file = nearest != path and not nearest.is_dir()
        raise InputError(f"can't write to {path}: {nearest} is {'a file' if inside_a_file else 'not writable'}")


def append_line(path, text):
    """Adds a line to a file. Raises InputError naming the file where that fails."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise InputError(f"can't write to {path}: {error.strerror}; what is in it is kept") from None
