"""The whole recipe once, on the toy world: draws pictures, runs the four scripts, and ends in a table and a page."""

from stic_min.runtime.files import read_records
from stic_min.toy import captions as toy_captions
from stic_min.toy import files, recipe, sheet

ON_THE_SHEET = 24

INTRO = """What the base model, and the same model after STIC, say of pictures that neither was trained on, asked with
one of the short captioning prompts. <span class="right">Green</span>: the object is in the picture.
<span class="wrong">Red</span>: it is not. The base model learned from captions that mention a place's usual objects (a
beach has a yellow star) whether they are there or not; nobody told STIC which captions were wrong. The first half of
the pictures are ones where the base is wrong, which it is in most, the second half ones where it is right."""


def measure(model, adapter, data, results):
    captions = recipe.evaluate("toycaptions", model, adapter, data, results)
    direct = recipe.evaluate("toyvqa", model, adapter, data, results)
    dar = recipe.evaluate("toyvqa", model, adapter, data, results, dar=True)
    return [captions["chair_i"], captions["f1"], direct["accuracy"], dar["accuracy"]]


HEADER = ["in %", "hallucinated objects (CHAIR_i)", "objects, F1", "questions, direct", "questions, DaR"]


def run(model, out, seed, images, test_images):
    instructions = recipe.num_instructions(images)
    recipe.claim(out, {"seed": seed, "images": images, "test_images": test_images}, model)
    unlabeled, instruct, data, results = out / "unlabeled", out / "instruct", out / "dev", out / "results"
    stage1, stic = out / "stage1", out / "stic"
    print(f"drawing {images} unlabeled pictures, {instructions} with instructions, {test_images} to evaluate on")
    files.write_unlabeled(unlabeled, images, seed)
    files.write_instructions(instruct, instructions, seed)
    files.write_benchmark(data, "dev", test_images)

    # Algorithm 1, then Algorithm 2; what is there is not made again.
    recipe.make_pairs(model, unlabeled, out / "pairs.jsonl", seed)
    recipe.stage1(model, out / "pairs.jsonl", unlabeled, stage1, seed)
    recipe.stage2(model, stage1, instruct, stic, seed)
    models = {"base": None, "stage 1": stage1, "STIC": stic}
    rows = [[name, *measure(model, adapter, data, results)] for name, adapter in models.items()]
    files.write_json(out / "table.json", [dict(zip(HEADER, row)) for row in rows])

    cells = [[name, *(f"{value:.1f}" for value in values)] for name, *values in rows]
    caption = f"{test_images} pictures of the dev split, {images} unlabeled pictures, seed {seed}. DaR: the model "
    caption += "describes the picture, then responds with its own description in the prompt."
    captions = {"base": read_captions(results, "base"), "after STIC": read_captions(results, stic.name)}
    questions = toy_captions.load(data)
    page, summary = out / "sheet.html", sheet.table(HEADER, cells, caption)
    chosen = select(questions, captions["base"])
    sheet.write_sheet(page, "STIC on the toy world", INTRO, summary, data, chosen, captions)

    print("\n" + " | ".join([f"{HEADER[0]:<7}", *HEADER[1:]]))
    for name, *values in cells:
        print(" | ".join([f"{name:<7}", *(f"{value:>{len(head)}}" for value, head in zip(values, HEADER[1:]))]))
    shape = questions[0]["objects"][0].split()[1]
    script, picture = recipe.short(recipe.ROOT / "evaluate.py"), recipe.short(data / questions[0]["image"])
    print(f"\nTo look at: {recipe.short(page)}. To ask it yourself:\npython {script} ask --model {recipe.short(model)} "
          f'--adapter {recipe.short(stic)} --image {picture} "Where is the {shape}?"')


def read_captions(results, name):
    return {r["question_id"]: r["text"] for _, r in read_records(results / f"toycaptions-{name}-direct.jsonl")}


def select(questions, captions):
    """Pictures for the sheet: as many of which the caption names something that is not there as of the others."""
    wrong = lambda q: set(toy_captions.mentions(captions[q["question_id"]], q["vocabulary"])) - set(q["objects"])
    half = ON_THE_SHEET // 2
    return [q for q in questions if wrong(q)][:half] + [q for q in questions if not wrong(q)][:half]
