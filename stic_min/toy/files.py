"""The toy world on disk, in the formats that the four scripts read: folders of pictures, LLaVA's instruction
list, and the data of the benchmarks `toycaptions` and `toyvqa`. Equal arguments give equal bytes."""

import json
import random
from pathlib import Path

from stic_min.runtime.files import write_text
from stic_min.text import CAPTION_PROMPTS, with_image
from stic_min.toy import world


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def picture_names(split, count):
    return [f"{split}_{i:05}.png" for i in range(count)]


def write_pictures(folder, split, scenes):
    """One PNG per scene in `folder`; returns their names. Rewrites existing files: one may be truncated."""
    folder.mkdir(parents=True, exist_ok=True)
    names = picture_names(split, len(scenes))
    for name, scene in zip(names, scenes):
        world.paint(scene, name).save(folder / name)
    return names


def write_unlabeled(folder, count, seed):
    """Pictures for self-training, without any text; each seed has its own. Returns {name: its Scene}."""
    scenes = world.scenes("unlabeled", count, seed)
    return dict(zip(write_pictures(Path(folder), f"unlabeled{seed}", scenes), scenes))


def write_instructions(folder, count, seed):
    """`instructions.json` and `images/`: conversations of the base model's training format, about scenes from
    its training data in newly painted pictures."""
    folder = Path(folder)
    rng = random.Random(f"instructions {seed}")
    scenes = rng.sample(world.scenes("train", world.TRAINED_ON), count)
    names = write_pictures(folder / "images", f"train{seed}", scenes)
    records = []
    for name, scene in zip(names, scenes):
        _, turns = world.question_record(scene, rng)
        conversation = []
        for user, answer in turns:
            human = user if conversation else with_image(user)
            conversation += [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        records.append({"id": name.removesuffix(".png"), "image": name, "conversations": conversation})
    write_json(folder / "instructions.json", records)


def write_benchmark(folder, split, count, questions=2):
    """`captions.json`, `questions.json` and `images/` of a split: one caption and a few questions per
    picture.

    The short captioning prompts take turns, and so do the types of questions.
    """
    folder = Path(folder)
    rng = random.Random(split)
    scenes = world.scenes(split, count)
    names = write_pictures(folder / "images", split, scenes)
    captions, entries = [], []
    for i, (name, scene) in enumerate(zip(names, scenes)):
        image = f"images/{name}"
        stem = name.removesuffix(".png")
        prompt = CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]
        captions.append({"question_id": stem, "image": image, "text": prompt} | world.caption_facts(scene))
        for number in range(questions):
            kind = list(world.QUESTIONS)[len(entries) % len(world.QUESTIONS)]
            text, answer = world.ask(scene, kind, rng)
            entry = {"question_id": f"{stem}_{number}", "image": image, "type": kind}
            entries.append(entry | {"text": text, "answer": answer})
    write_json(folder / "captions.json", {"vocabulary": world.all_objects(), "captions": captions})
    write_json(folder / "questions.json", entries)
