"""The published numbers: their own sums, and each of them against the protocol's tables where those are at hand."""

import os
from pathlib import Path

import pytest

from stic_min.scorers import published

# ---- the paper's own arithmetic


@pytest.mark.parametrize("run", published.TABLE2)
def test_averages_of_table_2(run):
    row = published.TABLE2[run]
    assert list(row) == list(published.BENCHMARKS)
    assert round(sum(row.values()) / 7, 1) == published.TABLE2_AVERAGES[run]


def test_averages_in_the_text_of_the_paper():
    mean = lambda row: round(sum(published.TABLE1[row].values()) / 7, 1)
    assert mean("LLaVA-1.5 7B") == 45.3  # as the text
    assert mean("LLaVA-1.6 7B + STIC") == 58.7  # as the text, with either value of MM-Vet
    assert mean("LLaVA-1.6 7B") == 54.8  # 54.7 in the text
    assert mean("LLaVA-1.5 7B + STIC") == 47.4  # 47.0 in the text
    assert [n in "".join(published.GENERAL_NOTES) for n in ("54.7", "54.8", "47.0", "47.4")] == [True] * 4


@pytest.mark.parametrize("stic, right", [(False, 742), (True, 800)])
def test_table_5_is_whole_numbers_of_1164_questions(stic, right):
    rates, counts = published.TABLE5[stic], published.TABLE5_COUNTS
    hits = {name: round(rates[name] * count / 100) for name, count in counts.items()}
    assert {name: round(100 * hits[name] / count, 1) for name, count in counts.items()} == rates
    assert (sum(hits.values()), sum(counts.values())) == (right, 1164)
    # the row with STIC is the run without DaR
    assert round(100 * right / 1164, 1) == published.TABLE2[stic, False]["mmbench"]
    assert published.TABLE2[True, True]["mmbench"] == 67.8


def test_table_1_repeats_table_2_but_for_one_cell():
    assert published.TABLE1["LLaVA-1.6 7B"] == published.TABLE2[False, False]
    one, two = published.TABLE1["LLaVA-1.6 7B + STIC"], published.TABLE2[True, True]
    assert {name: (one[name], two[name]) for name in one if one[name] != two[name]} == {"mmvet": (45.0, 45.2)}


def test_table_3_repeats_table_2_but_for_its_middle_row():
    for row, run in (("original", (False, False)), ("STIC", (True, True))):
        assert published.TABLE3[row].items() <= published.TABLE2[run].items()
    assert set(published.TABLE3["STIC, positives only"]) == {"scienceqa", "textvqa", "llavabench"}


def test_notes():
    assert list(published.NOTES) == list(published.BENCHMARKS)
    for benchmark, said in [("mmvet", "45.0"), ("mmvet", "45.2"), ("mathvista", "34.6"), ("mmbench", "without DaR"),
                            ("chartqa", "within the paper"), ("scienceqa", "which accuracy")]:  # fmt: skip
        assert said in " ".join(published.NOTES[benchmark]), benchmark
    assert published.NOTES["textvqa"] == () and "vicuna_v1" in published.GENERAL_NOTES[0]


# ---- what is printed beside one's own numbers

V16 = [f"paper, LLaVA-1.6 7B{how}" for how in ("", " + DaR", " + STIC", " + STIC + DaR")]
V15 = [f"paper, LLaVA-1.5 7B{how}" for how in ("", " + STIC + DaR")]


@pytest.mark.parametrize("name, base, expected", [
    ("scienceqa", "v1.6", [*zip(V16, (68.9, 69.9, 72.5, 75.3)), ("LLaVA's own, LLaVA-1.6 7B", 72.8)]),
    ("chartqa", "v1.6", [*zip(V16, (36.4, 34.6, 39.3, 41.5))]),
    ("mmvet", "v1.6", [*zip(V16, (42.2, 42.3, 45.7, 45.2)), (f"{V16[-1]}, by Table 1", 45.0),
                       ("LLaVA's own, LLaVA-1.6 7B", 47.3)]),
    ("mmbench", "v1.5", [*zip(V15, (64.3, 65.3)), ("LLaVA's own, LLaVA-1.5 7B", 64.3)]),
    ("mathvista", "v1.5", [*zip(V15, (25.1, 27.2))]),
])  # fmt: skip
def test_rows(name, base, expected):
    assert published.rows(name, base) == expected


@pytest.mark.parametrize("name", published.BENCHMARKS)
@pytest.mark.parametrize("base", published.LLAVA)
def test_rows_are_labels_with_numbers(name, base):
    rows = published.rows(name, base)
    assert len(dict(rows)) == len(rows) >= 2
    assert all(isinstance(value, float) for _, value in rows)


# ---- every number against the shared tables (skipped where the shared data is not at hand)


def shared(name):
    root = os.environ.get("STIC_SHARED")
    path = (Path(root) if root else Path(__file__).resolve().parents[3] / "shared") / name
    if not path.is_file():
        pytest.skip(f"no shared data: {name}")
    return path.read_text(encoding="utf-8")


def tables(name):
    """The tables of a shared Markdown file: {cells of the first row: [cells of another row]}."""
    found, rows = {}, []
    for line in [*shared(name).split("\n"), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
        elif rows:
            found[tuple(rows[0])], rows = rows[2:], []  # without the rule below the first
    return found


def numbers(cells):
    return [None if cell == "–" else float(cell) for cell in cells]


COLUMNS = ("SciQA", "TextVQA", "ChartQA", "LLaVA-B", "MMBench", "MM-Vet", "MathVista")


def test_table_1_against_the_protocol():
    rows = tables("benchmarks.md")["model", *COLUMNS]
    base, expected = None, {}
    for name, *cells in rows:
        base = base if name.startswith("+") else name
        expected[name if name == base else f"{base} {name}"] = dict(zip(published.BENCHMARKS, numbers(cells)))
    assert published.TABLE1 == expected and len(rows) == 7


def test_table_2_against_the_protocol():
    rows = tables("benchmarks.md")["method", "DaR", *COLUMNS, "avg"]
    run = lambda row: (row[0] == "STIC", row[1] == "yes")
    assert {run(r): dict(zip(published.BENCHMARKS, numbers(r[2:-1]))) for r in rows} == published.TABLE2
    assert {run(r): float(r[-1]) for r in rows} == published.TABLE2_AVERAGES and len(rows) == 4


def test_table_3_against_the_protocol():
    original, positives, stic = (" / ".join(map(str, row.values())) for row in published.TABLE3.values())
    line = f"Table 3: original {original}, STIC positives only {positives}, STIC {stic}"
    assert f"{line} (SciQA / TextVQA / LLaVA-Bench)" in shared("benchmarks.md")


@pytest.mark.parametrize("table, more", [(published.TABLE5, ("implied total",)), (published.TABLE6, ())])
def test_tables_5_and_6_against_the_protocol(table, more):
    columns = tuple(table[False])
    original, stic = tables("benchmarks.md")["", *columns, *more]
    assert (original[0], stic[0]) == ("original", "STIC")
    for row, own in ((original, table[False]), (stic, table[True])):
        assert dict(zip(columns, numbers(row[1:7]))) == own


def test_llava_against_the_notes_on_the_release():
    header = ("", "ScienceQA", "TextVQA", "MMBench", "MM-Vet", "MathVista", "LLaVA-Bench")
    zoo, original, stic = tables("paper_vs_release.md")[header]
    names = {title: name for name, title in published.BENCHMARKS.items()}
    by_name = lambda row: {names[title]: float(cell) for title, cell in zip(header[1:], row[1:])}
    assert published.LLAVA["v1.6"] == {**dict.fromkeys(published.BENCHMARKS), **by_name(zoo)}
    assert by_name(original).items() <= published.TABLE1["LLaVA-1.6 7B"].items()
    assert by_name(stic).items() <= published.TABLE1["LLaVA-1.6 7B + STIC"].items()


def test_llava_v15_against_the_graded_files_and_the_paper():
    rows = {row[0]: row for row in tables("benchmarks.md")["predictions", "published", "recomputed from the file"]}
    own, paper = published.LLAVA["v1.5"], published.TABLE1["LLaVA-1.5 7B"]
    assert rows["MM-Vet, LLaVA-1.5-7B / 13B graded files"][1].startswith(f"{own['mmvet']} /")
    assert rows["LLaVA-Bench, LLaVA-1.5-7B / 13B, 3 reviews each"][1].startswith(f"{own['llavabench']} /")
    # the paper repeats LLaVA's figures where there are any
    assert {name: value for name, value in own.items() if value is not None}.items() <= paper.items()


def test_every_number_is_in_the_paper():
    """The rows of the tables as the paper's text has them."""
    text = shared("paper/stic-paper.md").replace("<b>", "").replace("</b>", "")
    rows = {tuple(line.split("\t")[-length:]) for line in text.split("\n") for length in (3, 6, 7, 8)}
    line = lambda row: tuple("–" if value is None else f"{value}" for value in row.values())
    expected = [line(row) for table in (published.TABLE1, published.TABLE3, published.TABLE5, published.TABLE6)
                for row in table.values()]  # fmt: skip
    expected += [(*line(row), f"{published.TABLE2_AVERAGES[run]}") for run, row in published.TABLE2.items()]
    assert len(expected) == 18
    assert [row for row in expected if row not in rows] == []
