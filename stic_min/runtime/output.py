"""JSON Lines output that survives a kill, and the locks that keep two runs apart."""

import fcntl
import json
import os
import re
from pathlib import Path

from stic_min import InputError
from stic_min.runtime import preset, provenance
from stic_min.runtime.files import append_line, check_place, read_json, read_own_lines, wait_until, write_text


def lock(path, what):
    """Takes an exclusive lock on `path`, so that no other run writes to `what`; returns the open lock file.

    The lock lasts until `unlock` or the end of this process. Raises InputError if another run holds it.
    """
    while True:
        file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another run is writing to {what}; wait for it, or choose another --out"
            raise InputError(text) from None
        except OSError:
            return file  # a file system without locks
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # the run that held it has just ended and removed the file


def unlock(file):
    Path(file.name).unlink(missing_ok=True)
    file.close()


class Output:
    """JSON Lines, one record per line, that survive a kill at any moment; a restart skips existing records.

    Each rank appends whole lines to a part file of its own (a single rank to `path` itself), and `finish`
    merges them in the order of `keys`. `settings` is stored with each record; a file written with other
    settings is an error. How it came about is in NAME.run.json (provenance.py); of a part that was
    interrupted, the wall time counts only until `start`.
    """

    def __init__(self, path, key, settings, ranks):
        self.path, self.key, self.settings, self.ranks = Path(path), key, settings, ranks
        if self.path.is_dir():
            raise InputError(f"--out {path} is a folder, not a file")
        check_place(path)
        self.run_json = provenance.record_file(self.path)
        if self.run_json.exists() and read_json(self.run_json).keys() != {"record"}:
            raise InputError(f"{self.run_json} exists and is not the record of a run; choose another --out")
        self.file = self.path if ranks.world == 1 else self.part(ranks.rank)
        # Every rank reads all files, so that all of them end if a file is not ours.
        self.done = {record[key]: record for file in [self.path, *self.parts()] for record in self.read(file)}

    def start(self):
        """Locks the file and merges part files left by an earlier run; returns self."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock_path = self.path.with_name(f"{self.path.name}.lock")
        self.lock = lock(lock_path, self.path) if self.ranks.first else None
        self.ranks.check_shared(lock_path, self.path, self.settings)
        if self.ranks.first:
            self.merge([])
        self.ranks.barrier()
        self.done = {record[self.key]: record for record in self.read(self.path)}
        self.appended = 0
        self.previous = provenance.read_record(self.run_json)
        self.record = provenance.start_record(self.settings.get("model"), self.ranks)
        self.write_record(True, finished=False)
        return self

    def write_record(self, changed, **fields):
        """Every rank must call it. A part that has not `changed` the output leaves the previous record."""
        memory = provenance.peak_memory_gb(self.ranks.device)
        record = provenance.current_record(self.record, self.previous, self.ranks, memory)
        if self.ranks.first:
            record = (record if changed else self.previous) | fields
            write_text(self.run_json, json.dumps({"record": record}, indent=2) + "\n")

    def part(self, rank):
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def parts(self):
        pattern = re.compile(re.escape(self.path.name) + r"\.part\d+")
        folder = self.path.parent
        return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name)) if folder.is_dir() else []

    def read(self, path):
        """The records of one file; a last line cut off by a kill is dropped."""

        def check(record):
            hash(record[self.key])
            json.dumps(record, ensure_ascii=False).encode()
            for name in [*self.settings, *preset.RECORDED]:
                if record.get(name) != self.settings.get(name):
                    raise InputError(f"{path} was written with {name} {record.get(name)!r}, but this run has "
                                     f"{self.settings.get(name)!r}; choose another --out, or delete the "
                                     "file")  # fmt: skip
            return record

        return read_own_lines(path, check)

    def append(self, record):
        record = record | self.settings
        append_line(self.file, json.dumps(record, ensure_ascii=False))
        self.done[record[self.key]] = record
        self.appended += 1

    def merge(self, keys):
        """Merges `path` and all part files into `path`: those of `keys` in that order, then all others."""
        parts = self.parts()
        records = {record[self.key]: record for path in [self.path, *parts] for record in self.read(path)}
        order = dict.fromkeys([*(key for key in keys if key in records), *records])
        if order or self.path.is_file():
            lines = [json.dumps(records[key], ensure_ascii=False) for key in order]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        for part in parts:
            part.unlink()
        return records

    def missing_records(self, counts):
        """An error message if a rank's part file does not hold as many records as that rank has appended,
        else None."""
        if self.ranks.world > 1:
            read_counts = lambda: [len(self.read(self.part(rank))) for rank in range(self.ranks.world)]
            wait_until(lambda: read_counts() == counts)
            for rank, (on_disk, count) in enumerate(zip(read_counts(), counts)):
                if on_disk != count:
                    return (f"rank {rank} wrote {count} records, but {self.part(rank)} has {on_disk}: --out "
                            "must be on a disk that all nodes share. The part files are kept: copy them to "
                            "one folder and run the same command there")  # fmt: skip
        return None

    def finish(self, keys):
        """Call after the last record on every rank. Returns the records of `keys`, on the first rank only.

        Raises InputError on every rank if the first one does not see what the others have written.
        """
        counts = self.ranks.gather(self.appended)
        [problem, *_] = self.ranks.gather(self.missing_records(counts) if self.ranks.first else None)
        if problem:
            raise InputError(problem)
        records = self.merge(keys) if self.ranks.first else {}
        skipped = sum(key not in records for key in keys)
        self.write_record(sum(counts) > 0, finished=True, requested=len(keys), skipped=skipped)
        if self.ranks.first:
            unlock(self.lock)
        return [records[key] for key in keys if key in records]
