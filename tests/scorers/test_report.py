"""The paper's tables and the page, from small score files written by hand."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from stic_min import InputError
from stic_min.scorers import report

SEVEN = ["scienceqa", "textvqa", "chartqa", "llavabench", "mmbench", "mmvet", "mathvista"]
JUDGED = {"model": "gpt-4", "served": ["gpt-4-0613"], "official": "gpt-4-0613"}
COMPARABLE, OWN_WORDS = JUDGED | {"comparable": True}, JUDGED | {"comparable": False}


def entry(score, n=100):
    return {"score": score, "interval": [score - 5, score + 5], "n": n}


def save(folder, benchmark, score, adapter=None, mode="direct", name="", run=None, **more):
    """A score file as evaluate.py writes it; `run` and `more` are what is special about it."""
    settings = {
        "mode": mode, "model": "llava-v1.6-mistral-7b", "adapter": adapter, "fingerprint": "0123456789ab",
        "template": "vicuna_v1", "image_mode": "anyres", "dtype": "bfloat16", "temperature": 0.0, "top_p": None,
        "max_new_tokens": 1024, "seed": 0, "limit": None, "prompt": "USER: <image>\nWhat? ASSISTANT:"}  # fmt: skip
    result = {"benchmark": benchmark, "run": settings | (run or {}), **entry(score), "missing": 0, "groups": {}} | more
    if benchmark == "scienceqa" and "groups" not in more:
        result["groups"] = {"average": entry(score + 1, 200), "IMG": entry(score)}
    path = folder / f"{benchmark}-{adapter or 'base'}-{mode}{name}.scores.json"
    path.write_text(json.dumps(result))
    return path


def table(folder, title):
    """[[cell]] of a table in tables.md, the header first."""
    text = (folder / "tables.md").read_text(encoding="utf-8").partition(f"## {title}")[2].partition("\n## ")[0]
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] != "---"]


def row(folder, title, label):
    [found] = [cells for name, *cells in table(folder, title) if name == label]
    return found


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def chart(folder, title):
    """[(label, figure)] of the bars of one benchmark."""
    section = page(folder).partition(f"<section><h2>{title}")[2].partition("</section>")[0]
    bars = re.findall(r'<div class="bar \w+"><span>(.*?)</span>.*?</span><span>(.*?)</span></div>', section)
    return [(label, re.sub("<.*?>", "", figure)) for label, figure in bars]


@pytest.fixture
def both(tmp_path, capsys):
    """Base and stage 2, direct and with DaR, on all seven: 10, 20, ... 70, one more from run to run."""
    runs = [(None, "direct"), (None, "dar"), ("stage2", "direct"), ("stage2", "dar")]
    for more, (adapter, mode) in enumerate(runs):
        for place, name in enumerate(SEVEN, 1):
            save(tmp_path, name, 10 * place + more, adapter, mode)
    report.write(tmp_path)
    assert capsys.readouterr().out.startswith((tmp_path / "tables.md").read_text())
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
    report.write(tmp_path)
    assert row(tmp_path, "Table 5", "ours, base") == [
        "30.0 [25.0, 35.0]", "–", "–", "–", "–", "80.0 [75.0, 85.0]", "60.0 [55.0, 65.0]"]  # fmt: skip
    assert row(tmp_path, "Table 6", "ours, base") == [
        "50.0 [45.0, 55.0]", "–", "–", "–", "–", "12.5 [7.5, 17.5]", "40.0 [35.0, 45.0]"]  # fmt: skip


def test_what_was_not_run_is_a_dash(tmp_path):
    save(tmp_path, "textvqa", 60.04)
    report.write(tmp_path)
    assert row(tmp_path, "Table 2", "ours, base") == ["–", "–", "60.0 [55.0, 65.0]", *["–"] * 6]
    assert table(tmp_path, "Table 5") == table(tmp_path, "Table 6") == []
    assert chart(tmp_path, "TextVQA")[0] == ("ours, base", "60.0 55.0 to 65.0")
    assert page(tmp_path).count("<section>") == 1


def test_an_average_needs_all_seven_whole(both):
    """Its half interval is sqrt(7 * 5 * 5) / 7 = 1.89."""
    averages = lambda: [cells[-1] for cells in table(both, "Table 2")[1:5]]
    assert averages() == ["40.0 [38.1, 41.9]", "41.0 [39.1, 42.9]", "42.0 [40.1, 43.9]", "43.0 [41.1, 44.9]"]
    (both / "mmvet-base-dar.scores.json").unlink()
    save(both, "mathvista", 71, unextracted=2)
    save(both, "chartqa", 35, "stage2", run={"limit": 50})
    save(both, "mmbench", 53, "stage2", "dar", judge=OWN_WORDS)
    report.write(both)
    assert averages() == ["≥ 40.1 [38.3, 42.0]", "–", "–", "43.0 [41.1, 44.9] ‡"]


def test_an_adapter_that_was_asked_in_one_way_stands_in_table_1_anyway(tmp_path):
    for adapter, mode in [(None, "direct"), (None, "dar"), ("a", "direct"), ("b", "direct"), ("b", "blind-dar"),
                          ("c", "direct"), ("c", "dar")]:  # fmt: skip
        save(tmp_path, "textvqa", 60, adapter, mode)
    save(tmp_path, "chartqa", 40, "c", "direct")  # and this one on ChartQA only so
    report.write(tmp_path)
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
    report.write(tmp_path)
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


def test_a_subset_says_so(tmp_path):
    groups = {"average": entry(41, 30), "IMG": entry(40, 20)}
    save(tmp_path, "scienceqa", 40, n=20, groups=groups, run={"limit": 30})
    report.write(tmp_path)
    assert row(tmp_path, "Table 2", "ours, base")[:3] == ["40.0 [35.0, 45.0] (n=20)", "41.0 [36.0, 46.0] (n=30)", "–"]


def test_a_lower_bound_says_so(tmp_path):
    save(tmp_path, "mathvista", 30, unextracted=4)
    save(tmp_path, "mmbench", 50, unmatched=1, groups={"LR": entry(20)})
    save(tmp_path, "mathvista", 30, "stage2", "dar", unextracted=4, judge=COMPARABLE)
    save(tmp_path, "mmbench", 50, "stage2", "dar", unmatched=0)
    report.write(tmp_path)
    assert row(tmp_path, "Table 1", "ours, base")[-3:] == ["≥ 50.0 [45.0, 55.0]", "–", "≥ 30.0 [25.0, 35.0]"]
    assert row(tmp_path, "Table 1", "ours, stage2, DaR")[-3:] == ["50.0 [45.0, 55.0]", "–", "30.0 [25.0, 35.0]"]
    assert row(tmp_path, "Table 5", "ours, base")[0] == "≥ 20.0 [15.0, 25.0]"
    assert [figure for _, figure in chart(tmp_path, "MathVista")[:2]] == ["≥ 30.0 25.0 to 35.0", "30.0 25.0 to 35.0"]


def test_no_published_number_beside_a_judge_in_our_own_words(both):
    """Not in any table, average or chart of that benchmark; the others keep theirs."""
    assert "‡" not in page(both) + (both / "tables.md").read_text()
    save(both, "mmvet", 99, "stage2", "dar", judge=OWN_WORDS, groups={"rec": entry(88)})
    save(both, "mmvet", 60, judge=COMPARABLE)
    report.write(both)
    assert row(both, "Table 1", "ours, stage2, DaR")[6] == "99.0 [94.0, 104.0] ‡"
    assert row(both, "Table 6", "ours, stage2, DaR")[0] == "88.0 [83.0, 93.0] ‡"
    assert row(both, "Table 1", "ours, base")[6] == "60.0 [55.0, 65.0]"
    for title, column in [("Table 1", 7), ("Table 2", 7)]:
        theirs = [cells for cells in table(both, title)[1:] if not cells[0].startswith("ours")]
        assert len(theirs) > 3 and {cells[column] for cells in theirs} == {"–"}
    assert row(both, "Table 2", "paper, STIC, DaR") == "75.3 – 65.2 41.5 79.2 67.8 – 37.0 –".split()
    assert {cells[0][:4] for cells in table(both, "Table 6")[1:]} == {"ours"}
    assert len(table(both, "Table 5")) == 1 + 4 + 2 and len(table(both, "Table 3")) == 1 + 2 + 3
    assert all(label.startswith("ours") for label, _ in chart(both, "MM-Vet"))
    assert [label for label, _ in chart(both, "MM-Vet")][3] == "ours, stage2, DaR ‡"
    assert ("paper, base", "63.7") in chart(both, "MMBench") and "‡ graded by a judge" in page(both)


def test_another_judge_than_the_official_one_says_so(tmp_path):
    save(tmp_path, "mmvet", 40, judge=COMPARABLE | {"served": ["gpt-4-0613", "gpt-4o"]}, groups={"rec": entry(30)})
    save(tmp_path, "mmvet", 50, "stage2", "dar", judge=OWN_WORDS | {"served": ["gpt-4o"]})
    save(tmp_path, "llavabench", 70, judge={"files": ["reviews.jsonl"], "comparable": True})
    report.write(tmp_path)
    assert row(tmp_path, "Table 1", "ours, base")[6] == "40.0 [35.0, 45.0] †"
    assert row(tmp_path, "Table 6", "ours, base")[0] == "30.0 [25.0, 35.0] †"
    assert row(tmp_path, "Table 1", "ours, stage2, DaR")[6] == "50.0 [45.0, 55.0] ‡ †"
    assert row(tmp_path, "Table 1", "ours, base")[4] == "70.0 [65.0, 75.0]"
    assert [label for label, _ in chart(tmp_path, "MM-Vet")] == ["ours, base †", "ours, stage2, DaR ‡ †"]
    assert "† graded by another model than the official judge" in Reader(page(tmp_path)).text


def test_a_score_with_many_unread_verdicts_says_so(tmp_path):
    save(tmp_path, "mmvet", 40, judge=COMPARABLE, unread=30, unread_share=0.03, groups={"rec": entry(30)})
    save(tmp_path, "llavabench", 70, judge=COMPARABLE, unread=2, unread_share=0.02)
    report.write(tmp_path)
    assert row(tmp_path, "Table 1", "ours, base")[6] == "40.0 [35.0, 45.0] §"
    assert row(tmp_path, "Table 6", "ours, base")[0] == "30.0 [25.0, 35.0] §"
    assert row(tmp_path, "Table 1", "ours, base")[4] == "70.0 [65.0, 75.0]"
    assert "§ more than 2% of the judge's verdicts could not be read" in Reader(page(tmp_path)).text


@pytest.mark.parametrize("differs", [{"model": "another"}, {"fingerprint": "ffffffffffff"}, {"adapter": "stage2"}])
def test_a_score_of_other_answers_than_those_beside_it(tmp_path, differs):
    path = save(tmp_path, "textvqa", 60)
    settings = json.loads(path.read_text())["run"]
    answers = tmp_path / "textvqa-base-direct.jsonl"
    answers.write_text(json.dumps({"question_id": 1, "text": "red"} | settings))
    report.write(tmp_path)
    answers.write_text(json.dumps({"question_id": 1, "text": "red"} | settings | differs))
    with pytest.raises(InputError) as error:
        report.write(tmp_path)
    assert str(error.value) == f"{path}: not the score of the answers in {answers}; run `score` again"


def test_notes_are_those_of_what_was_run(tmp_path):
    save(tmp_path, "chartqa", 30)
    report.write(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "- The prompt and metric behind the paper's numbers are not identifiable" in text
    assert "- Ours: percent with a 95% interval" in text and "MM-Vet: " not in text and "official server" not in text
    assert text.startswith("Models: llava-v1.6-mistral-7b\n")


# ---- whose row it is


@pytest.mark.parametrize("differs", [
    {"fingerprint": "ffffffffffff"}, {"template": "mistral_instruct"}, {"image_mode": "pad"}])
def test_runs_of_one_name_are_told_apart(tmp_path, differs):
    save(tmp_path, "textvqa", 60, "stage2", "dar")
    save(tmp_path, "chartqa", 30, "stage2", "dar")
    save(tmp_path, "textvqa", 61, "stage2", "dar", name="-2", run=differs)
    save(tmp_path, "textvqa", 50)
    report.write(tmp_path)
    one, two = ({"fingerprint": "0123456789ab", "template": "vicuna_v1", "image_mode": "anyres"} | own
                for own in ({}, differs))  # fmt: skip
    label = lambda how: f"ours, stage2, DaR ({', '.join(how.values())})"
    assert row(tmp_path, "Table 2", label(one))[2:4] == ["60.0 [55.0, 65.0]", "30.0 [25.0, 35.0]"]
    assert row(tmp_path, "Table 2", label(two))[2:4] == ["61.0 [56.0, 66.0]", "–"]
    assert row(tmp_path, "Table 2", "ours, base")[2] == "50.0 [45.0, 55.0]"


def test_two_models(tmp_path):
    save(tmp_path, "textvqa", 60, "stage2")
    save(tmp_path, "textvqa", 50, "stage2", name="-2", run={"model": "llava-v1.5-7b"})
    save(tmp_path, "textvqa", 40, name="-2", run={"model": "llava-v1.5-7b"})
    report.write(tmp_path)
    own = [label for label, *_ in table(tmp_path, "Table 2") if label.startswith("ours")]
    assert own == ["ours, llava-v1.5-7b", "ours, llava-v1.5-7b + stage2", "ours, llava-v1.6-mistral-7b + stage2"]
    assert (tmp_path / "tables.md").read_text().startswith("Models: llava-v1.5-7b, llava-v1.6-mistral-7b\n")


@pytest.mark.parametrize("model, base, figures", [
    ("llava-v1.6-mistral-7b", "LLaVA-1.6 7B", {
        "paper, base": "42.2", "paper, base + DaR": "42.3", "paper, STIC": "45.7", "paper, STIC + DaR": "45.2",
        "paper, STIC + DaR, by Table 1": "45.0", "LLaVA's own": "47.3"}),
    ("llava-v1.5-7b", "LLaVA-1.5 7B", {"paper, base": "31.1", "paper, STIC + DaR": "32.6", "LLaVA's own": "31.1"})])
def test_bars_are_of_the_base_model(tmp_path, model, base, figures):
    save(tmp_path, "mmvet", 40, judge=COMPARABLE, run={"model": model})
    report.write(tmp_path)
    first, *others = chart(tmp_path, "MM-Vet")
    assert first == ("ours, base", "40.0 35.0 to 45.0")
    assert {label.replace("&#x27;", "'"): figure for label, figure in others} == figures
    assert f"(the last two for {base})." in page(tmp_path)


# ---- the page


def test_bars(tmp_path):
    save(tmp_path, "textvqa", 50, interval=[40.0, 62.5])
    save(tmp_path, "llavabench", 120, interval=[110, 125], judge=COMPARABLE)  # a judge may prefer the answers
    report.write(tmp_path)
    assert ('<span class=track><i style="width:50.00%"></i><b style="left:40.00%;right:calc(100% - 62.50%)"></b></span>'
            "<span>50.0 <small>40.0 to 62.5</small></span>") in page(tmp_path)  # fmt: skip
    assert '<i style="width:96.00%"></i><b style="left:88.00%;right:calc(100% - 100.00%)"></b>' in page(tmp_path)
    assert '<i style="width:61.84%"></i></span><span>77.3</span>' in page(tmp_path)  # the paper's, on the same scale


class Reader(HTMLParser):
    """The tags, their attributes and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else(both):
    read = Reader(page(both))
    assert page(both).startswith("<!doctype html>") and '<meta charset="utf-8">' in page(both)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "a", "form", "base"}
    assert read.attributes <= {"lang", "charset", "name", "content", "class", "style"}
    assert not re.search(r"https?://|url\(|@import", page(both))
    assert "Settings of each run" in read.text and "Before you compare" in read.text


@pytest.mark.parametrize("field", ["model", "adapter", "mode", "template", "image_mode", "dtype", "prompt"])
def test_what_others_wrote_is_text_on_the_page(tmp_path, field):
    save(tmp_path, "textvqa", 60, run={field: "<script>alert(1)</script>&amp;"})
    save(tmp_path, "mmvet", 40, judge=COMPARABLE | {"served": ["<img src=x onerror=alert(2)>"]})
    report.write(tmp_path)
    read = Reader(page(tmp_path))
    assert not read.tags & {"script", "img"} and "<img src=x onerror=alert(2)>" in read.text
    assert "<script>alert(1)</script>&amp;" in read.text


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path):
    save(tmp_path, "textvqa", 60, run={"adapter": "a|b"})
    report.write(tmp_path)
    lines = (tmp_path / "tables.md").read_text().splitlines()
    [ours, *_] = [line for line in lines if "60.0 [" in line]
    assert len(re.findall(r"(?<!\\)\|", ours)) == 10  # of Table 1, as in its header


def test_the_prompt_of_item_1(tmp_path):
    save(tmp_path, "textvqa", 60, n=90, missing=3)
    report.write(tmp_path)
    assert "ours, base: 90 items, 3 without an answer, template vicuna_v1" in Reader(page(tmp_path)).text
    assert "<pre>USER: &lt;image&gt;\nWhat? ASSISTANT:</pre>" in page(tmp_path)


# ---- bad input


def test_toy_scores_are_not_the_papers(tmp_path):
    (tmp_path / "toyvqa-base-direct.scores.json").write_text('{"benchmark": "toyvqa", "score": 99.0, "n": 1}')
    with pytest.raises(InputError, match=f"^{tmp_path} contains no .scores.json of a benchmark$"):
        report.write(tmp_path)
    save(tmp_path, "textvqa", 60)
    report.write(tmp_path)
    assert "toy" not in page(tmp_path) and "99.0" not in page(tmp_path)


@pytest.mark.parametrize("folder", ["empty", "none", "file"])
def test_a_folder_without_scores(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    with pytest.raises(InputError, match=f"^{tmp_path / folder} contains no .scores.json of a benchmark$"):
        report.write(tmp_path / folder)
    assert not [*tmp_path.rglob("tables.md")]


@pytest.mark.parametrize("fault", [
    "", "[]", {"run": None}, {"run": {}}, {"score": "1.0"}, {"score": None}, {"interval": None}, {"interval": [1.0]},
    {"score": math.nan}, {"interval": [1.0, math.inf]}, {"n": math.nan}, {"missing": math.nan}, {"unread": "3"},
    {"unread_share": math.nan}, {"answers": 5}, {"answers": {"empty": "<b>"}}, {"descriptions": {"cut": math.inf}}])
def test_a_file_that_is_not_ours(tmp_path, fault):
    save(tmp_path, "textvqa", 60)
    path = save(tmp_path, "mmvet", 40, judge=COMPARABLE)
    path.write_text(json.dumps(json.loads(path.read_text()) | fault) if isinstance(fault, dict) else fault)
    with pytest.raises(InputError) as error:
        report.write(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
