"""A folder of scores as a page: charts, the paper's tables with our scores, settings, and flipped answers."""

import re
from html import escape
from pathlib import Path

from stic_min.report import answers
from stic_min.report.options import Options
from stic_min.report.page import html_table, markdown, note, page_of
from stic_min.runtime.files import write_text
from stic_min.scorers import published, tables

# (benchmark, group or None for the score itself, title), in the order of the page
CHARTS = [
    *((name, None, title) for name, title in published.BENCHMARKS.items()),
    ("toyvqa", None, "Toy questions, accuracy (higher is better)"),
    ("toycaptions", "chair_i", "Toy captions, hallucinated objects: CHAIR_i (lower is better)"),
    ("toycaptions", "f1", "Toy captions, objects: F1 (higher is better)"),
]

STYLE = """
.bars { --ocher: #c08a1e; --interval: #0a1f44; }
@media (prefers-color-scheme: dark) { .bars { --ocher: #d8a640; --interval: #ffffff; } }
.bar { display: grid; grid-template-columns: 13em 1fr 9.5em; gap: .8em; align-items: center;
  margin: .25em 0; }
.bar.own { font-weight: 600; } .bar small { font-weight: 400; }
.track { position: relative; height: 1.1em; background: var(--panel); }
.track i { position: absolute; inset: 0 auto 0 0; background: var(--gray); }
.own .track i { background: var(--blue); } .llava .track i { background: var(--ocher); }
.partial .track i { background: repeating-linear-gradient(135deg, var(--blue) 0 5px, var(--own) 5px 10px); }
.track b { position: absolute; top: 45%; height: 2px; background: var(--interval);
  box-shadow: 0 0 0 1px var(--panel); }
.runs td, .runs th { text-align: left; }
@media (max-width: 45em) {
  .bar { grid-template-columns: 1fr auto; gap: 0 .8em; }
  .track { grid-column: 1 / -1; grid-row: 2; height: .8em; }
}
"""


def bar(label: str, value: str, score: float, interval: list[float] | None, kind: str, full: float) -> str:
    """One bar of a chart whose axis ends at `full` percent, with a thin line for the interval."""
    place = lambda number: f"{100 * min(max(number, 0), full) / full:.2f}%"
    span, line = "", ""
    if interval:
        low, high = interval
        line = f'<b style="left:{place(low)};right:calc(100% - {place(high)})"></b>'
        span = f" <small>{low:.1f} to {high:.1f}</small>"
    track = f'<span class=track><i style="width:{place(score)}"></i>{line}</span>'
    return f'<div class="bar {kind}"><span>{escape(label)}</span>{track}<span>{value}{span}</span></div>'


def chart(name: str, group: str | None, title: str, rows: list[tables.Row], base: str) -> str:
    """The bars of a benchmark or one of its groups: ours, the paper's, LLaVA's own; below them the prompt of
    item 1. "" without a score of ours."""
    results = [(row, row.results[name]) for row in rows if name in row.results]
    entries = [(row, result, result["groups"].get(group) if group else result) for row, result in results]
    entries = [(row, result, entry) for row, result, entry in entries if entry]
    if not entries:
        return ""
    is_comparable = name in published.BENCHMARKS and all(tables.comparable(result) for _, result in results)
    theirs = published.rows(name, base) if is_comparable else []
    full = max([100, *(entry["interval"][1] for *_, entry in entries)])  # LLaVA-Bench can exceed 100
    bars = []
    for row, result, entry in entries:
        value = tables.lower_bound(result) + tables.number(round(entry["score"], 1))
        partial = tables.partial(result, entry)
        kind = "own partial" if partial else "own"
        label = (row.label if theirs else row.label.removeprefix("ours, ")) + partial + tables.marks(result)
        bars.append(bar(label, value, entry["score"], entry["interval"], kind, full))
    for label, value in theirs:  # the page names the model once
        label = re.sub(r", LLaVA-1\.. 7B( \+ STIC)?", lambda match: ", STIC" if match[1] else ", base", label)
        kind, label = ("llava", "LLaVA's own") if label.startswith("LLaVA") else ("paper", label)
        bars.append(bar(label, tables.number(value), value, None, kind, full))
    prompts = "".join(
        f"<p>{escape(row.label)}: {result['n']} items, {result.get('missing', 0)} without an answer, "
        f"template {escape(result['run']['template'])}<pre>{escape(result['run']['prompt'])}</pre>"
        for row, result in results
    )
    if name == "scienceqa":
        title += ", questions with an image"
    return (
        f"<section><h3>{title}</h3>{''.join(bars)}"
        f"<details><summary>the prompt of item 1</summary>{prompts}</details></section>"
    )


def all_tables(rows):
    return [*tables.tables(rows), tables.runs_table(rows)]


def text(path: str | Path) -> str:
    """The tables and notes of a folder of scores as Markdown. Raises InputError like `read_results`."""
    rows = tables.read_results(path)
    parts = [f"Models: {', '.join(models(rows))}"]
    parts += [f"## {table.title}\n\n{markdown(table.header, table.rows)}" for table in all_tables(rows)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in tables.notes(rows))])


def models(rows):
    return sorted({row.model for row in rows})


def section(path: str | Path, options: Options) -> str:
    """The scores in a folder as HTML, and the answers that flipped. Raises InputError like `read_results`."""
    rows = tables.read_results(path)
    base = published.guess_base(models(rows))
    notes = tables.notes(rows)
    charts = "".join(chart(name, group, title, rows, base) for name, group, title in CHARTS)
    of_paper = any(name in published.BENCHMARKS for name in tables.benchmarks_of(rows))
    colors = "Bars: blue is ours"
    if of_paper:
        colors += f", gray the paper's, ocher LLaVA's own (the last two for LLaVA-{base[1:]} 7B)"
    colors += "."
    if "own partial" in charts:
        colors += " Striped: a partial run."
    *score_tables, runs = all_tables(rows)
    parts = [
        f"<h2>Scores: {escape(Path(path).resolve().name)}</h2>",
        note(f"{', '.join(models(rows))}. {notes[0]} {colors}"),
        f'<div class="charts bars">{charts}</div>',
        *(f"<h3>{escape(table.title)}</h3>{html_table(table.header, table.rows, table.title, table.ours)}"
          for table in score_tables),
        f"<h3>{runs.title}</h3><div class=runs>{html_table(runs.header, runs.rows, runs.title)}</div>",
        "<h3>Before you compare</h3><ul>" + "".join(f"<li>{escape(line)}" for line in notes) + "</ul>",
        answers.section(path, options),
    ]  # fmt: skip
    return "\n".join(parts)


def write(path: str | Path, options: Options) -> Path:
    """Writes report.html to a folder of scores. Raises InputError like `read_results`."""
    file = Path(path, "report.html")
    write_text(file, page_of(section(path, options), STYLE))
    return file
