"""The paper's tables on the toy world, and controls that it lacks, over several seeds and base models.

A chain is one base model and one seed: pictures of its own, pairs, every variant of training, every evaluation. What is
there is not made again, so the same command resumes. Chains run side by side, one single-threaded process each, and
write what the scripts print to their log.txt. The settings are those of recipe.py; they and the world were fixed,
on the dev split, before the test split was looked at.
"""

import json
import multiprocessing
import multiprocessing.connection
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import torch

from stic_min import InputError
from stic_min.runtime import console
from stic_min.runtime.files import read_json, read_records
from stic_min.toy import files, recipe, tables

# name: what its stage 1 changes, and which pairs it takes
STAGE1 = {
    "stage1": ({}, "pairs"),
    "positives1": ({"beta": 0}, "pairs"),  # Table 3: what is left of Eq. 4.1 is alpha * NLL of the preferred answer
    "alpha0_1": ({"alpha": 0}, "pairs"),
    "prompts1": ({}, "prompts"),
    "corruptions1": ({}, "corruptions"),
}
# name: the stage 1 that its stage 2 goes on from (None: the base), and whether the descriptions are left out
STAGE2 = {
    "stic": ("stage1", False),
    "positives": ("positives1", False),
    "alpha0": ("alpha0_1", False),
    "prompts": ("prompts1", False),
    "corruptions": ("corruptions1", False),
    "stage2only": (None, False),
    "plain": (None, True),
}
MEASURED = ("stage1", *STAGE2)  # captions and questions, direct and with DaR
SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # Figure 7: stage 1 on so many times --images pairs; captions only
SCALE_LR = recipe.STAGE1["--lr"] / 2
STEPS = len(STAGE1) + len(STAGE2) + 3 * len(MEASURED) + 2 * len(SCALES)  # files a chain ends up with, see `finished`
BENCHMARKS = (("toycaptions", False), ("toyvqa", False), ("toyvqa", True))  # and whether with DaR


def scale_name(scale):
    return f"scale{scale:g}"


def scaled(scale, pairs):
    return max(1, round(scale * pairs))


def select_pairs(folder, kind, pairs):
    """The pairs whose rejected answer came from a bad prompt, or from a corrupted picture."""
    records = [record for _, record in read_records(folder / "pairs.jsonl")]
    kept = [record for record in records if record["image_corruption"] == (kind == "corruptions")]
    if len(kept) < pairs:
        raise InputError(f"{folder}: {len(kept)} pairs of {len(records)} are from {kind}, {pairs} are needed")
    files.write_text(folder / f"{kind}.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


def run_chain(model, folder, data, seed, pairs):
    """Everything of one base model and one seed."""
    pictures, instruct, results = folder / "unlabeled", folder / "instruct", folder / "results"
    # So many that either kind of rejected answer alone fills `pairs`: each is half of them, give or take chance.
    files.write_unlabeled(pictures, 2 * pairs + max(200, int(6 * pairs**0.5)), seed)
    files.write_instructions(instruct, recipe.num_instructions(pairs), seed)
    recipe.make_pairs(model, pictures, folder / "pairs.jsonl", seed)
    for kind in ("prompts", "corruptions"):
        select_pairs(folder, kind, pairs)
    for name, (changed, kind) in STAGE1.items():
        recipe.stage1(model, folder / f"{kind}.jsonl", pictures, folder / name, seed, pairs, **changed)
    for name, (before, plain) in STAGE2.items():
        recipe.stage2(model, before and folder / before, instruct, folder / name, seed, plain)
    for name in MEASURED:
        for benchmark, dar in BENCHMARKS:
            recipe.evaluate(benchmark, model, folder / name, data, results, dar)
    for scale in SCALES:
        adapter = folder / scale_name(scale)
        recipe.stage1(model, folder / "pairs.jsonl", pictures, adapter, seed, scaled(scale, pairs), lr=SCALE_LR)
        recipe.evaluate("toycaptions", model, adapter, data, results)


def run_base(model, folder, data):
    for benchmark, dar in BENCHMARKS:
        recipe.evaluate(benchmark, model, None, data, folder / "results", dar)


def work(log, job, *arguments):
    """Runs a job in a process of its own; what the scripts print goes to `log`."""
    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1, encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            job(*arguments)
        except InputError as error:
            print(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def finished(folders):
    """How many adapters and scores there are in the folders of chains."""
    return sum(len([*f.glob("*/adapter_config.json"), *f.glob("results/*.scores.json")]) for f in folders)


def run_jobs(jobs, total, processes):
    """Runs all jobs, `processes` at a time. Returns the folders of those that failed; Ctrl-C ends all of them."""
    context, there = multiprocessing.get_context("spawn"), finished(jobs)
    progress = console.Progress("study, steps", total - there)
    waiting, running, failed = list(jobs), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                folder = waiting.pop(0)
                running[folder] = context.Process(target=work, args=(folder / "log.txt", *jobs[folder]), daemon=True)
                running[folder].start()
            multiprocessing.connection.wait([process.sentinel for process in running.values()], timeout=2)
            if (now := finished(jobs)) > there:
                progress.add(now - there)
                there = now
            for folder in [folder for folder, process in running.items() if not process.is_alive()]:
                if running.pop(folder).exitcode:  # said at once; the other chains go on
                    failed.append(folder)
                    console.warn(f"a chain of the study failed; what it said is at the end of {folder / 'log.txt'}")
    finally:
        for process in running.values():
            process.terminate()
    return failed


def run(models, out, seeds, pairs, split, pictures, processes):
    if len({m.resolve().name for m in models}) < len(models):
        raise InputError("two of --model have the same name")
    settings = {"images": pairs, "split": split, "test_images": pictures}
    for model in models:
        recipe.claim(out / model.resolve().name, settings, model)
    print(f"drawing {pictures} pictures of the {split} split")
    data = out / split
    files.write_benchmark(data, split, pictures)
    jobs = {}  # folder: job and its arguments
    for model in models:
        folder = out / model.resolve().name / "base"
        jobs[folder] = run_base, model, folder, data
    for model in models:
        for seed in seeds:
            folder = out / model.resolve().name / f"seed{seed}"
            jobs[folder] = run_chain, model, folder, data, seed, pairs
    total = len(models) * (len(BENCHMARKS) + STEPS * len(seeds))
    print(f"{total} steps in {len(jobs)} chains, {finished(jobs)} of them done; see {out}/*/*/log.txt", flush=True)
    failed = run_jobs(jobs, total, processes)
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} chains failed; the same command goes on with what is missing")
    result = settings | {"seeds": list(seeds), "models": {}}
    result["scales"] = {scale_name(scale): scaled(scale, pairs) for scale in SCALES}
    for model in models:
        folder = out / model.resolve().name
        result["models"][folder.name] = collect(folder, seeds)
    tables.write(out, result)


# ---------------------------------------------------------------- results


def numbers(results, name, questions=True):
    """What was measured of one model: its captions' scores, accuracy direct and with DaR, also by type of question."""
    read = lambda benchmark, mode: read_json(results / f"{benchmark}-{name}-{mode}.scores.json")
    captions = read("toycaptions", "direct")
    values = {key: captions[key] for key in ("chair_i", "chair_s", "precision", "recall", "f1", "signature")}
    for mode in ("direct", "dar") if questions else ():
        scores = read("toyvqa", mode)
        values[mode] = scores["accuracy"]
        values |= {f"{mode} {kind}": own["accuracy"] for kind, own in scores["types"].items()}
    if questions:
        values["gain"] = round(values["dar"] - values["direct"], 2)
    return values


def collect(folder, seeds):
    """{variant: [values of each seed]} of one base model; the base's own are the same for every seed."""
    results = [folder / f"seed{seed}" / "results" for seed in seeds]
    values = {"base": [numbers(folder / "base/results", "base")] * len(seeds)}
    values |= {name: [numbers(r, name) for r in results] for name in MEASURED}
    return values | {scale_name(s): [numbers(r, scale_name(s), questions=False) for r in results] for s in SCALES}
