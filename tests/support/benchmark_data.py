"""Small data folders of six benchmarks in their official formats, with drawn images; ScienceQA's is in tiny.py."""

import base64
import csv
import io
import json
from pathlib import Path

from tiny import paint, write_json

ANSWERS = ["red", "red", "red", "Red.", "the red", "blue", "blue", "orange", "unanswerable", "green"]


def write_lines(path, records):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def write_images(folder, names):
    """names: {file name: number of the image in tiny.py}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in names.items():
        paint(number).convert("RGB").save(folder / name)


def write_textvqa(root):
    """Two questions about the first image, one without OCR tokens about the second."""
    folder = Path(root) / "textvqa"
    asked = [("0a", "what colour is the house?", ["HOUSE", "12"]), ("0a", "Is it day?", ["HOUSE", "12"]),
             ("1b", "what floats on the sea?", [])]  # fmt: skip
    entries = [dict(question_id=34602 + i, image_id=image, question=question, answers=ANSWERS)
               for i, (image, question, _) in enumerate(asked)]  # fmt: skip
    text = "{}\nReference OCR token: {}\nAnswer the question using a single word or phrase."
    lines = [
        dict(question_id=image, image=f"{image}.jpg", category="default",
             text=text.format(question.capitalize(), ", ".join(tokens)))
        for image, question, tokens in asked
    ]  # fmt: skip
    write_images(folder / "train_images", {"0a.jpg": 1, "1b.jpg": 2})
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries})
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)


def write_chartqa(root):
    folder = Path(root) / "chartqa"
    human = [("c1.png", "How tall is the tallest bar?", "14"), ("c1.png", "Which is tallest?", "Red")]
    augmented = [("c2.png", "What was the share in 2019?", "12.5%"), ("c1.png", "What is the sum?", "0")]
    for split, asked in {"human": human, "augmented": augmented}.items():
        write_json(folder / f"test_{split}.json", [dict(imgname=i, query=q, label=a) for i, q, a in asked])
    write_images(folder / "png", {"c1.png": 5, "c2.png": 6})


def write_llavabench(root):
    folder = Path(root) / "llavabench"
    asked = [("conv", "001.jpg", "What is this?"), ("detail", "001.jpg", "Describe this photo in detail."),
             ("complex", "002.jpg", "Why does it float?")]  # fmt: skip
    write_images(folder / "images", {"001.jpg": 1, "002.jpg": 2})
    lines = [dict(question_id=i, image=p, category=c, text=t) for i, (c, p, t) in enumerate(asked)]
    write_lines(folder / "questions.jsonl", lines)
    captions = [dict(id="001", image="001.jpg", caption=["A red house.", "It stands on grass."]),
                dict(id="002", image="002.jpg", caption="A boat on the sea.")]  # fmt: skip
    write_lines(folder / "context.jsonl", captions)
    reference = [dict(question_id=i, text=f"Reference {i}.", answer_id=f"a{i}") for i in range(len(asked))]
    write_lines(folder / "answers_gpt4.jsonl", reference)


def write_mmbench(root):
    """Question 241 with three options in three orders, 252 with two in two, about the same image; 260 once."""
    folder = Path(root) / "mmbench"
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number in (1, 2):
        opened = io.BytesIO()
        paint(number).convert("RGB").save(opened, "JPEG")
        images.append(base64.b64encode(opened.getvalue()).decode())
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
               "l2-category", "comment", "split"]  # fmt: skip
    coarse, logic = "coarse_perception", "logic_reasoning"
    asked = [(241, "What is shown?", "", ["a house", "a boat", "a tree"], 0, "object", images[0], coarse),
             (252, "Is it day?", "The sky is \"blue\".", ["yes", "no"], 0, "time", images[0], logic),
             (260, "What floats?", "nan", ["a boat", "a car"], 0, "object", images[1], coarse)]  # fmt: skip
    with open(folder / "mmbench_dev_20230712.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for index, question, hint, options, right, category, picture, l2 in asked:
            for turn in range(len(options) if index != 260 else 1):
                order = options[turn:] + options[:turn]
                cells = dict(zip("ABCD", order)) | {"answer": "ABCD"[order.index(options[right])]}
                writer.writerow(cells | {
                    "index": turn * 1_000_000 + index, "question": question, "hint": hint, "category": category,
                    "image": picture, "source": "drawn", "l2-category": l2, "comment": "", "split": "dev"})  # fmt: skip


def write_mmvet(root):
    folder = Path(root) / "mmvet"
    asked = {"v1_0": ("v1_0.png", "What is x?", "-1<AND>-5", ["ocr", "math"]),
             "v1_1": ("v1_1.jpg", "What is it?", "a boat<OR>a ship", ["rec"]),
             "v1_2": ("v1_1.jpg", "Where is it?", "on the sea", ["rec", "spat"])}  # fmt: skip
    write_images(folder / "images", {"v1_0.png": 6, "v1_1.jpg": 2})
    keys = ("imagename", "question", "answer", "capability")
    questions = {key: dict(zip(keys, entry), imagesource="drawn") for key, entry in asked.items()}
    write_json(folder / "mm-vet.json", questions)


def write_mathvista(root):
    folder, problems = Path(root) / "mathvista", {}
    asked = [("multi_choice", "text", "Which is larger?", ["x", "y"], None, "y"),
             ("free_form", "integer", "How many discs are there?", None, None, "3"),
             ("free_form", "float", "What is the ratio?", None, 1, "1.2"),
             ("free_form", "list", "Which years?", None, None, "[2007, 2008]")]  # fmt: skip
    tags = dict(language="english", source="drawn", category="general-vqa", task="figure question answering",
                context="bar chart", grade="not applicable", skills=["statistical reasoning"])  # fmt: skip
    for pid, (question_type, answer_type, question, choices, precision, answer) in enumerate(asked, 1):
        problems[str(pid)] = dict(
            pid=str(pid), question=question, image=f"images/{1 + pid % 2}.jpg", choices=choices, unit=None,
            answer=answer, precision=precision, question_type=question_type, answer_type=answer_type, metadata=tags,
            query=f"Hint: Please answer.\nQuestion: {question}")  # fmt: skip
    write_images(folder / "images", {"1.jpg": 5, "2.jpg": 6})
    write_json(folder / "annot_testmini.json", problems)


def write_benchmarks(root):
    """A folder per benchmark in `root`, under evaluate.py's name for it."""
    for write in (write_textvqa, write_chartqa, write_llavabench, write_mmbench, write_mmvet, write_mathvista):
        write(root)
