"""The page of a folder of scores: its charts, tables and notes, and that it is the same from both commands."""

import re

import pytest
from commands import call
from pages import Reader
from score_files import COMPARABLE, OWN_WORDS, entry, save, save_all

from stic_min import InputError
from stic_min.report import scores
from stic_min.report.options import Options


def page(folder):
    """The HTML that `write` makes of a folder of scores."""
    file = scores.write(folder, Options())
    assert file == folder / "report.html"
    return file.read_text(encoding="utf-8")


def bars(text, title):
    """[(label, figure, classes)] of the bars of one chart."""
    section = text.partition(f"<section><h2>{title}")[2].partition("</section>")[0]
    found = re.findall(r'<div class="bar ([\w ]+)"><span>(.*?)</span>.*?</span><span>(.*?)</span></div>', section)
    return [(label, re.sub("<.*?>", "", figure), kind) for kind, label, figure in found]


def chart(text, title):
    return [(label, figure) for label, figure, _ in bars(text, title)]


@pytest.fixture
def both(tmp_path):
    save_all(tmp_path)
    return tmp_path


# ---- charts


def test_bars(tmp_path):
    save(tmp_path, "textvqa", 50, interval=[40.0, 62.5])
    save(tmp_path, "llavabench", 120, interval=[110, 125], judge=COMPARABLE)  # a judge may prefer the answers
    text = page(tmp_path)
    assert ('<span class=track><i style="width:50.00%"></i><b style="left:40.00%;right:calc(100% - 62.50%)"></b></span>'
            "<span>50.0 <small>40.0 to 62.5</small></span>") in text  # fmt: skip
    assert '<i style="width:96.00%"></i><b style="left:88.00%;right:calc(100% - 100.00%)"></b>' in text
    assert '<i style="width:61.84%"></i></span><span>77.3</span>' in text  # the paper's, on the same scale


def test_only_what_was_run_has_a_chart(tmp_path):
    save(tmp_path, "textvqa", 60.04)
    text = page(tmp_path)
    assert chart(text, "TextVQA")[0] == ("ours, base", "60.0 55.0 to 65.0")
    assert text.count("<section><h2>") == 1
    assert all("–" not in figure for _, figure in chart(text, "TextVQA"))  # LLaVA's for ChartQA would be one
    save(tmp_path, "chartqa", 30)
    assert all("–" not in figure for _, figure in chart(page(tmp_path), "ChartQA"))


def test_marks(tmp_path):
    """A lower bound, a judge in our own words (then without published numbers), another judge."""
    save(tmp_path, "mathvista", 30, unextracted=4)
    save(tmp_path, "mathvista", 30, "stage2", "dar", unextracted=4, judge=COMPARABLE)
    save(tmp_path, "mmvet", 40, judge=COMPARABLE | {"served": ["gpt-4o"]})
    save(tmp_path, "mmvet", 50, "stage2", "dar", judge=OWN_WORDS)
    text = page(tmp_path)
    assert [figure for _, figure in chart(text, "MathVista")[:2]] == ["≥ 30.0 25.0 to 35.0", "30.0 25.0 to 35.0"]
    assert [label for label, _ in chart(text, "MM-Vet")] == ["base †", "stage2, DaR ‡"]
    assert "‡ graded by a judge" in text and "† graded by another model" in text


def test_partial_runs(tmp_path):
    """Marked in words, by stripes and in the legend."""
    save(tmp_path, "textvqa", 60)
    assert "Striped" not in page(tmp_path)
    save(tmp_path, "textvqa", 61, "stage2", n=20, run={"limit": 20}, missing=3)
    text = page(tmp_path)
    assert bars(text, "TextVQA")[:2] == [
        ("ours, base", "60.0 55.0 to 65.0", "own"),
        ("ours, stage2 (subset, n=20, 3 missing)", "61.0 56.0 to 66.0", "own partial")]  # fmt: skip
    assert "Striped: a partial run." in text and "subset: a random part" in text and "missing: questions" in text


@pytest.mark.parametrize("model, base, figures", [
    ("llava-v1.6-mistral-7b", "LLaVA-1.6 7B", {
        "paper, base": "42.2", "paper, base + DaR": "42.3", "paper, STIC": "45.7", "paper, STIC + DaR": "45.2",
        "paper, STIC + DaR, by Table 1": "45.0", "LLaVA's own": "47.3"}),
    ("llava-v1.5-7b", "LLaVA-1.5 7B", {"paper, base": "31.1", "paper, STIC + DaR": "32.6", "LLaVA's own": "31.1"})])
def test_bars_are_of_the_base_model(tmp_path, model, base, figures):
    save(tmp_path, "mmvet", 40, judge=COMPARABLE, run={"model": model})
    text = page(tmp_path)
    first, *others = chart(text, "MM-Vet")
    assert first == ("ours, base", "40.0 35.0 to 45.0")
    assert {label.replace("&#x27;", "'"): figure for label, figure in others} == figures
    assert f"(the last two for {base})." in text


def test_the_toy_world(tmp_path):
    """Charts of its own, which say what is better; no word about the paper's numbers."""
    groups = {name: entry(score) for name, score in {"chair_i": 25, "f1": 74}.items()}
    save(tmp_path, "toyvqa", 92, run={"model": "llava-toy"})
    save(tmp_path, "toycaptions", 25, run={"model": "llava-toy"}, groups=groups, better="lower")
    text = page(tmp_path)
    assert chart(text, "Toy questions, accuracy (higher is better)") == [("base", "92.0 87.0 to 97.0")]
    assert chart(text, "Toy captions, hallucinated objects: CHAIR_i (lower is better)") == [
        ("base", "25.0 20.0 to 30.0")]  # fmt: skip
    assert chart(text, "Toy captions, objects: F1 (higher is better)") == [("base", "74.0 69.0 to 79.0")]
    assert "paper" not in Reader(text).text.replace("--paper", "").partition("Scores")[2] and "CHAIR_i ↓" in text


# ---- the page


def test_the_page_needs_nothing_else(both):
    text = page(both)
    read = Reader(text)
    assert text.startswith("<!doctype html>") and '<meta charset="utf-8">' in text
    assert not read.tags & {"link", "img", "iframe", "object", "a", "form", "base"}
    assert not re.search(r"https?://|url\(|@import|<script src", text)
    assert "Settings of each run" in read.text and "Before you compare" in read.text
    assert [*re.findall(r"<h2>(Table \d)", text)] == ["Table 1", "Table 2", "Table 3", "Table 5", "Table 6"]


@pytest.mark.parametrize("field", ["model", "adapter", "mode", "template", "image_mode", "dtype", "prompt"])
def test_what_others_wrote_is_text_on_the_page(tmp_path, field):
    save(tmp_path, "textvqa", 60, run={field: "<script>alert(1)</script>&amp;"})
    save(tmp_path, "mmvet", 40, judge=COMPARABLE | {"served": ["<img src=x onerror=alert(2)>"]})
    text = page(tmp_path)
    read = Reader(text)
    assert "<script>alert" not in text and "img" not in read.tags
    assert "<img src=x onerror=alert(2)>" in read.text and "<script>alert(1)</script>&amp;" in read.text


def test_the_prompt_of_item_1(tmp_path):
    save(tmp_path, "textvqa", 60, n=90, missing=3)
    text = page(tmp_path)
    assert "ours, base: 90 items, 3 without an answer, template vicuna_v1" in Reader(text).text
    assert "<pre>USER: &lt;image&gt;\nWhat? ASSISTANT:</pre>" in text


# ---- the command, and the text


def test_both_commands_write_the_same_page(both):
    text = call("evaluate", "table", both)
    written = (both / "report.html").read_text()
    assert page(both) == written
    assert text.startswith((both / "tables.md").read_text())
    assert text.endswith(f"wrote {both / 'tables.md'} and {both / 'report.html'}\n")


def test_the_text(both):
    text = scores.text(both)
    assert text.startswith("Models: llava-v1.6-mistral-7b\n\n## Table 1: ") and "\n- Ours: percent" in text
    assert "\n| ours, base | 10.0 [5.0, 15.0] | 11.0 [6.0, 16.0] |" in text


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path):
    save(tmp_path, "textvqa", 60, run={"adapter": "a|b"})
    [ours, *_] = [line for line in scores.text(tmp_path).splitlines() if "60.0 [" in line]
    assert len(re.findall(r"(?<!\\)\|", ours)) == 3  # of Table 1, as in its header


def test_nothing_is_written_without_scores(tmp_path):
    for write in (lambda: scores.write(tmp_path, Options()), lambda: call("evaluate", "table", tmp_path)):
        with pytest.raises(InputError, match="contains no .scores.json of a benchmark$"):
            write()
    assert not [*tmp_path.iterdir()]
