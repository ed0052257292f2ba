"""What the four scripts share: flags, ranks, a progress line, and how errors end."""

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from stic_min import InputError, first_line
from stic_min.files import check_text, fingerprint, printable, wait_until
from stic_min.text import TEMPLATES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------- flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default, the description as it was written."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def number(kind, test, what):
    """A flag's type: text -> `kind`, if it passes `test`."""

    def parse(text):
        try:
            if test(value := kind(text)):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{one_line(text, 60)} is not {what}")

    return parse


positive = number(int, lambda n: n >= 1, "a whole number of at least 1")
not_negative = number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
probability = number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
mass = number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
seed = number(int, lambda n: 0 <= n < 2**63, "a whole number in [0, 2^63)")


def add_model_flags(parser, image_mode="the checkpoint's", adapter=True):
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="LLaVA checkpoint folder, as published")
    if adapter:
        group.add_argument("--adapter", metavar="DIR", help="LoRA adapter: a folder of ours, or any in PEFT's format")
        group.add_argument("--other-base", action="store_true", help="use --adapter though its base had other weights")
    group.add_argument("--vision", metavar="DIR", help="CLIP's folder, where the checkpoint neither holds nor finds it")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, if not the checkpoint's")
    group.add_argument("--template", choices=sorted(TEMPLATES), help="chat template (default: the checkpoint's)")
    group.add_argument("--image-mode", choices=["pad", "anyres"], help=f"(default: {image_mode})")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="(default: bfloat16 on a GPU, else float32)")
    group.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one; this rank's under torchrun)")
    parser.add_argument("--seed", type=seed, default=0, help="of everything random")


def add_check_flag(parser):
    text = "read all input, report on it and on what the run will take, and end; with status 1 if it would fail"
    parser.add_argument("--check", action="store_true", help=text)


def add_limit_flag(parser):
    parser.add_argument("--limit", type=positive, metavar="N", help="only a random subset of N, drawn with --seed")


def add_sampling_flags(parser, temperature, batch_size=None, max_new_tokens=1024):
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=not_negative, default=temperature, help="0 is greedy")
    group.add_argument("--top-p", type=mass, help="keep the most probable tokens up to this mass (default: all)")
    group.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, help="per response")
    if batch_size:
        group.add_argument("--batch-size", type=positive, default=batch_size, help="responses sampled together")


def model_options(args, ranks):
    """The flags of `add_model_flags` as arguments of loader.open_llava and load_llava."""
    default = "bfloat16" if ranks.device.type == "cuda" else "float32"
    return {
        "vision": args.vision,
        "tokenizer": args.tokenizer,
        "template": args.template,
        "image_mode": args.image_mode,
        "dtype": DTYPES[args.dtype or default],
        "other_base": getattr(args, "other_base", False),
    }


def run_settings(args, llava):
    """What an output file was made with, for `files.Output`. Folders count by what is in them, not by their name."""
    return {
        "model": Path(args.model).resolve().name,
        "adapter": args.adapter and Path(args.adapter).resolve().name,
        "fingerprint": fingerprint(args.model, args.adapter, args.vision, args.tokenizer),
        "template": llava.config.template,
        "image_mode": llava.config.image_mode,
        "dtype": str(llava.lm_head.weight.dtype).removeprefix("torch."),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }


def say_loading(args, ranks):
    adapter = f" with {args.adapter}" if getattr(args, "adapter", None) else ""
    if ranks.first:
        print(f"loading {args.model}{adapter} on {ranks.device}", file=sys.stderr, flush=True)


def say_loaded(llava, ranks):
    """What the loader used and what it did not."""
    for note in llava.notes if ranks.first else ():
        put(one_line(note if note.startswith("warning: ") else f"loaded {note}"), "stderr")


# ---------------------------------------------------------------- ranks

JOINING = timedelta(minutes=10)  # for all ranks to find each other
WAITING = timedelta(days=7)  # for each other at the end, however unequal their shares; the default is half an hour


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    begin: float = field(default_factory=time.time, compare=False)  # of the command

    @property
    def first(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def gather(self, value):
        """[rank 0's value, rank 1's, ...], on every rank."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def check_shared(self, lock, out, settings):
        """Raises InputError on every rank if one of them does not see the file `lock`, which the first rank has made
        beside `out`, or has other settings: nodes may have disks, and copies of the input, of their own."""
        if self.world == 1:
            return
        token = self.gather(f"{time.time_ns()}".encode())[0]  # an earlier run may have left a lock behind

        def sees_it():
            try:
                return lock.read_bytes() == token
            except OSError:
                return False

        if self.first:
            lock.write_bytes(token)
        self.barrier()
        seen = self.gather(wait_until(sees_it))
        if not all(seen):
            raise InputError(f"--out has to be on a disk that all nodes share: rank {seen.index(False)} does not see "
                             f"what rank 0 writes beside {out}")  # fmt: skip
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            for name in first:
                if other.get(name) != first[name]:
                    raise InputError(f"rank {rank} has {name} {other.get(name)!r}, rank 0 has {first[name]!r}: the "
                                     "same command has to find the same input on all nodes")  # fmt: skip

    def say(self, text):
        if self.first:
            put(text)


def place():
    """(rank, world) of this process, by the variables that torchrun sets; (0, 1) without them.

    Set by hand they do as well, as under mpirun. Raises InputError if they are not complete: then they are left over,
    and a process that took itself for one of many would do a part of the work, or none.
    """
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    rank, world, address, port = (os.environ.get(name) for name in names)
    if rank in (None, "0") and world in (None, "1"):
        return 0, 1
    numbers = [int(text) for text in (rank, world, port) if text and text.isdecimal()]
    if len(numbers) < 3 or not address or numbers[0] >= numbers[1]:
        values = (f"{name}={os.environ[name]}" if name in os.environ else f"no {name}" for name in names)
        raise InputError("RANK and WORLD_SIZE are set, but this was not started by torchrun: unset them, or use "
                         f"torchrun ({', '.join(values)})")  # fmt: skip
    return numbers[0], numbers[1]


def gpu_index():
    """Which of this node's GPUs is this rank's."""
    local = os.environ.get("LOCAL_RANK")
    if local is None:  # not torchrun; the launchers that there are fill one node after the other
        return place()[0] % max(1, torch.cuda.device_count())
    if not local.isdecimal():
        raise InputError(f"LOCAL_RANK={local} is not the number of a GPU: unset it, or use torchrun")
    return int(local)


def start_device(name=None):
    """torch.device of --device; by default a GPU, this rank's under torchrun, or the CPU where there is none."""
    with warnings.catch_warnings(record=True) as found:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    for warning in found:  # a driver that is too old, say
        warn(f"no GPU is used: {first_line(warning.message)}")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", gpu_index() if device.index is None else device.index)
            torch.cuda.set_device(device)
            # cuDNN's attention is planned anew for every length, and differently with and without gradients.
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.empty(1, device=device).fill_(1).tolist()  # it can be had, computes and can be read
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {first_line(error)}") from None
    return device


def start_ranks(device=None, backend="gloo"):
    """This process's place: one of many under torchrun, else the only one. gloo is enough where ranks only meet at
    barriers; training asks for its device's own backend."""
    rank, world = place()
    device = start_device(device)
    if world > 1 and not dist.is_initialized():
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(WAITING)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAITING)
        except (RuntimeError, ValueError, OSError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(f"rank {rank} of {world} can't join the rest at {address}: {first_line(error)}") from None
    return Ranks(rank, world, device)


# ---------------------------------------------------------------- progress


def clock(seconds):
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def put(text, stream="stdout", end="\n"):
    """Prints; goes on without it when its reader is gone, as Ctrl-C also ends the `tee` behind a pipe, or a terminal is
    closed."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))


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
            put(f"\r\x1b[K{line}", "stderr", end="" if self.done < self.total else "\n")
        else:
            put(line, "stderr")


def one_line(text, limit=300):
    """A message as one printable line, without its middle where that makes it longer than `limit` characters."""
    half = limit // 2 - 3
    cut = lambda text: text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
    return cut(printable(cut(text.strip())))


def warn(text):
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress line, if there is one
    put(clear + one_line(f"warning: {text}"), "stderr")


# ---------------------------------------------------------------- being stopped

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
                    put("stopped at once; the same command goes on from the last checkpoint", "stderr")
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
        put(one_line(line), "stderr")
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
            put(f"{str(stopped) or 'stopped; what was finished is kept'}", "stderr")
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
