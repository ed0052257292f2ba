"""JSON lines in and out: reading what others wrote, and output files that survive a kill. No model code."""

import fcntl
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

from stic_min import InputError

# ---------------------------------------------------------------- files in


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


def read_json(path):
    """A JSON object. Raises InputError for anything else, and where a name comes twice: the last would win unseen."""

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
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
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


def subset(items, limit, seed):
    """A random subset of `limit` items in their order (None: all). A smaller limit gives a part of a larger one's."""
    chosen = list(range(len(items)))
    random.Random(seed).shuffle(chosen)
    return [items[i] for i in sorted(chosen[:limit])]


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


# ---------------------------------------------------------------- files out


def lock(path, what):
    """Keeps other runs from writing `what` too, until `unlock` or the end of this process -> the file that is locked.

    Raises InputError if there is another run.
    """
    while True:
        file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {what}; wait for it, or name another --out") from None
        except OSError:
            return file  # a file system that has no locks
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # a run that ended just now has removed it


def unlock(file):
    Path(file.name).unlink(missing_ok=True)
    file.close()


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


class Output:
    """JSON lines that survive a kill at any moment; a restart skips what is there.

    Every rank appends whole lines to a file of its own (the only rank to `path` itself); `finish` puts them together in
    the order of `keys`, written beside and renamed. `settings` goes into each record, and a file made with others is
    refused rather than mixed.
    """

    def __init__(self, path, key, settings, ranks):
        self.path, self.key, self.settings, self.ranks = Path(path), key, settings, ranks
        if self.path.is_dir():
            raise InputError(f"--out {path} is a folder, it has to name a file")
        check_place(path)
        self.own = self.path if ranks.world == 1 else self.part(ranks.rank)
        # On every rank, so that all of them end if a file is not ours.
        self.done = {record[key]: record for file in [self.path, *self.parts()] for record in self.read(file)}

    def start(self):
        """Makes it ready to append to, by this run alone -> itself."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.lock")
        self.lock = lock(beside, self.path) if self.ranks.first else None
        self.ranks.check_shared(beside, self.path, self.settings)
        if self.ranks.first:
            self.merge([])  # what an earlier run, of any number of ranks, left behind
        self.ranks.barrier()
        self.done = {record[self.key]: record for record in self.read(self.path)}
        self.appended = 0
        return self

    def part(self, rank):
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def parts(self):
        pattern = re.compile(re.escape(self.path.name) + r"\.part\d+")
        folder = self.path.parent
        return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name)) if folder.is_dir() else []

    def read(self, path):
        """Records of one file; a last line that a kill cut off is dropped."""
        if not path.is_file():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                found = {name: record.get(name) for name in self.settings}
                hash(record[self.key])
                json.dumps(record, ensure_ascii=False).encode()
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise InputError(f"{path}, line {number}: not a line that this command writes") from None
            for name, value in self.settings.items():
                if found[name] != value:
                    raise InputError(
                        f"{path} was made with {name} {found[name]!r}, this run has {value!r}; "
                        "name another --out, or delete it"
                    )
            records.append(record)
        return records

    def append(self, record):
        record = record | self.settings
        append_line(self.own, json.dumps(record, ensure_ascii=False))
        self.done[record[self.key]] = record
        self.appended += 1

    def merge(self, keys):
        """Puts `path` and all part files together in `path`, records of `keys` first and in their order."""
        parts = self.parts()
        records = {r[self.key]: r for path in [self.path, *parts] for r in self.read(path)}
        wanted = set(keys)
        ordered = [records[k] for k in keys if k in records]
        ordered += [r for k, r in records.items() if k not in wanted]
        if ordered or self.path.is_file():
            beside = self.path.with_name(self.path.name + ".new")
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        for part in parts:
            part.unlink()
        return records

    def lost(self, counts):
        """What to say if the part files have fewer records than so many of each rank."""
        if self.ranks.world > 1:
            read = lambda: [len(self.read(self.part(rank))) for rank in range(self.ranks.world)]
            wait_until(lambda: read() == counts)
            for rank, (found, count) in enumerate(zip(read(), counts)):
                if found != count:
                    return (
                        f"rank {rank} has finished {count} records, but {found} are in {self.part(rank)}: --out has to "
                        "be on a disk that all nodes share. The part files are kept: copy them to one folder and run "
                        "the same command there"
                    )
        return None

    def finish(self, keys):
        """After the last record of every rank. Returns the records of `keys`, on the first rank only.

        Raises InputError, on every rank, if the first one does not see what the others have written.
        """
        counts = self.ranks.gather(self.appended)
        [problem, *_] = self.ranks.gather(self.lost(counts) if self.ranks.first else None)
        if problem:
            raise InputError(problem)
        records = self.merge(keys) if self.ranks.first else {}
        if self.ranks.first:
            unlock(self.lock)
        return [records[k] for k in keys if k in records]
