"""The recipe on the toy world: the four scripts with flags that suit a model of 1.3M parameters."""

import importlib
import os
import runpy
import shlex
import sys
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import fingerprint, read_json
from stic_min.toy import files, world

ROOT = Path(__file__).resolve().parents[2]  # where the four scripts are
BASE = Path(__file__).parent / "llava-toy"  # the base model that comes with the project

# Chosen before the world was built, tried on dev, and not tuned further. They differ from the paper's values
# because the model is 6,000 times smaller and knows a few hundred words: the learning rates are larger, the
# batches and LoRA smaller. Pairs are sampled at a higher temperature so that the two responses differ, and
# alpha is larger because captions are shorter.
SAMPLING = {"--max-new-tokens": 64, "--batch-size": 100, "--device": "cpu"}
PAIRS = SAMPLING | {"--temperature": 0.4}
LORA = {"--lora-r": 32, "--lora-alpha": 64, "--projector-lr": 3e-4}
STAGE1 = LORA | {"--lr": 3e-4, "--beta": 0.2, "--alpha": 0.05, "--batch-size": 16, "--micro-batch": 16,
                 "--device": "cpu"}  # fmt: skip
STAGE2 = {"--lr": 3e-4, "--projector-lr": 3e-4, "--lora-dropout": 0, "--batch-size": 32, "--micro-batch": 32,
          "--device": "cpu"}  # fmt: skip


def num_instructions(pairs):
    """The paper has 6,000 pairs and 5,000 instructions; here, half as many instructions as pairs suffice."""
    limit = 2 * world.TRAINED_ON
    if pairs // 2 > limit // 2:
        raise InputError(f"--images {pairs}: at most {limit}, two per scene of the base model's training")
    return max(1, pairs // 2)


def claim(out, settings, model):
    """Creates the folder `out` for a run with `settings`; refuses one that holds a run with other settings.

    The model and all of the project's code count as settings: existing output is skipped, so after a change
    it would be the output of the old code.
    """
    code = sorted([*ROOT.glob("*.py"), *(ROOT / "stic_min").rglob("*.py")])
    settings = settings | {"model": model and fingerprint(model), "code": fingerprint(*code)}
    file = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, not a folder")
    if file.exists():
        for name, value in read_json(file).items():
            if settings.get(name) != value:
                raise InputError(
                    f"{out} was created with {name} {value}, but this run has {settings.get(name)}; "
                    "choose another --out, or delete the folder"
                )
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(file, settings)


def short(path):
    """A path as a user would type it here: relative, if it is below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def spelled(flags):
    """Keyword arguments as on the command line: top_k -> --top-k."""
    return {f"--{name.replace('_', '-')}": value for name, value in flags.items()}


def run_command(shown, main, words):
    """Prints a command and runs it in this process. main: what it does, as a function without arguments.

    A dictionary among the words holds flags: None and False omit a flag, True gives it without a value.
    """
    arguments = []
    for word in words:
        for flag, value in word.items() if isinstance(word, dict) else [(word, True)]:
            if value is not None and value is not False:
                arguments += [flag] if value is True else [flag, value]
    arguments = [short(a) if isinstance(a, Path) else str(a) for a in arguments]
    print(f"\n$ python {shown} {shlex.join(arguments)}", flush=True)
    saved_argv = sys.argv
    sys.argv = [shown.removeprefix("-m ").split("/")[-1], *arguments]
    try:
        main()
    finally:
        sys.argv = saved_argv


def script(name, *words):
    """One of the scripts, through its own entry point. An error ends the process, as it would on the command
    line."""
    run_command(short(ROOT / name), lambda: runpy.run_path(str(ROOT / name), run_name="__main__"), words)


def neighbor(method, *words):
    """A step of one of the methods in stic_min/neighbours. Raises InputError for its errors."""
    name = f"stic_min.neighbours.{method}"
    run_command(f"-m {name}", lambda: importlib.import_module(name).main(), words)


# ---------------------------------------------------------------- the steps; existing output is skipped


def make_pairs(model, images, out, seed, **flags):
    """`flags`, here and below, are further flags or replace those above: alpha=0, top_k=50."""
    inputs = {"--model": model, "--images": images, "--out": out, "--seed": seed}
    script("generate_pairs.py", inputs | PAIRS | spelled(flags))


def stage1(model, pairs, images, out, seed, limit=None, **flags):
    if (out / "adapter_config.json").exists():
        return
    inputs = {"--model": model, "--pairs": pairs, "--images": images, "--out": out, "--seed": seed}
    script("train_stage1.py", inputs | {"--limit": limit} | STAGE1 | spelled(flags))


def stage2(model, adapter, instruct, out, seed, describe_flags, **flags):
    """Describes the pictures of the instructions, then trains on both."""
    if (out / "adapter_config.json").exists():
        return
    instructions = instruct / "instructions.json"
    descriptions = out.with_name(f"{out.name}-descriptions.jsonl")
    inputs = {"--model": model, "--adapter": adapter, "--images": instruct / "images", "--seed": seed}
    describing = {"--describe": instructions} | inputs | {"--out": descriptions}
    script("generate_pairs.py", describing | PAIRS | spelled(describe_flags))
    inputs |= {"--instructions": instructions, "--descriptions": descriptions, "--out": out}
    script("train_stage2.py", inputs | ({} if adapter else LORA) | STAGE2 | spelled(flags))


def scores_file(benchmark, adapter, mode, out):
    return out / f"{benchmark}-{adapter.name if adapter else 'base'}-{mode}.scores.json"


def evaluate(benchmark, model, adapter, data, out, mode="direct", **flags):
    """Scores of a benchmark, from the file that evaluate.py writes. mode: direct, dar or blind-dar."""
    file = scores_file(benchmark, adapter, mode, out)
    if not file.exists():
        inputs = {"--model": model, "--adapter": adapter, "--data": data, "--out": out}
        modes = {"--dar": mode != "direct", "--blind": mode == "blind-dar"}
        script("evaluate.py", benchmark, inputs | modes | SAMPLING | spelled(flags))
    return read_json(file)
