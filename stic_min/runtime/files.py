"""Reading files, writing them safely, and text fit for messages. No model code."""

import errno
import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path

from stic_min import InputError

# ---------------------------------------------------------------- text for messages


def printable(text):
    """Text from a file, safe to print: line breaks, terminal codes and the like are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(text):
    """A name from a file, safe to print; a name of more than 80 characters loses its middle."""
    text = str(text)
    return printable(text if len(text) <= 80 else f"{text[:50]}...{text[-27:]}")


def check_text(text, where):
    """Rejects halves of surrogate pairs: JSON can hold them, but neither sentencepiece nor a UTF-8 file
    accepts them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} {ascii(text)[:60]} is not valid Unicode") from None


# ---------------------------------------------------------------- reading


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        parquet = Path(path).suffix == ".parquet"
        hint = " but a parquet file: convert it to JSON Lines, and its images to files" if parquet else ""
        raise InputError(f"{path}: not UTF-8 text{hint}") from None


def read_records(path):
    """A JSON list or JSON Lines of objects -> [(where, object)]; `where` is file and record, for messages."""
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
    """A JSON value of type `kind`. A repeated key is an error, too: its last value would silently win."""

    def unique(pairs):
        if len(value := dict(pairs)) < len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise InputError(f"{path}: {printable(name)[:60]!r} appears twice")
        return value

    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
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


def read_own_lines(path, parse):
    """[parse(value), ...] of a JSON Lines file that this project appends to; a last line cut off by a kill is
    dropped. A line that `parse` fails on is an error."""
    values = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            values.append(parse(json.loads(line)))
        except InputError:
            raise
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise InputError(f"{path}, line {number}: not a line written by this command") from None
    return values


def text_field(record, key, where):
    """record[key], which must be text that is not blank."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: no {key}")
    check_text(value, f"{where}: {key}")
    return value


def fingerprint(*paths):
    """12 hex digits that identify the contents of checkpoint and adapter folders or files; None is skipped.

    File names do not count, nor do logs. Only the size and 64 samples of each file are hashed, since reading
    all 15 GB of a checkpoint would take too long.
    """
    digest = hashlib.sha256()
    for path in (Path(p) for p in paths if p):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            relevant = file.suffix in (".bin", ".safetensors", ".model") or file.name.endswith("config.json")
            if file.is_file() and (relevant or file == path):
                size = file.stat().st_size
                digest.update(str(size).encode())
                with open(file, "rb") as opened:
                    for offset in range(0, size, max(1 << 16, size // 64)):
                        opened.seek(offset)
                        digest.update(opened.read(1 << 16))
    return digest.hexdigest()[:12]


def sha256(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def wait_until(condition, seconds=10):
    """Whether condition() becomes true in time: on network file systems, files take seconds to appear."""
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return result


# ---------------------------------------------------------------- writing


def check_place(path):
    """Raises InputError if `path` can't be written, before any work is done."""
    path = Path(path).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))
    below_a_file = nearest != path and not nearest.is_dir()
    if below_a_file or not os.access(nearest, os.W_OK):
        reason = "a file" if below_a_file else "not writable"
        raise InputError(f"can't write to {path}: {nearest} is {reason}")


def sync(path):
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can sync files but not folders
            raise
    finally:
        os.close(handle)


def write_text(path, text):
    """Replaces a file in one step: a kill leaves the old version or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_line(path, text):
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise InputError(f"can't write to {path}: {error.strerror}; its existing content is kept") from None
