"""The paper's tables on the toy world, plus further controls, over several seeds and base models.

A chain is one base model and one seed: its own pictures, pairs, every training variant, every evaluation.
Existing output is skipped, so the same command resumes. Chains run in parallel, one single-threaded process
each, and log what the scripts print to their log.txt. The settings are those of recipe.py; they and the world
were fixed on the dev split before the test split was used.
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
from stic_min.runtime.files import read_json, read_records, write_text
from stic_min.toy import files, recipe, tables

# name: flags that differ from recipe.STAGE1, and the file of pairs
STAGE1 = {
    "stage1": ({}, "pairs"),
    "positives1": ({"beta": 0}, "pairs"),  # Table 3: Eq. 4.1 without its DPO term
    "alpha0_1": ({"alpha": 0}, "pairs"),
    "prompts1": ({}, "prompts"),
    "corruptions1": ({}, "corruptions"),
}
# name: the stage 1 that its stage 2 starts from (None: the base model), and whether descriptions are omitted
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
SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # Figure 7: pairs for stage 1 as a multiple of --images; captions only
SCALE_LR = recipe.STAGE1["--lr"] / 2
BENCHMARKS = (("toycaptions", False), ("toyvqa", False), ("toyvqa", True))  # name, with DaR
RUNS = len(STAGE1) + len(STAGE2) + len(SCALES)  # training runs per chain
STEPS = RUNS + len(BENCHMARKS) * len(MEASURED) + len(SCALES)  # adapters and scores per chain


def overview():
    """What a study trains, for --help."""
    lines = [f"  {name:<14}{label}" for name, label in tables.ROWS.items() if name != "base"]
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    return "\n".join([
        f"For each base model and seed, trains and evaluates ({RUNS} training runs):",
        *lines,
        f"  {'scale...':<14}stage 1 on {scales} times --images pairs (Figure 7)",
    ])  # fmt: skip


def scale_name(scale):
    return f"scale{scale:g}"


def scaled(scale, pairs):
    return max(1, round(scale * pairs))


def select_pairs(folder, kind, pairs):
    """Writes the pairs whose dispreferred response came from a bad prompt, or from a corrupted picture."""
    records = [record for _, record in read_records(folder / "pairs.jsonl")]
    selected = [record for record in records if record["image_corruption"] == (kind == "corruptions")]
    if len(selected) < pairs:
        raise InputError(
            f"{folder}: only {len(selected)} of {len(records)} pairs are from {kind}; {pairs} are needed"
        )
    write_text(folder / f"{kind}.jsonl", "".join(json.dumps(record) + "\n" for record in selected))


def run_chain(model, folder, data, seed, pairs):
    """Everything for one base model and one seed."""
    pictures = folder / "unlabeled"
    instruct = folder / "instruct"
    results = folder / "results"
    # Each kind of dispreferred response makes up about half; with this margin, either alone fills `pairs`.
    files.write_unlabeled(pictures, 2 * pairs + max(200, int(6 * pairs**0.5)), seed)
    files.write_instructions(instruct, recipe.num_instructions(pairs), seed)
    recipe.make_pairs(model, pictures, folder / "pairs.jsonl", seed)
    for kind in ("prompts", "corruptions"):
        select_pairs(folder, kind, pairs)
    for name, (overrides, kind) in STAGE1.items():
        recipe.stage1(model, folder / f"{kind}.jsonl", pictures, folder / name, seed, pairs, **overrides)
    for name, (start, plain) in STAGE2.items():
        recipe.stage2(model, start and folder / start, instruct, folder / name, seed, plain)
    for name in MEASURED:
        for benchmark, dar in BENCHMARKS:
            recipe.evaluate(benchmark, model, folder / name, data, results, dar)
    for scale in SCALES:
        adapter = folder / scale_name(scale)
        limit = scaled(scale, pairs)
        recipe.stage1(model, folder / "pairs.jsonl", pictures, adapter, seed, limit, lr=SCALE_LR)
        recipe.evaluate("toycaptions", model, adapter, data, results)


def run_base(model, folder, data):
    for benchmark, dar in BENCHMARKS:
        recipe.evaluate(benchmark, model, None, data, folder / "results", dar)


def run_logged(log, job, *arguments):
    """The main function of a chain's process; the scripts' output goes to `log`."""
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


def count_finished(folders):
    """Number of adapters and scores in the chains' folders."""
    return sum(len([*f.glob("*/adapter_config.json"), *f.glob("results/*.scores.json")]) for f in folders)


def run_jobs(jobs, total, processes):
    """Runs all jobs, `processes` at a time. Returns the folders of failed jobs. Ctrl-C ends all of them."""
    context = multiprocessing.get_context("spawn")
    finished = count_finished(jobs)
    progress = console.Progress("study, steps", total - finished)
    waiting, running, failed = list(jobs), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                folder = waiting.pop(0)
                arguments = (folder / "log.txt", *jobs[folder])
                running[folder] = context.Process(target=run_logged, args=arguments, daemon=True)
                running[folder].start()
            multiprocessing.connection.wait([process.sentinel for process in running.values()], timeout=2)
            if (now := count_finished(jobs)) > finished:
                progress.add(now - finished)
                finished = now
            for folder in [folder for folder, process in running.items() if not process.is_alive()]:
                if running.pop(folder).exitcode:  # reported at once; the other chains continue
                    failed.append(folder)
                    console.warn(f"a chain of the study failed; see the end of {folder / 'log.txt'}")
    finally:
        for process in running.values():
            process.terminate()
    return failed


def run(models, out, seeds, pairs, split, test_images, processes):
    if len({m.resolve().name for m in models}) < len(models):
        raise InputError("two --model folders have the same name")
    settings = {"images": pairs, "split": split, "test_images": test_images}
    for model in models:
        recipe.claim(out / model.resolve().name, settings, model)
    print(f"drawing {test_images} pictures of the {split} split")
    data = out / split
    files.write_benchmark(data, split, test_images)
    jobs = {}  # folder: function and its arguments
    for model in models:
        folder = out / model.resolve().name / "base"
        jobs[folder] = run_base, model, folder, data
    for model in models:
        for seed in seeds:
            folder = out / model.resolve().name / f"seed{seed}"
            jobs[folder] = run_chain, model, folder, data, seed, pairs
    total = len(models) * (len(BENCHMARKS) + STEPS * len(seeds))
    finished = count_finished(jobs)
    print(f"{total} steps in {len(jobs)} chains, {finished} already done; see {out}/*/*/log.txt", flush=True)
    failed = run_jobs(jobs, total, processes)
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} chains failed; run the same command to retry them")
    result = settings | {"seeds": list(seeds), "models": {}}
    result["scales"] = {scale_name(scale): scaled(scale, pairs) for scale in SCALES}
    for model in models:
        folder = out / model.resolve().name
        result["models"][folder.name] = collect(folder, seeds)
    tables.write(out, result)


# ---------------------------------------------------------------- results


def numbers(results, name, questions=True):
    """One model's results: caption scores, and accuracy direct and with DaR, overall and by question type."""
    read = lambda benchmark, mode: read_json(results / f"{benchmark}-{name}-{mode}.scores.json")
    captions = read("toycaptions", "direct")
    values = {key: captions[key] for key in ("chair_i", "chair_s", "precision", "recall", "f1", "signature")}
    for mode in ("direct", "dar") if questions else ():
        scores = read("toyvqa", mode)
        values[mode] = scores["accuracy"]
        values |= {f"{mode} {kind}": part["accuracy"] for kind, part in scores["types"].items()}
    if questions:
        values["gain"] = round(values["dar"] - values["direct"], 2)
    return values


def collect(folder, seeds):
    """{variant: [values per seed]} for one base model; the base's own values are the same for every seed."""
    results = [folder / f"seed{seed}" / "results" for seed in seeds]
    values = {"base": [numbers(folder / "base/results", "base")] * len(seeds)}
    values |= {name: [numbers(r, name) for r in results] for name in MEASURED}
    for name in map(scale_name, SCALES):
        values[name] = [numbers(r, name, questions=False) for r in results]
    return values
