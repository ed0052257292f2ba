"""The paper's Tables 1, 2, 3, 5 and 6 with one's own scores: Markdown, and one HTML page that needs nothing else.

Reads the .scores.json files of `evaluate.py`; every score of ours carries its 95 % interval. Where a judge was asked
in our own words, published numbers say nothing about the result and are left out.
"""

import math
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stic_min import InputError
from stic_min.scorers import audit, published
from stic_min.scorers.common import figure, read_json

# ---------------------------------------------------------------- Markdown and HTML


def markdown(header, rows):
    line = lambda row: "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
    return "\n".join(map(line, [header, ["---"] * len(header), *rows]))


def page(title, style, body):
    """A whole HTML page from finished HTML."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style>{body}</html>\n"
    )


def html_table(header, rows, own):
    """Text cells; the first `own` rows are ours and stand out. An interval goes below its figure."""
    text = lambda cell: re.sub(r" (\[[-0-9., ]+\])", r"<br><small>\1</small>", escape(cell))
    line = lambda tag, cells, kind="": (
        f"<tr{kind}>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"
    )
    body = [line("td", row, " class=own" if i < own else "") for i, row in enumerate(rows)]
    return f"<div class=wide><table>{line('th', header)}{''.join(body)}</table></div>"


# ---------------------------------------------------------------- results


@dataclass
class Row:
    """One model, asked in one way: a row of the tables."""

    label: str
    model: str
    tuned: bool  # with an adapter
    dar: bool
    results: dict  # {benchmark: what its .scores.json holds}


RUN = {"model": str, "adapter": str | None, "mode": str, "fingerprint": str, "template": str, "image_mode": str,
       "dtype": str, "max_new_tokens": int, "temperature": int | float, "limit": int | None, "prompt": str}  # fmt: skip


def is_ours(result):
    """Whether what a .scores.json holds has everything that is shown of it."""
    run, parts = result.get("run"), [result.get(name, {}) for name in ("groups", "judge", "answers", "descriptions")]
    groups, judge, *counted = parts
    if not isinstance(run, dict) or not all(isinstance(part, dict) for part in parts):
        return False
    numbers = [n for counts in counted for n in counts.values()] + [result.get(k) for k in ("missing", "unread")]
    share = result.get("unread_share", 0)
    served, files = judge.get("served", []), judge.get("files", [])
    lists = isinstance(served, list) and isinstance(files, list)
    texts = [*served, *files, judge.get("official", "")] if lists else [None]
    return (
        all(isinstance(run.get(key), kind) for key, kind in RUN.items())
        and all(isinstance(text, str) for text in texts)
        and ("official" in judge or not served)
        and all(type(n) in (int, type(None)) for n in numbers)
        and type(share) in (int, float)
        and 0 <= share <= 1
        and all(map(is_figure, [result, *groups.values()]))
    )


def is_figure(entry):
    if not isinstance(entry, dict) or not isinstance(interval := entry.get("interval"), list):
        return False
    numbers = [entry.get("score"), entry.get("n"), *interval]
    return len(numbers) == 4 and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)


def read_results(folder):
    """The rows of a folder, base models first. Raises InputError if it holds no scores."""
    by_run = {}
    for path in sorted(Path(folder).glob("*.scores.json")):
        result = read_json(path)
        if str(result.get("benchmark")) in published.BENCHMARKS:  # the toy world's are not the paper's
            if not is_ours(result):
                raise InputError(f"{path}: not a file that this version of evaluate.py writes: run `score` again")
            run, name = result["run"], result["benchmark"]
            if other := audit.other_answers(path, run):
                raise InputError(f"{path}: not the score of {other}: run `score` again")
            how = [run.get(key) for key in ("model", "adapter", "mode", "fingerprint", "template", "image_mode")]
            if name in by_run.setdefault(tuple(how), {}):
                raise InputError(f"{path}: a second score of the same run, of {run['model']} on {name}")
            by_run[tuple(how)][name] = result
    if not by_run:
        raise InputError(f"{folder}: no .scores.json of a benchmark in it")
    rows, one_model = [], len({model for model, *_ in by_run}) == 1
    for (model, adapter, mode, *how), results in by_run.items():
        name = (adapter or "base") if one_model else " + ".join(filter(None, [model, adapter]))
        label = f"ours, {name}" + {"direct": "", "dar": ", DaR"}.get(mode, f", {mode}")
        rows.append((Row(label, model, bool(adapter), mode != "direct", results), how))
    labels = [row.label for row, _ in rows]
    for row, how in rows:
        if labels.count(row.label) > 1:  # told apart by what else differs
            row.label += f" ({', '.join(map(str, how))})"
    return sorted((row for row, _ in rows), key=lambda row: (row.tuned, row.label))


def part(result, name):
    """A result's figure, or that of one of its groups; None if there is none."""
    return result and (result if name is None else result.get("groups", {}).get(name))


def cell(result, name=None):
    entry = part(result, name)
    if entry is None:
        return "–"
    subset = f" (n={entry['n']})" if result["run"]["limit"] else ""
    return bound(result) + figure(entry) + subset + marks(result)


def bound(result):
    """Without a judge, answers that only a judge can read count as wrong."""
    return "≥ " * (not result.get("judge") and bool(result.get("unextracted") or result.get("unmatched")))


def marks(result):
    """What keeps a judged result from being compared, behind its figure."""
    return (
        f" {OWN_WORDS}" * (not comparable(result))
        + f" {OTHER_JUDGE}" * other_judge(result)
        + f" {UNREAD}" * much_unread(result)
    )


def much_unread(result):
    return result.get("unread_share", 0) > audit.UNREAD


def other_judge(result):
    judge = result.get("judge", {})
    return any(not name.startswith(judge["official"]) for name in judge.get("served", ()))


def comparable(result):
    return result.get("judge", {}).get("comparable", True)


# ---------------------------------------------------------------- the paper's tables

SHORT = {"scienceqa": "SciQA", "textvqa": "TextVQA", "chartqa": "ChartQA", "llavabench": "LLaVA-B",
         "mmbench": "MMBench", "mmvet": "MM-Vet", "mathvista": "MathVista"}  # fmt: skip
OWN_WORDS, OTHER_JUDGE, UNREAD = "‡", "†", "§"


@dataclass
class Table:
    title: str
    header: list
    rows: list  # of text cells, ours first
    own: int  # how many are ours


def as_in_the_paper(rows):
    """Tables 1 and 3 show the base without DaR, STIC with it; an adapter also without, for what it has only so."""
    adapter = lambda row: next(iter(row.results.values()))["run"]["adapter"]
    described = {(adapter(row), name) for row in rows if row.dar for name in row.results}
    only_so = lambda row: row.tuned and any((adapter(row), name) not in described for name in row.results)
    return [row for row in rows if row.dar == row.tuned or only_so(row)]


def number(value):
    """A published figure with the decimals it has, one at least."""
    return "–" if value is None else f"{value:.1f}" if value == round(value, 1) else f"{value:g}"


def tables(rows):
    """The paper's tables as far as there are results for them -> [Table]."""
    misleading = {name for row in rows for name, result in row.results.items() if not comparable(result)}

    def table(title, own, benchmarks, theirs):
        """A column a benchmark (ScienceQA has two accuracies); theirs: [(label, {benchmark: value})]."""
        columns = [(name, None) for name in benchmarks]
        columns[1:1] = [("scienceqa", "average")]
        which = lambda name, group: f" {'all' if group else 'IMG'}" if name == "scienceqa" else ""
        header = ["", *(SHORT[name] + which(name, group) for name, group in columns)]
        cells = [[row.label, *(cell(row.results.get(n), group) for n, group in columns)] for row in own]
        for label, values in theirs:
            shown = [None if group or n in misleading else values.get(n) for n, group in columns]
            cells.append([label, *map(number, shown)])
        return Table(title, header, cells, len(own))

    def groups(title, benchmark, theirs):
        """A column a group of one benchmark, and the whole; theirs: {with STIC: {group: value}}."""
        own = [row for row in rows if benchmark in row.results]
        names = list(theirs[False])
        cells = [[r.label, *(cell(r.results[benchmark], n) for n in [*names, None])] for r in own]
        for stic, values in theirs.items() if benchmark not in misleading else ():
            whole = published.TABLE2[stic, False][benchmark] if benchmark == "mmbench" else None  # Table 6's is unclear
            cells.append([f"paper, {'STIC' if stic else 'original'}", *map(number, [*values.values(), whole])])
        return [Table(title, ["", *names, "all"], cells, len(own))] if own else []

    as_paper, all_seven = as_in_the_paper(rows), list(published.BENCHMARKS)
    llava = [(f"LLaVA's own, {base}", values) for base, values in published.LLAVA.items()]
    theirs = {
        1: [*((f"paper, {label}", values) for label, values in published.TABLE1.items()), *llava],
        2: [("paper, " + ("STIC" if stic else "original") + ", DaR" * dar, values)
            for (stic, dar), values in published.TABLE2.items()],
        3: [(f"paper, {label}", values) for label, values in published.TABLE3.items()],
    }  # fmt: skip
    averaged = table("Table 2: with and without describe-and-respond", rows, all_seven, theirs[2])
    averages = [*map(average, rows), *(number(None if misleading else v) for v in published.TABLE2_AVERAGES.values())]
    averaged.header.append("average")
    averaged.rows = [[*row, value] for row, value in zip(averaged.rows, averages)]
    return [
        table("Table 1: the base model directly, STIC with DaR", as_paper, all_seven, theirs[1]),
        averaged,
        table("Table 3: what the rejected responses add", as_paper, list(published.TABLE3["STIC"]), theirs[3]),
        *groups("Table 5: MMBench by ability", "mmbench", published.TABLE5),
        *groups("Table 6: MM-Vet by capability", "mmvet", published.TABLE6),
    ]


def average(row):
    """Table 2's average of the seven, if all are there whole. Its interval adds up theirs as independent."""
    results = row.results.values()
    if set(row.results) != set(published.BENCHMARKS) or any(result["run"]["limit"] for result in results):
        return "–"
    score = sum(result["score"] for result in results) / len(results)
    half = math.hypot(*((result["interval"][1] - result["interval"][0]) / 2 for result in results)) / len(results)
    shown = figure({"score": score, "interval": [score - half, score + half]})
    return max(map(bound, results)) + shown + "".join(sorted({marks(result) for result in results}))


def notes(rows):
    """What a reader has to know before comparing -> [str]."""
    found = [note for name in published.BENCHMARKS for note in published.NOTES[name]
             if any(name in row.results for row in rows)]  # fmt: skip
    results = [result for row in rows for result in row.results.values()]
    marked = [
        (not all(map(comparable, results)), f"{OWN_WORDS} graded by a judge that was asked in our own words: not "
         "comparable, published numbers are left out."),
        (any(map(other_judge, results)), f"{OTHER_JUDGE} graded by another model than the official judge: published "
         "numbers are a rough guide."),
        (any(map(much_unread, results)), f"{UNREAD} more than {audit.UNREAD:.0%} of the judge's verdicts could not be "
         "read and count by the benchmark's rule for them: not a measure of the answers."),
        (any(map(bound, results)), "≥ without a judge, answers that only a judge can read count as wrong; the interval "
         "is that of this lower bound."),
    ]  # fmt: skip
    return [
        "Ours: percent with a 95 % interval (Wilson for shares, over question groups in MMBench; bootstrap otherwise).",
        *(text for holds, text in marked if holds),
        "Tables 2, 3, 5 and 6 of the paper are LLaVA-1.6 7B's.", *published.GENERAL_NOTES, *found,
    ]  # fmt: skip


def runs_table(rows):
    """What each figure was made with."""
    lines = []
    for row in rows:
        for name in (name for name in published.BENCHMARKS if name in row.results):
            r = row.results[name]
            run, judge = r["run"], r.get("judge", {})
            by = ", ".join(judge.get("served") or []) or ", ".join(Path(f).name for f in judge.get("files", []))
            n = f"{r['n']}" + (f" (--limit {run['limit']})" if run["limit"] else "")
            how = [run[key] for key in ("template", "image_mode", "dtype", "max_new_tokens", "temperature")]
            known = lambda counts, key: "–" if counts.get(key) is None else counts[key]
            answers = [known(r.get("answers", {}), key) for key in ("empty", "cut")]
            line = row.label, published.BENCHMARKS[name], n, r.get("missing", 0), *answers, *how, run.get("suffix", "–")
            lines.append([*map(str, line), by or "–", str(known(r, "unread"))])
    header = ["", "benchmark", "items", "without answer", "empty", "cut off", "template", "pictures", "dtype",
              "new tokens", "temperature", "suffix", "judge", "unread verdicts"]  # fmt: skip
    return Table("How they were made", header, lines, len(lines))


# ---------------------------------------------------------------- the page

STYLE =
"""
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2.2em 0 .4em; } small, .note { color: #666; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9em; margin: .6em 0; min-width: 100%; }
th, td { text-align: right; padding: .35em .7em; border-top: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.own td { background: #eef4fd; font-weight: 600; } td small { font-weight: 400; }
.runs td, .runs th { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34em, 100%), 1fr)); gap: 0 3em; }
.bar { display: grid; grid-template-columns: 13em 1fr 9.5em; gap: .8em; align-items: center; margin: .25em 0; }
.bar.own { font-weight: 600; } .bar small { font-weight: 400; }
.track { position: relative; height: 1.1em; background: #f1f1f1; }
.track i { position: absolute; inset: 0 auto 0 0; background: #b9bec7; }
.own .track i { background: #1f6feb; } .llava .track i { background: #ddb86a; }
.track b { position: absolute; top: 45%; height: 2px; background: #0a1f44; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7em; font-size: .85em; }
@media (max-width: 45em) {
  .bar { grid-template-columns: 1fr auto; gap: 0 .8em; } .track { grid-column: 1 / -1; grid-row: 2; height: .8em; }
  th:first-child, td:first-child { max-width: 9em; white-space: normal; } body { margin: 1em auto; }
}
"""


def bar(label, entry, kind, full):
    """One bar of a chart that ends at `full` percent, with a thin line for the interval."""
    place = lambda value: f"{100 * min(max(value, 0), full) / full:.2f}%"
    span, line = "", ""
    if "interval" in entry:
        low, high = entry["interval"]
        line = f'<b style="left:{place(low)};right:calc(100% - {place(high)})"></b>'
        span = f" <small>{low:.1f} to {high:.1f}</small>"
    value = bound(entry) + number(round(entry["score"], 1) if "interval" in entry else entry["score"])
    return (
        f'<div class="bar {kind}"><span>{escape(label)}</span>'
        f'<span class=track><i style="width:{place(entry["score"])}"></i>{line}</span><span>{value}{span}</span></div>'
    )


def chart(benchmark, rows, base):
    """A benchmark's bars: ours, the paper's, LLaVA's own; below them what item 1 was asked."""
    own = [row for row in rows if benchmark in row.results]
    marked = not all(comparable(row.results[benchmark]) for row in own)
    theirs = [] if marked else published.rows(benchmark, base)
    full = max([100, *(row.results[benchmark]["interval"][1] for row in own)])  # a judge may prefer the answers
    bars = [bar(row.label + marks(r), r, "own", full)
            for row in own for r in [row.results[benchmark]]]  # fmt: skip
    for name, value in theirs:  # the page says once which model is meant
        name = re.sub(r", LLaVA-1\.. 7B( \+ STIC)?", lambda found: ", STIC" if found[1] else ", base", name)
        kind, name = ("llava", "LLaVA's own") if name.startswith("LLaVA") else ("paper", name)
        bars.append(bar(name, {"score": value}, kind, full))
    asked = "".join(
        f"<p>{escape(row.label)}: {r['n']} items, {r.get('missing', 0)} without an answer, "
        f"template {escape(r['run']['template'])}<pre>{escape(r['run']['prompt'])}</pre>"
        for row in own
        for r in [row.results[benchmark]]
    )
    title = published.BENCHMARKS[benchmark] + (", questions with an image" if benchmark == "scienceqa" else "")
    return (
        f"<section><h2>{title}</h2>{''.join(bars)}"
        f"<details><summary>the prompt of item 1</summary>{asked}</details></section>"
    )


def write(folder):
    """tables.md and report.html in a folder of scores; prints the first. Raises InputError as `read_results`."""
    rows = read_results(folder)
    found = tables(rows)
    runs, remarks, models = runs_table(rows), notes(rows), sorted({row.model for row in rows})
    base = "v1.5" if all("1.5" in model for model in models) else "v1.6"
    text = "\n\n".join(
        [
            f"Models: {', '.join(models)}",
            *(f"## {t.title}\n\n{markdown(t.header, t.rows)}" for t in [*found, runs]),
            "\n".join(f"- {note}" for note in remarks),
        ]
    )
    charts = [chart(name, rows, base) for name in published.BENCHMARKS if any(name in r.results for r in rows)]
    body = [
        "<h1>STIC: scores on the paper's benchmarks</h1>",
        f"<p class=note>{escape(', '.join(models))}. {escape(remarks[0])} Bars: blue ours, grey the paper's, ochre "
        f"LLaVA's own, both of LLaVA-{base[1:]} 7B.</p>",
        f"<div class=charts>{''.join(charts)}</div>",
        *(f"<h2>{escape(t.title)}</h2>{html_table(t.header, t.rows, t.own)}" for t in found),
        f"<h2>{runs.title}</h2><div class=runs>{html_table(runs.header, runs.rows, 0)}</div>",
        "<h2>Before you compare</h2><ul>" + "".join(f"<li>{escape(note)}" for note in remarks) + "</ul>",
    ]
    Path(folder, "tables.md").write_text(text + "\n", encoding="utf-8")
    Path(folder, "report.html").write_text(page("STIC scores", STYLE, "\n".join(body)), encoding="utf-8")
    print(f"{text}\n\nwrote {Path(folder, 'tables.md')} and {Path(folder, 'report.html')}")
