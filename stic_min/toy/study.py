"""The paper's tables on the toy world, the release's differences from the paper, and further controls, over
several base models and seeds.

A chain (chain.py) is one base model and one seed. Chains run in parallel, one single-threaded process each,
and log what the scripts print to their log.txt. Base models are pretrained first, the same way. Existing
output is skipped, so the same command resumes.
"""

import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from statistics import mean

import torch

from stic_min import InputError
from stic_min.loader import load_llava
from stic_min.runtime import console
from stic_min.runtime.files import read_json, read_records
from stic_min.toy import chain, files, pretrain, recipe, tables, world

TRUSTING = "trusting"  # the base model that believes a description in its prompt rather than the picture
TRUST = 0.5
# Time on one core as a multiple of `probe`'s, measured on one machine (0.38 s, 21 minutes and 8.2 s): a base
# model, and the average step with 1,000 pairs and 500 test pictures.
PRETRAINING, STEP = 3400, 21.5


def overview():
    """What a study trains, for --help."""
    line = lambda name: f"  {name:<17}{tables.LABELS[name]}"
    names = [name for name in tables.LABELS if name not in ("base", *chain.ROUNDS)]
    scales = ", ".join(f"{scale:g}" for scale in chain.SCALES)
    return "\n".join([
        f"For each base model and seed (of the one that trusts text, only {', '.join(chain.MAIN)}), trains "
        "and evaluates:", *map(line, names),
        "and for the first base model:", *map(line, chain.ROUNDS),
        "  beta...-lr...    stage 1 over a grid of beta and learning rate",
        f"  scale...         stage 1 on {scales} times --images pairs (Figure 7)",
        f"  {', '.join(chain.ROUNDING)}: stage 1 at a small learning rate",
    ])  # fmt: skip


# ---------------------------------------------------------------- processes


def run_logged(log, job, *arguments):
    """The main function of a job's process; its output goes to `log`."""
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
    """Number of base models, adapters and scores in the jobs' folders."""
    patterns = "*/pretrain.json", "*/adapter_config.json", "results*/*.scores.json"
    return sum(len([*folder.glob(pattern)]) for folder in folders for pattern in patterns)


def run_jobs(jobs, total, processes):
    """Runs all jobs, `processes` at a time. Ctrl-C ends all of them. Raises InputError if some failed."""
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
                if running.pop(folder).exitcode:  # reported at once; the other jobs continue
                    failed.append(folder)
                    console.warn(f"a part of the study failed; see the end of {folder / 'log.txt'}")
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} parts failed; run the same command to retry them")


def probe():
    """Seconds that this machine takes, on one core, for a little of the study's own work."""
    llava = load_llava(recipe.BASE)
    scenes = world.scenes("dev", 40)
    pictures = [[world.paint(scene, i)] for i, scene in enumerate(scenes)]
    prompts = [llava.chat_prompt(world.PROMPTS["short"][0])] * len(scenes)
    begin = time.monotonic()
    llava.generate(prompts, pictures, max_new_tokens=48)
    return time.monotonic() - begin


# ---------------------------------------------------------------- the study


def base_models(out, count):
    """{folder: (seed, trust)} of `count` base models and the trusting one, to be pretrained in OUT/NAME/NAME.
    The first one, with seed 0, comes with the project: None."""
    how = {f"llava-toy-seed{seed}": (seed, 0.0) for seed in range(1, count)}
    how[f"llava-toy-{TRUSTING}"] = 0, TRUST
    return {recipe.BASE: None} | {out / name / name: value for name, value in how.items()}


def pretrain_base(folder, seed, trust, steps):
    if not (folder / "pretrain.json").exists():
        (folder / "config.json").unlink(missing_ok=True)  # of a run that was killed
        pretrain.pretrain(folder, seed, trust, steps)


def run(models, out, seeds, pairs, split, test_images, processes, steps=pretrain.STEPS):
    """models: folders of base models, or how many to pretrain, besides the one that trusts text."""
    bases = base_models(out, models) if isinstance(models, int) else dict.fromkeys(models)
    if len({model.resolve().name for model in bases}) < len(bases):
        raise InputError("two --model folders have the same name")
    settings = {"images": pairs, "split": split, "test_images": test_images}
    for model, how in bases.items():  # a model that is pretrained here follows from the code
        recipe.claim(out / model.resolve().name, settings, None if how else model)
    print(f"drawing {test_images} pictures of the {split} split")
    data = out / split
    files.write_benchmark(data, split, test_images)

    pretraining = {
        folder.parent: (pretrain_base, folder, *how, steps) for folder, how in bases.items() if how
    }
    jobs, total = {}, 0  # {folder: function and its arguments}
    for model in bases:
        folder = out / model.resolve().name
        jobs[folder / "base"] = chain.run_base, model, folder / "base", data
    for seed in seeds:
        for number, model in enumerate(bases):
            kind = number == 0, model.name.endswith(TRUSTING)
            folder = out / model.resolve().name / f"seed{seed}"
            jobs[folder] = chain.run, model, folder, data, seed, pairs, *kind
            total += chain.num_steps(*kind)
    total += 6 * len(bases) + len(pretraining)
    announce(pretraining, jobs, total, (pairs + test_images) / 1500, processes, out)
    run_jobs(pretraining, len(pretraining), processes)
    run_jobs(jobs, total - len(pretraining), processes)
    result = settings | {"seeds": list(seeds), "models": {}}
    result |= {"betas": chain.BETAS, "rates": chain.RATES, "rounding": chain.ROUNDING}
    result["scales"] = {chain.scale_name(scale): chain.scaled(scale, pairs) for scale in chain.SCALES}
    for number, model in enumerate(bases):
        name, main_only = model.resolve().name, model.name.endswith(TRUSTING)
        result["models"][name] = collect(out / name, seeds, number == 0, main_only)
    tables.write(out, result)


def announce(pretraining, jobs, total, size, processes, out):
    """Says how much there is to do, and how long that takes on this machine."""
    unpretrained = len(pretraining) - count_finished(pretraining)
    done = count_finished([*pretraining, *jobs])
    seconds = probe() * (unpretrained * PRETRAINING + (total - done - unpretrained) * size * STEP) / processes
    print(
        f"{total} steps in {len(jobs)} chains, {done} already done: about {console.clock(seconds)} on this "
        f"machine in {processes} processes; see the files log.txt in {out}", flush=True
    )  # fmt: skip


# ---------------------------------------------------------------- results


def numbers(folder, name, dar="dar", questions=True):
    """One model's results: caption scores, and accuracy direct and with DaR, overall and by question type."""
    read = lambda benchmark, mode: read_json(folder / f"{benchmark}-{name}-{mode}.scores.json")
    captions = read("toycaptions", "direct")
    values = {key: captions[key] for key in ("chair_i", "chair_s", "precision", "recall", "f1", "signature")}
    for key, mode in {"direct": "direct", "dar": dar}.items() if questions else ():
        scores = read("toyvqa", mode)
        values[key] = scores["accuracy"]
        values |= {f"{key} {kind}": part["accuracy"] for kind, part in scores["types"].items()}
    if questions:
        values["gain"] = round(values["dar"] - values["direct"], 2)
    return values


def final_margin(folder):
    """Mean margin between the responses' rewards over the last quarter of a training run."""
    margins = [line["margin"] for _, line in read_records(folder / "log.jsonl") if "margin" in line]
    return {"margin": mean(margins[3 * len(margins) // 4 :])}


def collect(folder, seeds, is_first, main_only):
    """{variant: [values per seed]} for one base model; the base's own values are the same for every seed."""
    chains = [folder / f"seed{seed}" for seed in seeds]
    values = {"base": [numbers(folder / "base/results", "base")] * len(chains)}
    values["baseF"] = [numbers(folder / "base/results-vicuna", "base")] * len(chains)
    for name in chain.MAIN if main_only else chain.MEASURED:
        dar = "blind-dar" if name == "released" else "dar"
        values[name] = [numbers(c / "results", name, dar) for c in chains]
    if not main_only:
        values["E"] = [numbers(c / "results", "stic", "blind-dar") for c in chains]
    if is_first:
        values |= {name: [numbers(c / "results", name) for c in chains] for name in chain.ROUNDS}
        for name in (*chain.GRID, *map(chain.scale_name, chain.SCALES)):
            values[name] = [numbers(c / "results", name, questions=False) for c in chains]
        for name in chain.ROUNDING:
            values[name] = [final_margin(c / name) for c in chains]
    return values
