"""The whole recipe once on the toy world: draws pictures, runs the scripts, writes a table, pages and a
figure."""

from stic_min.report.options import Options
from stic_min.report.recipe import write as write_report
from stic_min.runtime.files import read_records
from stic_min.toy import captions as toy_captions
from stic_min.toy import files, pair_figure, recipe, story

HEADER = ["in %", "hallucinated objects (CHAIR_i)", "objects, F1", "questions, direct", "questions, DaR"]


def measure(model, adapter, data, results):
    captions = recipe.evaluate("toycaptions", model, adapter, data, results)
    direct = recipe.evaluate("toyvqa", model, adapter, data, results)
    dar = recipe.evaluate("toyvqa", model, adapter, data, results, "dar")
    return [captions["chair_i"], captions["f1"], direct["accuracy"], dar["accuracy"]]


def run(model, out, seed, images, test_images):
    instructions = recipe.num_instructions(images)
    recipe.claim(out, {"seed": seed, "images": images, "test_images": test_images}, model)
    unlabeled = out / "unlabeled"
    instruct = out / "instruct"
    data = out / "dev"
    results = out / "results"
    print(f"drawing pictures: {images} unlabeled, {instructions} for stage 2, {test_images} for evaluation")
    scenes = files.write_unlabeled(unlabeled, images, seed)
    files.write_instructions(instruct, instructions, seed)
    files.write_benchmark(data, "dev", test_images)

    # Algorithm 1, then Algorithm 2. Existing output is skipped.
    stage1, stic = out / "stage1", out / "stic"
    recipe.make_pairs(model, unlabeled, out / "pairs.jsonl", seed)
    recipe.stage1(model, out / "pairs.jsonl", unlabeled, stage1, seed)
    recipe.stage2(model, stage1, instruct, stic, seed, {})
    models = {"base": None, "stage 1": stage1, "STIC": stic}
    scores = {name: measure(model, adapter, data, results) for name, adapter in models.items()}

    pairs = [pair for _, pair in read_records(out / "pairs.jsonl")]
    pair_figure.write_figure(out / "pair.svg", pairs, unlabeled, scenes)
    story.write(out, model, scenes, scores)
    write_report(out, Options())
    report(out, model, scores)


def report(out, model, scores):
    """Writes table.json, prints the table, and names what to look at next."""
    rows = [[name, *values] for name, values in scores.items()]
    files.write_json(out / "table.json", [dict(zip(HEADER, row)) for row in rows])
    print()
    for name, *values in [HEADER, *rows]:
        texts = [value if isinstance(value, str) else f"{value:.1f}" for value in values]
        columns = [f"{text:>{len(title)}}" for text, title in zip(texts, HEADER[1:])]
        print(" | ".join([f"{name:<7}", *columns]))
    first = toy_captions.load(out / "dev")[0]
    shape = first["objects"][0].split()[1]
    script = recipe.short(recipe.ROOT / "evaluate.py")
    picture = recipe.short(out / "dev" / first["image"])
    print(f"\nWhat happened, step by step: {recipe.short(out / 'story.html')}. All pairs, curves and scores: "
          f"{recipe.short(out / 'report.html')}. To ask the model yourself:\n"
          f"python {script} ask --model {recipe.short(model)} --adapter {recipe.short(out / 'stic')} "
          f'--image {picture} "Where is the {shape}?"')  # fmt: skip
