"""A small world for tests to damage: a folder `w` of models, images and records. All commands run in it."""

import importlib
import json
import re
import shutil
import sys
from unittest import mock

from stic_min.runtime import process

A, B = "scene_01.jpg", "scene_02.png"
MODEL, CONFIG, ADAPTER = "model/model.safetensors", "model/config.json", "stage1/adapter_model.safetensors"
MODEL16, SHARD = "--model {w}/model16", "model16/model-00002-of-00002.safetensors"
PAIRS, ANSWERS = "pairs.jsonl", "answers.jsonl"
RECORDS, DESCRIPTIONS = "instructions.json", "descriptions.jsonl"


def pair(image, chosen="A red house.", rejected="A blue whale, and a boat."):
    user = {"role": "user", "content": "<image>\nWhat?"}
    turns = lambda response: [user, {"role": "assistant", "content": response}]
    return {"image": image, "chosen": turns(chosen), "rejected": turns(rejected)}


def instruction(record_id, image):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A house."}]
    return {"id": record_id, "conversations": talk} | ({"image": image} if image else {})


def write(path, records):
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")


def change(path, edit):
    """Reads a JSON or JSON lines file, lets `edit` change the value in place, writes it back."""
    text = path.read_text(encoding="utf-8")
    value = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    edit(value)
    write(path, value)


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def commands(w):
    """{name: module and arguments}; all of them work in the folder `w`."""
    at = ["--model", w / "model", "--device", "cpu"]
    images = ["--images", w / "images"]
    few = ["--max-new-tokens", "4"]
    describe = ["--describe", w / RECORDS]
    tune = [*at, *images, "--batch-size", "2", "--lr", "0.001", "--out", w / "out"]
    stage2 = ["--instructions", w / RECORDS, "--descriptions", w / DESCRIPTIONS]
    score = ["--answers", w / ANSWERS, "--data", w / "scienceqa"]
    adapter = ["--adapter", w / "stage1"]
    return {
        "pairs": ["generate_pairs", *at, *images, *few, "--out", w / "new.jsonl"],
        "describe": ["generate_pairs", *describe, *at, *images, *few, "--out", w / "new.jsonl"],
        "stage1": ["train_stage1", *tune, "--lora-r", "2", "--pairs", w / PAIRS],
        "stage2": ["train_stage2", *tune, *stage2, *adapter],
        "scienceqa": ["evaluate", "scienceqa", *at, *few, "--data", w / "scienceqa", "--out", w / "results"],
        "score": ["evaluate", "score", "scienceqa", *score],
        "ask": ["evaluate", "ask", "What?", *at, *adapter, *few, "--image", w / "images" / A],
        "merge": ["stic_min.merge", "--model", w / "model", *adapter, "--out", w / "merged"],
    }


def small_world(tiny, w):
    shutil.copytree(tiny / "llava-v1.5-tiny", w / "model")
    shutil.copytree(tiny / "llava-v1.6-tiny", w / "model16")
    for name in ("clip-tiny", "scienceqa"):
        shutil.copytree(tiny / name, w / name)
    (w / "images").mkdir()
    for name in (A, B):
        shutil.copy(tiny / "images" / name, w / "images")
    write(w / PAIRS, [pair(A), pair(B)])
    write(w / RECORDS, [instruction("a", A), instruction("b", B), instruction("text", None)])
    ids = ("a", A), ("b", B)
    write(w / DESCRIPTIONS, [{"id": key, "image": name, "description": "Red."} for key, name in ids])
    write(w / ANSWERS, [{"question_id": "4", "prompt": "", "text": "B"}])
    outcome(w, "stage1", "--out", w / "stage1")
    return w


def outcome(w, name, *flags):
    """Runs a command as its script does -> its exit status."""
    module, *args = commands(w)[name]
    try:
        with mock.patch.object(sys, "argv", [module, *map(str, [*args, *flags])]):
            process.run(importlib.import_module(module).main)
    except SystemExit as stop:
        return stop.code
    return 0


def printed(capsys):
    """stdout, and the lines of stderr without progress."""
    out, err = capsys.readouterr()
    progress = r"(loading|loaded|pairs|descriptions|checking|merging|scienceqa) "
    return out, [line for line in err.splitlines() if not re.match(progress, line)]
