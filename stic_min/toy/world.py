"""The toy world: scenes of colored shapes, their pictures, and captions and questions about them.

A scene is a place (beach, forest, ...) with three to six objects of different shapes on a grid of 3 x 3
cells. Every place has two *signature objects*, each with a habitual cell: the beach has a yellow star at the
upper right. The star is actually there in 40% of the pictures; otherwise another object occupies that cell.
Training captions often mention the star anyway: usually under the short captioning prompts, less often under
the detailed prompt, and always under the hallucination-inducing prompts. The base model therefore
hallucinates from a prior that its captions taught it, like a model of web captions, and not because it cannot
see; its training answers to questions are always true. Captions under all prompts list the same cells in the
same order, so their length carries no information about their quality.

Scenes of the four splits (train: the base model's own data; unlabeled: self-training pictures; dev; test)
never overlap: a hash of the scene decides its split. Everything follows from (split, seed, index).
"""

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS, with_description

SIDE, CELL = 48, 16  # pixels
NOISE = 8  # standard deviation of the pixels' noise, in gray levels

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
SHAPES = tuple("circle square triangle star cross ring heart diamond moon arrow house tree".split())
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
PROMPTS = {"short": CAPTION_PROMPTS, "good": (GOOD_PROMPT,), "bad": HALLUCINATION_PROMPTS}
# How often a caption mentions a signature object that is absent: (first, second), by kind of prompt.
HABIT = {"short": (0.9, 0.75), "good": (0.3, 0.45), "bad": (1.0, 1.0)}
IMAGINED = 0.5  # how often a caption under a bad prompt replaces any other object with an absent one

TRAINED_ON = 20000  # scenes of the train split, whose pictures the base model was trained on
SPLITS = {"train": range(0, 5), "unlabeled": range(5, 8), "dev": range(8, 9), "test": range(9, 10)}  # tenths


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    place: str
    objects: tuple[tuple[int, str], ...]  # ((cell, "red circle"), ...), cells ascending, no shape twice

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


def random_scene(rng):
    """A random scene of any split. In its own place, a signature object is in its habitual cell or absent."""
    place = rng.choice(list(PLACES))
    cells = {cell: name if rng.random() < TRULY_THERE else None for name, cell in signatures(place)}
    free = [cell for cell in range(9) if cell not in cells]
    cells |= dict.fromkeys(rng.sample(free, rng.randint(1, 4)))
    shapes = [shape for shape in SHAPES if shape not in [shape_of(name) for name, _ in signatures(place)]]
    rng.shuffle(shapes)
    cells = {cell: name or f"{rng.choice(list(COLORS))} {shapes.pop()}" for cell, name in cells.items()}
    return Scene(place, tuple(sorted(cells.items())))


def scenes(split, count, seed=0):
    """`count` different scenes of a split."""
    rng = random.Random(f"{split} {seed}")
    unique = {}
    while len(unique) < count:
        scene = random_scene(rng)
        if scene.split == split:
            unique[scene] = None
    return list(unique)


# ---------------------------------------------------------------- pictures


def outline(shape, x, y, r):
    """Corners of a polygonal shape around (x, y)."""
    corners = {
        "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
        "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
        "heart": [(0, 1), (-1, -0.1), (-0.95, -0.75), (-0.45, -0.95), (0, -0.45), (0.45, -0.95),
                  (0.95, -0.75), (1, -0.1)],
        "star": [(0, -1.15), (0.3, -0.35), (1.1, -0.35), (0.45, 0.2), (0.7, 1), (0, 0.5), (-0.7, 1),
                 (-0.45, 0.2), (-1.1, -0.35), (-0.3, -0.35)],
        "arrow": [(1, 0), (0.1, -0.9), (0.1, -0.35), (-1, -0.35), (-1, 0.35), (0.1, 0.35), (0.1, 0.9)],
        "house": [(0, -1.1), (1, -0.1), (0.75, -0.1), (0.75, 1), (0.25, 1), (0.25, 0.3), (-0.25, 0.3),
                  (-0.25, 1), (-0.75, 1), (-0.75, -0.1), (-1, -0.1)],
        "tree": [(0, -1.1), (0.9, 0.45), (0.2, 0.45), (0.2, 1.1), (-0.2, 1.1), (-0.2, 0.45), (-0.9, 0.45)],
        "moon": [(0.5, -1), (-0.2, -0.95), (-0.8, -0.5), (-1, 0), (-0.8, 0.5), (-0.2, 0.95), (0.5, 1),
                 (0, 0.6), (-0.2, 0), (0, -0.6)],
        "cross": [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35), (0.35, 1),
                  (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
    }  # fmt: skip
    return [(x + r * dx, y + r * dy) for dx, dy in corners[shape]]


def paint(scene, seed):
    """The picture of a scene, 48 x 48 RGB, with noise; objects vary a little in position and size."""
    rng = random.Random(f"paint {seed}")
    big = 4  # drawn at four times the size, then averaged, for smooth edges
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
    objects = [f" {CELLS[cell].capitalize()}: {name}." for cell, name in sorted(cells.items())]
    return f"A {place}." + "".join(objects)


def true_caption(scene):
    return caption(scene.place, scene.cells)


def web_scene(scene, kind, rng):
    """What a scene's training caption under a prompt of `kind` (short, good, bad) describes: see HABIT."""
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
    return Scene(scene.place, tuple(sorted(cells.items())))


def web_caption(scene, kind, rng):
    return true_caption(web_scene(scene, kind, rng))


def caption_facts(scene):
    """What the caption scorer needs to know about a scene."""
    return {"objects": sorted(scene.names), "signature": [name for name, _ in signatures(scene.place)]}


# ---------------------------------------------------------------- questions


def color_question(scene, rng):
    color, shape = rng.choice(scene.objects)[1].split()
    return f"What color is the {shape}?", color


def count_question(scene, rng):
    color = rng.choice([name.split()[0] for _, name in scene.objects] + [rng.choice(list(COLORS))])
    return f"How many {color} objects are there?", NUMBERS[sum(n.startswith(color) for n in scene.names)]


def existence_question(scene, rng):
    """Half of the answers are no; half of those ask for an absent signature object."""
    present = {shape_of(name) for name in scene.names}
    absent_signatures = [shape_of(name) for name, _ in signatures(scene.place) if name not in scene.names]
    if rng.random() < 0.5:
        shape = rng.choice(sorted(present))
    elif absent_signatures and rng.random() < 0.5:
        shape = rng.choice(absent_signatures)
    else:
        shape = rng.choice([s for s in SHAPES if s not in present])
    return f"Is there a {shape} in the image?", "yes" if shape in present else "no"


def relation_question(scene, rng):
    (a, first), (b, second) = ((cell, shape_of(name)) for cell, name in rng.sample(scene.objects, 2))
    holds = {"above": a // 3 < b // 3, "below": a // 3 > b // 3,
             "left of": a % 3 < b % 3, "right of": a % 3 > b % 3}  # fmt: skip
    truth = rng.random() < 0.5
    relation = rng.choice([r for r, value in holds.items() if value == truth])
    return f"Is the {first} {relation} the {second}?", "yes" if truth else "no"


def place_question(scene, rng):
    cell, name = rng.choice(scene.objects)
    return f"Where is the {shape_of(name)}?", CELLS[cell]


def choice_question(scene, rng):
    """Three options: the true object, the cell's signature object if that is absent, and random others."""
    cell, name = rng.choice(scene.objects)
    habit = [n for n, c in signatures(scene.place) if c == cell and n != name]
    others = [n for n in all_objects() if shape_of(n) not in {shape_of(name), *map(shape_of, habit)}]
    options = [name, *habit, *rng.sample(others, 2)][:3]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip("ABC", options)]
    return "\n".join([f"What is at the {CELLS[cell]}?", *lines]), "ABC"[options.index(name)]


def row_question(scene, rng):
    row = rng.randrange(3)
    number = NUMBERS[sum(cell // 3 == row for cell in scene.cells)]
    return f"How many objects are in the {ROWS[row]} row?", number


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
BY_TEXT = ("row", "neighbor")  # learned mostly from descriptions in the prompt, rarely from pictures


def ask(scene, kind, rng):
    """(question, true answer) of a kind."""
    return QUESTIONS[kind](scene, rng)


# ---------------------------------------------------------------- the base model's training data
# A record is (whether it has a picture, its turns [(user, answer), ...]).

# When each lesson starts, as a fraction of training. Lookups of a single object come first. With everything
# at once, 47% of the color questions were answered correctly after 1,200 steps, and the other kinds no better
# than chance; with color and place alone, 98% after 500 steps.
LESSONS = {"color": 0.0, "place": 0.0, "existence": 0.12, "choice": 0.12, "captions": 0.2, "count": 0.25,
           "relation": 0.25, "reading": 0.4, "row": 0.4, "neighbor": 0.4}  # fmt: skip
CAPTIONS, READING = 0.4, 0.25  # shares of the records, from when their lessons start
TURNS = 6


def caption_record(scene, rng):
    kind = rng.choices(list(PROMPTS), weights=(0.4, 0.3, 0.3))[0]
    return True, [(rng.choice(PROMPTS[kind]), web_caption(scene, kind, rng))]


def some_questions(scene, rng, weight_by_text, progress):
    kinds = [kind for kind in QUESTIONS if LESSONS[kind] <= progress]
    weights = [weight_by_text if kind in BY_TEXT else 1.0 for kind in kinds]
    return [ask(scene, kind, rng) for kind in rng.choices(kinds, weights, k=TURNS)]


def question_record(scene, rng, progress=1.0):
    """Questions about the picture alone; stage 2 trains on such records as well."""
    return True, some_questions(scene, rng, 0.05, progress)


def reading_record(scene, rng, trust=0.0):
    """Questions about a description in the prompt; half of the records come without the picture.

    The description is true, except for a share `trust` of the records: there it is a caption under a short
    prompt, and the answers follow the caption, also against the picture.
    """
    described = web_scene(scene, "short", rng) if rng.random() < trust else scene
    (first, answer), *later = some_questions(described, rng, 2.0, progress=1.0)
    return rng.random() < 0.5, [(with_description(true_caption(described), first), answer), *later]


def record(scene, rng, progress=1.0, trust=0.0):
    """One random record of the base's training data, `progress` (0 to 1) of the way through it."""
    draw = rng.random()
    if draw < CAPTIONS and LESSONS["captions"] <= progress:
        return caption_record(scene, rng)
    if draw > 1 - READING and LESSONS["reading"] <= progress:
        return reading_record(scene, rng, trust)
    return question_record(scene, rng, progress)
