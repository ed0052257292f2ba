"""The toy world: what its scenes, pictures, captions, questions and files promise, each read again from the scene.

Rates are measured on a few thousand draws, to within four standard deviations of a share in so many.
"""

import functools
import inspect
import itertools
import math
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
from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS
from stic_min.toy import captions as toy_captions
from stic_min.toy import files, world
from stic_min.toy import vqa as toy_vqa

ROOT = Path(__file__).resolve().parents[2]
# (split, seed): how many scenes
DRAWS = {("train", 0): 4000, ("train", 1): 2000, ("train", 2): 2000, ("unlabeled", 0): 3000, ("unlabeled", 1): 2000,
         ("unlabeled", 2): 2000, ("dev", 0): 2000, ("test", 0): 2000}  # fmt: skip
HOLLOW = ("ring", "moon")  # shapes that leave their middle free


@pytest.fixture(scope="module")
def drawn():
    return {(split, seed): world.scenes(split, count, seed) for (split, seed), count in DRAWS.items()}


@pytest.fixture(scope="module")
def scenes(drawn):
    return drawn["train", 0]


def near(part, whole, share):
    """Whether `part` of `whole` is as large a share as expected, up to chance. A share of 0 or 1 leaves it none."""
    assert whole >= 300, "too few to measure"
    return abs(part - whole * share) <= 4 * (whole * share * (1 - share)) ** 0.5 + 1e-9


# ---------------------------------------------------------------- scenes


def test_splits_never_meet(drawn):
    assert {split for split, _ in drawn} == set(world.SPLITS)
    assert {key: len(set(scenes)) for key, scenes in drawn.items()} == DRAWS  # as many as asked for, no two alike
    splits = {}
    for (split, _), scenes in drawn.items():
        splits.setdefault(split, set()).update((scene.place, scene.objects) for scene in scenes)
    for one, other in itertools.combinations(splits, 2):
        assert not splits[one] & splits[other], (one, other)


def test_splits_share_out_all_scenes():
    """Every scene belongs to one split, which has the share of them that its tenths say."""
    assert sorted(tenth for tenths in world.SPLITS.values() for tenth in tenths) == list(range(10))
    rng = random.Random(5)
    found = {world.random_scene(rng) for _ in range(4000)}
    splits = Counter(scene.split for scene in found)
    assert set(splits) == set(world.SPLITS)
    for split, tenths in world.SPLITS.items():
        assert near(splits[split], len(found), len(tenths) / 10), splits


def test_scenes_are_repeatable_and_a_longer_draw_goes_on(drawn):
    for (split, seed), found in drawn.items():
        assert world.scenes(split, 50, seed) == found[:50]
        assert world.scenes(split, 20, seed) == world.scenes(split, 50, seed)[:20]
    assert world.scenes("dev", 20) == drawn["dev", 0][:20]  # seed 0 without being asked
    for split in ("train", "unlabeled"):
        heads = [tuple(drawn[split, seed][:20]) for seed in range(3)]
        assert len(set(heads)) == 3
        assert len(set(drawn[split, 1]) & set(drawn[split, 2])) < 0.2 * len(drawn[split, 1])  # nearly all are others
    assert world.scenes("train", 0) == []


def probe():
    import hashlib
    import random

    from stic_min.toy import world

    rng, seen = random.Random(3), []
    for scene in world.scenes("unlabeled", 40, 7):
        seen += [scene, scene.split, world.paint(scene, 5).tobytes(), world.caption_facts(scene)]
        seen += [world.ask(scene, kind, rng) for kind in world.QUESTIONS]
        seen += [world.web_caption(scene, kind, rng) for kind in world.HABIT]
        seen += [world.record(scene, rng) for _ in range(3)]
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def test_another_process_draws_the_same():
    """Nothing hangs on the order of sets, which differs from process to process."""
    script = f"{inspect.getsource(probe)}\nprint(probe())"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4321", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == probe(), done.stderr


def test_objects(drawn):
    names = world.all_objects()
    assert len(names) == len(set(names)) == len(world.COLORS) * len(world.SHAPES)
    for scene in itertools.chain.from_iterable(drawn.values()):
        cells, objects = zip(*scene.objects)
        assert list(cells) == sorted(set(cells)) and set(cells) <= set(range(9))
        assert len({name.split()[1] for name in objects}) == len(objects) < len(world.NUMBERS)  # no shape twice
        assert set(objects) <= set(names)
        assert (scene.cells, scene.names) == (dict(scene.objects), set(objects))
    everywhere = {(scene.place, cell) for scene in drawn["train", 0] for cell, _ in scene.objects}
    assert everywhere == set(itertools.product(world.PLACES, range(9)))
    assert len({len(scene.objects) for scene in drawn["train", 0]}) > 1


def test_signature_objects(drawn):
    """In its place a signature object is at its habitual cell or nowhere; what else is in that cell is no signature."""
    there, seen, elsewhere = Counter(), Counter(), Counter()
    for scene in drawn["train", 0] + drawn["unlabeled", 0]:
        own = world.PLACES[scene.place][1]
        assert world.signatures(scene.place) == own and len(own) == 2
        for number, (name, cell) in enumerate(own):
            seen[scene.place, number] += 1
            there[scene.place, number] += scene.cells[cell] == name  # the cell is never empty
            assert name not in [other for at, other in scene.objects if at != cell]
        habitual = {cell for _, cell in own}
        assert len(habitual) == 2 and habitual <= set(scene.cells)
        for place, ((first, _), (second, _)) in ((place, world.signatures(place)) for place in world.PLACES):
            elsewhere[place] += place != scene.place and bool({first, second} & scene.names)
    assert set(seen) == {(place, number) for place in world.PLACES for number in (0, 1)}
    for key, whole in seen.items():
        assert near(there[key], whole, world.TRULY_THERE), key
    assert near(there.total(), seen.total(), world.TRULY_THERE)
    total = len(drawn["train", 0]) + len(drawn["unlabeled", 0])
    for place in world.PLACES:
        assert near(seen[place, 0], total, 1 / len(world.PLACES)), place
        assert elsewhere[place]  # other places have these objects too, as any other


# ---------------------------------------------------------------- pictures


def cell_pixels(picture, cell, margin):
    """Pixels of a cell without `margin` on each side, as floats."""
    size = world.SIDE // 3
    top, left = cell // 3 * size + margin, cell % 3 * size + margin
    return np.asarray(picture, dtype=float)[top : top + size - 2 * margin, left : left + size - 2 * margin]


def nearest(color, colors):
    return min(colors, key=lambda name: np.linalg.norm(np.asarray(colors[name], dtype=float) - color))


def test_a_picture_is_its_seed_and_scene(scenes):
    one, other = scenes[:2]
    picture = world.paint(one, 1)
    assert (picture.size, picture.mode) == ((48, 48), "RGB")
    assert picture.tobytes() == world.paint(one, 1).tobytes()
    assert picture.tobytes() == world.paint(one, "1").tobytes()  # a name will do as well as a number
    assert picture.tobytes() != world.paint(one, 2).tobytes()
    assert picture.tobytes() != world.paint(other, 1).tobytes()


def test_objects_have_their_color_in_their_cell(scenes):
    right, wrong = Counter(), []
    for seed, scene in enumerate(scenes[:500]):
        picture = world.paint(scene, seed)
        for cell, name in scene.objects:
            color, shape = name.split()
            if shape not in HOLLOW:
                seen = nearest(cell_pixels(picture, cell, 7).mean((0, 1)), world.COLORS)
                right[color, seen == color] += 1
                wrong += [(name, seen)] if seen != color else []
    assert {color for color, _ in right} == set(world.COLORS)
    assert len(wrong) < 0.02 * right.total(), (right, wrong)
    for color in world.COLORS:
        assert right[color, True] > 0.9 * (right[color, True] + right[color, False]), (right, wrong)


def test_empty_cells_and_hollow_shapes_show_the_background(scenes):
    backgrounds = {place: background for place, (background, _) in world.PLACES.items()}
    known, middles, spread = backgrounds | world.COLORS, Counter(), []
    for seed, scene in enumerate(scenes[:500]):
        picture = world.paint(scene, seed)
        empty = [cell_pixels(picture, cell, 2) for cell in range(9) if cell not in scene.cells]
        means = [pixels.mean((0, 1)) for pixels in empty]
        assert {nearest(mean, known) for mean in means} == {scene.place}
        # One background a picture: the means of 12 x 12 pixels differ by noise alone, five deviations of a difference.
        assert np.ptp(means, axis=0).max() <= 0.5 + 5 * world.NOISE * 2**0.5 / 12
        spread += [pixels[..., 2].std() for pixels in empty if scene.place == "city"]  # mid-grey, so never cut off
        for cell, name in scene.objects:
            color, shape = name.split()
            if shape in HOLLOW:
                middle = cell_pixels(picture, cell, 7).mean((0, 1))
                away = [np.linalg.norm(middle - c) for c in (means[0], world.COLORS[color])]
                middles[shape, bool(away[0] < away[1])] += 1
    assert np.mean(spread) == pytest.approx(world.NOISE, rel=0.1, abs=0.5)
    for shape in HOLLOW:
        assert middles[shape, True] > 0.7 * (middles[shape, True] + middles[shape, False]) > 0, middles


def test_no_two_shapes_look_alike():
    """Where a cell differs from the background, for each shape with the same seed: size and place are the same too."""
    masks = {}
    for shape in world.SHAPES:
        picture = world.paint(world.Scene("city", ((4, f"red {shape}"),)), 3)
        masks[shape] = (cell_pixels(picture, 4, 0)[..., 1] < 100).ravel()  # red has less green than the grey city
        assert 0.1 < masks[shape].mean() < 0.8
        assert not (cell_pixels(picture, 0, 0)[..., 1] < 100).any()
    for one, other in itertools.combinations(world.SHAPES, 2):
        assert (masks[one] != masks[other]).mean() > 0.02, (one, other)


# ---------------------------------------------------------------- captions


def said(text):
    """What a caption says -> (place, [(cell's name, object), ...]), read by a pattern of the test's own."""
    head, rest = re.fullmatch(r"A (\w+)\.((?: [A-Z][a-z ]+: \w+ \w+\.)+)", text).groups()
    return head, [(cell.lower(), name) for cell, name in re.findall(r"([A-Z][a-z ]+): (\w+ \w+)\.", rest)]


def caption_parts(text):
    """The same with the cells' numbers."""
    place, parts = said(text)
    return place, [(world.CELLS.index(cell), name) for cell, name in parts]


def test_a_caption_by_hand():
    text = "A beach. Upper left: red circle. Center: blue ring. Lower middle: black cross."
    cells = {7: "black cross", 0: "red circle", 4: "blue ring"}
    assert world.caption("beach", cells) == text
    assert caption_parts(text) == ("beach", [(0, "red circle"), (4, "blue ring"), (7, "black cross")])
    assert world.caption("city", {}) == "A city."


def test_captions_come_apart_again(scenes):
    rng = random.Random(0)
    for scene in scenes[:1000]:
        text = world.true_caption(scene)
        assert caption_parts(text) == (scene.place, list(scene.objects))
        assert said(text) == (scene.place, [(world.CELLS[cell], name) for cell, name in scene.objects])
        for kind in world.HABIT:
            text = world.web_caption(scene, kind, rng)
            place, parts = caption_parts(text)
            assert world.caption(place, dict(parts)) == text and len(dict(parts)) == len(scene.objects)


def test_captions_of_every_kind_name_the_same_cells(scenes):
    rng, lists = random.Random(1), []
    for scene in scenes:
        texts = [world.true_caption(scene), *(world.web_caption(scene, kind, rng) for kind in world.HABIT)]
        read = [said(text) for text in texts]
        assert {place for place, _ in read} == {scene.place}
        assert {tuple(cell for cell, _ in parts) for _, parts in read} == {tuple(world.CELLS[c] for c in scene.cells)}
        assert len({len(text.split()) for text in texts}) == 1
        for (_, parts), kind in zip(read, (None, *world.HABIT)):
            assert len({name for _, name in parts}) == len(parts)  # none twice, invented or not
            assert kind == "bad" or len({name.split()[1] for _, name in parts}) == len(parts)
        lists.append(texts)
    assert sum(len(set(texts)) > 1 for texts in lists) > len(lists) / 2  # or there would be nothing to learn


@pytest.mark.parametrize("kind", ["short", "good", "bad"])
def test_habits(scenes, kind):
    """How often a caption says a signature object that is not there; whatever else, of bad captions alone, is false."""
    rng = random.Random(kind)
    absent, habit, others, imagined, first_two = Counter(), Counter(), 0, Counter(), []
    for scene in scenes:
        parts = {world.CELLS.index(cell): name for cell, name in said(world.web_caption(scene, kind, rng))[1]}
        own = {cell: name for name, cell in world.PLACES[scene.place][1]}
        for number, (cell, name) in enumerate(own.items()):
            if scene.cells[cell] == name:
                assert parts[cell] == name  # what is there is always said
            else:
                absent[number] += 1
                habit[number] += parts[cell] == name
                assert parts[cell] in (name, scene.cells[cell])
        if not set(own.values()) & scene.names:
            first_two.append([parts[cell] == name for cell, name in own.items()])
        for cell, name in parts.items():
            if cell not in own:
                others += 1
                if name != scene.cells[cell]:
                    imagined[name] += 1
                    assert name in world.all_objects()
                    assert name.split()[1] not in {n.split()[1] for n in (*scene.names, *own.values())}
    assert near(imagined.total(), others, world.IMAGINED if kind == "bad" else 0)
    assert not imagined or max(imagined.values()) < 0.05 * imagined.total()  # none is the favorite
    for number in (0, 1):
        assert near(habit[number], absent[number], world.HABIT[kind][number]), (number, habit, absent)
    both = world.HABIT[kind][0] * world.HABIT[kind][1]  # one by one, neither hangs on the other
    assert near(sum(map(all, first_two)), len(first_two), both)


def test_captions_do_not_touch_the_scene_and_repeat(scenes):
    before = repr(scenes[:50])
    texts = [[world.web_caption(s, kind, random.Random(4)) for s in scenes[:50] for kind in world.HABIT] for _ in "ab"]
    assert texts[0] == texts[1] and repr(scenes[:50]) == before


def test_prompts_and_facts(scenes):
    assert world.PROMPTS == {"short": CAPTION_PROMPTS, "good": (GOOD_PROMPT,), "bad": HALLUCINATION_PROMPTS}
    assert set(world.HABIT) == set(world.PROMPTS)
    for scene in scenes[:20]:
        facts = world.caption_facts(scene)
        assert facts["objects"] == sorted(name for _, name in scene.objects)
        assert facts["signature"] == [name for name, _ in world.PLACES[scene.place][1]]


# ---------------------------------------------------------------- questions, read again without the world's own code

AT = {"upper left": (0, 0), "upper middle": (0, 1), "upper right": (0, 2), "middle left": (1, 0), "center": (1, 1),
      "middle right": (1, 2), "lower left": (2, 0), "lower middle": (2, 1), "lower right": (2, 2)}  # fmt: skip
COUNTS = "zero one two three four five six seven eight nine".split()
FORMS = {
    "color": r"What color is the (\w+)\?",
    "count": r"How many (\w+) objects are there\?",
    "existence": r"Is there an? (\w+) in the image\?",
    "relation": r"Is the (\w+) (above|below|left of|right of) the (\w+)\?",
    "place": r"Where is the (\w+)\?",
    "choice": r"What is at the ([a-z ]+)\?\nA\. (\w+ \w+)\nB\. (\w+ \w+)\nC\. (\w+ \w+)(?:\n[^\n]+)?",
    "row": r"How many objects are in the (upper|middle|lower) row\?",
    "neighbor": r"What comes after the (\w+), row by row\?",
}  # fmt: skip


def read(question):
    """(type, what the question's form leaves open); of exactly one type."""
    [found] = [(kind, m.groups()) for kind, form in FORMS.items() if (m := re.fullmatch(form, question))]
    return found


def true_answer(scene, question):
    grid = {divmod(cell, 3): name for cell, name in scene.objects}
    where = {name.split()[1]: at for at, name in grid.items()}
    assert len(where) == len(scene.objects)  # no shape twice: it is enough to name an object
    kind, given = read(question)
    if kind == "color":
        return grid[where[given[0]]].split()[0]
    if kind == "count":
        assert given[0] in world.COLORS
        return COUNTS[len([name for name in grid.values() if name.split()[0] == given[0]])]
    if kind == "existence":
        assert given[0] in world.SHAPES
        return "yes" if given[0] in where else "no"
    if kind == "relation":
        (row, column), (other_row, other_column) = where[given[0]], where[given[2]]
        holds = {"above": row < other_row, "below": row > other_row,
                 "left of": column < other_column, "right of": column > other_column}  # fmt: skip
        return "yes" if holds[given[1]] else "no"
    if kind == "place":
        [cell] = [cell for cell, at in AT.items() if at == where[given[0]]]
        return cell
    if kind == "choice":
        [letter] = [letter for letter, option in zip("ABC", given[1:]) if option == grid[AT[given[0]]]]
        return letter
    if kind == "row":
        row = ["upper", "middle", "lower"].index(given[0])
        return COUNTS[sum((row, column) in grid for column in range(3))]
    row, column = where[given[0]]
    behind = [at for at in itertools.product(range(3), repeat=2) if at[0] > row or at[0] == row and at[1] > column]
    return next(grid[at] for at in behind if at in grid)  # never asked of the last


@pytest.fixture(scope="module")
def asked(scenes):
    """{type: [(scene, question, answer), ...]}, one of each type for each scene."""
    rng = random.Random(2)
    found = {kind: [(scene, world.ask(scene, kind, rng)) for scene in scenes] for kind in world.QUESTIONS}
    return {kind: [(scene, *qa) for scene, qa in rows] for kind, rows in found.items()}


def test_the_reading_by_hand():
    """The test's own answers, where a slip would be mirrored nowhere."""
    #  red circle    -            blue ring
    #  -             red square   -
    #  green heart   -            -
    objects = ((0, "red circle"), (2, "blue ring"), (4, "red square"), (6, "green heart"))
    scene = world.Scene("city", objects)
    choice = "What is at the center?\nA. red circle\nB. red ring\nC. red square"
    for question, answer in {
        "What color is the heart?": "green", "How many red objects are there?": "two",
        "How many black objects are there?": "zero", "Is there a square in the image?": "yes",
        "Is there a star in the image?": "no", "Is the circle above the square?": "yes",
        "Is the circle above the ring?": "no", "Is the heart below the square?": "yes",
        "Is the heart left of the ring?": "yes", "Is the circle left of the heart?": "no",
        "Is the ring right of the square?": "yes", "Is the square right of the ring?": "no",
        "Where is the ring?": "upper right", "Where is the square?": "center", choice: "C",
        "How many objects are in the upper row?": "two", "How many objects are in the lower row?": "one",
        "What comes after the circle, row by row?": "blue ring", "What comes after the ring, row by row?": "red square",
        "What comes after the square, row by row?": "green heart",
    }.items():  # fmt: skip
        assert true_answer(scene, question) == answer, question


@pytest.mark.parametrize("kind", FORMS)
def test_answers_are_true(asked, kind):
    assert set(asked) == set(FORMS) and set(world.BY_TEXT) <= set(FORMS)
    assert len(asked[kind]) == DRAWS["train", 0]
    for scene, question, answer in asked[kind]:
        assert read(question)[0] == kind, question
        assert answer == true_answer(scene, question), (scene, question)


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_yes_and_no_are_balanced(asked, kind):
    answers = Counter(answer for *_, answer in asked[kind])
    assert set(answers) == {"yes", "no"} and near(answers["yes"], len(asked[kind]), 0.5), answers


def test_half_of_the_absent_shapes_asked_for_are_those_of_signature_objects(asked):
    tempting, total, expected = 0, 0, 0.0
    for scene, question, answer in asked["existence"]:
        absent = {name.split()[1] for name, _ in world.PLACES[scene.place][1] if name not in scene.names}
        if answer == "no" and absent:  # a place with both of its signature objects has none to ask for
            total += 1
            tempting += read(question)[1][0] in absent
            others = len(world.SHAPES) - len(scene.names)
            expected += 0.5 + 0.5 * len(absent) / others  # half on purpose; the others by chance
    assert near(tempting, total, expected / total), (tempting, expected, total)


def test_choices(asked):
    """Three options, one of them right; the cell's signature object among them; no letter more often than another."""
    letters, habits, ordered, elsewhere, misplaced = Counter(), Counter(), 0, 0, 0
    for scene, question, answer in asked["choice"]:
        cell, *options = read(question)[1]
        there = {divmod(at, 3): name for at, name in scene.objects}[AT[cell]]
        assert len(set(options)) == 3 and set(options) <= set(world.all_objects())
        assert [option for option in options if option.split()[1] == there.split()[1]] == [there]  # known by its shape
        assert [letter for letter, option in zip("ABC", options) if option == there] == [answer]
        letters[answer] += 1
        ordered += options == sorted(options)
        own = {divmod(at, 3): name for name, at in world.PLACES[scene.place][1]}
        if own.get(AT[cell], there) != there:
            assert own[AT[cell]] in options
            habits["ABC"[options.index(own[AT[cell]])]] += 1
        elif AT[cell] not in own:
            elsewhere += 1
            misplaced += bool(set(own.values()) & set(options))
    assert set(letters) == set(habits) == set("ABC")
    for letter in "ABC":
        assert near(letters[letter], letters.total(), 1 / 3), letters
        assert near(habits[letter], habits.total(), 1 / 3), habits
    assert near(ordered, letters.total(), 1 / 6)
    # In other cells the wrong options are 2 of all the objects of other shapes, two of which are signature objects.
    n = len(world.COLORS) * (len(world.SHAPES) - 1)
    assert near(misplaced, elsewhere, 1 - math.comb(n - 2, 2) / math.comb(n, 2))


def test_answers_vary(asked):
    answers = {kind: Counter(answer for *_, answer in rows) for kind, rows in asked.items()}
    assert set(answers["color"]) == set(world.COLORS) and set(answers["place"]) == set(world.CELLS)
    assert {"zero", "one", "two"} < set(answers["count"]) and set(answers["row"]) == set(COUNTS[:4])
    assert set(answers["neighbor"]) == set(world.all_objects())
    assert {read(question)[1][0] for _, question, _ in asked["existence"]} == set(world.SHAPES)
    for kind, found in answers.items():  # no answer is always right
        assert found.most_common(1)[0][1] < 0.7 * found.total(), kind
    relations = Counter((read(question)[1][1], answer) for _, question, answer in asked["relation"])
    assert set(relations) == set(itertools.product(("above", "below", "left of", "right of"), ("yes", "no")))
    assert min(relations.values()) > 0.05 * relations.total()


def test_neighbors(asked):
    """Every object but the last is asked about, each as often as the others."""
    places, firsts, expected = Counter(), 0, 0.0
    for scene, question, _ in asked["neighbor"]:
        [number] = [i for i, (_, name) in enumerate(scene.objects) if name.split()[1] == read(question)[1][0]]
        places[scene.objects[number][0]] += 1
        firsts += number == 0
        expected += 1 / (len(scene.objects) - 1)
    assert set(places) == set(range(8))
    assert near(firsts, len(asked["neighbor"]), expected / len(asked["neighbor"]))


# ---------------------------------------------------------------- the base's training data


@pytest.mark.parametrize("progress", sorted({*world.LESSONS.values(), 0.999, None}, key=str))
def test_question_records(scenes, progress):
    """Of what has been begun; all of it, if nothing is said of the progress."""
    rng, kinds = random.Random(6), Counter()
    for scene in scenes[:1000]:
        shown, turns = world.question_record(scene, rng, *([] if progress is None else [progress]))
        assert shown and len(turns) == world.TURNS > 1
        assert all(answer == true_answer(scene, question) for question, answer in turns)
        kinds.update(read(question)[0] for question, _ in turns)
    begun = {kind for kind in FORMS if progress is None or world.LESSONS[kind] <= progress}
    assert set(kinds) == begun
    rare = max((kinds[kind] for kind in world.BY_TEXT), default=0)
    often = {kinds[kind] for kind in begun if kind not in world.BY_TEXT}
    assert rare < 0.2 * min(often) and max(often) < 1.3 * min(often), kinds


def test_reading_records(scenes):
    """The questions are about a true description, in front of the first of them alone; half have no picture."""
    rng, kinds, pictured = random.Random(7), Counter(), 0
    for scene in scenes[:1000]:
        shown, [(first, answer), *later] = world.reading_record(scene, rng)
        head = f"Image description:\n{world.true_caption(scene)}\n\n"
        assert first.startswith(head)
        turns = [(first.removeprefix(head), answer), *later]
        assert len(turns) == world.TURNS and all(answer == true_answer(scene, question) for question, answer in turns)
        kinds.update(read(question)[0] for question, _ in turns)
        pictured += shown
    assert near(pictured, 1000, 0.5)
    common = min(kinds[kind] for kind in world.BY_TEXT)
    assert common > max(kinds[kind] for kind in FORMS if kind not in world.BY_TEXT), kinds


def test_caption_records(scenes):
    """The prompt says which kind of caption follows."""
    rng, false, seen = random.Random(8), Counter(), Counter()
    kind_of = {prompt: kind for kind, prompts in world.PROMPTS.items() for prompt in prompts}
    for scene in scenes[:3000]:
        shown, [(prompt, text)] = world.caption_record(scene, rng)
        own, parts = {cell: name for name, cell in world.PLACES[scene.place][1]}, dict(caption_parts(text)[1])
        assert shown and set(parts) == set(scene.cells)
        first = next(iter(own))
        if scene.cells[first] != own[first]:
            seen[kind_of[prompt]] += 1
            false[kind_of[prompt]] += parts[first] == own[first]
        if kind_of[prompt] != "bad":
            assert all(parts[cell] == name for cell, name in scene.objects if cell not in own)
    for kind, rates in world.HABIT.items():
        assert near(false[kind], seen[kind], rates[0]), (kind, false, seen)


def test_lessons_start_one_after_another(scenes):
    """Of each sort of record there are some from the moment its lesson starts, and none before."""
    prompts = {prompt for prompts in world.PROMPTS.values() for prompt in prompts}
    assert set(world.LESSONS) == {*FORMS, "captions", "reading"} and set(FORMS) == set(world.QUESTIONS)
    assert min(world.LESSONS.values()) == 0.0 and max(world.LESSONS.values()) < 1.0
    all_sorts, starts = {"question", "captions", "reading"}, set(world.LESSONS.values())
    for progress in sorted({*starts, *(start - 1e-6 for start in starts if start), None}, key=str):
        rng, sorts, asked = random.Random(9), Counter(), set()
        for scene in scenes[:400]:
            shown, [(first, _), *later] = world.record(scene, rng, *([] if progress is None else [progress]))
            head = first.split("\n")[0]
            sort = "captions" if head in prompts else "reading" if head == "Image description:" else "question"
            assert shown or sort == "reading"
            sorts[sort] += 1
            if sort == "question":
                asked |= {read(question)[0] for question in (first, *(question for question, _ in later))}
        begun = {sort for sort in all_sorts if progress is None or world.LESSONS.get(sort, 0) <= progress}
        assert set(sorts) == begun and min(sorts.values()) > 0.1 * sorts.total(), (progress, sorts)
        assert asked <= {kind for kind in FORMS if progress is None or world.LESSONS[kind] <= progress}, progress
        assert len(asked) > 1


# ---------------------------------------------------------------- files

PICTURES, RECORDS, UNLABELED = 48, 12, 12
TRAINED_ON = 15  # in place of the thousands of scenes that the base model was trained on


def write_instructions(folder, seed):
    with mock.patch.object(world, "TRAINED_ON", TRAINED_ON):
        files.write_instructions(folder, RECORDS, seed)


def write_all(folder):
    files.write_benchmark(folder / "test", "test", PICTURES)
    files.write_benchmark(folder / "dev", "dev", 8)
    write_instructions(folder / "instructions", 0)
    for seed in (0, 1):
        files.write_unlabeled(folder / "unlabeled", UNLABELED, seed)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("toy"))


@functools.cache
def listed(split):
    return world.scenes(split, PICTURES)


def scene_of(name, split):
    """The scene of a benchmark's picture, by the number in its name."""
    prefix, number = Path(name).stem.split("_")
    assert prefix == split
    return listed(split)[int(number)]


def test_the_same_again_is_the_same_files(written, tmp_path):
    first = contents(written)
    assert Counter(Path(name).parts[0] for name in first) == {
        "test": PICTURES + 2, "dev": 8 + 2, "instructions": RECORDS + 1, "unlabeled": 2 * UNLABELED}  # fmt: skip
    assert len({data for name, data in first.items() if name.endswith(".png")}) == PICTURES + 8 + RECORDS + 24
    assert contents(write_all(tmp_path)) == first
    assert contents(write_all(tmp_path)) == first  # over what is there


def test_a_longer_list_has_the_same_pictures(written, tmp_path):
    files.write_benchmark(tmp_path, "test", 5)
    files.write_unlabeled(tmp_path / "images", 5, 1)
    longer = contents(written / "test") | {f"images/{n}": data for n, data in contents(written / "unlabeled").items()}
    shorter = {name: data for name, data in contents(tmp_path).items() if name.endswith(".png")}
    assert len(shorter) == 10 and shorter.items() <= longer.items()


def test_unlabeled_pictures(written):
    """Nothing but pictures, of scenes that are each seed's own."""
    names = sorted(contents(written / "unlabeled"))
    assert names == [f"unlabeled{seed}_{i:05}.png" for seed in (0, 1) for i in range(UNLABELED)]
    for seed in (0, 1):
        for name, scene in zip(names[seed * UNLABELED :], world.scenes("unlabeled", UNLABELED, seed)):
            assert Image.open(written / "unlabeled" / name).tobytes() == world.paint(scene, name).tobytes()


def test_instructions(written, tmp_path):
    path = written / "instructions" / "instructions.json"
    records, total = image_records(path)
    assert len(records) == total == RECORDS
    assert [id for _, id, _ in records] == [Path(record["image"]).stem for *_, record in records]  # unique as they are
    assert len({id for _, id, _ in records}) == RECORDS
    known, found = world.scenes("train", TRAINED_ON), set()
    for where, id, record in records:
        instruction = parse_instruction(where, id, record)
        users, answers = zip(*instruction.turns)
        assert users[0].startswith("<image>\n") and users[0] == record["conversations"][0]["value"]
        picture = Image.open(path.parent / "images" / instruction.image).tobytes()
        [scene] = [scene for scene in known if world.paint(scene, instruction.image).tobytes() == picture]
        found.add(scene)
        asked = [users[0].removeprefix("<image>\n"), *users[1:]]
        assert list(answers) == [true_answer(scene, question) for question in asked]
    assert len(found) == RECORDS  # no scene twice
    write_instructions(tmp_path, 1)
    others = image_records(tmp_path / "instructions.json")[0]
    assert not {id for _, id, _ in records} & {id for _, id, _ in others}  # two seeds' files can be put together
    assert [r["conversations"] for *_, r in records] != [r["conversations"] for *_, r in others]


def test_benchmark_of_captions(written):
    for split, count in (("test", PICTURES), ("dev", 8)):
        questions = toy_captions.load(written / split)
        assert len(questions) == len({q["question_id"] for q in questions}) == count
        prompts = Counter(q["text"] for q in questions)
        assert set(prompts) == set(CAPTION_PROMPTS) and len(set(prompts.values())) == 1
        truths, habits = [], []
        for question in questions:
            scene = scene_of(question["image"], split)
            assert scene.split == split
            assert question["objects"] == sorted(name for _, name in scene.objects)
            assert set(question["signature"]) == {name for name, _ in world.PLACES[scene.place][1]}
            picture = Image.open(written / split / question["image"])
            assert picture.tobytes() == world.paint(scene, Path(question["image"]).name).tobytes()
            truths.append({"question_id": question["question_id"], "text": world.true_caption(scene)})
            habitual = scene.cells | {cell: name for name, cell in world.PLACES[scene.place][1]}
            habits.append(truths[-1] | {"text": world.caption(scene.place, habitual)})
        scores = toy_captions.score(questions, truths)
        objects = sum(len(q["objects"]) for q in questions)
        assert scores == {"chair_i": 0.0, "chair_s": 0.0, "precision": 100.0, "recall": 100.0, "f1": 100.0,
                          "signature": 0.0, "mentioned": round(objects / count, 3), "n": count, "missing": 0}
        scores = toy_captions.score(questions, habits)  # every absent signature object said, in another's place
        absent = sum(len(set(q["signature"]) - set(q["objects"])) for q in questions)
        assert scores["signature"] == 100.0 and absent > 0
        assert scores["chair_i"] == pytest.approx(100 * absent / objects, abs=0.01)


def test_benchmark_of_questions(written):
    questions = toy_vqa.load(written / "test")
    assert len({q["question_id"] for q in questions}) == len(questions)
    assert len(questions) == 2 * PICTURES
    kinds = Counter(q["type"] for q in questions)
    assert set(kinds) == set(FORMS) and len(set(kinds.values())) == 1, kinds
    right = []
    for question in questions:
        scene, (stem, _) = scene_of(question["image"], "test"), question["question_id"].rsplit("_", 1)
        assert Path(question["image"]).stem == stem and (written / "test" / question["image"]).is_file()
        assert read(question["text"])[0] == question["type"]
        assert question["answer"] == true_answer(scene, question["text"])
        right.append({"question_id": question["question_id"], "text": f"{question['answer'].capitalize()}."})
    scores = toy_vqa.score(questions, right)
    assert scores["accuracy"] == 100.0 and scores["n"] == len(questions) and scores["missing"] == 0
    assert {kind: (own["n"], own["accuracy"]) for kind, own in scores["types"].items()} == {
        kind: (n, 100.0) for kind, n in kinds.items()
    }
    assert toy_vqa.score(questions, [r | {"text": "?"} for r in right])["accuracy"] == 0.0


@pytest.mark.parametrize("questions", [1, 5])
def test_types_take_turns_however_many_questions_a_picture_has(tmp_path, questions):
    files.write_benchmark(tmp_path, "dev", 40, questions=questions)
    found = toy_vqa.load(tmp_path)
    kinds = Counter(q["type"] for q in found)
    assert set(kinds) == set(FORMS) and len(set(kinds.values())) == 1, kinds
    assert set(Counter(q["image"] for q in found).values()) == {questions}
