"""The whole speed table of one device, most important lines first, within a time limit.

  python tests/speed/all.py --size 7b --minutes 8 --out speed.jsonl          # on a GPU
  python tests/speed/all.py --size tiny --device cpu --minutes 1             # a rehearsal

Each line is printed, and written to --out as JSON, as soon as it is known. Each section has a share of the
time: it is skipped if less than half of its share is left, and ends with the first line after twice its
share. The sections run in a second process, so that one that fails or hangs takes only itself down.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import generation
import recipe
import stage1
import stage2
import torch
from common import (
    bandwidth,
    build_ours,
    build_peer,
    configuration,
    free_memory,
    fused,
    needed_flops,
    peak_memory,
    product_flops,
    seconds_of,
    synthetic_images,
)

from stic_min import lora
from stic_min.runtime import flags, provenance
from stic_min.runtime.ranks import start_device

POSITIONS = {"pad": 760, "anyres": 2700}  # tokens in a slot halfway through a response of 250 tokens
TOKENS = 128  # per response
TRAINING = [("stage 1", "pad", 1), ("stage 1", "pad", 4), ("stage 1", "anyres", 1), ("stage 2", "pad", 4)]


# ---------------------------------------------------------------- sections: they yield (line, its numbers)


def ceilings(run):
    product, read = product_flops(run.device, run.dtype), bandwidth(run.device)
    text = f"matrix product {product / 1e12:.3g} TFLOP/s, reading {read / 1e12:.3g} TB/s"
    yield text, {"flops": product, "bytes_per_second": read}


def sampling_model(run, image_mode, adapter=False):
    llava = build_ours(run.size, image_mode, run.device, run.dtype)
    if adapter:
        lora.attach(llava, lora.new_adapter(llava, 128, 256, 0.0, seed=0))
        llava.to(run.dtype)
    return fused(llava)


def decode(run):
    for adapter in (False, True):
        for image_mode, positions in POSITIONS.items():
            free_memory()
            llava = sampling_model(run, image_mode, adapter)
            for rows in run.rows:
                seconds = generation.decode_seconds(llava, rows, positions)
                floor = generation.bytes_read(llava, rows, positions) / bandwidth(run.device)
                text = (f"{image_mode}, {rows} rows of {positions} positions{', with adapter' * adapter}: "
                        f"{1000 * seconds:.2f} ms per step, floor {1000 * floor:.2f}, "
                        f"ratio {seconds / floor:.2f}")  # fmt: skip
                yield text, {"image_mode": image_mode, "rows": rows, "positions": positions,
                             "adapter": adapter, "ms": 1000 * seconds, "floor_ms": 1000 * floor}  # fmt: skip
                free_memory()
            del llava


def prefill(run):
    for image_mode in POSITIONS:
        free_memory()
        llava = sampling_model(run, image_mode)
        images = synthetic_images(32 if run.gpu else 4)
        seconds, flops = generation.prefill(llava, images, 2 * len(images))
        floor = flops / product_flops(run.device, run.dtype)
        text = (f"{image_mode}, {2 * len(images)} rows: {1000 * seconds:.1f} ms per image, "
                f"floor {1000 * floor:.1f}, {floor / seconds:.0%} of the product")  # fmt: skip
        yield text, {"image_mode": image_mode, "rows": 2 * len(images), "ms": 1000 * seconds,
                     "floor_ms": 1000 * floor}  # fmt: skip
        del llava


def generate(run):
    tokens = TOKENS if run.gpu else 8
    for image_mode in POSITIONS:
        free_memory()
        llava = sampling_model(run, image_mode)
        generation.ours(llava, synthetic_images(4), 8, 2)  # warms up
        for rows in run.rows:
            images = synthetic_images(rows if run.gpu else 4)
            begin = time.perf_counter()
            generation.ours(llava, images, rows, tokens)  # ends on the host
            speed = 2 * len(images) * tokens / (time.perf_counter() - begin)
            text = f"{image_mode}, {rows} rows, {len(images)} images: {speed:.0f} tokens/s"
            yield text, {"image_mode": image_mode, "rows": rows, "images": len(images),
                         "tokens_per_second": speed}  # fmt: skip
        del llava


def step_line(run, name, image_mode, micro_batch, make_step):
    """Measures make_step(settings) -> (line, its numbers)."""
    stage = stage1 if name == "stage 1" else stage2
    settings = SimpleNamespace(micro_batch=micro_batch, image_mode=image_mode, text=30, chosen=270,
                               rejected=230, r=128, device=str(run.device),
                               dtype=str(run.dtype).removeprefix("torch."))  # fmt: skip
    config = configuration(run.size, image_mode)
    flops = needed_flops(stage.ours_batch(settings, config), config, 128, reference=stage is stage1)
    free_memory()
    step = make_step(stage, settings)
    seconds = seconds_of(step, 5 if run.gpu else 1)
    memory = peak_memory(step, run.device) / 2**30
    share = flops / seconds / product_flops(run.device, run.dtype)
    text = (f"{name}, {image_mode}, {micro_batch} per step: {1000 * seconds:.0f} ms, "
            f"{share:.0%} of the product, +{memory:.1f} GiB")  # fmt: skip
    return text, {"stage": name, "image_mode": image_mode, "micro_batch": micro_batch,
                  "ms": 1000 * seconds, "share": share, "memory_gib": memory}  # fmt: skip


def train(run):
    def make_step(stage, settings):
        llava = build_ours(run.size, settings.image_mode, run.device, run.dtype).train()
        return stage.ours_step(settings, llava)

    for name, image_mode, micro_batch in TRAINING:
        yield step_line(run, name, image_mode, micro_batch, make_step)


def whole_recipe(run):
    if run.gpu:
        args = SimpleNamespace(pictures=128, tokens=250, slots=64, micro_batch=4, repeat=5)
    else:
        args = SimpleNamespace(pictures=2, tokens=16, slots=8, micro_batch=1, repeat=1)
    seconds = {}
    for name, value in recipe.measure(run.size, run.device, run.dtype, args):
        seconds[name] = value
        minutes = value * recipe.COUNTS[name] / 60
        text = f"{name}: {1000 * value:.0f} ms per sample, {minutes:.1f} min for {recipe.COUNTS[name]}"
        yield text, {"what": name, "seconds_per_sample": value, "minutes": minutes}
    minutes = sum(seconds[name] * count / 60 for name, count in recipe.COUNTS.items())
    yield f"whole recipe: {minutes:.1f} min", {"what": "whole recipe", "minutes": minutes}
    for line in recipe.larger_runs(seconds, configuration(run.size, "pad").decoder):
        yield line, None


def peer_line(run, theirs, image_mode, images, batch, label, **options):
    """Measures transformers' generate -> (line, its numbers)."""
    config = configuration(run.size, image_mode)
    tokens = TOKENS if run.gpu else 8
    images = synthetic_images(images)
    warm_up = tokens if options else 4  # a static cache is compiled for its length
    generation.peer(theirs, config, images, batch, warm_up, **options)
    begin = time.perf_counter()
    responses = generation.peer(theirs, config, images, batch, tokens, **options)
    speed = sum(map(len, responses)) / (time.perf_counter() - begin)
    text = f"{image_mode}, {label}, batch {batch}: {speed:.0f} tokens/s"
    return text, {"image_mode": image_mode, "batch": batch, "label": label, "tokens_per_second": speed}


def transformers_generate(run):
    for image_mode in POSITIONS:
        free_memory()
        theirs = build_peer(run.size, image_mode, run.device, run.dtype)
        for images, batch in ((8, 16), (1, 1)) if run.gpu else ((1, 2), (1, 1)):
            yield peer_line(run, theirs, image_mode, images, batch, "transformers")
        del theirs


def peft_steps(run):
    if not provenance.version("peft"):
        yield "peft is not installed", None
        return
    peers = {"stage 1": stage1.PEERS, "stage 2": stage2.PEERS}
    if not provenance.version("trl"):
        yield "TRL is not installed", None
        peers["stage 1"] = {name: peer for name, peer in stage1.PEERS.items() if peer is not stage1.trl_step}
    for name, image_mode, micro_batch in TRAINING if run.gpu else TRAINING[:1]:
        for peer_name, peer_step in peers[name].items():

            def make_step(_, settings, peer_step=peer_step):
                theirs = build_peer(run.size, settings.image_mode, run.device, run.dtype)
                return peer_step(settings, theirs, configuration(run.size, settings.image_mode))

            text, values = step_line(run, name, image_mode, micro_batch, make_step)
            yield f"{peer_name}: {text}", values | {"peer": peer_name}


def static_cache(run):
    """transformers' static cache, first without and then with torch.compile; its continuous batching."""
    from transformers import LlavaForConditionalGeneration as Llava

    yield f"continuous batching: {continuous_batching(Llava)}", None
    theirs = build_peer(run.size, "pad", run.device, run.dtype)
    images, batch = (8, 16) if run.gpu else (1, 2)
    options = {"cache_implementation": "static"}
    yield peer_line(run, theirs, "pad", images, batch, "static cache", disable_compile=True, **options)
    if run.gpu:  # it is compiled only there
        yield peer_line(run, theirs, "pad", images, batch, "static cache, compiled", **options)


def continuous_batching(model):
    import inspect

    import transformers

    if not hasattr(model, "generate_batch"):
        return f"transformers {transformers.__version__} has none for LLaVA"
    inputs = inspect.signature(model.generate_batch).parameters["inputs"].annotation
    return f"generate_batch of transformers {transformers.__version__} takes {inputs}: token ids, no images"


SECTIONS = {  # most important first, with the seconds that each may take on one H200
    "ceilings": (ceilings, 15),
    "decode step": (decode, 60),
    "prefill": (prefill, 25),
    "generation": (generate, 50),
    "training step": (train, 60),
    "recipe": (whole_recipe, 90),
    "transformers' generate": (transformers_generate, 60),
    "peft steps": (peft_steps, 60),
    "static cache": (static_cache, 60),
}


# ---------------------------------------------------------------- running them


def work(connection, args):
    """The second process: runs the sections that it is told to, and sends their lines; ends at an error."""
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = start_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    run = SimpleNamespace(size=args.size, device=device, dtype=dtype, gpu=device.type == "cuda")
    run.rows = (64, 8) if run.gpu else (8,)
    where = torch.cuda.get_device_name(device) if run.gpu else f"{torch.get_num_threads()} CPU threads"
    connection.send((where, str(dtype).removeprefix("torch.")))
    while message := connection.recv():
        name, limit = message
        section, _ = SECTIONS[name]
        begin = time.monotonic()
        try:
            for line in section(run):
                connection.send(line)
                if time.monotonic() > begin + limit:
                    connection.send((f"stopped after {limit:.0f} s", {"error": "stopped"}))
                    break
        except Exception as error:
            connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return
        connection.send(None)
        free_memory()


class Worker:
    """The second process, as the first sees it."""

    def __init__(self, args):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, args), daemon=True)
        self.process.start()
        other.close()  # so that the death of the process ends the connection

    def receive(self, deadline):
        """What it sends next; EOFError if it died, TimeoutError after `deadline`."""
        if not self.connection.poll(max(0, deadline - time.monotonic())):
            raise TimeoutError
        return self.connection.recv()

    def end(self):
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        self.process.kill()


def run_section(worker, name, limit, deadline, emit):
    """Passes the lines of a section to emit(line, numbers) -> whether the worker can run another. It stops
    itself after `limit` seconds, or is killed at `deadline`."""
    begin = time.monotonic()
    try:
        worker.connection.send((name, limit))
        while (message := worker.receive(deadline)) is not None:
            if isinstance(message, str):
                emit(f"failed: {message}", {"error": message})
                return False
            emit(*message)
    except TimeoutError:
        worker.process.kill()
        emit(f"killed after {time.monotonic() - begin:.0f} s", {"error": "killed"})
        return False
    except (EOFError, OSError):
        worker.process.join(5)
        emit(f"failed: the process died, exit status {worker.process.exitcode}", {"error": "died"})
        return False
    emit(f"took {time.monotonic() - begin:.0f} s", {"took_seconds": time.monotonic() - begin})
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="7b", help="size of the model")
    parser.add_argument("--minutes", type=float, default=8, help="time limit")
    parser.add_argument("--out", metavar="FILE", help="file for the lines as JSON; it is extended")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION",
                        help=f"sections to run, of: {', '.join(SECTIONS)}")
    parser.add_argument("--device", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES,
                        help="precision of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
    args = parser.parse_args()
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the worker, too

    def emit(section, line, numbers):
        print(f"{time.monotonic() - begin:4.0f} s  {section}: {line}", flush=True)
        if args.out and numbers is not None:
            with open(args.out, "a") as file:
                file.write(json.dumps({"section": section} | numbers) + "\n")

    worker = None
    sections = {name: seconds for name, (_, seconds) in SECTIONS.items() if name in (args.only or SECTIONS)}
    unit = 60 * args.minutes / sum(sections.values())
    for name, seconds in sections.items():
        share, remaining = unit * seconds, end - time.monotonic()
        if remaining < share / 2:
            line = f"skipped: {max(0, remaining):.0f} s left, its share is {share:.0f} s"
            emit(name, line, {"error": "skipped"})
            continue
        if worker is None:
            worker = Worker(args)
            try:
                where, dtype = worker.receive(end)
            except (EOFError, TimeoutError):
                sys.exit("the worker process did not start")
            packages = ("torch", "transformers", "peft", "trl")
            facts = {"device": where, "dtype": dtype, "size": args.size, "commit": provenance.commit(),
                     "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}  # fmt: skip
            facts |= {package: provenance.version(package) for package in packages}
            emit("setup", ", ".join(f"{key} {value}" for key, value in facts.items()), facts)
        deadline = min(time.monotonic() + 3 * share, end)
        emit_line = functools.partial(emit, name)
        if not run_section(worker, name, 2 * share, deadline, emit_line):
            worker.end()
            worker = None
    if worker:
        worker.end()
    emit("all", f"{math.floor(time.monotonic() - begin)} s in all", {"total_seconds": time.monotonic() - begin})


if __name__ == "__main__":
    main()
