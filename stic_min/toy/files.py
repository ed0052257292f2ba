"""The toy world as files, in the formats that the four scripts read: folders of pictures, LLaVA's instruction list, and
the data of the benchmarks `toycaptions` and `toyvqa`. Equal arguments write equal bytes."""

import json
import random
from pathlib import Path

from stic_min.runtime.files import write_text
from stic_min.text import CAPTION_PROMPTS, with_image
from stic_min.toy import world


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_pictures(folder, split, scenes):
    """One PNG a scene in `folder`; returns their names. Written anew each time: one that a kill cut off is mended."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{i:05}.png" for i in range(len(scenes))]
    for name, scene in zip(names, scenes):
        world.paint(scene, name).save(folder / name)
    return names


def write_unlabeled(folder, count, seed):
    """Pictures for self-training, without any word about them; every seed has its own."""
    write_pictures(Path(folder), f"unlabeled{seed}", world.scenes("unlabeled", count, seed))


def write_instructions(folder, count, seed):
    """`instructions.json` and `images/`: conversations like those the base learned from, about scenes it learned from,
    painted anew."""
    folder, rng = Path(folder), random.Random(f"instructions {seed}")
    scenes = rng.sample(world.scenes("train", world.TRAINED_ON), count)
    names = write_pictures(folder / "images", f"train{seed}", scenes)
    records = []
    for name, scene in zip(names, scenes):
        turns = world.question_record(scene, rng)[1]
        users = [with_image(user) if i == 0 else user for i, (user, _) in enumerate(turns)]
        talk = [
            {"from": who, "value": text}
            for user, (_, answer) in zip(users, turns)
            for who, text in (("human", user), ("gpt", answer))
        ]
        records.append({"id": name.removesuffix(".png"), "image": name, "conversations": talk})
    write_json(folder / "instructions.json", records)


def write_benchmark(folder, split, count, questions=2):
    """`captions.json`, `questions.json` and `images/` of a split: one caption and some questions for each picture.

    The short captioning prompts take turns, and so do the types of questions.
    """
    folder, rng = Path(folder), random.Random(split)
    scenes = world.scenes(split, count)
    names = write_pictures(folder / "images", split, scenes)
    captions, asked = [], []
    for i, (name, scene) in enumerate(zip(names, scenes)):
        image, stem = f"images/{name}", name.removesuffix(".png")
        captions.append({
            "question_id": stem, "image": image, "text": CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)],
            "objects": sorted(scene.names), "signature": [n for n, _ in world.signatures(scene.place)],
        })  # fmt: skip
        for number in range(questions):
            kind = list(world.QUESTIONS)[len(asked) % len(world.QUESTIONS)]
            text, answer = world.ask(scene, kind, rng)
            asked.append(
                {"question_id": f"{stem}_{number}", "image": image, "type": kind, "text": text, "answer": answer}
            )
    write_json(folder / "captions.json", {"vocabulary": world.all_objects(), "captions": captions})
    write_json(folder / "questions.json", asked)
