"""What the four scripts share: flags, ranks, a progress line, and how errors end."""

import argparse
import contextlib
import errno
import hashlib
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from stic_min import InputError, first_line
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
        raise argparse.ArgumentTypeError(f"{text} is not {what}")

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


def say_loading(args, ranks):
    adapter = f" with {args.adapter}" if getattr(args, "adapter", None) else ""
    if ranks.first:
        print(f"loading {args.model}{adapter} on {ranks.device}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def say(self, text):
        if self.first:
            put(text)


def start_device(name=None):
    """torch.device of --device; by default a GPU, this rank's under torchrun, or the CPU where there is none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
            # cuDNN's attention is planned anew for every length, and differently with and without gradients.
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.empty(1, device=device).tolist()  # it can be had, and read
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {first_line(error)}") from None
    return device


def start_ranks(device=None, backend="gloo"):
    """This process's place: one of many under torchrun, else the only one. gloo is enough where ranks only meet at
    barriers; training asks for its device's own backend."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = start_device(device)
    if world > 1 and not dist.is_initialized():
        # Ranks wait for each other at the end, however unequal their shares: a week, not the default half hour.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Ranks(rank, world, device)


# ---------------------------------------------------------------- progress


def clock(seconds):
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def put(text, stream="stdout", end="\n"):
    """Prints; goes on without it when its reader is gone, as Ctrl-C also ends the `tee` behind a pipe."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except BrokenPipeError:
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


def warn(text):
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress line, if there is one
    put(f"{clear}warning: {text}", "stderr")


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
        yield
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
                if int(os.environ.get("RANK", 0)) == 0:
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


def exit_status(main, rank):
    """Runs main; bad input is one line and status 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no dash gets a question mark
    try:
        main()
        return 0
    except BrokenPipeError:  # what it says has no reader any more, as behind `| head`
        sys.stdout = open(os.devnull, "w")
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            error = f"{error.filename or 'writing'}: {error.strerror}"
        if rank:  # when all ranks fail alike, torchrun ends this one before it says the same again
            time.sleep(2)
        put(f"error: {error}", "stderr")
    except MemoryError as error:
        put(f"error: {OUT_OF_MEMORY.format(first_line(error) or 'of the machine')}", "stderr")
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            put(f"error: {OUT_OF_MEMORY.format(first_line(error))}", "stderr")
        elif died_elsewhere(error):
            put(f"rank {rank} ends, as another one has: {first_line(error)}", "stderr")
        else:
            raise
    return 1


def run(main):
    """Runs a script's main; bad input ends in one line and status 1, anything else is a bug and keeps its traceback."""
    rank = int(os.environ.get("RANK", 0))
    hook, sys.unraisablehook = sys.unraisablehook, pass_on
    try:  # around all of it: the signal may arrive while an error is being reported
        interrupt.armed = True
        on_signals(interrupt)
        status = exit_status(main, rank)
        interrupt.armed = False  # nothing is left to stop
    except KeyboardInterrupt as stopped:
        interrupt.armed, status = False, 130
        if rank == 0:
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
