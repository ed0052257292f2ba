"""The toy world: what the study relies on about its scenes, pictures, captions, questions and files.

Captions and questions are read back by this file's own patterns. Rates are measured on a few thousand samples
and must be within four standard deviations of the expected share.
"""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from stic_min.data import image_records, parse_instruction
from stic_min.text import CAPTION_PROMPTS
from stic_min.toy import captions as toy_captions
from stic_min.toy import files, world
from stic_min.toy import vqa as toy_vqa

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def by_split():
    return {split: world.scenes(split, 2000) for split in world.SPLITS}


@pytest.fixture(scope="module")
def scenes():
    return world.scenes("train", 4000)


def near(part, total, share):
    """Whether `part` of `total` is the expected share, up to chance; exactly so for a share of 0 or 1."""
    assert total >= 300, "too few to measure"
    return abs(part - total * share) <= 4 * (total * share * (1 - share)) ** 0.5 + 1e-9


def habits_of(scene):
    return {cell: name for name, cell in world.PLACES[scene.place][1]}


# ---------------------------------------------------------------- scenes


def test_splits_never_meet(by_split):
    """Every scene belongs to one split, by its hash alone; the splits have the shares of their tenths."""
    for split, scenes in by_split.items():
        assert len(set(scenes)) == len(scenes) == 2000
        assert {scene.split for scene in scenes} == {split}
    assert len(set().union(*by_split.values())) == 4 * 2000
    assert sorted(tenth for tenths in world.SPLITS.values() for tenth in tenths) == list(range(10))
    rng = random.Random(5)
    sampled = {world.random_scene(rng) for _ in range(4000)}
    splits = Counter(scene.split for scene in sampled)
    assert all(near(splits[split], len(sampled), len(tenths) / 10) for split, tenths in world.SPLITS.items())


def test_scenes_follow_from_split_and_seed(by_split):
    for split, scenes in by_split.items():
        assert world.scenes(split, 50, seed=0) == scenes[:50]  # a longer list begins with a shorter one
    seeds = [world.scenes("unlabeled", 2000, seed) for seed in (1, 2)]
    assert len(set(seeds[0]) & set(seeds[1])) < 0.2 * 2000


def test_scenes_and_base_rates(scenes):
    """Three to six objects, no shape twice. In its own place, a signature object is in its habitual cell in
    40% of the scenes and nowhere in the others; that cell is never empty."""
    present, total = Counter(), Counter()
    for scene in scenes:
        cells, names = zip(*scene.objects)
        assert list(cells) == sorted(set(cells)) and set(cells) <= set(range(9)) and 3 <= len(cells) <= 6
        assert len({name.split()[1] for name in names}) == len(names)
        habits = habits_of(scene)
        assert len(habits) == 2 and set(habits) <= set(cells)
        for cell, name in habits.items():
            total[scene.place, name] += 1
            present[scene.place, name] += scene.cells[cell] == name
            assert name not in [other for at, other in scene.objects if at != cell]
    assert len(total) == 2 * len(world.PLACES)
    assert world.TRULY_THERE == 0.4
    for key in total:
        assert near(present[key], total[key], 0.4), key


# ---------------------------------------------------------------- pictures


def middle(picture, cell, margin):
    """Mean color of a cell without `margin` pixels on each side."""
    top, left = cell // 3 * 16 + margin, cell % 3 * 16 + margin
    size = 16 - 2 * margin
    return np.asarray(picture, dtype=float)[top : top + size, left : left + size].mean((0, 1))


def nearest(color, colors):
    return min(colors, key=lambda name: np.linalg.norm(np.asarray(colors[name], dtype=float) - color))


def test_pictures_show_their_scene(scenes):
    """Objects have their color in their cell, empty cells the background. Scene and seed set the picture."""
    backgrounds = {place: background for place, (background, _) in world.PLACES.items()}
    right, total = Counter(), Counter()
    for seed, scene in enumerate(scenes[:300]):
        picture = world.paint(scene, seed)
        for cell in set(range(9)) - set(scene.cells):
            assert nearest(middle(picture, cell, 2), backgrounds | world.COLORS) == scene.place
        for cell, name in scene.objects:
            color, shape = name.split()
            if shape not in ("ring", "moon"):  # their middle is empty
                total[color] += 1
                right[color] += nearest(middle(picture, cell, 7), world.COLORS) == color
    assert set(total) == set(world.COLORS) and right.total() > 0.98 * total.total(), (right, total)
    one, other = scenes[:2]
    picture = world.paint(one, 1)
    assert (picture.size, picture.mode) == ((48, 48), "RGB")
    same, by_seed, by_scene = world.paint(one, 1), world.paint(one, 2), world.paint(other, 1)
    assert picture.tobytes() == same.tobytes() not in (by_seed.tobytes(), by_scene.tobytes())
    shapes = {world.paint(world.Scene("city", ((4, f"red {shape}"),)), 3).tobytes() for shape in world.SHAPES}
    assert len(shapes) == len(world.SHAPES)


# ---------------------------------------------------------------- captions


def read_caption(text):
    """(place, {cell: object}) of a caption."""
    place, rest = re.fullmatch(r"A (\w+)\.((?: [A-Z][a-z ]+: \w+ \w+\.)+)", text).groups()
    objects = re.findall(r"([A-Z][a-z ]+): (\w+ \w+)\.", rest)
    return place, {world.CELLS.index(cell.lower()): name for cell, name in objects}


def test_captions_of_every_kind_list_the_same_cells(scenes):
    """So a caption's length and order carry no information about its quality."""
    text = "A beach. Upper left: red circle. Center: blue ring. Lower middle: black cross."
    cells = {0: "red circle", 4: "blue ring", 7: "black cross"}
    assert world.caption("beach", cells) == text and read_caption(text) == ("beach", cells)
    rng = random.Random(1)
    different = 0
    for scene in scenes[:1500]:
        assert read_caption(world.true_caption(scene)) == (scene.place, scene.cells)
        texts = [world.true_caption(scene), *(world.web_caption(scene, kind, rng) for kind in world.HABIT)]
        for place, cells in map(read_caption, texts):
            assert place == scene.place and list(cells) == list(scene.cells)
            assert len(set(cells.values())) == len(cells)  # no object twice
        assert len({len(text.split()) for text in texts}) == 1
        different += len(set(texts)) > 1
    assert different > 1500 / 2  # otherwise there would be nothing to learn


@pytest.mark.parametrize("kind, first, second, imagined", [
    ("short", 0.9, 0.75, 0), ("good", 0.3, 0.45, 0), ("bad", 1.0, 1.0, 0.5)])  # fmt: skip
def test_priors(scenes, kind, first, second, imagined):
    """How often a caption mentions an absent signature object; only bad captions invent others, too."""
    rng = random.Random(kind)
    absent, mentioned, others, invented, both = Counter(), Counter(), 0, 0, []
    for scene in scenes:
        cells = read_caption(world.web_caption(scene, kind, rng))[1]
        habits = habits_of(scene)
        for number, (cell, name) in enumerate(habits.items()):
            assert cells[cell] in (name, scene.cells[cell])  # what is present is always mentioned
            if scene.cells[cell] != name:
                absent[number] += 1
                mentioned[number] += cells[cell] == name
        if not set(habits.values()) & scene.names:
            both.append(all(cells[cell] == name for cell, name in habits.items()))
        for cell in set(cells) - set(habits):
            others += 1
            invented += cells[cell] != scene.cells[cell]
            assert cells[cell] == scene.cells[cell] or cells[cell] not in {*scene.names, *habits.values()}
    assert near(mentioned[0], absent[0], first) and near(mentioned[1], absent[1], second)
    assert near(sum(both), len(both), first * second)  # independently of each other
    assert near(invented, others, imagined)


# ---------------------------------------------------------------- questions

COUNTS = "zero one two three four five six".split()
FORMS = {
    "color": r"What color is the (\w+)\?",
    "count": r"How many (\w+) objects are there\?",
    "existence": r"Is there an? (\w+) in the image\?",
    "relation": r"Is the (\w+) (above|below|left of|right of) the (\w+)\?",
    "place": r"Where is the (\w+)\?",
    "choice": r"What is at the ([a-z ]+)\?\nA\. (\w+ \w+)\nB\. (\w+ \w+)\nC\. (\w+ \w+)",
    "row": r"How many objects are in the (upper|middle|lower) row\?",
    "neighbor": r"What comes after the (\w+), row by row\?",
}


def read(question):
    """(type, the variable parts of the question); it must be of exactly one type."""
    [match] = [(kind, m.groups()) for kind, form in FORMS.items() if (m := re.fullmatch(form, question))]
    return match


def true_answer(scene, question):
    kind, given = read(question)
    cells = {name.split()[1]: cell for cell, name in scene.objects}
    if kind == "color":
        return scene.cells[cells[given[0]]].split()[0]
    if kind == "count":
        return COUNTS[sum(name.split()[0] == given[0] for _, name in scene.objects)]
    if kind == "existence":
        return "yes" if given[0] in cells else "no"
    if kind == "relation":
        (row, column), (other_row, other_column) = divmod(cells[given[0]], 3), divmod(cells[given[2]], 3)
        holds = {"above": row < other_row, "below": row > other_row,
                 "left of": column < other_column, "right of": column > other_column}  # fmt: skip
        return "yes" if holds[given[1]] else "no"
    if kind == "place":
        return world.CELLS[cells[given[0]]]
    if kind == "choice":
        return "ABC"[given[1:].index(scene.cells[world.CELLS.index(given[0])])]
    if kind == "row":
        row = ["upper", "middle", "lower"].index(given[0])
        return COUNTS[sum(cell in (3 * row, 3 * row + 1, 3 * row + 2) for cell in scene.cells)]
    later = [cell for cell in scene.cells if cell > cells[given[0]]]
    return scene.cells[min(later)]  # never asked about the last object


def test_the_true_answers_by_hand():
    """This file's own answers, on one scene."""
    #  red circle    -            blue ring
    #  -             red square   -
    #  green heart   -            -
    scene = world.Scene("city", ((0, "red circle"), (2, "blue ring"), (4, "red square"), (6, "green heart")))
    for question, answer in {
        "What color is the heart?": "green", "How many red objects are there?": "two",
        "How many black objects are there?": "zero", "Is there a square in the image?": "yes",
        "Is there a star in the image?": "no", "Is the circle above the ring?": "no",
        "Is the heart below the square?": "yes", "Is the ring right of the square?": "yes",
        "Where is the ring?": "upper right", "How many objects are in the upper row?": "two",
        "What is at the center?\nA. red circle\nB. red ring\nC. red square": "C",
        "What comes after the ring, row by row?": "red square",
    }.items():  # fmt: skip
        assert true_answer(scene, question) == answer, question


@pytest.fixture(scope="module")
def asked(scenes):
    """{type: [(scene, question, answer), ...]}, one of each type for each scene."""
    rng = random.Random(2)
    return {kind: [(scene, *world.ask(scene, kind, rng)) for scene in scenes] for kind in world.QUESTIONS}


def test_answers_are_true_and_vary(asked):
    assert set(asked) == set(FORMS)
    for kind, rows in asked.items():
        for scene, question, answer in rows:
            assert read(question)[0] == kind and answer == true_answer(scene, question), (scene, question)
        answers = Counter(answer for *_, answer in rows)
        assert answers.most_common(1)[0][1] < 0.7 * len(rows), kind  # no constant answer is good
    for kind in ("existence", "relation"):
        assert near(sum(answer == "yes" for *_, answer in asked[kind]), len(asked[kind]), 0.5)
    assert near(sum(answer == "A" for *_, answer in asked["choice"]), len(asked["choice"]), 1 / 3)


def test_choices_tempt_with_signature_objects(asked):
    """A choice about a habitual cell offers its signature object, present or not; one option is right."""
    for scene, question, _ in asked["choice"]:
        name, *options = read(question)[1]
        cell = world.CELLS.index(name)
        assert len(set(options)) == 3 and scene.cells[cell] in options
        assert habits_of(scene).get(cell, scene.cells[cell]) in options


def test_training_records(scenes):
    """Captions follow the prior of their prompt; answers and the descriptions in reading records are true."""
    rng = random.Random(8)
    kind_of = {prompt: kind for kind, prompts in world.PROMPTS.items() for prompt in prompts}
    absent, mentioned = Counter(), Counter()
    for scene in scenes[:3000]:
        _, [(prompt, text)] = world.caption_record(scene, rng)
        cell, name = next(iter(habits_of(scene).items()))
        absent[kind_of[prompt]] += scene.cells[cell] != name
        mentioned[kind_of[prompt]] += scene.cells[cell] != name and read_caption(text)[1][cell] == name
        _, [(first, answer), *later] = world.reading_record(scene, rng)
        head = f"Image description:\n{world.true_caption(scene)}\n\n"
        assert first.startswith(head) and answer == true_answer(scene, first.removeprefix(head))
        assert all(answer == true_answer(scene, question) for question, answer in later)
    assert all(near(mentioned[kind], absent[kind], first) for kind, (first, _) in world.HABIT.items())


def test_a_base_model_that_trusts_text_reads_hallucinations(scenes):
    """With `trust`, that share of the descriptions hallucinates, and all answers follow the description."""
    rng = random.Random(9)
    hallucinated = 0
    for scene in scenes[:2000]:
        _, [(first, answer), *later] = world.reading_record(scene, rng, trust=0.5)
        description, _, question = first.removeprefix("Image description:\n").partition("\n\n")
        place, cells = read_caption(description)
        described = world.Scene(place, tuple(sorted(cells.items())))
        assert place == scene.place and cells.keys() == scene.cells.keys()
        hallucinated += described != scene
        assert all(true_answer(described, q) == a for q, a in [(question, answer), *later])
    # Of the pictures, 1 - 0.4^2 lack a signature object; a caption mentions the first with 0.9, the second
    # with 0.75: 1 - (0.4 + 0.6 * 0.1) (0.4 + 0.6 * 0.25) = 0.747 hallucinate.
    assert near(hallucinated, 2000, 0.5 * 0.747)


# ---------------------------------------------------------------- files

PICTURES, RECORDS, UNLABELED, TRAINED_ON = 48, 12, 12, 15  # TRAINED_ON: in place of 20,000 scenes


def write_all(folder, seed=0):
    files.write_benchmark(folder / "test", "test", PICTURES)
    with mock.patch.object(world, "TRAINED_ON", TRAINED_ON):
        files.write_instructions(folder / "instructions", RECORDS, seed)
    files.write_unlabeled(folder / "unlabeled", UNLABELED, seed)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("toy"))


def test_files_are_reproducible(written, tmp_path):
    """Also over existing files, and in another process, where sets have another order."""
    assert contents(write_all(tmp_path)) == contents(written)
    script = f"""import random
from stic_min.toy import files, world
files.write_benchmark({str(tmp_path / "test")!r}, "test", {PICTURES})
rng = random.Random(3)
print([world.record(scene, rng) for scene in world.scenes("train", 40)])
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4321"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE)
    rng = random.Random(3)
    assert done.stdout.decode() == f"{[world.record(scene, rng) for scene in world.scenes('train', 40)]}\n"
    assert contents(tmp_path) == contents(written)
    files.write_benchmark(tmp_path / "shorter", "test", 5)
    shorter = {name: data for name, data in contents(tmp_path / "shorter").items() if name.endswith(".png")}
    assert len(shorter) == 5 and shorter.items() <= contents(written / "test").items()
    assert sorted(contents(written / "unlabeled")) == [f"unlabeled0_{i:05}.png" for i in range(UNLABELED)]


def test_instructions(written, tmp_path):
    """In LLaVA's format, with true answers about different training scenes; each seed has its own."""
    path = written / "instructions/instructions.json"
    records, total = image_records(path)
    assert len(records) == total == RECORDS
    known, used = world.scenes("train", TRAINED_ON), set()
    for where, record_id, record in records:
        instruction = parse_instruction(where, record_id, record)
        users, answers = zip(*instruction.turns)
        picture = Image.open(path.parent / "images" / instruction.image).tobytes()
        [scene] = [scene for scene in known if world.paint(scene, instruction.image).tobytes() == picture]
        used.add(scene)
        assert users[0].startswith("<image>\n")
        questions = [users[0].removeprefix("<image>\n"), *users[1:]]
        assert list(answers) == [true_answer(scene, question) for question in questions]
    assert len(used) == RECORDS
    others = image_records(write_all(tmp_path, seed=1) / "instructions/instructions.json")[0]
    assert not {record_id for _, record_id, _ in records} & {record_id for _, record_id, _ in others}
    assert [r["conversations"] for *_, r in records] != [r["conversations"] for *_, r in others]


def test_benchmark_files(written):
    """Pictures, objects and true answers of the split's scenes; prompts and question types take turns."""
    scenes = world.scenes("test", PICTURES)
    entries = toy_captions.load(written / "test")
    assert set(Counter(entry["text"] for entry in entries).values()) == {PICTURES // len(CAPTION_PROMPTS)}
    truths = []
    for entry, scene in zip(entries, scenes, strict=True):
        picture = Image.open(written / "test" / entry["image"])
        assert picture.tobytes() == world.paint(scene, Path(entry["image"]).name).tobytes()
        assert sorted(entry["signature"]) == sorted(habits_of(scene).values())
        truths.append({"question_id": entry["question_id"], "text": world.true_caption(scene)})
    scores = toy_captions.score(entries, truths)
    assert (scores["chair_i"], scores["precision"], scores["recall"], scores["signature"]) == (0, 100, 100, 0)

    questions = toy_vqa.load(written / "test")
    assert len({q["question_id"] for q in questions}) == len(questions) == 2 * PICTURES
    kinds = Counter(q["type"] for q in questions)
    assert set(kinds) == set(FORMS) and len(set(kinds.values())) == 1
    for number, entry in enumerate(questions):
        scene = scenes[number // 2]
        assert entry["image"] == entries[number // 2]["image"] and read(entry["text"])[0] == entry["type"]
        assert entry["answer"] == true_answer(scene, entry["text"])
