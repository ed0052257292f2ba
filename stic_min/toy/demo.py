"""The whole recipe once, on the toy world: draws pictures, runs the four scripts, and ends in a table and a page."""

import json

from stic_min import cli
from stic_min.data import read_records
from stic_min.scorers import toy_captions
from stic_min.toy import files, recipe, sheet

ON_THE_SHEET = 24

INTRO = """What the base model, and the same model after STIC, say of pictures that neither was trained on, asked with
one of the short captioning prompts. <span class="right">Green</span>: the object is in the picture.
<span class="wrong">Red</span>: it is not. The base model learned from captions that mention a place's usual objects (a
beach has a yellow star) whether they are there or not; nobody told STIC which captions were wrong."""


def measure(model, adapter, data, results):
    captions = recipe.evaluate("toycaptions", model, adapter, data, results)
    direct = recipe.evaluate("toyvqa", model, adapter, data, results)
    dar = recipe.evaluate("toyvqa", model, adapter, data, results, dar=True)
    return [captions["chair_i"], captions["f1"], direct["accuracy"], dar["accuracy"]]


HEADER = [
    "in %",
    "hallucinated objects (CHAIR_i)",
    "objects, F1",
    "questions, direct",
    "questions, describe and respond",
]


def run(model, out, seed, images, test_images):
    recipe.claim(out, {"model": cli.fingerprint(model), "seed": seed, "images": images})
    instructions = recipe.num_instructions(images)
    unlabeled, instruct, data, results = out / "unlabeled", out / "instruct", out / "dev", out / "results"
    stage1, stic = out / "stage1", out / "stic"
    print(
        f"drawing {images} unlabeled pictures, {instructions} with instructions, {test_images} to evaluate on"
    )
    files.write_unlabeled(unlabeled, images, seed)
    files.write_instructions(instruct, instructions, seed)
    files.write_benchmark(data, "dev", test_images)

    # Algorithm 1, then Algorithm 2; nothing is run again that is there already.
    recipe.make_pairs(model, unlabeled, out / "pairs.jsonl", seed)
    recipe.stage1(model, out / "pairs.jsonl", unlabeled, stage1, seed)
    recipe.stage2(model, stage1, instruct, stic, seed)
    rows = [
        [name, *measure(model, adapter, data, results)]
        for name, adapter in (("base", None), ("stage 1", stage1), ("STIC", stic))
    ]

    said = {
        name: {r["question_id"]: r["text"] for _, r in read_records(results / f"toycaptions-{file}-direct.jsonl")}
        for name, file in (("base", "base"), ("after STIC", stic.name))
    }
    # Half of the pictures are ones where the base says something that is not there: that is what there is to see.
    questions = toy_captions.load(data)
    wrong = lambda q: set(toy_captions.mentions(said["base"][q["question_id"]], q["vocabulary"])) - set(q["objects"])
    chosen = [q for q in questions if wrong(q)][: ON_THE_SHEET // 2] + [q for q in questions if not wrong(q)][
        : ON_THE_SHEET // 2
    ]
    cells = [[name, *(f"{value:.1f}" for value in values)] for name, *values in rows]
    caption = f"{test_images} pictures of the dev split, {images} unlabeled pictures, seed {seed}"
    sheet.write_sheet(
        out / "sheet.html", "STIC on the toy world", INTRO, sheet.table(HEADER, cells, caption), data, chosen, said
    )
    (out / "table.json").write_text(json.dumps([dict(zip(HEADER, row)) for row in rows], indent=1) + "\n")

    print("\n" + " | ".join(["in %   ", *HEADER[1:]]))
    for name, *values in cells:
        print(" | ".join([f"{name:<7}", *(f"{value:>{len(head)}}" for value, head in zip(values, HEADER[1:]))]))
    print(
        f"\nTo look at: {recipe.short(out / 'sheet.html')}. To ask it yourself:\n"
        f"python evaluate.py ask --model {recipe.short(model)} --adapter {recipe.short(stic)} "
        f'--image {recipe.short(data / questions[0]["image"])} "Where is the {questions[0]["objects"][0]}?"'
    )
