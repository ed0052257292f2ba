"""The paper's tables and the toy world's, from small score files written by hand."""

import json
import math

import pytest
from score_files import COMPARABLE, OWN_WORDS, entry, save, save_all

from stic_min import InputError
from stic_min.scorers import tables


def table(folder, title):
    """[[cell]] of a table, the header first; [] if there is none."""
    rows = tables.read_results(folder)
    all_tables = [*tables.tables(rows), tables.runs_table(rows)]
    return next(([t.header, *t.rows] for t in all_tables if t.title.startswith(title)), [])


def row(folder, title, label):
    [found] = [cells for name, *cells in table(folder, title) if name == label]
    return found


def legend(folder):
    return "\n".join(tables.notes(tables.read_results(folder)))


@pytest.fixture
def both(tmp_path):
    save_all(tmp_path)
    return tmp_path


# ---- the tables


def test_columns(both):
    seven = ["", "SciQA IMG", "SciQA all", "TextVQA", "ChartQA", "LLaVA-B", "MMBench", "MM-Vet", "MathVista"]
    assert table(both, "Table 1")[0] == seven and table(both, "Table 2")[0] == [*seven, "average"]
    assert table(both, "Table 3")[0] == ["", "SciQA IMG", "SciQA all", "TextVQA", "LLaVA-B"]
    assert table(both, "Table 5")[0] == ["", "LR", "AR", "RR", "FP-S", "FP-C", "CP", "all"]
    assert table(both, "Table 6")[0] == ["", "rec", "ocr", "know", "gen", "spat", "math", "all"]


def test_who_is_in_which_table(both):
    names = lambda title: [label for label, *_ in table(both, title)[1:]]
    paper = ["paper, InstructBLIP 7B", "paper, mPLUG-Owl2 7B", "paper, LLaVA-1.5 7B", "paper, LLaVA-1.5 7B + POVID",
             "paper, LLaVA-1.5 7B + STIC", "paper, LLaVA-1.6 7B", "paper, LLaVA-1.6 7B + STIC"]  # fmt: skip
    assert names("Table 1") == ["ours, base", "ours, stage2, DaR", *paper, "LLaVA's own, v1.6", "LLaVA's own, v1.5"]
    four = ["ours, base", "ours, base, DaR", "ours, stage2", "ours, stage2, DaR"]
    two = ["paper, original", "paper, original, DaR", "paper, STIC", "paper, STIC, DaR"]
    assert names("Table 2") == [*four, *two]
    assert names("Table 3") == ["ours, base", "ours, stage2, DaR", "paper, original", "paper, STIC, positives only",
                                "paper, STIC"]  # fmt: skip
    assert names("Table 5") == names("Table 6") == [*four, "paper, original", "paper, STIC"]


def test_cells(both):
    assert row(both, "Table 2", "ours, base, DaR") == [
        "11.0 [6.0, 16.0]", "12.0 [7.0, 17.0]", "21.0 [16.0, 26.0]", "31.0 [26.0, 36.0]", "41.0 [36.0, 46.0]",
        "51.0 [46.0, 56.0]", "61.0 [56.0, 66.0]", "71.0 [66.0, 76.0]", "41.0 [39.1, 42.9]"]  # fmt: skip
    assert row(both, "Table 3", "ours, stage2, DaR") == [
        "13.0 [8.0, 18.0]", "14.0 [9.0, 19.0]", "23.0 [18.0, 28.0]", "43.0 [38.0, 48.0]"]  # fmt: skip
    for label, cells in {
        "paper, original": "68.9 – 60.3 36.4 77.3 63.7 42.2 34.6 54.8",
        "paper, STIC, DaR": "75.3 – 65.2 41.5 79.2 67.8 45.2 37.0 58.7",
    }.items():
        assert row(both, "Table 2", label) == cells.split()
    assert row(both, "Table 1", "paper, LLaVA-1.5 7B + POVID") == "68.8 – – – 68.7 64.9 31.8 –".split()
    assert row(both, "Table 1", "paper, LLaVA-1.5 7B") == "66.8 – 58.2 6.32 65.4 64.3 31.1 25.1".split()
    assert row(both, "Table 1", "LLaVA's own, v1.6") == "72.8 – 65.7 – 83.2 68.7 47.3 37.7".split()
    assert row(both, "Table 3", "paper, STIC, positives only") == "71.8 – 63.7 76.7".split()
    assert row(both, "Table 5", "paper, STIC") == "42.4 69.3 67.8 68.6 60.8 83.1 68.7".split()
    assert row(both, "Table 6", "paper, original") == "43.1 40.6 29.6 32.5 44.7 15.4 –".split()  # unclear which run


def test_groups(tmp_path):
    save(tmp_path, "mmbench", 60, groups={"LR": entry(30, 10), "CP": entry(80, 20)})
    save(tmp_path, "mmvet", 40, groups={"math": entry(12.5), "rec": entry(50)}, judge=COMPARABLE)
    assert row(tmp_path, "Table 5", "ours, base") == [
        "30.0 [25.0, 35.0]", "80.0 [75.0, 85.0]", "60.0 [55.0, 65.0]"]  # fmt: skip
    assert row(tmp_path, "Table 6", "ours, base") == [
        "50.0 [45.0, 55.0]", "12.5 [7.5, 17.5]", "40.0 [35.0, 45.0]"]  # fmt: skip
    assert table(tmp_path, "Table 5")[0] == ["", "LR", "CP", "all"]
    assert table(tmp_path, "Table 6")[0] == ["", "rec", "math", "all"]
    assert row(tmp_path, "Table 5", "paper, STIC") == ["42.4", "83.1", "68.7"]


def test_what_nobody_ran_is_left_out(tmp_path):
    """A column, a row or a table without any value of ours; a dash is for what only some have."""
    save(tmp_path, "textvqa", 60.04)
    assert row(tmp_path, "Table 2", "ours, base") == ["60.0 [55.0, 65.0]"]
    assert table(tmp_path, "Table 2")[0] == ["", "TextVQA"]
    assert table(tmp_path, "Table 5") == table(tmp_path, "Table 6") == table(tmp_path, "Toy world") == []
    save(tmp_path, "chartqa", 40, "stage2", "dar")
    assert table(tmp_path, "Table 1")[:3] == [
        ["", "TextVQA", "ChartQA"], ["ours, base", "60.0 [55.0, 65.0]", "–"],
        ["ours, stage2, DaR", "–", "40.0 [35.0, 45.0]"]]  # fmt: skip
    assert [label for label, *_ in table(tmp_path, "Table 3")][:2] == ["", "ours, base"]  # has no ChartQA
    assert "stage2" not in str(table(tmp_path, "Table 3"))
    assert "suffix" not in table(tmp_path, "Settings")[0]


def test_an_average_needs_all_seven_whole(both):
    """Its half interval is sqrt(7 * 5 * 5) / 7 = 1.89."""
    averages = lambda: [cells[-1] for cells in table(both, "Table 2")[1:5]]
    assert averages() == ["40.0 [38.1, 41.9]", "41.0 [39.1, 42.9]", "42.0 [40.1, 43.9]", "43.0 [41.1, 44.9]"]
    (both / "mmvet-base-dar.scores.json").unlink()
    save(both, "mathvista", 71, unextracted=2)
    save(both, "chartqa", 35, "stage2", run={"limit": 50})
    save(both, "mmbench", 53, "stage2", "dar", judge=OWN_WORDS)
    assert averages() == ["≥ 40.1 [38.3, 42.0]", "–", "–", "43.0 [41.1, 44.9] ‡"]
    save(both, "textvqa", 23, "stage2", "dar", missing=3)
    save(both, "scienceqa", 13, "stage2", "dar", missing=1)
    assert averages()[-1] == "43.0 [41.1, 44.9] (4 missing) ‡"


def test_an_adapter_that_was_asked_in_one_way_stands_in_table_1_anyway(tmp_path):
    for adapter, mode in [(None, "direct"), (None, "dar"), ("a", "direct"), ("b", "direct"), ("b", "blind-dar"),
                          ("c", "direct"), ("c", "dar")]:  # fmt: skip
        save(tmp_path, "textvqa", 60, adapter, mode)
    save(tmp_path, "chartqa", 40, "c", "direct")  # and this one on ChartQA only so
    own = lambda title: [label.removeprefix("ours, ") for label, *_ in table(tmp_path, title) if "ours" in label]
    assert own("Table 1") == own("Table 3") == ["base", "a", "b, blind-dar", "c", "c, DaR"]
    assert own("Table 2") == ["base", "base, DaR", "a", "b", "b, blind-dar", "c", "c, DaR"]


def test_how_each_was_made(tmp_path):
    special = {"limit": 90, "dtype": "float32", "suffix": "Be brief."}
    answers = {"n": 88, "empty": 3, "cut": 5}
    save(tmp_path, "chartqa", 30, "stage2", "dar", missing=2, n=90, run=special, answers=answers)
    save(tmp_path, "mmvet", 40, judge=COMPARABLE | {"served": ["a-1", "b-2"]}, unread=4, unread_share=0.0037,
         answers={"n": 218, "empty": 1, "cut": None})  # fmt: skip
    save(tmp_path, "llavabench", 70, judge={"files": ["some/where/reviews.jsonl"], "comparable": True})
    header, *made = table(tmp_path, "Settings of each run")
    assert header == ["", "benchmark", "items", "without answer", "empty", "cut off", "template", "image mode", "dtype",
                      "new tokens", "temperature", "suffix", "judge", "unread verdicts"]  # fmt: skip
    how = ["vicuna_v1", "anyres"]
    assert made == [
        ["ours, base", "LLaVA-Bench", "100", "0", "–", "–", *how, "bfloat16", "1024", "0.0", "–", "reviews.jsonl",
         "–"],
        ["ours, base", "MM-Vet", "100", "0", "1", "–", *how, "bfloat16", "1024", "0.0", "–", "a-1, b-2", "4"],
        ["ours, stage2, DaR", "ChartQA", "90 (--limit 90)", "2", "3", "5", *how, "float32", "1024", "0.0", "Be brief.",
         "–", "–"],
    ]  # fmt: skip


# ---- what a figure is worth


def test_a_partial_run_says_so(tmp_path):
    groups = {"average": entry(41, 30), "IMG": entry(40, 20)}
    save(tmp_path, "scienceqa", 40, n=20, groups=groups, run={"limit": 30})
    assert row(tmp_path, "Table 2", "ours, base") == [
        "40.0 [35.0, 45.0] (subset, n=20)", "41.0 [36.0, 46.0] (subset, n=30)"]  # fmt: skip
    assert "subset: a random part of the questions (--limit)" in legend(tmp_path) and "missing:" not in legend(tmp_path)
    save(tmp_path, "scienceqa", 40, n=20, groups=groups, run={"limit": 30}, missing=2)
    assert row(tmp_path, "Table 2", "ours, base")[0] == "40.0 [35.0, 45.0] (subset, n=20, 2 missing)"
    save(tmp_path, "scienceqa", 40, missing=2)
    assert row(tmp_path, "Table 2", "ours, base")[0] == "40.0 [35.0, 45.0] (2 missing)"
    assert "missing: questions without an answer" in legend(tmp_path) and "subset:" not in legend(tmp_path)


def test_a_lower_bound_says_so(tmp_path):
    save(tmp_path, "mathvista", 30, unextracted=4)
    save(tmp_path, "mmbench", 50, unmatched=1, groups={"LR": entry(20)})
    save(tmp_path, "mathvista", 30, "stage2", "dar", unextracted=4, judge=COMPARABLE)
    save(tmp_path, "mmbench", 50, "stage2", "dar", unmatched=0)
    assert row(tmp_path, "Table 1", "ours, base")== ["≥ 50.0 [45.0, 55.0]", "≥ 30.0 [25.0, 35.0]"]
    assert row(tmp_path, "Table 1", "ours, stage2, DaR")== ["50.0 [45.0, 55.0]", "30.0 [25.0, 35.0]"]
    assert row(tmp_path, "Table 5", "ours, base")[0] == "≥ 20.0 [15.0, 25.0]"


def test_no_published_number_beside_a_judge_in_our_own_words(both):
    """Not in any table or average of that benchmark; the others keep theirs."""
    assert "‡" not in legend(both) + str(table(both, "Table 2"))
    save(both, "mmvet", 99, "stage2", "dar", judge=OWN_WORDS, groups={"rec": entry(88)})
    save(both, "mmvet", 60, judge=COMPARABLE)
    assert row(both, "Table 1", "ours, stage2, DaR")[6] == "99.0 [94.0, 104.0] ‡"
    assert row(both, "Table 6", "ours, stage2, DaR")[0] == "88.0 [83.0, 93.0] ‡"
    assert row(both, "Table 1", "ours, base")[6] == "60.0 [55.0, 65.0]"
    for title, column in [("Table 1", 7), ("Table 2", 7)]:
        theirs = [cells for cells in table(both, title)[1:] if not cells[0].startswith("ours")]
        assert len(theirs) > 3 and {cells[column] for cells in theirs} == {"–"}
    assert row(both, "Table 2", "paper, STIC, DaR") == "75.3 – 65.2 41.5 79.2 67.8 – 37.0 –".split()
    assert {cells[0][:4] for cells in table(both, "Table 6")[1:]} == {"ours"}
    assert len(table(both, "Table 5")) == 1 + 4 + 2 and len(table(both, "Table 3")) == 1 + 2 + 3


def test_another_judge_than_the_official_one_says_so(tmp_path):
    save(tmp_path, "mmvet", 40, judge=COMPARABLE | {"served": ["gpt-4-0613", "gpt-4o"]}, groups={"rec": entry(30)})
    save(tmp_path, "mmvet", 50, "stage2", "dar", judge=OWN_WORDS | {"served": ["gpt-4o"]})
    save(tmp_path, "llavabench", 70, judge={"files": ["reviews.jsonl"], "comparable": True})
    assert row(tmp_path, "Table 1", "ours, base")[1] == "40.0 [35.0, 45.0] †"
    assert row(tmp_path, "Table 6", "ours, base")[0] == "30.0 [25.0, 35.0] †"
    assert row(tmp_path, "Table 1", "ours, stage2, DaR")[1] == "50.0 [45.0, 55.0] ‡ †"
    assert row(tmp_path, "Table 1", "ours, base")[0] == "70.0 [65.0, 75.0]"
    assert "† graded by another model than the official judge" in legend(tmp_path)


def test_a_score_with_many_unread_verdicts_says_so(tmp_path):
    save(tmp_path, "mmvet", 40, judge=COMPARABLE, unread=30, unread_share=0.03, groups={"rec": entry(30)})
    save(tmp_path, "llavabench", 70, judge=COMPARABLE, unread=2, unread_share=0.02)
    assert row(tmp_path, "Table 1", "ours, base")[1] == "40.0 [35.0, 45.0] §"
    assert row(tmp_path, "Table 6", "ours, base")[0] == "30.0 [25.0, 35.0] §"
    assert row(tmp_path, "Table 1", "ours, base")[0] == "70.0 [65.0, 75.0]"
    assert "§ more than 2% of the judge's verdicts could not be read" in legend(tmp_path)


@pytest.mark.parametrize("differs", [{"model": "another"}, {"fingerprint": "ffffffffffff"}, {"adapter": "stage2"}])
def test_a_score_of_other_answers_than_those_beside_it(tmp_path, differs):
    path = save(tmp_path, "textvqa", 60)
    settings = json.loads(path.read_text())["run"]
    answers = tmp_path / "textvqa-base-direct.jsonl"
    answers.write_text(json.dumps({"question_id": 1, "text": "red"} | settings))
    tables.read_results(tmp_path)
    answers.write_text(json.dumps({"question_id": 1, "text": "red"} | settings | differs))
    with pytest.raises(InputError) as error:
        tables.read_results(tmp_path)
    assert str(error.value) == f"{path}: not the score of the answers in {answers}; run `score` again"


def test_notes_are_those_of_what_was_run(tmp_path):
    save(tmp_path, "chartqa", 30)
    text = legend(tmp_path)
    assert "The prompt and metric behind the paper's numbers are not identifiable" in text
    assert text.startswith("Ours: percent with a 95% interval") and "MM-Vet: " not in text
    assert "official server" not in text and "CHAIR" not in text


# ---- whose row it is


@pytest.mark.parametrize("differs", [
    {"fingerprint": "ffffffffffff"}, {"template": "mistral_instruct"}, {"image_mode": "pad"}])
def test_runs_of_one_name_are_told_apart(tmp_path, differs):
    save(tmp_path, "textvqa", 60, "stage2", "dar")
    save(tmp_path, "chartqa", 30, "stage2", "dar")
    save(tmp_path, "textvqa", 61, "stage2", "dar", name="-2", run=differs)
    save(tmp_path, "textvqa", 50)
    one, two = ({"fingerprint": "0123456789ab", "template": "vicuna_v1", "image_mode": "anyres"} | own
                for own in ({}, differs))  # fmt: skip
    label = lambda how: f"ours, stage2, DaR ({', '.join(how.values())})"
    assert row(tmp_path, "Table 2", label(one)) == ["60.0 [55.0, 65.0]", "30.0 [25.0, 35.0]"]
    assert row(tmp_path, "Table 2", label(two)) == ["61.0 [56.0, 66.0]", "–"]
    assert row(tmp_path, "Table 2", "ours, base")[0] == "50.0 [45.0, 55.0]"


def test_two_models(tmp_path):
    save(tmp_path, "textvqa", 60, "stage2")
    save(tmp_path, "textvqa", 50, "stage2", name="-2", run={"model": "llava-v1.5-7b"})
    save(tmp_path, "textvqa", 40, name="-2", run={"model": "llava-v1.5-7b"})
    own = [label for label, *_ in table(tmp_path, "Table 2") if label.startswith("ours")]
    assert own == ["ours, llava-v1.5-7b", "ours, llava-v1.5-7b + stage2", "ours, llava-v1.6-mistral-7b + stage2"]


# ---- the toy world

TOY_GROUPS = {name: entry(score) for name, score in
              {"chair_i": 25, "chair_s": 80, "precision": 75, "recall": 74, "f1": 74.5}.items()}  # fmt: skip


def save_toy(folder, adapter=None, mode="direct", captions=True):
    run = {"model": "llava-toy"}
    save(folder, "toyvqa", 92.5, adapter, mode, run=run, groups={"color": entry(100)})
    if captions:
        save(folder, "toycaptions", 25, adapter, mode, run=run, groups=TOY_GROUPS, better="lower")


def test_only_the_toy_world(tmp_path):
    """A table of its own, with the direction; nothing about the paper's numbers."""
    save_toy(tmp_path)
    save_toy(tmp_path, "stic", "dar", captions=False)
    rows = tables.read_results(tmp_path)
    [toy] = tables.tables(rows)
    assert toy.header == ["", "questions ↑", "CHAIR_i ↓", "CHAIR_s ↓", "precision ↑", "recall ↑", "F1 ↑"]
    assert "↑ higher is better, ↓ lower is better" in toy.title and toy.ours == 2
    interval = lambda score: f"{score:.1f} [{score - 5:.1f}, {score + 5:.1f}]"
    assert toy.rows == [["base", *map(interval, (92.5, 25, 80, 75, 74, 74.5))],
                        ["stic, DaR", interval(92.5), *["–"] * 5]]  # fmt: skip
    assert "LLaVA" not in legend(tmp_path) and "CHAIR_i: mentions of objects" in legend(tmp_path)
    assert [line[1] for line in table(tmp_path, "Settings")] == ["benchmark", "Toy questions", "Toy captions",
                                                                 "Toy questions"]  # fmt: skip


def test_the_toy_world_next_to_a_benchmark(tmp_path):
    save_toy(tmp_path)
    save_toy(tmp_path, "stic")
    save(tmp_path, "textvqa", 60)
    assert [line[0] for line in table(tmp_path, "Table 1") if "ours" in line[0]] == ["ours, llava-v1.6-mistral-7b"]
    assert [line[0] for line in table(tmp_path, "Toy world")] == ["", "llava-toy", "llava-toy + stic"]
    assert "toy" not in str(table(tmp_path, "Table 1"))


def test_toy_scores_of_an_earlier_version(tmp_path):
    path = tmp_path / "toyvqa-base-direct.scores.json"
    path.write_text('{"benchmark": "toyvqa", "accuracy": 99.0, "n": 1, "run": {}}')
    with pytest.raises(InputError) as error:
        tables.read_results(tmp_path)
    assert str(error.value) == f"{path}: not written by this version of evaluate.py; run `score` again"


# ---- bad input


@pytest.mark.parametrize("folder", ["empty", "none", "file"])
def test_a_folder_without_scores(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    with pytest.raises(InputError, match=f"^{tmp_path / folder} contains no .scores.json of a benchmark$"):
        tables.read_results(tmp_path / folder)


@pytest.mark.parametrize("fault", [
    "", "[]", {"run": None}, {"run": {}}, {"score": "1.0"}, {"score": None}, {"interval": None}, {"interval": [1.0]},
    {"score": math.nan}, {"interval": [1.0, math.inf]}, {"n": math.nan}, {"missing": math.nan}, {"unread": "3"},
    {"unread_share": math.nan}, {"answers": 5}, {"answers": {"empty": "<b>"}}, {"descriptions": {"cut": math.inf}}])
def test_a_file_that_is_not_ours(tmp_path, fault):
    save(tmp_path, "textvqa", 60)
    path = save(tmp_path, "mmvet", 40, judge=COMPARABLE)
    path.write_text(json.dumps(json.loads(path.read_text()) | fault) if isinstance(fault, dict) else fault)
    with pytest.raises(InputError) as error:
        tables.read_results(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
