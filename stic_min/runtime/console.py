"""What a command prints: lines, warnings, a progress line."""

import os
import sys
import time

from stic_min.runtime.files import printable


def clock(seconds):
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_line(text, stream="stdout", end="\n"):
    """Prints; goes on without it when its reader is gone, as Ctrl-C also ends the `tee` behind a pipe, or a terminal is
    closed."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))


def one_line(text, limit=300):
    """A message as one printable line, without its middle where that makes it longer than `limit` characters."""
    half = limit // 2 - 3
    cut = lambda text: text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
    return cut(printable(cut(text.strip())))


def warn(text):
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress line, if there is one
    print_line(clear + one_line(f"warning: {text}"), "stderr")


class Progress:
    """`what 12/100  3.1/s  0:28 left` on stderr: rewritten in place on a terminal, else a line every ten seconds."""

    def __init__(self, what, total, ranks):
        self.what = what if ranks.world == 1 else f"{what}, rank 0 of {ranks.world}"  # the others have like shares
        self.total, self.show = total, ranks.first
        self.done, self.begin, self.shown = 0, time.monotonic(), time.monotonic()

    def add(self, n=1):
        self.done += n
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not n or not self.show or (now - self.shown < (0.2 if terminal else 10) and self.done < self.total):
            return
        self.shown = now
        rate = self.done / max(now - self.begin, 1e-9)
        per = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        left = f"{clock((self.total - self.done) / rate)} left" if self.done < self.total else clock(now - self.begin)
        line = f"{self.what} {self.done}/{self.total}  {per}  {left}"
        if terminal:
            print_line(f"\r\x1b[K{line}", "stderr", end="" if self.done < self.total else "\n")
        else:
            print_line(line, "stderr")


def say_loading(args, ranks):
    adapter = f" with {args.adapter}" if getattr(args, "adapter", None) else ""
    if ranks.first:
        print(f"loading {args.model}{adapter} on {ranks.device}", file=sys.stderr, flush=True)


def say_loaded(llava, ranks):
    """What the loader used and what it did not."""
    for note in llava.notes if ranks.first else ():
        print_line(one_line(note if note.startswith("warning: ") else f"loaded {note}"), "stderr")
