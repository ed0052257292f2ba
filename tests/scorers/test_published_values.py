"""`evaluate.py score` on official-format folders gives the published numbers: put together here from the answers and
keys beside the repository, skipped where these are not at hand. What the keys lack (questions, options, pictures) no
score depends on; it is filled in."""

import csv
import json
import re

import pytest
from commands import call
from official import shared


@pytest.fixture(scope="module")
def load():
    return shared


def write(path, value):
    """A value as JSON, or a list of records as JSON lines."""
    path.write_text("".join(f"{json.dumps(r)}\n" for r in value) if isinstance(value, list) else json.dumps(value))
    return path


def scored(benchmark, folder, *flags):
    """(what `evaluate.py score` prints, its --json)."""
    command = ["evaluate", "score", benchmark, "--data", folder, *flags]
    return call(*command), json.loads(call(*command, "--json"))


def line(text, name):
    """The rest of the line that begins with `name`."""
    return re.search(rf"^{re.escape(name)} +(.*)$", text, re.MULTILINE)[1]


def test_scienceqa_llava_v15_13b(load, tmp_path):
    problems, answers = {}, []
    for key in load("scienceqa_test_key.jsonl"):
        problems[key["qid"]] = {
            "question": "?", "choices": ["option"] * key["num_choices"], "answer": key["answer"], "split": "test",
            "image": "image.png" if key["has_image"] else None, "hint": "hint" if key["has_text"] else "",
            "subject": key.get("subject"), "grade": key.get("grade")}  # fmt: skip
    for row in load("scienceqa_pred_llava_v1.5_13b.jsonl"):
        prompt = "<image>\n?" if problems[row["qid"]]["image"] else "?"
        answers.append({"question_id": row["qid"], "prompt": prompt, "text": row["text"]})
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": list(problems)})
    said, numbers = scored("scienceqa", tmp_path, "--answers", write(tmp_path / "answers.jsonl", answers))
    assert "ScienceQA test: 4241 questions, 0 without a prediction" in said
    assert line(said, "IMG") == "71.64 [69.63, 73.57]   n=2017" and line(said, "img_acc").startswith("71.64 ")
    assert line(said, "average") == "74.39 [73.06, 75.68]   n=4241"
    assert (round(numbers["score"], 2), numbers["correct"], numbers["n"]) == (71.64, 1445, 2017)
    assert numbers["groups"]["average"]["correct"] == 3155 and numbers["groups"]["TXT"]["n"] == 2046
    assert [*tmp_path.glob("*.scores.json")] == []  # the file does not say what made it


def test_mmbench_llava_v15_13b(load, tmp_path):
    rows = load("mmbench_dev_llava_v1.5_13b.jsonl")
    header = ["index", "question", "A", "B", "C", "D", "answer", "split"]
    for name, columns in [("mmbench_dev_20230712.tsv", header), ("sheet.tsv", [*header[:6], "prediction", "split"])]:
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                options = {letter: f"option {letter}" for letter in row["options"]}
                writer.writerow({"question": "?", "split": "dev"} | options | row)
    said, numbers = scored("mmbench", tmp_path, "--answers", tmp_path / "sheet.tsv")
    assert "240 questions in 885 rows, 0 without an answer" in said and "0 answers match no option" in said
    assert line(said, "CircularEval") == "63.3 [57.1, 69.2]    n=240"
    assert line(said, "vanilla (unrotated options)").startswith("72.1 [")
    assert line(said, "rows").startswith("71.9 [")
    assert numbers["score"] == pytest.approx(100 * 152 / 240) and numbers["correct"] == 152
    assert (numbers["vanilla"]["correct"], numbers["rows"]["correct"]) == (173, 636)
    for rule in ("2024", "2026"):
        assert scored("mmbench", tmp_path, "--answers", tmp_path / "sheet.tsv", "--rule", rule)[1]["correct"] == 152


@pytest.mark.parametrize("name, lenient, strict", [
    ("bard", 34.8, 34.8), ("llava_llama_2_13b", 26.1, 26.1), ("llavar", 25.2, 25.0), ("random_guess", 17.9, 17.9),
    ("gpt4_2shot_code", 27.0, 26.0)])  # published: 34.8, 26.1, 25.2, 17.9 and, by the stricter rule, 26.0
def test_mathvista(load, tmp_path, name, lenient, strict):
    tags, problems = ("task", "category", "context", "grade", "language", "source", "skills"), {}
    for row in load("mathvista_testmini_key.jsonl"):
        problems[row["pid"]] = row | {"metadata": {tag: row.pop(tag) for tag in tags}}
    write(tmp_path / "testmini.json", problems)
    extractions = write(tmp_path / "extractions.jsonl", load(f"mathvista_pred_{name}.jsonl"))
    said, numbers = scored("mathvista", tmp_path, "--judged", extractions)
    assert "MathVista testmini: 1000 problems, 0 without an answer; " in said and "rule lenient_int" in said
    assert line(said, "all").startswith(f"{lenient} [") and line(said, "all").endswith("n=1000")
    assert (numbers["score"], numbers["correct"]) == (pytest.approx(lenient), round(10 * lenient))
    said, numbers = scored("mathvista", tmp_path, "--judged", extractions, "--rule", "strict_int")
    assert line(said, "all").startswith(f"{strict} [") and numbers["score"] == pytest.approx(strict)
    assert "\n  paper, LLaVA-1.6 7B  " in said and "not comparable" not in said


@pytest.mark.parametrize("runs, total, spread, groups", [  # published: 31.1, of three runs
    (1, 31.2, "31.2, std 0.0", [37.0, 21.0, 17.6, 20.4, 24.9, 7.7]),
    (3, 31.1, "31.2 30.8 31.2, std 0.2", [36.8, 21.1, 17.3, 19.9, 24.9, 7.7])])
def test_mmvet_llava_v15_7b(load, tmp_path, runs, total, spread, groups):
    entry = {"imagename": "v1_0.png", "question": "?", "answer": "!"}
    needs = load("mmvet_capabilities.json")
    write(tmp_path / "mm-vet.json", {key: entry | {"capability": own} for key, own in needs.items()})
    grades = write(tmp_path / "grades.json", load(f"mmvet_grades_llava_v1.5_7b_{runs}runs.json"))
    said, numbers = scored("mmvet", tmp_path, "--judged", grades)
    assert "MM-Vet: 218 questions" in said and f"{runs} runs of the judge: {spread}\n" in said
    assert line(said, "all").startswith(f"{total} [") and line(said, "all").endswith("n=218")
    assert (round(numbers["score"], 1), numbers["n"]) == (total, 218)
    assert list(numbers["groups"]) == ["rec", "ocr", "know", "gen", "spat", "math"]
    assert [round(own["score"], 1) for own in numbers["groups"].values()] == groups


def test_llavabench_llava_v15_7b(load, tmp_path):
    """One of three reviews; the three average 65.4, the published number."""
    reviews = load("llavabench_reviews_llava_v1.5_7b_eval1.jsonl")
    category = lambda review: review["category"].removeprefix("llava_bench_")
    write(tmp_path / "questions.jsonl", [
        {"question_id": r["question_id"], "image": "001.jpg", "text": "?", "category": category(r)} for r in reviews])
    write(tmp_path / "answers_gpt4.jsonl", [{"question_id": r["question_id"], "text": "!"} for r in reviews])
    write(tmp_path / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A picture."}])
    said, numbers = scored("llavabench", tmp_path, "--judged", write(tmp_path / "reviews.jsonl", reviews))
    assert "LLaVA-Bench (In-the-Wild): 60 questions, 0 of 60 reviews without two scores" in said
    assert re.fullmatch(r"64\.7 \[\d\d\.\d, \d\d\.\d\] +87\.0 +56\.3 +60", line(said, "all"))
    assert (numbers["score"], numbers["reference"], numbers["model"], numbers["n"]) == (64.7, 87.0, 56.3, 60)
    assert {name: own["score"] for name, own in numbers["groups"].items()} == {
        "conv": 59.3, "detail": 47.7, "complex": 77.6}  # fmt: skip
