"""The paper's Tables 1, 2, 3, 5 and 6 with our scores, and one for the toy world. No model code, no HTML.

Reads the .scores.json files of `evaluate.py`; every score of ours has its 95% interval. If a judge was
prompted in our own words, its scores are not comparable with published numbers, which are then omitted. A
table has no columns without a score of ours.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from stic_min import InputError
from stic_min.runtime.files import read_json
from stic_min.scorers import audit, published
from stic_min.scorers.common import with_interval

TOY = {"toyvqa": "Toy questions", "toycaptions": "Toy captions"}
TITLES = published.BENCHMARKS | TOY

# ---------------------------------------------------------------- results


@dataclass
class Row:
    """One row of the tables: a model, asked in one way."""

    label: str
    model: str
    tuned: bool  # with an adapter
    dar: bool
    results: dict[str, dict]  # {benchmark: content of its .scores.json}
    files: dict[str, Path]  # {benchmark: the .scores.json}


RUN = {"model": str, "adapter": str | None, "mode": str, "fingerprint": str, "template": str,
       "image_mode": str, "dtype": str, "max_new_tokens": int, "temperature": int | float,
       "limit": int | None, "prompt": str}  # fmt: skip


def is_ours(result):
    """Whether a .scores.json has everything that the tables show."""
    run = result.get("run")
    parts = [result.get(name, {}) for name in ("groups", "judge", "answers", "descriptions")]
    if not isinstance(run, dict) or not all(isinstance(part, dict) for part in parts):
        return False
    groups, judge, *counts = parts
    numbers = [number for part in counts for number in part.values()]
    numbers += [result.get(key) for key in ("missing", "unread")]
    unread = result.get("unread_share", 0)
    served = judge.get("served", [])
    files = judge.get("files", [])
    texts = [None]
    if isinstance(served, list) and isinstance(files, list):
        texts = [*served, *files, judge.get("official", "")]
    return (
        all(isinstance(run.get(key), kind) for key, kind in RUN.items())
        and all(isinstance(text, str) for text in texts)
        and ("official" in judge or not served)
        and all(type(number) in (int, type(None)) for number in numbers)
        and type(unread) in (int, float)
        and 0 <= unread <= 1
        and all(map(is_score, [result, *groups.values()]))
    )


def is_score(entry):
    """Whether it has a finite score, interval and n."""
    if not isinstance(entry, dict) or not isinstance(interval := entry.get("interval"), list):
        return False
    numbers = [entry.get("score"), entry.get("n"), *interval]
    return len(numbers) == 4 and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)


def read_results(folder: str | Path) -> list[Row]:
    """The rows of a folder of scores, base models first. Raises InputError if there are none."""
    by_run = {}
    for path in sorted(Path(folder).glob("*.scores.json")):
        result = read_json(path)
        name = str(result.get("benchmark"))
        if name not in TITLES:
            continue
        if not is_ours(result):
            raise InputError(f"{path}: not written by this version of evaluate.py; run `score` again")
        run = result["run"]
        if other := audit.find_other_answers(path, run):
            raise InputError(f"{path}: not the score of the answers in {other}; run `score` again")
        keys = ("model", "adapter", "mode", "fingerprint", "template", "image_mode")
        results, files = by_run.setdefault(tuple(run.get(key) for key in keys), ({}, {}))
        if name in results:
            raise InputError(f"{path}: a second score of the same run ({run['model']} on {name})")
        results[name] = result
        files[name] = path
    if not by_run:
        raise InputError(f"{folder} contains no .scores.json of a benchmark")
    rows = []
    one_model = len({model for model, *_ in by_run}) == 1
    for (model, adapter, mode, *details), (results, files) in by_run.items():
        name = (adapter or "base") if one_model else " + ".join(filter(None, [model, adapter]))
        label = f"ours, {name}" + {"direct": "", "dar": ", DaR"}.get(mode, f", {mode}")
        rows.append((Row(label, model, bool(adapter), mode != "direct", results, files), details))
    labels = [row.label for row, _ in rows]
    for row, details in rows:
        if labels.count(row.label) > 1:  # distinguished by what else differs
            row.label += f" ({', '.join(map(str, details))})"
    return sorted((row for row, _ in rows), key=lambda row: (row.tuned, row.label))


def cell(result, group=None):
    """The text of a table cell: the score of a result, or of one of its groups."""
    entry = result and (result if group is None else result.get("groups", {}).get(group))
    if entry is None:
        return "–"
    return lower_bound(result) + with_interval(entry) + partial(result, entry) + marks(result)


def partial(result, entry):
    """What the score of a partial run is worth: on how many questions, and how many have no answer."""
    subset = [f"subset, n={entry['n']}"] if result["run"]["limit"] else []
    missing = [f"{result['missing']} missing"] if result.get("missing") else []
    return f" ({', '.join(subset + missing)})" if subset or missing else ""


def lower_bound(result):
    """Without a judge, answers that only a judge can read count as wrong."""
    is_bound = not result.get("judge") and (result.get("unextracted") or result.get("unmatched"))
    return "≥ " if is_bound else ""


def marks(result):
    """The marks behind a judged score for what limits its comparison."""
    applies = {
        OWN_WORDS: not comparable(result),
        OTHER_JUDGE: other_judge(result),
        UNREAD: much_unread(result),
    }
    return "".join(f" {mark}" for mark in applies if applies[mark])


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
    header: list[str]
    rows: list[list[str]]  # ours first
    ours: int  # the number of our rows


def without_gaps(table):
    """[the table] without the columns that have no value of ours and without empty rows; [] if all are."""
    ours = table.rows[: table.ours]
    columns = [i for i in range(1, len(table.header)) if any(row[i] != "–" for row in ours)]
    is_filled = lambda row: any(row[i] != "–" for i in columns)
    rows = [[row[0], *(row[i] for i in columns)] for row in filter(is_filled, table.rows)]
    header = [table.header[0], *(table.header[i] for i in columns)]
    return [Table(table.title, header, rows, sum(map(is_filled, ours)))] if columns else []


def select_as_in_paper(rows):
    """Tables 1 and 3 show the base without DaR and STIC with it. An adapter's direct run is added if it has
    results without a counterpart with DaR."""
    adapter = lambda row: next(iter(row.results.values()))["run"]["adapter"]
    with_dar = {(adapter(row), name) for row in rows if row.dar for name in row.results}
    only_direct = lambda row: row.tuned and any((adapter(row), name) not in with_dar for name in row.results)
    return [row for row in rows if row.dar == row.tuned or only_direct(row)]


def number(value):
    """A published number with its own decimals, at least one."""
    return "–" if value is None else f"{value:.1f}" if value == round(value, 1) else f"{value:g}"


def benchmark_table(title, rows, benchmarks, theirs, omitted):
    """One column per benchmark (two for ScienceQA). theirs: [(label, {benchmark: percent})]; omitted:
    benchmarks whose published numbers would mislead."""
    columns = [(name, None) for name in benchmarks]
    columns.insert(1, ("scienceqa", "average"))
    header = [""]
    for name, group in columns:
        which = (" all" if group else " IMG") if name == "scienceqa" else ""
        header.append(SHORT[name] + which)
    cells = [[row.label, *(cell(row.results.get(name), group) for name, group in columns)] for row in rows]
    for label, values in theirs:
        values = [None if group or name in omitted else values.get(name) for name, group in columns]
        cells.append([label, *map(number, values)])
    return Table(title, header, cells, len(rows))


def group_table(title, rows, benchmark, theirs, omitted):
    """One column per group of a benchmark, and one for all. theirs: {with STIC: {group: percent}} -> [Table]
    or []."""
    rows = [row for row in rows if benchmark in row.results]
    if not rows:
        return []
    names = list(theirs[False])
    cells = [[row.label, *(cell(row.results[benchmark], name) for name in [*names, None])] for row in rows]
    for stic, values in theirs.items() if benchmark not in omitted else ():
        is_known = benchmark == "mmbench"  # it is unclear which run Table 6 is from
        overall = published.TABLE2[stic, False][benchmark] if is_known else None
        cells.append([f"paper, {'STIC' if stic else 'original'}", *map(number, [*values.values(), overall])])
    return [Table(title, ["", *names, "all"], cells, len(rows))]


def tables(rows: list[Row]) -> list[Table]:
    """The paper's tables and the toy world's, as far as there are results."""
    in_paper = lambda results: {name: results[name] for name in published.BENCHMARKS if name in results}
    paper_rows = [replace(row, results=in_paper(row.results)) for row in rows]
    paper = paper_tables([row for row in paper_rows if row.results])
    return [part for table in [*paper, toy_table(rows)] for part in without_gaps(table)]


TOY_COLUMNS = {
    ("toyvqa", None): "questions ↑",
    ("toycaptions", "chair_i"): "CHAIR_i ↓",
    ("toycaptions", "chair_s"): "CHAIR_s ↓",
    ("toycaptions", "precision"): "precision ↑",
    ("toycaptions", "recall"): "recall ↑",
    ("toycaptions", "f1"): "F1 ↑",
}


def toy_table(rows):
    cells = []
    for row in rows:
        values = (cell(row.results.get(name), group) for name, group in TOY_COLUMNS)
        cells.append([row.label.removeprefix("ours, "), *values])
    title = "Toy world: questions and captions (↑ higher is better, ↓ lower is better)"
    return Table(title, ["", *TOY_COLUMNS.values()], cells, len(rows))


def paper_tables(rows):
    omitted = {name for row in rows for name, result in row.results.items() if not comparable(result)}
    selected = select_as_in_paper(rows)
    benchmarks = list(published.BENCHMARKS)
    paper = lambda table: [(f"paper, {label}", values) for label, values in table.items()]
    llava = [(f"LLaVA's own, {base}", values) for base, values in published.LLAVA.items()]
    table2 = [(f"paper, {'STIC' if stic else 'original'}{', DaR' if dar else ''}", values)
              for (stic, dar), values in published.TABLE2.items()]  # fmt: skip

    titles = {
        1: "Table 1: the base model directly, STIC with DaR",
        2: "Table 2: with and without describe-and-respond",
        3: "Table 3: the effect of the dispreferred responses",
    }
    averaged = benchmark_table(titles[2], rows, benchmarks, table2, omitted)
    averaged.header.append("average")
    averages = [*map(average, rows)]
    averages += [number(None if omitted else value) for value in published.TABLE2_AVERAGES.values()]
    averaged.rows = [[*row, value] for row, value in zip(averaged.rows, averages)]
    return [
        benchmark_table(titles[1], selected, benchmarks, paper(published.TABLE1) + llava, omitted),
        averaged,
        benchmark_table(titles[3], selected, [*published.TABLE3["STIC"]], paper(published.TABLE3), omitted),
        *group_table("Table 5: MMBench by ability", rows, "mmbench", published.TABLE5, omitted),
        *group_table("Table 6: MM-Vet by capability", rows, "mmvet", published.TABLE6, omitted),
    ]


def average(row):
    """Table 2's average, if all seven benchmarks are complete. Its interval treats theirs as independent."""
    results = row.results.values()
    if set(row.results) != set(published.BENCHMARKS) or any(result["run"]["limit"] for result in results):
        return "–"
    score = sum(result["score"] for result in results) / len(results)
    halves = [(result["interval"][1] - result["interval"][0]) / 2 for result in results]
    half = math.hypot(*halves) / len(results)
    text = with_interval({"score": score, "interval": [score - half, score + half]})
    if missing := sum(result.get("missing") or 0 for result in results):
        text += f" ({missing} missing)"
    return max(map(lower_bound, results)) + text + "".join(sorted({marks(result) for result in results}))


def notes(rows: list[Row]) -> list[str]:
    """What to know before comparing."""
    results = [result for row in rows for result in row.results.values()]
    legend = []
    if any(result["run"]["limit"] for result in results):
        legend.append("subset: a random part of the questions (--limit), n of them.")
    if any(result.get("missing") for result in results):
        legend.append("missing: questions without an answer, which count as wrong; a missing caption of the "
                      "toy world mentions nothing.")  # fmt: skip
    if not all(map(comparable, results)):
        legend.append(f"{OWN_WORDS} graded by a judge prompted in our own words: not comparable, published "
                      "numbers are omitted.")  # fmt: skip
    if any(map(other_judge, results)):
        legend.append(f"{OTHER_JUDGE} graded by another model than the official judge: published numbers are "
                      "only a rough guide.")  # fmt: skip
    if any(map(much_unread, results)):
        legend.append(f"{UNREAD} more than {audit.UNREAD:.0%} of the judge's verdicts could not be read and "
                      "count by the benchmark's rule for them: not a measure of the answers.")  # fmt: skip
    if any(map(lower_bound, results)):
        legend.append("≥ without a judge, answers that only a judge can read count as wrong; the interval is "
                      "for this lower bound.")  # fmt: skip
    names = benchmarks_of(rows)
    of_paper = [name for name in names if name in published.BENCHMARKS]
    if len(of_paper) < len(names):
        legend.append("CHAIR_i: mentions of objects that are not in the image, in percent of all mentions; "
                      "CHAIR_s: captions with such a mention.")  # fmt: skip
    paper_notes = ("Tables 2, 3, 5 and 6 of the paper are for LLaVA-1.6 7B.", *published.GENERAL_NOTES)
    return [
        "Ours: percent with a 95% interval (Wilson for proportions, over question groups in MMBench; "
        "bootstrap otherwise).",
        *legend,
        *(paper_notes if of_paper else ()),
        *(note for name in of_paper for note in published.NOTES[name]),
    ]


def benchmarks_of(rows):
    return [name for name in TITLES if any(name in row.results for row in rows)]


def runs_table(rows: list[Row]) -> Table:
    """The settings behind each score."""
    known = lambda counts, key: "–" if counts.get(key) is None else counts[key]
    lines = []
    for row in rows:
        for name in (name for name in TITLES if name in row.results):
            result = row.results[name]
            run = result["run"]
            judge = result.get("judge", {})
            judges = judge.get("served") or [Path(file).name for file in judge.get("files", [])]
            items = f"{result['n']}" + (f" (--limit {run['limit']})" if run["limit"] else "")
            endings = [known(result.get("answers", {}), key) for key in ("empty", "cut")]
            keys = ("template", "image_mode", "dtype", "max_new_tokens", "temperature")
            settings = [run[key] for key in keys] + [run.get(key, "–") for key in ("suffix", "preset")]
            line = [row.label, TITLES[name], items, result.get("missing", 0), *endings,
                    *settings, ", ".join(judges) or "–", known(result, "unread")]  # fmt: skip
            lines.append(list(map(str, line)))
    header = ["", "benchmark", "items", "without answer", "empty", "cut off", "template", "image mode",
              "dtype", "new tokens", "temperature", "suffix", "preset", "judge",
              "unread verdicts"]  # fmt: skip
    [table] = without_gaps(Table("Settings of each run", header, lines, len(lines)))
    return table
