"""How a command starts, is stopped, and ends: signals, error messages, exit status."""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time

from stic_min import InputError, first_line
from stic_min.runtime.console import one_line, print_line, warn
from stic_min.runtime.files import check_text
from stic_min.runtime.ranks import place

# ---------------------------------------------------------------- signals

SIGNALS = signal.SIGINT, signal.SIGTERM


def on_signals(handler):
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


def interrupt(number, frame):
    """The signal handler of a command: ends main. Only the first signal does, since a second one could
    interrupt the handling of the first."""
    if interrupt.armed:
        interrupt.armed = False
        raise KeyboardInterrupt


interrupt.armed = False


def ignore_signals():
    """From now on. Blocked meanwhile: Python prints a traceback if one arrives while its handler changes."""
    interrupt.armed = False
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    on_signals(signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def pass_on(unraisable):
    """A sys.unraisablehook. Python only prints what finalizers and callbacks raise, so a KeyboardInterrupt
    there would be lost: the signal is sent again instead."""

    def send_again():
        interrupt.armed = True
        os.kill(os.getpid(), signal.SIGTERM)

    if unraisable.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(unraisable)
    threading.Timer(0.01, send_again).start()


class Stop:
    """Inside this context, SIGTERM and Ctrl-C only set `signal`, which a loop checks when it can stop safely.

    If the loop does not check in time (it waits for a dead rank, or in a long computation), the process is
    killed after `patience` seconds, or immediately on a second signal, but never while it is `busy` writing.
    torchrun passes SIGTERM on to its ranks and kills them 30 seconds later.
    """

    patience = 20

    def __init__(self):
        self.signal = None  # the number of the one that has arrived
        self.writing = False
        self.handlers = {}  # the previous ones

    @contextlib.contextmanager
    def busy(self):
        self.writing = True
        try:
            yield
        finally:
            self.writing = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # other threads can't handle signals
            handle = lambda number, frame: setattr(self, "signal", number)
            self.handlers = {number: signal.signal(number, handle) for number in SIGNALS}
            # Python runs `handle` only between two of its own instructions. A thread that reads this pipe
            # notices the signal even while C code is running.
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind, *error):
        if self.handlers:
            os.write(self.pipe[1], b"\0")  # ends `watch`
            self.thread.join()
            signal.set_wakeup_fd(self.wakeup)
            for end in self.pipe:
                os.close(end)
            if self.signal or kind is KeyboardInterrupt:
                interrupt.armed = False  # already stopping
            for number, handler in self.handlers.items():  # last, as `interrupt` may raise at once
                signal.signal(number, handler)

    def watch(self):
        """The thread: reads one byte per signal, its number."""
        first_signal = None  # when it arrived
        while True:
            ready, _, _ = select.select(self.pipe[:1], [], [], 1 if first_signal else None)
            number = os.read(self.pipe[0], 1)[0] if ready else None
            if number == 0:
                return
            now = time.monotonic()
            repeated = False
            if number in self.handlers:
                # Within a second it is the same request: Ctrl-C reaches a rank from the terminal and from
                # torchrun.
                repeated = first_signal is not None and now - first_signal > 1
                first_signal = first_signal or now
            if first_signal and (repeated or now - first_signal > self.patience) and not self.writing:
                if place()[0] == 0:
                    text = "stopped immediately; run the same command to resume from the last checkpoint"
                    print_line(text, "stderr")
                os._exit(128 + (self.signal or signal.SIGTERM))


# ---------------------------------------------------------------- error messages

OUT_OF_MEMORY = (
    "out of memory ({}). Training: lower --micro-batch or --max-length, add --checkpoint-activations, or use "
    "--shard full on more GPUs. Generation and evaluation: lower --batch-size or --max-new-tokens"
)
# Errors of the disk or the machine. Python does not name the file if it was open already.
DISK_FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS
MACHINE_FAILURE = errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE
PEER_GONE = "closed by peer", "reset by peer", "Broken pipe", "remote process exit"  # from gloo and NCCL


def torch_module():
    """torch if this command has imported it, else None: then no error can be torch's."""
    return sys.modules.get("torch")


def has_process_group():
    torch = torch_module()
    return torch is not None and torch.distributed.is_initialized()


def out_of_memory(error):
    torch = torch_module()
    kinds = (MemoryError, torch.OutOfMemoryError) if torch else MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def explain(error):
    """The message for an error that a user or a machine can cause; None for a bug."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if out_of_memory(error):
        reason = ". ".join(first_line(error).split(". ")[:2]) if str(error) else "main memory"
        return f"error: {OUT_OF_MEMORY.format(one_line(reason, 70))}"
    known = DISK_FULL + MACHINE_FAILURE
    if isinstance(error, OSError) and (error.filename is not None or error.errno in known):
        where = error.filename or ("writing" if error.errno in DISK_FULL else "reading or writing")
        return f"error: {where}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError):  # a file name in another encoding, or a locale without Unicode
        text = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        remedy = "rename the file or folder" if error.encoding == "utf-8" else "set PYTHONUTF8=1"
        return f"error: {text} can't be written in {error.encoding}: {remedy}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "error: can't start a thread: the limit on processes (ulimit -u) has been reached"
    if has_process_group() and any(text in str(error) for text in PEER_GONE):
        return f"rank {place()[0]} exiting because another rank failed: {first_line(error)}"
    torch = torch_module()
    if torch and isinstance(error, torch.distributed.DistError):  # NCCL gives the reason in the last line
        return f"error: the ranks can't reach each other: {str(error).strip().splitlines()[-1]}"
    return None


# ---------------------------------------------------------------- start and end


def check_environment():
    rank, _ = place()
    encoding = sys.getfilesystemencoding()
    if rank == 0 and encoding != "utf-8":
        warn(f"this locale encodes file names in {encoding}: if some of yours differ, set PYTHONUTF8=1")
    for argument in sys.argv[1:]:
        check_text(argument, "the command line:")


def exit_status(main):
    """Runs main -> 0, or 1 after printing `explain`'s message for the error."""
    try:
        check_environment()
        main()
        return 0
    except BrokenPipeError:  # nobody reads the output any more, as behind `| head`
        sys.stdout = open(os.devnull, "w")
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        # If all ranks fail alike, torchrun ends the others on the node before they print the same message.
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
            time.sleep(2)
        print_line(one_line(message), "stderr")
    return 1


def run(main):
    """Runs a script's main. Bad input ends in a one-line message and status 1; a bug keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # print ? for characters that the terminal lacks
    hook, sys.unraisablehook = sys.unraisablehook, pass_on
    try:  # around everything: a signal may arrive while an error is being reported
        interrupt.armed = True
        on_signals(interrupt)
        status = exit_status(main)
        interrupt.armed = False  # nothing left to stop
    except KeyboardInterrupt as stopped:
        interrupt.armed = False
        status = 130
        if os.environ.get("RANK", "0") == "0":
            print_line(str(stopped) or "stopped; completed output is kept", "stderr")
    finally:
        ignore_signals()
        sys.unraisablehook = hook
    if has_process_group():
        if status == 0:  # if only this rank failed, this would wait for the others
            sys.modules["torch"].distributed.destroy_process_group()
        # In torch 2.15, gloo's threads sometimes abort a CPU process at exit, after all work is done. Exit
        # without them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
