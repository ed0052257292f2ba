"""A drill for long runs: every command is killed again and again, and must end as if it had never been.

  python tests/runtime/drill.py                    40 kills
  python tests/runtime/drill.py --kills 200 --seed 7
  python tests/runtime/drill.py --images 2000      instead: memory and open files of a long generation

On the tiny world of tests/support/tiny.py, under torchrun. First, five commands run undisturbed. Then each is
killed at random moments and started again, until it has had its kills. At last all run to their ends. The
files must be those of the first run, byte for byte (log.jsonl: all but what depends on the machine). Linux only: it
reads /proc.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import commands  # noqa: E402
import tiny  # noqa: E402
from forked import Forked  # noqa: E402

ENV = commands.ENV | {"OMP_NUM_THREADS": "1"}
PATIENCE = 60  # seconds for a command to end after one of its ranks is dead, or after a signal
# What a kill hits. "all" is a power cut: torchrun and its ranks at once. "torchrun" leaves its ranks running.
KINDS = ("all", "one rank", "SIGTERM", "all", "SIGINT", "all", "torchrun", "all")
MOMENTS = ("while it runs", "when it has written", "when it has written", "while it writes")
OF_THE_MACHINE = ("tokens_per_s", "memory_gb", "seconds_left")  # fields of log.jsonl
OUR_FRAMES = re.compile(r'File "[^"]*(stic_min/[\w/]+|generate_pairs|train_stage\d|evaluate)\.py", line')
GROWTH = 4, 4 / 1024  # --images: MB allowed, and MB per image, whose record is kept to be skipped later


# ---------------------------------------------------------------- what is run


def write_world(folder, copies):
    """The tiny world with everything in it `copies` times under other names: time for kills."""
    tiny.write_all(folder)
    images, science = folder / "images", folder / "scienceqa"
    named = lambda name, copy: f"{Path(name).stem}-{copy}{Path(name).suffix}"
    for file in list(images.iterdir()):
        for copy in range(copies):
            shutil.copy(file, images / named(file.name, copy))
        file.unlink()
    records = json.loads((folder / "instructions.json").read_text())
    copied = [record | {"id": f"{record['id']}-{copy}"} for record in records for copy in range(copies)]
    for record in copied:
        if "image" in record:
            record["image"] = named(record["image"], record["id"].split("-")[1])
    tiny.write_json(folder / "instructions.json", copied)
    problems = json.loads((science / "problems.json").read_text())
    folder = science / "images" / "test"
    for key, problem in problems.items():
        for copy in range(copies if problem["image"] else 0):
            shutil.copytree(folder / key, folder / f"{key}-{copy}")
    problems = {f"{key}-{copy}": problem for key, problem in problems.items() for copy in range(copies)}
    tiny.write_json(science / "problems.json", problems)
    tiny.write_json(science / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def chain(world, inputs, out):
    """{name: command}. Each reads the output of earlier ones from `inputs`, and writes to out / name."""
    at = ["--model", world / "llava-v1.6-tiny", "--device", "cpu"]
    images = ["--images", world / "images"]
    train = [*at, *images, "--lr", 1e-3, "--batch-size", 2, "--save-every", 1]
    few = ["--max-new-tokens", 64, "--batch-size", 2]
    more = ["--max-new-tokens", 192, "--batch-size", 2]  # nothing is trained on these
    return {
        "pairs": ["generate_pairs.py", *at, *images, *few, "--out", out / "pairs" / "pairs.jsonl"],
        "stage1": ["train_stage1.py", *train, "--lora-r", 32, "--pairs", inputs / "pairs" / "pairs.jsonl",
                   "--out", out / "stage1"],
        "describe": ["generate_pairs.py", "--describe", world / "instructions.json", *at, *images, *few,
                     "--adapter", inputs / "stage1", "--out", out / "describe" / "descriptions.jsonl"],
        "stage2": ["train_stage2.py", *train, "--lora-dropout", 0.05, "--adapter", inputs / "stage1",
                   "--instructions", world / "instructions.json",
                   "--descriptions", inputs / "describe" / "descriptions.jsonl", "--out", out / "stage2"],
        "evaluate": ["evaluate.py", "scienceqa", "--dar", *at, "--data", world / "scienceqa", *more,
                     "--adapter", inputs / "stage2", "--out", out / "evaluate"],
    }


def run_chain(world, inputs, out):
    """On every rank: all commands, one after the other, in one start of Python."""
    import torch.distributed as dist

    for name, (script, *args) in chain(world, inputs, out).items():
        begin = time.monotonic()
        if not finished(out / name):
            with mock.patch.object(sys, "argv", [script, *map(str, args)]):
                importlib.import_module(script.removesuffix(".py")).main()
            dist.barrier()  # the next command reads what the first rank wrote
        if not int(os.environ["RANK"]):
            print("took", name, time.monotonic() - begin, flush=True)
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


def undisturbed(ranks, *folders, before):
    """The chain in one start, after `before` -> {command: (seconds, output)}, empty if it failed."""
    for _ in range(3):
        before()
        process = Forked(torchrun(ranks, __file__, "--chain", *folders), ROOT, ENV)
        out, err = process.communicate()
        if process.returncode == 0:
            texts = re.split(r"^took (\w+) (\S+)\n", out, flags=re.M)
            triples = zip(texts[::3], texts[1::3], texts[2::3])
            return {name: (float(seconds), text) for text, name, seconds in triples}
        if not crashed(out + err):
            print(out + err)
            break
        print("a rank crashed by itself: once more", flush=True)
    return {}


def crashed(text):
    """Whether a rank died by itself, in C code, as gloo's thread does once in many runs (torch 2.15).

    This is counted, and must be survived like any other death.
    """
    return bool(re.search(r"Signal (6|11) \(SIG\w+\) received", text))


# ---------------------------------------------------------------- processes


def torchrun(ranks, *args):
    return ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *args]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ranks_of(process):
    """{rank: pid} of torchrun's children. Each is in a session of its own: no signal to torchrun's group."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                pids |= {int(rank[1]): int(folder.name)} if rank else {}
        except OSError:
            pass  # it has ended meanwhile
    return pids


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def gone(pids):
    """Whether they end in time. If not, they are killed."""
    limit = time.monotonic() + PATIENCE
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.01)
    late = [pid for pid in pids if alive(pid)]
    send(late, signal.SIGKILL)
    return not late


# ---------------------------------------------------------------- files


def newest(out):
    """The step of the newest checkpoint."""
    return max((int(folder.name.split("-")[1]) for folder in out.glob("checkpoint-*")), default=0)


def finished(out):
    """Whether a training run is complete."""
    return (out / "adapter_config.json").exists()


def lines(file):
    try:
        return file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:  # merged with others meanwhile
        return []


def whole_lines(out):
    """The complete lines of `out`'s first file and of the ranks' parts of it, which a restart must keep."""
    files = sorted(out.glob("*.jsonl")) + sorted(out.glob("*.jsonl.part*"))
    stem = lambda file: file.name.split(".jsonl")[0]
    return {line for file in files if stem(file) == stem(files[0]) for line in lines(file)}


def on_disk(out):
    """What a restart can resume from, in words; empty if there is nothing."""
    if finished(out):
        return "the finished adapter"
    if step := newest(out):
        return f"checkpoint-{step}"
    files = [*out.glob("*.jsonl"), *out.glob("*.jsonl.part*")]
    count = sum(len(lines(file)) for file in files if file.name != "log.jsonl")
    return f"{count} lines" if count else ""


def half_written(out):
    return [file.name for file in out.glob("*.new")]


def contents(folder):
    """{file: content}, leftovers included."""
    files = {}
    for file in (p for p in folder.rglob("*") if p.is_file()):
        files[str(file.relative_to(folder))] = file.read_bytes()
        if file.name == "log.jsonl":
            records = map(json.loads, file.read_text().splitlines())
            files["log.jsonl"] = [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in records]
        if file.name == "report.html":  # curves of the machine's speed, too
            files["report.html"] = None
        if file.name.endswith("run.json"):
            name = str(file.relative_to(folder))
            files[name] = json.loads(file.read_text())
            del files[name]["record"]  # when, where and how long
    return files


# ---------------------------------------------------------------- one command


class Drill:
    def __init__(self, name, command, reference, out, ranks, rng):
        self.name, self.reference, self.out, self.rng = name, reference, out, rng
        self.training = name.startswith("stage")
        self.command = torchrun(ranks, *command)
        self.starts = self.kills = self.saved = self.halves = self.restarts = self.compared = self.crashes = 0
        self.wrong = []

    def complain(self, what):
        self.wrong.append(what)
        print(f"WRONG  {self.name}: {what}\n{self.text()[-3000:]}", flush=True)

    def text(self):
        return self.output.read_text(errors="replace")

    def look(self):
        """Notes what the next start will find."""
        self.resumable, self.half = on_disk(self.out), half_written(self.out)
        self.step, self.lines = newest(self.out), len(whole_lines(self.out))

    def start(self):
        """Starts the command -> (process, time of its first output)."""
        self.look()
        self.starts += 1
        self.output = self.out.with_name(f"{self.name}-{self.starts}.txt")
        self.output.touch()
        process = Forked(self.command, ROOT, ENV, stdout=self.output, stderr=self.output)
        while process.poll() is None and not self.output.stat().st_size:
            time.sleep(0.002)
        return process, time.monotonic()

    def check_resumed(self, text):
        """It must have resumed from what was on disk when it started."""
        self.restarts += bool(self.resumable)
        resumed = f"resuming after step {self.step} "
        if self.training and self.step and re.search(r"step \d+/", text) and resumed not in text:
            self.complain(f"did not print '{resumed}'")
        match = re.search(r"(\d+) of them already in", text)
        if match and int(match[1]) != self.lines:
            self.complain(f"{self.lines} lines were on disk, it found {match[1]}")

    def compare(self):
        """Compares the files with the reference, and removes them."""
        theirs, ours = contents(self.reference), contents(self.out)
        different = sorted(f for f in theirs.keys() | ours.keys() if theirs.get(f) != ours.get(f))
        self.compared += 1
        if different or not theirs:
            copy = self.out.with_name(f"{self.name}-differs-{self.compared}")
            self.out.rename(copy)
            self.complain(f"{', '.join(different)} differ: {copy}, {self.reference}")
        shutil.rmtree(self.out, ignore_errors=True)

    def attempt(self, kind, within, number):
        """Starts the command, and kills it within so many seconds or lets it end -> whether it was killed."""
        process, first = self.start()
        ranks = ranks_of(process)  # now: finding them takes longer than writing a checkpoint
        moment = self.rng.choice(MOMENTS)
        while moment == MOMENTS[1] and process.poll() is None and on_disk(self.out) == self.resumable:
            time.sleep(0.002)
        while moment == MOMENTS[-1] and process.poll() is None and half_written(self.out) == self.half:
            time.sleep(0.0005)
        longest = {MOMENTS[0]: within, MOMENTS[1]: within / 2, MOMENTS[-1]: 0.001}[moment]
        try:
            process.wait(self.rng.uniform(0, longest))
        except subprocess.TimeoutExpired:
            pass
        hit = time.monotonic()
        if runs := process.poll() is None:
            self.hit(process, kind, ranks)
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.complain(f"still running {PATIENCE} s after: {kind}")
            send([process.pid, *ranks.values()], signal.SIGKILL)
            status = process.wait()
        self.check_resumed(self.text())
        if status == 0:
            return False
        crash = not runs and crashed(self.text())
        self.crashes += crash
        if not runs and not crash:
            self.complain(f"ended with status {status} by itself")
        ended = time.monotonic() - hit
        remains, half = on_disk(self.out), half_written(self.out)
        self.kills += 1
        self.saved += bool(remains)
        self.halves += bool(half)
        remains = ", ".join([remains or "nothing", *half])
        crash_note = "  (crashed)" if crash else ""
        print(f"{self.name:<9} {self.kills:>3}/{number}  {kind:<9} at {hit - first:4.1f} s  "
              f"status {status:>3} after {ended:4.1f} s  on disk: {remains}{crash_note}", flush=True)
        if OUR_FRAMES.search(self.text()):
            self.complain(f"a traceback after: {kind}")
        if kind.startswith("SIG") and self.training:
            self.check_stopped()
        if kind == "torchrun":
            self.again_at_once(ranks)
        if not gone(ranks.values()):
            self.complain(f"a rank was still running {PATIENCE} s after: {kind}")
        return True

    def hit(self, process, kind, ranks):
        if kind == "one rank":
            send([self.rng.choice(list(ranks.values()))] if ranks else [], signal.SIGKILL)
        elif kind.startswith("SIG"):
            send([process.pid], getattr(signal, kind))  # torchrun passes it on
        else:
            os.killpg(process.pid, signal.SIGKILL)
            if kind == "all":
                send(ranks.values(), signal.SIGKILL)

    def again_at_once(self, ranks):
        """Runs the command while ranks of a dead torchrun may still run: refused, or they have ended."""
        lived = any(map(alive, ranks.values()))
        process, _ = self.start()
        status, text = process.wait(), self.text()
        refused = "another run is writing to" in text or "holds a finished run" in text
        if status and not (refused and lived or crashed(text)):
            self.complain(f"next to the ranks of a dead torchrun it ended with status {status}")
        if OUR_FRAMES.search(text):
            self.complain("a traceback next to the ranks of a dead torchrun")
        outcome = "refused" if refused else "done"
        print(f"{self.name:<9} again at once: {outcome}, on disk: {on_disk(self.out)}", flush=True)

    def check_stopped(self):
        """A training run that was stopped between two steps must print after which, and have saved it."""
        steps = re.findall(r"^step (\d+)/(\d+)", self.text(), re.M)
        stopped = re.search(r"stopped after step (\d+)", self.text())
        if steps and steps[-1][0] != steps[-1][1] and not stopped:  # the last step is always printed
            self.complain("stopped between its steps without a message")
        if stopped and newest(self.out) != int(stopped[1]):
            self.complain(f"'{stopped[0]}', but the newest checkpoint is {newest(self.out)}")

    def run(self, kinds, whole):
        """Starts the command until it has been killed once per kind; undisturbed it takes `whole` seconds."""
        within = whole
        while self.kills < len(kinds) and len(self.wrong) < 3:
            killed = self.attempt(kinds[self.kills], within, len(kinds))
            within = whole if killed else within / 2  # in the end it is killed
            if finished(self.out):  # killed at its very end, it may leave what it no longer needs
                (self.out / ".lock").unlink(missing_ok=True)
                for folder in self.out.glob("checkpoint-*"):
                    shutil.rmtree(folder)
            if not killed or finished(self.out):
                self.compare()


def drill(kills, seed, ranks, copies, folder):
    """Drills all commands -> whether they passed."""
    world, reference, out = folder / "world", folder / "reference", folder / "killed"
    rng = random.Random(seed)
    begin = time.monotonic()
    drills = []
    write_world(world, copies)
    out.mkdir()
    clear = lambda: shutil.rmtree(reference, ignore_errors=True)
    took = undisturbed(ranks, world, reference, reference, before=clear)
    if not took:
        return False
    for number, (name, command) in enumerate(chain(world, reference, out).items()):
        print(f"{name:<9} undisturbed in {took[name][0]:.1f} s", flush=True)
        kinds = [KINDS[(number + i) % len(KINDS)] for i in range(kills // 5 + (number < kills % 5))]
        drills.append(Drill(name, command, reference / name, out / name, ranks, rng))
        drills[-1].run(kinds, took[name][0])
    rest = undisturbed(ranks, world, reference, out, before=lambda: [d.look() for d in drills])
    for d in drills:
        d.check_resumed(rest.get(d.name, (0, ""))[1])
        d.compare()
    print(f"\n{'command':<9}  kills  something on disk  half written  restarts  compared  crashes  result")
    for d in drills:
        print(f"{d.name:<9}  {d.kills:>5}  {d.saved:>17}  {d.halves:>12}  {d.restarts:>8}  {d.compared:>8}  "
              f"{d.crashes:>7}  {'WRONG' if d.wrong else 'equal'}")
    print(f"{sum(d.kills for d in drills)} kills in {time.monotonic() - begin:.0f} s")
    return not any(d.wrong for d in drills)


# ---------------------------------------------------------------- memory


def resident():
    """MB of this process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def memory(count, folder):
    """Generates pairs for `count` images in this process -> whether memory and open files stay constant."""
    import generate_pairs
    from stic_min.runtime.output import Output

    tiny.write_all(folder)
    rng, rows = random.Random(0), []
    images = folder / "random"
    every = min(100, max(1, count // 6))
    images.mkdir()
    for i in range(count):
        size, color = (rng.randint(24, 120), rng.randint(24, 120)), tuple(rng.randbytes(3))
        Image.new("RGB", size, color).save(images / f"{i:06}.{rng.choice(['png', 'jpg'])}")

    def append(output, record, append=Output.append):
        append(output, record)
        if len(output.done) % every == 0:
            time.sleep(0.05)  # the threads that prefetch images come to rest, and have none open
            rows.append((len(output.done), resident(), len(os.listdir("/proc/self/fd"))))
            print("{:>8}  {:>8.1f}  {:>12}".format(*rows[-1]), flush=True)

    print("  images    RSS MB  open handles")
    model = ["--model", folder / "llava-v1.6-tiny", "--device", "cpu"]
    command = ["generate_pairs.py", *model, "--images", images, "--max-new-tokens", 4, "--batch-size", 8,
               "--out", folder / "pairs.jsonl"]  # fmt: skip
    begin = time.monotonic()
    with mock.patch.object(Output, "append", append), mock.patch.object(sys, "argv", [*map(str, command)]):
        generate_pairs.main()
    (_, mb, handles), (_, last_mb, last_handles) = rows[0], rows[-1]
    print(f"{last_handles - handles:+} handles, {last_mb - mb:+.1f} MB from the first line to the last, in "
          f"{time.monotonic() - begin:.0f} s")
    return last_handles <= handles and last_mb - mb < GROWTH[0] + GROWTH[1] * count


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--kills", type=int, default=40, help="kills of all commands together (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of their moments")
    parser.add_argument("--ranks", type=int, default=2, help="ranks per command (default: 2)")
    parser.add_argument("--copies", type=int, default=12, help="copies of all data (default: 12)")
    parser.add_argument("--images", type=int, metavar="N", help="measure memory and open files over N images")
    parser.add_argument("--chain", type=Path, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.chain:
        run_chain(*args.chain)
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    if args.images:
        passed = memory(args.images, folder)
    else:
        passed = drill(args.kills, args.seed, args.ranks, args.copies, folder)
    if passed:
        shutil.rmtree(folder)
    else:
        print(f"failed; the files are in {folder}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
