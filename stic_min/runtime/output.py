"""JSON lines out: files that survive a kill, and the locks that keep two runs apart."""

import fcntl
import json
import os
import re
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import append_line, check_place, wait_until


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
