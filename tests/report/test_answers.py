"""The answers that flipped between runs: right or wrong by the benchmark's scorer, and how the page shows them."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_data import write_benchmarks, write_lines
from commands import ROOT, call
from pages import Reader, images_of, items
from PIL import Image
from tiny import write_scienceqa

from stic_min import InputError
from stic_min.report import answers
from stic_min.report.options import Options
from stic_min.scorers import harness
from stic_min.toy import captions as toy_captions
from stic_min.toy import files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data of all benchmarks, a folder each."""
    folder = tmp_path_factory.mktemp("data")
    write_scienceqa(folder)
    write_benchmarks(folder)
    for name in ("toyvqa", "toycaptions"):
        files.write_benchmark(folder / name, "dev", 8)
    return folder


def write_run(results, data, name, texts, adapter=None, mode="direct", descriptions=None, judged=None, **more):
    """Answers as evaluate.py writes them, then their scores. texts: {question key: answer}; judged: verdicts."""
    settings = {
        "benchmark": name, "mode": mode, "model": "llava-tiny", "adapter": adapter, "fingerprint": adapter or "base",
        "template": "vicuna_v1", "image_mode": "pad", "dtype": "float32", "temperature": 0.0, "top_p": None,
        "max_new_tokens": 64, "seed": 0} | more  # fmt: skip
    benchmark = harness.get_benchmark(name)
    entries = harness.make_entries(benchmark, harness.load_questions(benchmark, data / name))
    stem = results / f"{name}-{adapter or 'base'}-{mode}"
    record = lambda key: entries[key] | {"text": texts[key], "finish": "stop"} | settings
    write_lines(f"{stem}.jsonl", [record(key) for key in entries if key in texts])
    if descriptions:
        lines = [{"image": image, "description": text} | settings for image, text in descriptions.items()]
        write_lines(f"{stem}.descriptions.jsonl", lines)
    flags = []
    for suffix, text in benchmark.judged_files(judged).items() if judged else ():
        Path(f"{stem}{suffix}").write_text(text)
        flags += ["--judged", f"{stem}{suffix}"]
    call("evaluate", "score", name, "--answers", f"{stem}.jsonl", "--data", data / name, *flags)


def section(results, *data):
    return answers.section(results, Options(data=[*data]))


def counts(text):
    """{comparison: [compared, both right, wrong to right, right to wrong, both wrong, points, p]}"""
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", text)
    return {label: re.findall(r"<td>(.*?)</td>", cells) for label, cells in rows}


CHART = {"human-0": "14", "human-1": "red", "augmented-0": "0.125", "augmented-1": "0"}  # all right


def wrong(texts, *keys):
    return texts | dict.fromkeys(keys, "a boat")


# ---- the test


@pytest.mark.parametrize("gains, losses, p", [
    (0, 0, 1), (1, 0, 1), (5, 5, 1), (5, 0, 2 / 32), (0, 5, 2 / 32), (2, 8, 2 * (1 + 10 + 45) / 1024)])
def test_mcnemar(gains, losses, p):
    assert answers.mcnemar(gains, losses) == p


def test_mcnemar_of_many():
    assert 0 < answers.mcnemar(300, 900) < 1e-60 and math.isclose(answers.mcnemar(600, 601), 1, abs_tol=0.05)


# ---- counts and pairs of runs


def test_which_runs_are_compared(tmp_path, data):
    """Base with tuned (with DaR, if there is such a run), and without and with DaR."""
    write_run(tmp_path, data, "chartqa", wrong(CHART, "human-0", "human-1"))
    write_run(tmp_path, data, "chartqa", wrong(CHART, "augmented-0"), "one")
    assert counts(section(tmp_path, data / "chartqa")) == {"base → one": ["4", "1", "2", "1", "0", "+25.0", "1"]}
    write_run(tmp_path, data, "chartqa", CHART, "two")
    write_run(tmp_path, data, "chartqa", wrong(CHART, "human-0"), "two", "dar")
    write_run(tmp_path, data, "chartqa", wrong(CHART, *CHART), mode="dar")
    write_run(tmp_path, data, "chartqa", CHART, "three", template="mistral_instruct")
    assert counts(section(tmp_path, data / "chartqa")) == {
        "base → one": ["4", "1", "2", "1", "0", "+25.0", "1"],
        "base → two, DaR": ["4", "2", "1", "0", "1", "+25.0", "1"],
        "base → base, DaR": ["4", "0", "0", "2", "2", "-50.0", "0.5"],
        "two → two, DaR": ["4", "3", "0", "1", "0", "-25.0", "1"],
    }


def test_only_what_both_answered_is_compared(tmp_path, data):
    write_run(tmp_path, data, "chartqa", {"human-0": "14", "human-1": "blue"})
    write_run(tmp_path, data, "chartqa", {key: CHART[key] for key in ("human-1", "augmented-0")}, "one")
    assert counts(section(tmp_path, data / "chartqa")) == {"base → one": ["1", "0", "1", "0", "0", "+100.0", "1"]}


# ---- each benchmark

CASES = {  # benchmark: (all right, keys that become wrong, a text of the flipped item)
    "textvqa": ({1: "red", 2: "red", 3: "Red"}, [2], "Reference: red (3), blue (2), Red. (1)"),
    "mmbench": (None, [1_000_241], "✗ a boat (right: C)"),
    "mathvista": ({"1": "y", "2": "3", "3": "1.2", "4": "[2007, 2008]"}, ["2"], "Reference: 3"),
    "chartqa": (CHART, ["human-1"], "Reference: Red"),
}


@pytest.mark.parametrize("name", CASES)
def test_benchmarks(tmp_path, data, name):
    texts, keys, shown = CASES[name]
    benchmark = harness.get_benchmark(name)
    questions = harness.load_questions(benchmark, data / name)
    texts = texts or {q["question_id"]: q["answer"] for q in questions}
    write_run(tmp_path, data, name, texts)
    write_run(tmp_path, data, name, wrong(texts, *keys), "one")
    text = section(tmp_path, data / name)
    groups = len({harness.get_group(benchmark, q) for q in questions})
    unread = int(name == "mathvista")  # the list, which takes a judge
    assert counts(text)["base → one"][:5] == [str(groups), str(groups - 1 - unread), "0", "1", str(unread)]
    assert ("only a judge can read" in text) == (name in ("mathvista", "mmbench"))
    [(kind, html)] = items(text)
    assert kind == "loss" and shown in Reader(html).text and "a boat" in Reader(html).text
    [[uri]] = images_of(text)
    assert uri.startswith("data:image/") and 'alt="image of question ' in html


def test_scienceqa(tmp_path, data):
    """The text of a choice is the reference; a question may have no image."""
    benchmark = harness.get_benchmark("scienceqa")
    questions = harness.load_questions(benchmark, data / "scienceqa")
    right = {q["question_id"]: "ABCDE"[q["answer"]] for q in questions}
    write_run(tmp_path, data, "scienceqa", wrong(right, *right))
    write_run(tmp_path, data, "scienceqa", right, "one")
    text = section(tmp_path, data / "scienceqa")
    assert [kind for kind, _ in items(text)] == ["gain"] * len(questions)
    for question, (_, html) in zip(questions, items(text)):
        answer = question["answer"]
        assert f"Reference: {'ABCDE'[answer]}. {question['choices'][answer]}" in Reader(html).text
        assert ("<img" in html) == (question["image"] is not None)
    assert not all(question["image"] for question in questions)


def test_the_toy_world(tmp_path, data):
    """A caption is right without hallucinated objects; a description is shown below its answer."""
    questions = toy_captions.load(data / "toycaptions")
    right = {q["question_id"]: ", ".join(q["objects"]) for q in questions}
    absent = next(name for name in questions[0]["vocabulary"] if name not in questions[0]["objects"])
    first = questions[0]["question_id"]
    write_run(tmp_path, data, "toycaptions", right | {first: absent})
    write_run(tmp_path, data, "toycaptions", right, "stic")
    asked = harness.load_questions(harness.get_benchmark("toyvqa"), data / "toyvqa")
    texts = {q["question_id"]: q["answer"] for q in asked}
    write_run(tmp_path, data, "toyvqa", texts)
    descriptions = {asked[0]["image"]: "A <beach>."}
    write_run(tmp_path, data, "toyvqa", wrong(texts, asked[0]["question_id"]), "stic", "dar", descriptions)
    text = section(tmp_path, data / "toycaptions", data / "toyvqa")
    assert [(label, cells[:4]) for label, cells in counts(text).items()] == [
        ("base → stic, DaR", ["16", "15", "0", "1"]), ("base → stic", ["8", "7", "1", "0"])]  # fmt: skip
    [(_, asked_flip), (_, caption_flip)] = items(text)
    assert "A &lt;beach&gt;." in asked_flip and "description by stic, DaR" in asked_flip
    assert absent in caption_flip and "Reference: " + ", ".join(questions[0]["objects"]) in caption_flip


def test_a_judge_grades(tmp_path, data):
    """MM-Vet's saved grades count, half a point is right; without them nothing is compared."""
    texts = {0: "-1", 1: "a ship", 2: "here"}
    for adapter, grades in ((None, [1, 0.4, 0]), ("one", [1, 0.5, 0])):
        judged = {f"v1_{i}": {"content": ["1"], "score": [grade], "model": ["gpt"]} for i, grade in enumerate(grades)}
        write_run(tmp_path, data, "mmvet", texts, adapter, judged=judged)
    text = section(tmp_path, data / "mmvet")
    assert counts(text)["base → one"][:5] == ["3", "1", "1", "0", "1"]
    assert "at least half of the judge&#x27;s points" in text and len(items(text)) == 1
    for path in tmp_path.glob("*.grades.json"):
        path.unlink()
    assert "MM-Vet: no two runs to compare" in section(tmp_path, data / "mmvet")


def test_a_judge_reads(tmp_path, data):
    """MathVista's saved extractions count."""
    texts = {pid: "It is obvious." for pid in "1234"}
    right = {"1": "y", "2": "3", "3": "1.2", "4": "[2007, 2008]"}
    write_run(tmp_path, data, "mathvista", texts, judged=right | {"4": "[2007]"})
    write_run(tmp_path, data, "mathvista", texts, "one", judged=right)
    text = section(tmp_path, data / "mathvista")
    assert counts(text)["base → one"][:5] == ["4", "3", "1", "0", "0"] and "only a judge can read" not in text


def test_ratings_are_neither_right_nor_wrong(tmp_path, data):
    texts = dict.fromkeys(range(3), "A boat.")
    reviews = [[{"question_id": i, "tuple": [8, 6], "content": "8 6"} for i in range(3)]]
    for adapter in (None, "one"):
        write_run(tmp_path, data, "llavabench", texts, adapter, judged=reviews)
    text = section(tmp_path, data / "llavabench")
    assert "LLaVA-Bench: a judge rates its answers, which are neither right nor wrong." in text and not counts(text)


# ---- what is missing


def both_runs(folder, data):
    write_run(folder, data, "chartqa", wrong(CHART, "human-1"))
    write_run(folder, data, "chartqa", CHART, "one")


def test_without_the_data(tmp_path, data):
    both_runs(tmp_path, data)
    text = section(tmp_path)
    assert "ChartQA: its questions were not found: give the benchmark&#x27;s data folder" in text
    assert str(data) not in text
    assert items(text) == [] and counts(text) == {}
    assert f"(no such file: {tmp_path / 'none' / 'test_human.json'})" in section(tmp_path, tmp_path / "none")


def test_the_recorded_folder(tmp_path, data):
    """Found in the record of the command, but not shown."""
    both_runs(tmp_path, data)
    record = {"record": {"command": f"evaluate.py chartqa --data {data / 'chartqa'} --out results"}}
    (tmp_path / "chartqa-one-direct.run.json").write_text(json.dumps(record))
    text = section(tmp_path)
    assert len(items(text)) == 1 and str(data) not in text
    record["record"]["command"] = f"evaluate.py chartqa --data {data / 'secret'}"
    (tmp_path / "chartqa-one-direct.run.json").write_text(json.dumps(record))
    assert "questions were not found" in section(tmp_path) and "secret" not in section(tmp_path)


def test_without_torch(tmp_path, data):
    """Scores, tables, flips and their images need no model code."""
    both_runs(tmp_path, data)
    record = {"record": {"command": f"evaluate.py chartqa --data {data / 'chartqa'}"}}
    (tmp_path / "chartqa-one-direct.run.json").write_text(json.dumps(record))
    code = "import sys; sys.modules['torch'] = None; import evaluate; evaluate.main()"
    command = [sys.executable, "-c", code, "table", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text()
    assert len(items(text)) == 1 and "data:image/" in text


@pytest.mark.parametrize("line, problem", [
    ("{", ", line 2: not JSON"), ('{"question_id": "human-1"}', ": the answer to 'human-1' has no 'text'")])
def test_damaged_answers(tmp_path, data, line, problem):
    both_runs(tmp_path, data)
    path = tmp_path / "chartqa-one-direct.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line)
    with pytest.raises(InputError) as error:
        section(tmp_path, data / "chartqa")
    assert str(error.value).startswith(f"{path}{problem}")


def test_other_questions(tmp_path, data):
    both_runs(tmp_path, data)
    other = shutil.copytree(data / "chartqa", tmp_path / "other")
    (other / "test_human.json").write_text((other / "test_human.json").read_text().replace("tallest", "smallest"))
    assert "has changed since these answers were written" in section(tmp_path, other)


def test_an_image_that_is_missing_or_broken(tmp_path, data):
    both_runs(tmp_path, data)
    other = shutil.copytree(data / "chartqa", tmp_path / "other")
    for break_it in (lambda path: path.write_bytes(path.read_bytes()[:100]), lambda path: path.unlink()):
        break_it(other / "png" / "c1.png")
        text = section(tmp_path, other)
        assert "1 images could not be read" in text and "<img" not in text and len(items(text)) == 1


def test_large_images_are_scaled_down(tmp_path, data):
    both_runs(tmp_path, data)
    other = shutil.copytree(data / "chartqa", tmp_path / "other")
    Image.effect_noise((2000, 3000), 50).save(other / "png" / "c1.png")
    assert len(section(tmp_path, other)) < 60_000


def test_answers_are_text(tmp_path, data):
    write_run(tmp_path, data, "chartqa", CHART | {"human-1": "</script><script>alert(1)</script>"})
    write_run(tmp_path, data, "chartqa", CHART, "<b>one")
    text = section(tmp_path, data / "chartqa")
    assert "<script>alert" not in text and "<b>one" not in text and text.count("</script>") == 2  # index and program
    [(_, html)] = items(text)
    read = Reader(html)
    assert not read.tags & {"script"} and "</script><script>alert(1)</script>" in read.text and "<b>one" in read.text
