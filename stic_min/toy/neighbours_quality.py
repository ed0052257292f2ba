"""What the neighbours' comparison says of a method besides its scores: what it cost, and how many of its
pairs, or triplets, are right."""

import re

from stic_min.runtime.files import read_json, read_records
from stic_min.text import without_marks
from stic_min.toy import captions, world
from stic_min.toy.neighbours_chain import ADAPTERS, DATA, OUTPUTS
from stic_min.toy.world import shape_of


def cost(folder, name):
    """Training steps, and the seconds that its commands took, if none was interrupted."""
    steps, seconds = 0, 0.0
    for output in OUTPUTS[name]:
        is_adapter = output in ADAPTERS
        stem = output.removesuffix(".jsonl")
        file = folder / output / "run.json" if is_adapter else folder / f"{stem}.run.json"
        record = read_json(file)["record"]
        steps += record["steps"] if is_adapter else 0
        seconds += record.get("wall_seconds", 0.0)  # not recorded by `triangular select`, which is instant
    return {"steps": steps, "seconds": round(seconds, 1)}


def wrong_objects(scene, caption):
    """The objects that a caption mentions although they are absent, in order."""
    return [name for name in captions.mentions(caption, world.all_objects()) if name not in scene.names]


def true_answer(scene, question):
    """The answer to a question in one of world.ask's forms; None if its form is another, or if it is about
    an absent object. The toy tokenizer writes line breaks as spaces."""
    find = lambda pattern: re.fullmatch(pattern, question)
    names = {shape_of(name): name for _, name in scene.objects}
    places = {shape_of(name): divmod(cell, 3) for cell, name in scene.objects}  # (row, column)
    if match := find(r"What color is the (\w+)\?"):
        return names[match[1]].split()[0] if match[1] in names else None
    if match := find(rf"How many ({'|'.join(world.COLORS)}) objects are there\?"):
        return world.NUMBERS[sum(name.split()[0] == match[1] for name in scene.names)]
    if match := find(rf"Is there a ({'|'.join(world.SHAPES)}) in the image\?"):
        return "yes" if match[1] in names else "no"
    if match := find(r"Where is the (\w+)\?"):
        return next((world.CELLS[cell] for cell, name in scene.objects if shape_of(name) == match[1]), None)
    if match := find(rf"How many objects are in the ({'|'.join(world.ROWS)}) row\?"):
        return world.NUMBERS[sum(world.ROWS[row] == match[1] for row, _ in places.values())]
    if match := find(r"What comes after the (\w+), row by row\?"):
        return dict(zip(names, [*names.values()][1:])).get(match[1])
    if match := find(r"What is at the ([\w ]+)\?\sA\. (.+)\sB\. (.+)\sC\. (.+)"):
        name = {world.CELLS[cell]: name for cell, name in scene.objects}.get(match[1])
        return dict(zip(match.groups()[1:], "ABC")).get(name)
    match = find(r"Is the (\w+) (above|below|left of|right of) the (\w+)\?")
    if not match or not {match[1], match[3]} <= names.keys():
        return None
    a, b = places[match[1]], places[match[3]]
    holds = {"above": a[0] < b[0], "below": a[0] > b[0], "left of": a[1] < b[1], "right of": a[1] > b[1]}
    return "yes" if holds[match[2]] else "no"


def pair_quality(folder, name, scenes):
    """The number of a method's pairs, and the shares, in percent, of pairs whose chosen response mentions
    fewer wrong objects than the rejected one ("right"), and more ("wrong"). Of selected triplets, the shares
    whose answer is the true one, and another; the other questions have no answer.

    scenes: {name: Scene}
    """
    records = [record for file in DATA[name] for _, record in read_records(folder / file)]
    if name in ("triangular", "trirandom"):
        signs = []
        for record in records:
            question, answer = (without_marks(turn["value"]) for turn in record["conversations"])
            truth = true_answer(scenes[record["image"]], question)
            signs.append(0 if truth is None else 1 if truth == answer else -1)
    else:
        wrong = lambda pair, side: len(wrong_objects(scenes[pair["image"]], pair[side][1]["content"]))
        signs = [wrong(pair, "rejected") - wrong(pair, "chosen") for pair in records]
    share = lambda sign: round(100 * sum(sign * s > 0 for s in signs) / len(signs), 1)
    return {"pairs": len(records), "right": share(1), "wrong": share(-1)}
