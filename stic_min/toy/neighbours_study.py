"""STIC and its neighbours on the toy world, over several base models and seeds.

The base models are first taught to judge captions and to write questions (lessons.py); the methods are those
of neighbours_chain.py. Processes, resuming and tables are those of the study.
"""

from statistics import mean

from stic_min import InputError
from stic_min.report.page import markdown
from stic_min.runtime import console
from stic_min.runtime.files import read_json, write_text
from stic_min.toy import files, lessons, pretrain, recipe, study, tables
from stic_min.toy import neighbours_chain as chain
from stic_min.toy import neighbours_quality as quality

# Time on one core as a multiple of `study.probe`'s: lessons (10 minutes), and the average step with 1,000
# pictures and 500 test pictures (10 seconds).
LESSONS, STEP = 1575, 25
COLUMNS = ("chair_i", "f1", "direct", "dar")


def overview():
    """What is trained, for --help."""
    names = [f"  {name:<17}{label}" for name, label in chain.METHODS.items()]
    return "\n".join(["For each base model and seed, trains and evaluates:", *names])


# ---------------------------------------------------------------- the study


def base_models(out, models):
    """{folder: its seed, or None if it exists}. models: folders, or how many to use with seeds 0, 1, ..."""
    if not isinstance(models, int):
        return dict.fromkeys(models)
    pretrained = {seed: f"llava-toy-seed{seed}" for seed in range(1, models)}
    return {recipe.BASE: None} | {out / name / name: seed for seed, name in pretrained.items()}


def taught(out, model):
    """Where the copy of a base model that had lessons is. Its name differs from the base model's."""
    name = f"{model.resolve().name}-lessons"
    return out / name / name


def teach(model, copy, steps):
    if not (copy / "pretrain.json").exists():
        (copy / "config.json").unlink(missing_ok=True)  # of a run that was killed
        lessons.teach(model, copy, steps=steps)


def run(models, out, seeds, pictures, split, test_images, processes, lesson_steps=lessons.STEPS):
    """models: folders of base models, or how many to use."""
    bases = base_models(out, models)
    copies = {model: taught(out, model) for model in bases}
    if len(set(copies.values())) < len(bases):
        raise InputError("two --model folders have the same name")
    settings = {"images": pictures, "split": split, "test_images": test_images, "lesson_steps": lesson_steps}
    for model, seed in bases.items():
        recipe.claim(copies[model].parent, settings, model if seed is None else None)
        if seed is not None:  # it is pretrained here, and follows from the code
            recipe.claim(model.parent, {}, None)
    print(f"drawing {test_images} pictures of the {split} split")
    data = out / split
    files.write_benchmark(data, split, test_images)

    pretraining = {
        folder.parent: (study.pretrain_base, folder, seed, 0.0, pretrain.STEPS)
        for folder, seed in bases.items() if seed is not None
    }  # fmt: skip
    teaching = {copy.parent: (teach, model, copy, lesson_steps) for model, copy in copies.items()}
    jobs = {}  # {folder: function and its arguments}
    for copy in copies.values():
        folder = copy.parent / "base"
        jobs[folder] = chain.run_base, copy, folder, data
    for seed in seeds:
        for copy in copies.values():
            folder = copy.parent / f"seed{seed}"
            jobs[folder] = chain.run, copy, folder, data, seed, pictures
    total = len(copies) * (3 + len(seeds) * chain.STEPS)
    announce(pretraining, teaching, jobs, total, (pictures + test_images) / 1500, processes, out)
    for group, steps in ((pretraining, len(pretraining)), (teaching, len(teaching)), (jobs, total)):
        study.run_jobs(group, steps, processes)
    result = settings | {"seeds": list(seeds), "labels": chain.labels_used(pictures)}
    result["models"] = {copy.name: collect(copy.parent, seeds, pictures) for copy in copies.values()}
    result["lessons"] = {copy.name: read_json(copy / "pretrain.json")["dev"] for copy in copies.values()}
    write(out, result)


def announce(pretraining, teaching, jobs, total, size, processes, out):
    """Says how much there is to do, and how long that takes on this machine."""
    remaining = lambda group, steps: steps - study.count_finished(group)
    unpretrained = remaining(pretraining, len(pretraining))
    untaught = remaining(teaching, len(teaching))
    steps = remaining(jobs, total)
    cost = unpretrained * study.PRETRAINING + untaught * LESSONS + steps * size * STEP
    time = console.clock(study.probe() * cost / processes)
    print(
        f"{unpretrained} base models to pretrain, {untaught} to teach, {steps} of {total} steps left in "
        f"{len(jobs)} chains: about {time} on this machine in {processes} processes; see the files log.txt "
        f"in {out}", flush=True
    )  # fmt: skip


# ---------------------------------------------------------------- results


def collect(folder, seeds, pictures):
    """{method: [values per seed]} for one base model; the base's own values are the same for every seed."""
    base = study.numbers(folder / "base/results", "base")
    values = {"base": [base] * len(seeds)} | {name: [] for name in chain.TRAINED}
    for seed in seeds:
        seed_folder, scenes = folder / f"seed{seed}", chain.named_scenes(pictures, seed)
        for name in chain.TRAINED:
            values[name].append(
                study.numbers(seed_folder / "results", name) | quality.cost(seed_folder, name)
                | quality.pair_quality(seed_folder, name, scenes)
            )  # fmt: skip
    return values


def main_table(variants, labels_used):
    """One base model: scores, labels, pairs, steps and time of every method, as means over the seeds."""
    rows = []
    for name, label in chain.METHODS.items():
        values = variants[name]
        average = lambda key: mean(value[key] for value in values)
        cells = [tables.spread([value[key] for value in values]) for key in COLUMNS]
        cells.append(labels_used[name])
        if name != "base":
            cells.append(f"{average('pairs'):,.0f} ({average('right'):.0f} / {average('wrong'):.0f})")
            cells += [f"{average('steps'):.0f}", console.clock(average("seconds"))]
        rows.append([label, *cells])
    header = ["", *(tables.COLUMNS[key] for key in COLUMNS)]
    header += ["labels", "pairs (right / wrong)", "steps", "time"]
    return markdown(header, [row + [""] * (len(header) - len(row)) for row in rows])


def lessons_table(scores):
    """The critic on dev scenes, for each base model after its lessons."""
    rows = []
    for name, dev in scores.items():
        for critic in ("critic", "critic without reference"):
            keys = "accuracy", "verdict_1", "agree", "no_verdict"
            cells = ["" if dev[critic][key] is None else f"{dev[critic][key]:.1f}" for key in keys]
            rows.append([f"{name}, {critic}", *cells])
    return markdown(["in %", "right", "verdict 1", "agree after swapping", "no verdict"], rows)


def write(out, result):
    """Writes neighbours.json and neighbours.md to `out`, and prints the tables."""
    first, last = result["seeds"][0], result["seeds"][-1]
    parts = [
        f"{result['test_images']} pictures of the {result['split']} split, seeds {first} to {last}, "
        f"{result['images']} unlabeled pictures for every method; in %, mean ± standard deviation over the "
        "seeds. Labels: what a method is told about its pictures. Pairs: those that it trains on; in "
        "brackets, % whose chosen response mentions fewer absent objects than the rejected one, and % where "
        "it mentions more (of triplets, for triangular consistency: % whose answer is the true one, and % "
        "with another; the others have none). Steps: of training. Time: of all its commands, on "
        "one core. Differences: in percentage points, mean ± half of the 95% interval over the seeds, and "
        "the seeds that agree; 0: equal for every seed.",
        "**Lessons**, on dev scenes", lessons_table(result["lessons"]),
    ]  # fmt: skip
    others = lambda reference: [method for method in chain.METHODS if method != reference]
    compared = {"base": others("base"), "stic": others("stic"), "stage1": ["spin", "povid"],
                "spin": ["spinstage2"], "sima": ["simanll"], "trirandom": ["triangular"]}  # fmt: skip
    models = result["models"]
    for name, variants in models.items():
        parts += [f"**{name}**", main_table(variants, result["labels"])]
        for reference, methods in compared.items():
            parts.append(tables.differences_table(variants, methods, reference, chain.METHODS))
    if len(models) > 1:
        parts.append(f"**{', '.join(models)}**: mean of their means [lowest, highest] (seeds that agree)")
        for reference, methods in compared.items():
            parts.append(tables.summary_table(models, methods, reference, chain.METHODS))
    report = "\n\n".join(parts) + "\n"
    files.write_json(out / "neighbours.json", result)
    write_text(out / "neighbours.md", report)
    print(f"{report}\nwrote neighbours.json and neighbours.md to {out}")
