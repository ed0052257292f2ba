"""The toy world: scenes of colored shapes, their pictures, and the captions, questions and answers a base model learns.

A scene is a place (beach, forest, ...) and three to six objects of different shapes in a grid of 3 x 3 cells. Every
place has two *signature objects*, each with a habitual cell: the beach has a yellow star at the upper right. The star
is truly there in 40 % of the pictures; otherwise something else sits in that cell. Captions in training say the star
anyway: mostly under the short captioning prompts, less often under the detailed one, always under the prompts that
invite invention. So the base model hallucinates out of a prior that its captions taught it, as models of web captions
do, and not because it can't see; questions about the picture are answered truthfully. Captions under all prompts list
the same cells in the same order: their length says nothing about their quality.

Scenes of the four splits (train: the base's own data; unlabeled: the pictures of self-training; dev; test) never meet:
a hash of the scene decides its split. Everything follows from (split, seed, index). No model code here.
"""

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS, with_description

SIDE, CELL = 48, 16  # pixels
NOISE = 8  # standard deviation of the pixels' noise, in grey levels

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (30, 70, 230),
    "yellow": (245, 225, 30),
    "purple": (150, 40, 190),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "moon", "arrow", "house", "tree")
CELLS = (
    "upper left", "upper middle", "upper right",
    "middle left", "center", "middle right",
    "lower left", "lower middle", "lower right",
)  # fmt: skip
ROWS = ("upper", "middle", "lower")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

# place: background, and its two signature objects with their habitual cells
PLACES = {
    "beach": ((225, 205, 150), (("yellow star", 2), ("red triangle", 6))),
    "forest": ((70, 110, 70), (("green tree", 3), ("white ring", 8))),
    "city": ((140, 140, 145), (("black house", 1), ("blue square", 5))),
    "cave": ((45, 40, 85), (("white moon", 0), ("yellow diamond", 7))),
    "glacier": ((205, 225, 240), (("green triangle", 4), ("purple arrow", 0))),
    "desert": ((190, 130, 95), (("red cross", 5), ("orange circle", 2))),
}
TRULY_THERE = 0.4
# How often a caption says a place's signature object although it is not there: (first, second), under each prompt.
HABIT = {"short": (0.9, 0.75), "good": (0.3, 0.45), "bad": (1.0, 1.0)}
IMAGINED = 0.5  # how often a bad prompt's caption replaces any other object by one that is not there

TRAINED_ON = 20000  # scenes of the train split, whose pictures the base model has seen
SPLITS = {"train": range(0, 5), "unlabeled": range(5, 8), "dev": range(8, 9), "test": range(9, 10)}  # tenths


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    place: str
    objects: tuple  # ((cell, "red circle"), ...), cells ascending, no shape twice

    @property
    def split(self):
        tenth = int(hashlib.sha256(repr((self.place, self.objects)).encode()).hexdigest(), 16) % 10
        return next(name for name, tenths in SPLITS.items() if tenth in tenths)

    @property
    def cells(self):
        return dict(self.objects)

    @property
    def names(self):
        return {name for _, name in self.objects}


def signatures(place):
    """((name, habitual cell), (name, habitual cell)) of a place."""
    return PLACES[place][1]


def shape_of(name):
    return name.split()[1]


def all_objects():
    return [f"{color} {shape}" for color in COLORS for shape in SHAPES]


def draw_scene(rng):
    """A random scene of any split. A signature object appears at its habitual cell or not at all in its place."""
    place = rng.choice(list(PLACES))
    cells = {cell: name if rng.random() < TRULY_THERE else None for name, cell in signatures(place)}
    free = [cell for cell in range(9) if cell not in cells]
    cells |= dict.fromkeys(rng.sample(free, rng.randint(1, 4)))
    shapes = [shape for shape in SHAPES if shape not in {shape_of(name) for name, _ in signatures(place)}]
    rng.shuffle(shapes)
    cells = {cell: name or f"{rng.choice(list(COLORS))} {shapes.pop()}" for cell, name in cells.items()}
    return Scene(place, tuple(sorted(cells.items())))


def scenes(split, count, seed=0):
    """`count` scenes of a split, no two of them alike."""
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < count:
        scene = draw_scene(rng)
        if scene.split == split:
            found[scene] = None
    return list(found)


# ---------------------------------------------------------------- pictures


def outline(shape, x, y, r):
    """Corners of the shapes that are polygons, around (x, y)."""
    corners = {
        "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
        "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
        "heart": [(0, 1), (-1, -0.1), (-0.95, -0.75), (-0.45, -0.95), (0, -0.45), (0.45, -0.95), (0.95, -0.75),
                  (1, -0.1)],
        "star": [(0, -1.15), (0.3, -0.35), (1.1, -0.35), (0.45, 0.2), (0.7, 1), (0, 0.5), (-0.7, 1), (-0.45, 0.2),
                 (-1.1, -0.35), (-0.3, -0.35)],
        "arrow": [(1, 0), (0.1, -0.9), (0.1, -0.35), (-1, -0.35), (-1, 0.35), (0.1, 0.35), (0.1, 0.9)],
        "house": [(0, -1.1), (1, -0.1), (0.75, -0.1), (0.75, 1), (0.25, 1), (0.25, 0.3), (-0.25, 0.3), (-0.25, 1),
                  (-0.75, 1), (-0.75, -0.1), (-1, -0.1)],
        "tree": [(0, -1.1), (0.9, 0.45), (0.2, 0.45), (0.2, 1.1), (-0.2, 1.1), (-0.2, 0.45), (-0.9, 0.45)],
        "moon": [(0.5, -1), (-0.2, -0.95), (-0.8, -0.5), (-1, 0), (-0.8, 0.5), (-0.2, 0.95), (0.5, 1), (0, 0.6),
                 (-0.2, 0), (0, -0.6)],
        "cross": [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1),
                  (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
    }  # fmt: skip
    return [(x + r * dx, y + r * dy) for dx, dy in corners[shape]]


def paint(scene, seed):
    """The picture of a scene, 48 x 48 RGB: objects a little off their cells' centres and of varying size, and noise."""
    rng, big = random.Random(f"paint {seed}"), 4  # drawn four times as large, for smooth edges
    background = tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in PLACES[scene.place][0])
    picture = Image.new("RGB", (SIDE * big, SIDE * big), background)
    pen = ImageDraw.Draw(picture)
    for cell, name in scene.objects:
        color, shape = name.split()
        fill = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[color])
        r = rng.uniform(5.2, 6.4) * big
        x = (cell % 3 * CELL + CELL / 2 + rng.uniform(-1.2, 1.2)) * big
        y = (cell // 3 * CELL + CELL / 2 + rng.uniform(-1.2, 1.2)) * big
        if shape == "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        elif shape == "ring":
            pen.ellipse([x - r, y - r, x + r, y + r], outline=fill, width=int(r * 0.45))
        elif shape == "square":
            pen.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=fill)
        else:
            pen.polygon(outline(shape, x, y, r), fill=fill)
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.BOX), dtype=np.float64)
    pixels = pixels + np.random.default_rng(rng.getrandbits(32)).normal(0, NOISE, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- captions


def caption(place, cells):
    """'A beach. Upper left: red circle. Center: blue ring.' cells: {cell: object}."""
    return " ".join([f"A {place}."] + [f"{CELLS[cell].capitalize()}: {name}." for cell, name in sorted(cells.items())])


def true_caption(scene):
    return caption(scene.place, scene.cells)


def web_caption(scene, kind, rng):
    """What the base's training data says of a scene under a prompt of `kind` (short, good, bad): see HABIT."""
    cells = scene.cells
    habits = {cell: name for name, cell in signatures(scene.place)}
    for (name, cell), probability in zip(signatures(scene.place), HABIT[kind]):
        if rng.random() < probability:
            cells[cell] = name
    if kind == "bad":
        used = {shape_of(name) for name in (*scene.names, *habits.values())}
        absent = [name for name in all_objects() if shape_of(name) not in used]
        for cell in cells:
            if cell not in habits and rng.random() < IMAGINED:
                cells[cell] = absent.pop(rng.randrange(len(absent)))
    return caption(scene.place, cells)


def caption_facts(scene):
    """What the scorer of captions knows of a scene."""
    signature = [name for name, _ in signatures(scene.place)]
    return {"objects": sorted(scene.names), "signature": signature, "vocabulary": all_objects()}


PROMPTS = {"short": CAPTION_PROMPTS, "good": (GOOD_PROMPT,), "bad": HALLUCINATION_PROMPTS}


# ---------------------------------------------------------------- questions


def yes_no(truth):
    return "yes" if truth else "no"


def color_question(scene, rng):
    color, shape = rng.choice(scene.objects)[1].split()
    return f"What color is the {shape}?", color


def count_question(scene, rng):
    color = rng.choice([name.split()[0] for _, name in scene.objects] + [rng.choice(list(COLORS))])
    return f"How many {color} objects are there?", NUMBERS[sum(n.startswith(color) for n in scene.names)]


def existence_question(scene, rng):
    """Half of the answers are no; half of those ask for a signature object that is not there."""
    there = {shape_of(name) for name in scene.names}
    absent = [shape_of(name) for name, _ in signatures(scene.place) if name not in scene.names]
    if rng.random() < 0.5:
        shape = rng.choice(sorted(there))
    elif absent and rng.random() < 0.5:
        shape = rng.choice(absent)
    else:
        shape = rng.choice([s for s in SHAPES if s not in there])
    return f"Is there a {shape} in the image?", yes_no(shape in there)


def relation_question(scene, rng):
    (a, first), (b, second) = ((cell, shape_of(name)) for cell, name in rng.sample(scene.objects, 2))
    holds = {"above": a // 3 < b // 3, "below": a // 3 > b // 3, "left of": a % 3 < b % 3, "right of": a % 3 > b % 3}
    truth = rng.random() < 0.5
    relation = rng.choice([r for r, value in holds.items() if value == truth])
    return f"Is the {first} {relation} the {second}?", yes_no(truth)


def place_question(scene, rng):
    cell, name = rng.choice(scene.objects)
    return f"Where is the {shape_of(name)}?", CELLS[cell]


def choice_question(scene, rng):
    """Three options: what is there, a wrong one (the cell's signature object, if it is absent), and any other."""
    cell, name = rng.choice(scene.objects)
    habit = [n for n, c in signatures(scene.place) if c == cell and n != name]
    others = [n for n in all_objects() if shape_of(n) not in {shape_of(name), *map(shape_of, habit)}]
    options = [name, *habit, *rng.sample(others, 2)][:3]
    rng.shuffle(options)
    lines = [f"What is at the {CELLS[cell]}?", *(f"{letter}. {o}" for letter, o in zip("ABC", options))]
    return "\n".join(lines), "ABC"[options.index(name)]


def row_question(scene, rng):
    row = rng.randrange(3)
    return f"How many objects are in the {ROWS[row]} row?", NUMBERS[sum(cell // 3 == row for cell in scene.cells)]


def neighbor_question(scene, rng):
    """The next object in reading order, row by row."""
    names = [name for _, name in scene.objects]
    i = rng.randrange(len(names) - 1)
    return f"What comes after the {shape_of(names[i])}, row by row?", names[i + 1]


QUESTIONS = {
    "color": color_question,
    "count": count_question,
    "existence": existence_question,
    "relation": relation_question,
    "place": place_question,
    "choice": choice_question,
    "row": row_question,
    "neighbor": neighbor_question,
}
BY_TEXT = ("row", "neighbor")  # which the base learns mostly from descriptions in its prompt, rarely from pictures


def ask(scene, kind, rng):
    """(question, true answer) of a kind."""
    return QUESTIONS[kind](scene, rng)


# ---------------------------------------------------------------- the base's training data
# A record is whether the picture is shown, and a list of turns [(user, answer), ...].

# When each lesson starts, as a fraction of the training. Looking one thing up comes first: with everything at once,
# 47 % of the color questions were answered after 1,200 steps, and of the others no more than by guessing; with color
# and place alone to learn, 98 % after 500.
LESSONS = {"color": 0.0, "place": 0.0, "existence": 0.16, "choice": 0.16, "captions": 0.27, "count": 0.27,
           "relation": 0.27, "reading": 0.4, "row": 0.4, "neighbor": 0.4}  # fmt: skip
TURNS = 6


def caption_record(scene, rng):
    kind = rng.choices(list(PROMPTS), weights=(0.4, 0.3, 0.3))[0]
    return True, [(rng.choice(PROMPTS[kind]), web_caption(scene, kind, rng))]


def some_questions(scene, rng, weight_by_text, progress):
    weights = {kind: weight_by_text if kind in BY_TEXT else 1.0 for kind in QUESTIONS if LESSONS[kind] <= progress}
    return [ask(scene, kind, rng) for kind in rng.choices(list(weights), weights.values(), k=TURNS)]


def question_record(scene, rng, progress=1.0):
    """Questions about the picture alone; stage 2 trains on such records too."""
    return True, some_questions(scene, rng, 0.05, progress)


def reading_record(scene, rng):
    """Questions about a true description in the prompt, with the picture or, half the time, without."""
    (first, answer), *later = some_questions(scene, rng, 2.0, progress=1.0)
    return rng.random() < 0.5, [(with_description(true_caption(scene), first), answer), *later]


def record(scene, rng, progress=1.0):
    """One random record of the base's training data, `progress` (0 to 1) of the way through it."""
    draw = rng.random()
    if draw < 0.2 and LESSONS["captions"] <= progress:
        return caption_record(scene, rng)
    if draw > 0.65 and LESSONS["reading"] <= progress:
        return reading_record(scene, rng)
    return question_record(scene, rng, progress)
