"""The whole recipe once on the toy world: draws pictures, runs the scripts, writes a table, a page and a
figure."""

from stic_min.runtime.files import read_records
from stic_min.toy import captions as toy_captions
from stic_min.toy import files, pair_figure, recipe, sheet

ON_THE_SHEET = 24

INTRO = """Captions by the base model, and by the same model after STIC, of pictures that neither was trained
on, under one of the short captioning prompts. <span class="right">Green</span>: the object is in the picture.
<span class="wrong">Red</span>: it is not. The base model was trained on captions that mention a place's usual
objects (a beach has a yellow star) whether or not they are present. STIC never learns which captions were
wrong. In the first half of the pictures the base model hallucinates, as it does in most; in the second half,
it does not."""

HEADER = ["in %", "hallucinated objects (CHAIR_i)", "objects, F1", "questions, direct", "questions, DaR"]


def measure(model, adapter, data, results):
    captions = recipe.evaluate("toycaptions", model, adapter, data, results)
    direct = recipe.evaluate("toyvqa", model, adapter, data, results)
    dar = recipe.evaluate("toyvqa", model, adapter, data, results, dar=True)
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
    recipe.stage2(model, stage1, instruct, stic, seed)
    models = {"base": None, "stage 1": stage1, "STIC": stic}
    rows = [[name, *measure(model, adapter, data, results)] for name, adapter in models.items()]
    files.write_json(out / "table.json", [dict(zip(HEADER, row)) for row in rows])

    cells = [[name, *(f"{value:.1f}" for value in values)] for name, *values in rows]
    note = (
        f"{test_images} pictures of the dev split, {images} unlabeled pictures, seed {seed}. DaR: the model "
        "describes the picture, then answers with its own description in the prompt."
    )
    captions = {"base": read_captions(results, "base"), "after STIC": read_captions(results, stic.name)}
    questions = toy_captions.load(data)
    selected = select(questions, captions["base"])
    page = out / "sheet.html"
    sheet.write_sheet(page, "STIC on the toy world", INTRO, HEADER, cells, note, data, selected, captions)
    pairs = [pair for _, pair in read_records(out / "pairs.jsonl")]
    pair_figure.write_figure(out / "pair.svg", pairs, unlabeled, scenes)

    print()
    for name, *values in [HEADER, *cells]:
        columns = [f"{value:>{len(title)}}" for value, title in zip(values, HEADER[1:])]
        print(" | ".join([f"{name:<7}", *columns]))
    shape = questions[0]["objects"][0].split()[1]
    script = recipe.short(recipe.ROOT / "evaluate.py")
    picture = recipe.short(data / questions[0]["image"])
    print(f"\nCaptions before and after: {recipe.short(page)}. To ask the model yourself:\n"
          f"python {script} ask --model {recipe.short(model)} --adapter {recipe.short(stic)} "
          f'--image {picture} "Where is the {shape}?"')  # fmt: skip


def read_captions(results, name):
    records = read_records(results / f"toycaptions-{name}-direct.jsonl")
    return {record["question_id"]: record["text"] for _, record in records}


def select(questions, captions):
    """Pictures for the page: half with a hallucinated object in the caption, half without."""

    def hallucinates(question):
        caption = captions[question["question_id"]]
        return bool(set(toy_captions.mentions(caption, question["vocabulary"])) - set(question["objects"]))

    wrong = [question for question in questions if hallucinates(question)]
    right = [question for question in questions if not hallucinates(question)]
    return wrong[: ON_THE_SHEET // 2] + right[: ON_THE_SHEET // 2]
