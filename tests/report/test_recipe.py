"""`python -m stic_min.report`: what a RUN is taken for, and the pages of a whole recipe."""

import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from commands import call, ended
from pages import Page
from small_world import instruction, pair, write

from stic_min import InputError
from stic_min.report import __main__ as command
from stic_min.report import recipe, steps
from stic_min.report.options import Options


@pytest.fixture(scope="module")
def chain15(chains):
    return chains("llava-v1.5-tiny")


@pytest.fixture
def folder(chain15, tmp_path):
    """A finished recipe to damage."""
    return shutil.copytree(chain15.out, tmp_path / "recipe")


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def markdown(folder):
    return recipe.text(folder, recipe.read(folder))


def table(text, header):
    """{first cell: other cells} of a Markdown table."""
    lines = text.split(f"| {header} |", 1)[1].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("") if "" in lines else None]]
    return {name: cells for name, *cells in rows}


# ---------------------------------------------------------------- recognition


def test_a_run_is_recognized_by_its_content(chain15, tmp_path):
    for kind in ("pairs", "descriptions"):
        shutil.copy(chain15.out / f"{kind}.jsonl", tmp_path / "data")
        assert steps.file_kind(tmp_path / "data") == kind
    records = [json.loads(line) for line in (chain15.out / "pairs.jsonl").read_text().splitlines()]
    write(tmp_path / "list.json", records)
    assert steps.file_kind(tmp_path / "list.json") == "pairs"
    module = lambda path: steps.recognize(path).__name__.removeprefix("stic_min.report.")
    assert module(chain15.out / "stage1") == module(chain15.out / "stage2") == "training"
    assert module(chain15.out) == "recipe"


def test_the_steps_of_a_recipe_are_found_up_to_two_levels_deep(folder):
    names = lambda: [(step.kind, str(step.path.relative_to(folder))) for step in steps.steps_in(folder)]
    assert names() == [("pairs", "pairs.jsonl"), ("stage 1", "stage1"), ("descriptions", "descriptions.jsonl"),
                       ("stage 2", "stage2"), ("scores", "results")]  # fmt: skip
    (folder / "runs").mkdir()
    for name in ("stage1", "stage2"):
        (folder / name).rename(folder / "runs" / f"x-{name}")
    (folder / "a" / "b" / "c").mkdir(parents=True)
    shutil.copy(folder / "pairs.jsonl", folder / "a" / "b" / "c")
    (folder / "pairs.jsonl").rename(folder / "a" / "b" / "first.jsonl")
    write(folder / "instructions.json", [instruction("a", "a.jpg")])  # an input, not a step
    assert [name for _, name in names()] == ["a/b/first.jsonl", "runs/x-stage1", "descriptions.jsonl", "runs/x-stage2",
                                             "results"]  # fmt: skip


def test_other_files_in_the_folder_of_a_recipe_are_no_steps(folder, capsys, monkeypatch):
    before = steps.steps_in(folder)
    (folder / "self").symlink_to(".")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "best").symlink_to("stage1")
    (folder / "last.jsonl").symlink_to("pairs.jsonl")
    os.mkfifo(folder / "fifo.jsonl")  # to open it would wait forever
    write(folder / "package.json", {"name": "x", "description": "of a program"})
    write(folder / "texts.json", {"text": "The proposal was rejected."})
    (folder / "private").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "private" not in str(path) and access(path, mode))
    assert steps.steps_in(folder) == before
    assert capsys.readouterr().err == f"warning: skipped: can't read {folder / 'private'}\n"


def test_descriptions_of_an_evaluation_have_a_page(folder):
    [file] = (folder / "results").glob("*.descriptions.jsonl")
    assert steps.recognize(file).__name__ == "stic_min.report.descriptions" and steps.file_kind(file) is None


def test_a_file_may_begin_with_a_long_record(tmp_path):
    write(tmp_path / "pairs.jsonl", [pair("a.png", "word " * 400_000)])
    assert steps.file_kind(tmp_path / "pairs.jsonl") == "pairs"


@pytest.mark.parametrize("name, content, message", [
    ("empty", None, "empty contains no run: no pairs, descriptions, log.jsonl or .scores.json, in it or up to"),
    ("none.jsonl", "", "none.jsonl contains neither pairs nor descriptions: there is no page for it"),
    ("a.txt", "not JSON", "a.txt contains neither pairs nor descriptions: there is no page for it"),
    ("a.json", '{"a": 1}', "a.json contains neither pairs nor descriptions: there is no page for it"),
    ("i.json", json.dumps([instruction("a", "a.jpg")]), "i.json contains instructions (--describe, --instructions): "),
    ("answers.jsonl", '{"question_id": "1", "text": "A"}', "contains answers of a benchmark: give the folder of"),
    ("log.jsonl", '{"step": 1}', "log.jsonl is part of a run: give its folder, "),
    ("x.scores.json", '{"benchmark": "mmvet"}', "x.scores.json is part of a run: give its folder, "),
    ("missing", ..., "no such file or folder: "),
])  # fmt: skip
def test_what_has_no_page_is_an_error(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content is not ...:
        path.write_text(content)
    status, line = ended("stic_min.report.__main__", path)
    assert status == 1 and line.startswith("error: ") and message in line


def test_the_command_prints_the_paths_of_its_pages(folder):
    paths = [folder / "stage1", folder / "stage2"]
    printed = call("stic_min.report.__main__", *paths, "--images", folder, "--images", folder / "stage1")
    assert printed.splitlines() == [str(path / "report.html") for path in paths]


def test_no_file_is_replaced_by_its_own_page(chain15, tmp_path):
    file = tmp_path / "pairs.html"
    shutil.copy(chain15.out / "pairs.jsonl", file)
    status, line = ended("stic_min.report.__main__", file)
    assert status == 1 and line.endswith("would be replaced by its own page: rename it to pairs.jsonl")
    assert file.read_bytes() == (chain15.out / "pairs.jsonl").read_bytes()


def test_a_page_that_can_not_be_written_is_an_error_before_the_work(folder):
    (folder / "pairs.html").mkdir()
    status, line = ended("stic_min.report.__main__", folder / "stage1", folder / "pairs.jsonl")
    assert status == 1 and line.endswith("pairs.html: it is a folder") and not (folder / "pairs.html.new").exists()
    for flag in ("--images", "--data"):
        outcome = ended("stic_min.report.__main__", folder, flag, folder / "none")
        assert outcome == (1, f"error: no such folder: {folder / 'none'}")


@pytest.mark.parametrize("flags", [["--adapter", "x"], ["--model", "x"]])
def test_flags_that_need_each_other(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "x", *flags])
    with pytest.raises(SystemExit):
        command.main()
    assert "--adapter" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- report.md


def test_report_md_has_costs_commands_counts_and_scores(folder):
    text = markdown(folder)
    costs = table(text, "step | wall time | peak memory | hardware")
    assert list(costs) == ["1. Preference pairs: pairs.jsonl", "2. Stage 1: stage1",
                           "3. Descriptions: descriptions.jsonl", "4. Stage 2: stage2",
                           "5. Scores: results, 2 evaluations", "all steps"]  # fmt: skip
    assert all(time.endswith(" s") and memory.endswith(" GB") and " cpu" in hardware
               for time, memory, hardware in list(costs.values())[:-1])  # fmt: skip
    assert "not recorded" not in text
    commands = text.split("```bash\n")[1].split("```")[0].splitlines()
    assert [line.split()[1] for line in commands if not line.startswith("#")] == [
        "generate_pairs", "train_stage1", "generate_pairs", "train_stage2", "evaluate", "evaluate"]  # fmt: skip
    counts = table(text, "step | count | equal | cut off | truncated | skipped")
    assert counts["1. Preference pairs: pairs.jsonl"] == ["8 pairs", "0", "15 of 16 responses", "–", "0"]
    assert counts["2. Stage 1: stage1"] == ["8 samples", "0", "–", "0", "–"]
    assert counts["3. Descriptions: descriptions.jsonl"] == ["8 descriptions", "–", "8 of 8 responses", "–", "0"]
    assert counts["4. Stage 2: stage2"] == ["8 samples", "–", "–", "0", "–"]
    assert counts["5. Scores: results"] == ["12 answers", "–", "12 of 12 responses", "–", "0"]
    scores = table(text, "evaluation | model | score in %, 95% interval | n | wall time")
    saved = json.loads((folder / "results" / "scienceqa-stage2-dar.scores.json").read_text())
    low, high = saved["interval"]
    assert scores["scienceqa-stage2-dar"][:3] == [
        "llava-v1.5-tiny + stage2", f"{saved['score']:.1f} [{low:.1f}, {high:.1f}]", str(saved["n"])]  # fmt: skip
    assert text.count("- commit: ") == text.count("- versions: ") == 1 and " (step" not in text
    assert "| DPO term | 0.6931 |" in text and "Finished: 3 steps." in text


def test_what_was_not_recorded_is_said(folder):
    for path in [*folder.glob("*.run.json"), *folder.glob("results/*-direct.run.json")]:
        path.unlink()
    text = markdown(folder)
    assert "| 1. Preference pairs: pairs.jsonl | not recorded | not recorded | not recorded |" in text
    assert "# 3. Descriptions: descriptions.jsonl: not recorded" in text
    assert "(1 of 2 runs)" in text and "(3 of 6 runs)" in text
    assert "- commit: not recorded (steps 1, 3, 5); " in text
    for path in [*folder.glob("results/*.run.json"), *folder.glob("stage*/run.json")]:
        path.unlink()
    assert "| 5. Scores: results, 2 evaluations | not recorded | not recorded | not recorded |" in markdown(folder)
    assert "- versions: not recorded" in markdown(folder)


def test_commits_and_versions_that_differ_are_named(folder):
    change(folder / "stage1" / "run.json", lambda run: run["record"].update(commit="abc"))
    change(folder / "stage2" / "run.json", lambda run: run["record"]["versions"].update(torch="9.9"))
    text = markdown(folder)
    assert "abc (step 2)" in text and "(steps 1, 3, 4, 5)" in text
    assert "; torch differs: " in text and "9.9 (step 4)" in text and "pillow differs" not in text


def test_counts_of_pairs_that_others_published(tmp_path):
    write(tmp_path / "pairs.json", [pair("a.png"), pair("b.png", "Same.", "Same.")])
    counts = table(markdown(tmp_path), "step | count | equal | cut off | truncated | skipped")
    assert counts == {"1. Preference pairs: pairs.json": ["2 pairs", "1", "not recorded", "–", "not recorded"]}


def test_skipped_and_unfinished(folder):
    change(folder / "pairs.run.json", lambda run: run["record"].update(skipped=3, parts=2, wall_seconds=100.0))
    change(folder / "descriptions.run.json", lambda run: run["record"].update(finished=False))
    text = markdown(folder)
    assert "15 of 16 responses | – | 3 |" in text and "| 1 min 40 s in 2 parts |" in text
    assert "| 3. Descriptions: descriptions.jsonl | at least " in text


@pytest.mark.parametrize("damage", [
    {"versions": {"torch": ["a"], "numpy": {"a": 1}}},
    {"wall_seconds": math.nan, "peak_memory_gb": math.inf, "skipped": math.nan, "parts": -math.inf},
    {"wall_seconds": 10**400, "peak_memory_gb": 10**400},
    {"commit": ["a"], "hardware": {"a": 1}, "command": 5, "ranks": "2", "nodes": math.nan},
])  # fmt: skip
def test_a_damaged_record(folder, sections, damage):
    change(folder / "pairs.run.json", lambda run: run["record"].update(damage))
    change(folder / "stage1" / "run.json", lambda run: run["record"].update(damage))
    recipe.write(folder, Options())
    assert "1. Preference pairs: pairs.jsonl" in markdown(folder)


@pytest.mark.parametrize("damage", [{"run": None}, {"answers": [1]}, {"score": "high"}, {"interval": [1]}])
def test_strange_scores(folder, damage):
    change(folder / "results" / "scienceqa-stage2-dar.scores.json", lambda scores: scores.update(damage))
    assert "| scienceqa-stage2-dar |" in markdown(folder)


# ---------------------------------------------------------------- report.html


@pytest.fixture
def sections(monkeypatch):
    """The sections of other modules, which have tests of their own, as a line of text each."""
    for name in ("pairs", "descriptions", "scores"):
        section = lambda path, options, name=name: f"<h2>the {name}</h2>"
        module = SimpleNamespace(section=section, STYLE=f".{name} {{}}")
        monkeypatch.setitem(sys.modules, f"stic_min.report.{name}", module)


def test_the_page_has_all_sections_and_a_table_of_contents(folder, sections):
    file = recipe.write(folder, Options())
    html = file.read_text(encoding="utf-8")
    page = Page(html.replace("<li>", "").replace("<br>", ""))
    assert file == folder / "report.html" and (folder / "report.md").read_text(encoding="utf-8") == markdown(folder)
    targets = [link["href"] for link in page.all("a")]
    assert targets == ["report.md", *(f"#{section['id']}" for section in page.all("section"))] and len(targets) == 6
    order = [page.text.index(text) for text in ("the pairs", "Stage 1, preference training: ", "the descriptions",
                                                "Stage 2, description-infused ", "the scores")]  # fmt: skip
    assert order == sorted(order) and len(page.all("svg")) == 9 + 5
    assert all(f".{name} {{}}" in html for name in ("pairs", "descriptions", "scores")) and html.count(".curves {") == 1
    assert page.text.count("python evaluate scienceqa") == 2 and page.text.count("python generate_pairs --") == 2


def test_names_of_files_are_escaped(folder, sections):
    (folder / "pairs.jsonl").rename(folder / "<b>&.jsonl")
    html = recipe.write(folder, Options()).read_text(encoding="utf-8")
    assert "<b>" not in html and "&lt;b&gt;&amp;.jsonl" in html


def test_a_damaged_step_is_an_error_and_leaves_no_pages(folder, sections):
    (folder / "stage1" / "run.json").write_text("{")
    with pytest.raises(InputError, match="stage1/run.json: not JSON"):
        recipe.write(folder, Options())
    assert not (folder / "report.html").exists() and not (folder / "report.md").exists()


def test_a_real_recipe(chain15, folder):
    """All modules together. Images and data are found by the folders in the recorded commands."""
    assert call("stic_min.report.__main__", folder).splitlines() == [str(folder / "report.html")]
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 14 and "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert all(text in html for text in ("Preference pairs", "Stage 1", "Descriptions", "Stage 2", "Scores"))
    assert "data:image/" in html
