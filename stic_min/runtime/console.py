"""What a command prints: lines, warnings, progress."""

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
    """Prints. If the stream's reader is gone (Ctrl-C also ends the `tee` behind a pipe; a terminal was
    closed), this and all later output to it is discarded."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))


def one_line(text, limit=300):
    """A message as one printable line of about `limit` characters: the middle of a longer one is cut out."""
    half = limit // 2 - 3
    cut = lambda text: text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
    return cut(printable(cut(text.strip())))


def warn(text):
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may be there
    print_line(clear + one_line(f"warning: {text}"), "stderr")


def report_loading(args, ranks):
    adapter = f" with {args.adapter}" if getattr(args, "adapter", None) else ""
    if ranks.first:
        print(f"loading {args.model}{adapter} on {ranks.device}", file=sys.stderr, flush=True)


def report_loaded(llava, ranks):
    """Prints which files the loader used and which it did not."""
    for note in llava.notes if ranks.first else ():
        print_line(one_line(note if note.startswith("warning: ") else f"loaded {note}"), "stderr")


class Progress:
    """`what 12/100  3.1/s  0:28 left` on stderr: updated in place on a terminal, else every ten seconds.

    Given `ranks`, only the first one prints, and it counts its own share: the other ranks' shares are about
    equal.
    """

    def __init__(self, what, total, ranks=None):
        self.what = f"{what}, rank 0 of {ranks.world}" if ranks and ranks.world > 1 else what
        self.total = total
        self.show = ranks is None or ranks.first
        self.done = 0
        self.begin = self.printed = time.monotonic()

    def add(self, n=1):
        self.done += n
        now, terminal = time.monotonic(), sys.stderr.isatty()
        finished = self.done >= self.total
        due = finished or now - self.printed >= (0.2 if terminal else 10)
        if not (n and self.show and due):
            return
        self.printed = now
        rate = self.done / max(now - self.begin, 1e-9)
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        duration = clock(now - self.begin) if finished else f"{clock((self.total - self.done) / rate)} left"
        line = f"{self.what} {self.done}/{self.total}  {speed}  {duration}"
        if terminal:
            print_line(f"\r\x1b[K{line}", "stderr", end="\n" if finished else "")
        else:
            print_line(line, "stderr")
