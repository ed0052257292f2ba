"""How a command starts, is stopped, and ends: signals, error messages, exit status."""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from stic_min import InputError, first_line
from stic_min.runtime.console import one_line, print_line, warn
from stic_min.runtime.files import check_text
from stic_min.runtime.ranks import place

SIGNALS = signal.SIGINT, signal.SIGTERM


class Stop:
    """Within it, SIGTERM and Ctrl-C only set `asked`, for a loop to look at.

    A loop that does not come to that, as it waits for a rank that has died or computes for long, is ended after
    `patience` seconds, or at once when the wish is repeated; but not while it is `busy` writing. torchrun passes
    SIGTERM on, and kills 30 seconds later.
    """

    patience = 20

    def __init__(self):
        self.asked, self.writing, self.before = None, False, {}

    @contextlib.contextmanager
    def busy(self):
        self.writing = True
        try:
            yield
        finally:
            self.writing = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere there are no signals to handle
            ask = lambda number, frame: setattr(self, "asked", number)
            self.before = {s: signal.signal(s, ask) for s in SIGNALS}
            # Python runs `ask` only between two lines of its own. What C code holds up, a thread sees by this pipe.
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.old = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind, *error):
        if self.before:
            os.write(self.pipe[1], b"\0")
            self.thread.join()
            signal.set_wakeup_fd(self.old)
            for end in self.pipe:
                os.close(end)
            if self.asked or kind is KeyboardInterrupt:
                interrupt.armed = False  # it is on its way out
            for number, handler in self.before.items():  # last, as `interrupt` may raise at once
                signal.signal(number, handler)

    def watch(self):
        asked = None  # when
        while True:
            ready, _, _ = select.select(self.pipe[:1], [], [], 1 if asked else None)
            number = os.read(self.pipe[0], 1)[0] if ready else None
            if number == 0:
                return
            again, now = False, time.monotonic()
            if number in self.before:
                again = asked is not None and now - asked > 1  # sooner, it is the terminal's and torchrun's
                asked = asked or now
            if asked and (again or now - asked > self.patience) and not self.writing:
                if place()[0] == 0:
                    print_line("stopped at once; the same command goes on from the last checkpoint", "stderr")
                os._exit(128 + (self.asked or signal.SIGTERM))


def on_signals(handler):
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


def interrupt(number, frame):
    """Ends main. Only the first signal does: one more could hit what handles the first."""
    if interrupt.armed:
        interrupt.armed = False
        raise KeyboardInterrupt


interrupt.armed = False


def ignore_signals():
    """For good. Blocked meanwhile, as Python prints a traceback of a signal that finds its handler just replaced."""
    interrupt.armed = False
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    on_signals(signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def pass_on(unraisable):
    """A sys.unraisablehook. What finalizers and callbacks raise is only printed: the signal comes once more instead."""

    def again():
        interrupt.armed = True
        os.kill(os.getpid(), signal.SIGTERM)

    if unraisable.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(unraisable)
    threading.Timer(0.01, again).start()


def died_elsewhere(error):
    """Whether this rank failed because another one is gone: what gloo and NCCL say then."""
    said = "closed by peer", "reset by peer", "Broken pipe", "remote process exit"
    return dist.is_initialized() and any(text in str(error) for text in said)

# ---------------------------------------------------------------- the end

OUT_OF_MEMORY = (
    "out of memory ({}). Training: a smaller --micro-batch, --checkpoint-activations, --shard full on more GPUs, "
    "a smaller --max-length. Generation and evaluation: a smaller --batch-size or --max-new-tokens"
)
# Errors of a disk or a machine, which name no file where it is open already.
FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS
FAILING = errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE


def explain(error):
    """The line for what a user or a machine can cause; None for a bug."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        said = ". ".join(first_line(error).split(". ")[:2]) if str(error) else "of the machine"
        return f"error: {OUT_OF_MEMORY.format(one_line(said, 70))}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL + FAILING):
        where = error.filename or ("writing" if error.errno in FULL else "reading or writing")
        return f"error: {where}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError):  # a name of another encoding, or a locale that has no Unicode
        text = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        mend = "a file or folder has to be renamed" if error.encoding == "utf-8" else "set PYTHONUTF8=1"
        return f"error: {text} can't be written in {error.encoding}: {mend}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "error: can't start a thread: the limit of processes (ulimit -u) is reached"
    if died_elsewhere(error):
        return f"rank {place()[0]} ends, as another one has: {first_line(error)}"
    if isinstance(error, dist.DistError):  # NCCL says what it is in the last line
        return f"error: the ranks can't reach each other: {str(error).strip().splitlines()[-1]}"
    return None


def exit_status(main):
    """Runs main -> 0, or 1 after the line that `explain` has for what went wrong."""
    try:
        main()
        return 0
    except BrokenPipeError:  # what it says has no reader any more, as behind `| head`
        sys.stdout = open(os.devnull, "w")
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        # When all ranks fail alike, torchrun ends those behind the first of a node before they say the same again.
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
            time.sleep(2)
        print_line(one_line(line), "stderr")
    return 1


def start(main):
    """Runs main once what it finds around it is in order."""
    rank, _ = place()
    if rank == 0 and sys.getfilesystemencoding() != "utf-8":
        warn(f"this locale has file names in {sys.getfilesystemencoding()}: if some are not, set PYTHONUTF8=1")
    for argument in sys.argv[1:]:
        check_text(argument, "the command line:")
    main()


def run(main):
    """Runs a script's main; bad input ends in one line and status 1, anything else is a bug and keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # a terminal that has no dash gets a question mark
    hook, sys.unraisablehook = sys.unraisablehook, pass_on
    try:  # around all of it: the signal may arrive while an error is being reported
        interrupt.armed = True
        on_signals(interrupt)
        status = exit_status(lambda: start(main))
        interrupt.armed = False  # nothing is left to stop
    except KeyboardInterrupt as stopped:
        interrupt.armed, status = False, 130
        if os.environ.get("RANK", "0") == "0":
            print_line(f"{str(stopped) or 'stopped; what was finished is kept'}", "stderr")
    finally:
        ignore_signals()
        sys.unraisablehook = hook
    if dist.is_initialized():
        if status == 0:  # after an error of one rank alone it would wait for the others
            dist.destroy_process_group()
        # gloo's threads (torch 2.15) abort one CPU process in a few as it exits, when all is done. Exit without them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
