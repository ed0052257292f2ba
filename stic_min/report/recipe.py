"""A whole recipe, from pairs to scores, as a page (report.html) and as a text to hand on (report.md)."""

from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stic_min.formats.records import pair_sides, read_kind
from stic_min.report import record as records
from stic_min.report import training
from stic_min.report.options import Options
from stic_min.report.page import html_table, markdown, note, page, plural
from stic_min.report.steps import Step, steps_in
from stic_min.runtime.files import read_json, write_text
from stic_min.scorers.common import with_interval

NAMES = {
    "pairs": "Preference pairs", "stage 1": "Stage 1", "descriptions": "Descriptions", "stage 2": "Stage 2",
    "training": "Training", "scores": "Scores",
}  # fmt: skip
NONE = "–"  # does not apply
COSTS = (
    "Wall time is summed over resumed parts. Peak memory is that of the rank that took most: of its GPU, or "
    "of the process if it had none."
)
COUNTS = (
    "Equal: pairs with identical responses, which have no preference to learn. Cut off: by --max-new-tokens. "
    "Truncated: to --max-length. Skipped: requested, but without a record, such as unreadable images."
)

STYLE = """
nav ol { padding-left: 1.4em; } main > section { border-top: 1px solid var(--line); margin-top: 2.5em; }
"""


@dataclass
class Part:
    """A step of the recipe with what its runs recorded."""

    number: int
    step: Step
    name: str  # its path in the recipe's folder
    records: dict[str, dict]  # {name: record}; scores have one per evaluation, {} if it was not recorded

    @property
    def title(self) -> str:
        return f"{NAMES[self.step.kind]}: {self.name}"


def read(folder: Path) -> list[Part]:
    parts = []
    for number, step in enumerate(steps_in(folder), 1):
        name = str(step.path.relative_to(folder)) if step.path != folder else folder.resolve().name
        parts.append(Part(number, step, name, read_records_of(step, name)))
    return parts


def read_records_of(step, name):
    if step.kind in ("pairs", "descriptions"):
        return {name: records.of_output(step.path)}
    if step.kind != "scores":
        return {name: training.read(step.path).record}
    stems = [path.name.removesuffix(".scores.json") for path in sorted(step.path.glob("*.scores.json"))]
    return {stem: records.of_output(step.path / f"{stem}.jsonl") for stem in stems}


# ---------------------------------------------------------------- tables: (header, rows) of text


def steps_table(parts: list[Part]):
    """One row per step. The evaluations of a folder share a row: time is their sum, memory their maximum."""
    header = ["step", "wall time", "peak memory", "hardware"]
    rows = [[what(part), *costs(list(part.records.values()))] for part in parts]
    total = total_time([record for part in parts for record in part.records.values()])
    if len(parts) > 1 and total:
        rows.append(["all steps", total, "", ""])
    return header, rows


def what(part):
    count = f", {len(part.records)} evaluations" if part.step.kind == "scores" else ""
    return f"{part.number}. {part.title}{count}"


def total_time(recorded):
    """The wall time of several runs as text; "" if it is not recorded for any."""
    seconds = [records.number(record, "wall_seconds") for record in recorded]
    known = [value for value in seconds if value is not None]
    some = f" ({len(known)} of {len(seconds)} runs)" if len(known) < len(seconds) else ""
    return records.duration(sum(known)) + some if known else ""


def costs(recorded):
    """Wall time, peak memory and hardware of one or several runs."""
    if len(recorded) == 1:
        [record] = recorded
        return [records.wall_time(record), records.peak_memory(record), records.hardware(record)]
    total = total_time(recorded)
    if not total:
        return [records.MISSING] * 3
    memory = [records.number(record, "peak_memory_gb") for record in recorded]
    peak = max((value for value in memory if value is not None), default=None)
    machines = dict.fromkeys(records.hardware(record) for record in recorded if record)
    return [total, records.peak_memory({"peak_memory_gb": peak}), "; ".join(machines)]


def counts_table(parts: list[Part]):
    header = ["step", "count", "equal", "cut off", "truncated", "skipped"]
    count = {"pairs": count_pairs, "descriptions": count_descriptions, "scores": count_answers}
    cells = lambda part: count.get(part.step.kind, count_samples)(part)
    return header, [[f"{part.number}. {part.title}", *cells(part)] for part in parts]


def known(value) -> str:
    return records.MISSING if value is None else str(value)


def of_all(finishes, missing):
    """How many responses were cut off by --max-new-tokens."""
    return f"{finishes.count('length')} of {len(finishes)} responses" if finishes else missing


def skipped(part):
    [record] = part.records.values()
    return known(records.number(record, "skipped"))


def count_pairs(part):
    pairs = [record for _, record in read_kind(part.step.path, "pairs")]
    sides = [pair_sides(pair) for pair in pairs]
    equal = sum(side["chosen"] == side["rejected"] for side in sides)
    finishes = [pair[name] for pair in pairs for name in ("chosen_finish", "rejected_finish") if name in pair]
    return [plural(len(pairs), "pair"), str(equal), of_all(finishes, records.MISSING), NONE, skipped(part)]


def count_descriptions(part):
    described = [record for _, record in read_kind(part.step.path, "descriptions")]
    finishes = [record["finish"] for record in described if "finish" in record]
    cut = of_all(finishes, records.MISSING)
    return [plural(len(described), "description"), NONE, cut, NONE, skipped(part)]


def count_samples(part):
    [record] = part.records.values()
    samples, truncated, equal = (known(records.number(record, name))
                                 for name in ("samples", "truncated", "equal"))  # fmt: skip
    count = records.MISSING if samples == records.MISSING else f"{samples} samples"
    return [count, equal if part.step.kind == "stage 1" else NONE, NONE, truncated, NONE]


def count_answers(part):
    counted = [scores.get("answers") for _, scores in read_scores(part)]
    counted = [counts for counts in counted if isinstance(counts, dict)]
    total = lambda name: sum(records.number(counts, name) or 0 for counts in counted)
    missing = sum(records.number(scores, "missing") or 0 for _, scores in read_scores(part))
    cut = f"{total('cut')} of {total('n')} responses" if counted else records.MISSING
    return [f"{total('n')} answers", NONE, cut, NONE, str(missing)]


def read_scores(part):
    """[(name, content of NAME.scores.json), ...]"""
    return [(stem, read_json(part.step.path / f"{stem}.scores.json")) for stem in part.records]


def scores_table(part: Part):
    header = ["evaluation", "model", "score in %, 95% interval", "n", "wall time"]
    rows = []
    for stem, scores in read_scores(part):
        run = scores.get("run") if isinstance(scores.get("run"), dict) else {}
        model = " + ".join(str(run[name]) for name in ("model", "adapter") if run.get(name))
        subset = f" (of a subset: --limit {run['limit']})" if run.get("limit") else ""
        rows.append([stem, model, score_of(scores), f"{scores.get('n', NONE)}{subset}",
                     records.wall_time(part.records[stem])])  # fmt: skip
    return header, rows


def score_of(scores):
    try:
        return with_interval(scores)
    except (KeyError, TypeError, ValueError):  # damaged, or of an earlier version
        return NONE


# ---------------------------------------------------------------- what differs between the steps


def groups(parts: list[Part], value_of) -> list[str]:
    """The value if it is the same in all runs, else a "value (steps 1, 3)" for each."""
    by_value = {}
    for part in parts:
        for record in part.records.values():
            by_value.setdefault(value_of(record), {}).setdefault(part.number)
    if len(by_value) == 1:
        return list(by_value)
    return [f"{value} ({'steps' if len(numbers) > 1 else 'step'} {', '.join(map(str, numbers))})"
            for value, numbers in by_value.items()]  # fmt: skip


def versions_lines(parts: list[Part]) -> list[str]:
    """The versions that most runs have, and a line for each package that differs in some steps."""
    recorded = [record["versions"] for part in parts for record in part.records.values()
                if isinstance(record.get("versions"), dict)]  # fmt: skip
    if not recorded:
        return [records.MISSING]
    names = dict.fromkeys(name for versions in recorded for name in versions)
    counts = {name: Counter(str(v.get(name) or "(none)") for v in recorded) for name in names}
    common = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    lines = [records.versions({"versions": common})]
    for name in names:
        if len({str(versions.get(name)) for versions in recorded}) > 1:
            value = lambda record, name=name: str((record.get("versions") or {}).get(name, records.MISSING))
            lines.append(f"{name} differs: {'; '.join(groups(parts, value))}")
    return lines


# ---------------------------------------------------------------- report.md


def text(folder: Path, parts: list[Part]) -> str:
    """The page of text to hand on."""
    commands = []
    for part in parts:
        for name, record in part.records.items():
            label = f"{part.name}/{name}" if part.step.kind == "scores" else part.title
            command = records.command(record)
            commands.append(f"# {part.number}. {label}" + ("" if record else f": {command}"))
            commands += [command] if record else []
    bullets = lambda name, lines: [f"- {name}: {'; '.join(lines)}"]
    blocks = [
        f"# STIC: {folder.resolve().name}",
        markdown(*steps_table(parts)),
        "\n".join(bullets("commit", groups(parts, records.commit))
                  + bullets("versions", versions_lines(parts))),
        COSTS,
        "## Commands\n\n```bash\n" + "\n".join(commands) + "\n```",
        "## Counts\n\n" + markdown(*counts_table(parts)),
        COUNTS,
    ]  # fmt: skip
    for part in parts:
        if part.step.kind == "scores":
            blocks.append(f"## {part.title}\n\n{markdown(*scores_table(part))}")
        elif part.step.kind not in ("pairs", "descriptions"):
            run = training.read(part.step.path)
            blocks.append(f"## {part.title}\n\n{training.status(run)} {training.counts(run)}")
            if run.log:
                blocks.append(markdown(*training.values_table(run)))
    return "\n\n".join(blocks) + "\n"


# ---------------------------------------------------------------- report.html


def section(path: str | Path, options: Options) -> str:
    """All steps of a recipe as HTML, from an <h2> on."""
    folder = Path(path)
    parts = read(folder)
    links = "".join(f'<li><a href="#step-{part.number}">{escape(part.title)}</a>' for part in parts)
    commits = "; ".join(groups(parts, records.commit))
    lines = [COSTS, f"Commit: {commits}", f"Versions: {'; '.join(versions_lines(parts))}"]
    sections = "".join(
        f'<section id="step-{part.number}">{part.step.module.section(part.step.path, options)}'
        f"{provenance(part)}</section>"
        for part in parts
    )
    return (
        f"<h2>Steps</h2><nav aria-label=Steps><ol>{links}</ol></nav>"
        f"{html_table(*steps_table(parts), 'Steps')}<p class=note>{'<br>'.join(map(escape, lines))}</p>"
        f"<h2>Counts</h2>{html_table(*counts_table(parts), 'Counts')}{note(COUNTS)}{sections}"
    )


def provenance(part):
    """Command and machine of a step whose own section does not show them."""
    if part.step.kind in ("pairs", "descriptions"):
        [record] = part.records.values()
        return f"<h3>Command and machine</h3>{records.table(record)}"
    if part.step.kind == "scores":
        rows = [(name, records.command(record)) for name, record in part.records.items()]
        return f"<h3>Commands</h3>{records.facts(rows, code=tuple(part.records))}"
    return ""


def write(path: str | Path, options: Options) -> Path:
    """Writes report.html and report.md into a recipe's folder -> the path of the page."""
    folder = Path(path)
    parts = read(folder)
    name = folder.resolve().name
    modules = [part.step.module for part in parts]
    style = "".join(dict.fromkeys(getattr(module, "STYLE", "") for module in [training, *modules])) + STYLE
    body = (
        f"<h1>STIC: {escape(name)}</h1><p class=note>All steps in one folder. "
        '<a href="report.md">report.md</a> is the short version to hand on.</p>'
    )
    html = page(f"STIC: {name}", body + section(folder, options), style)
    write_text(folder / "report.md", text(folder, parts))
    write_text(folder / "report.html", html)
    return folder / "report.html"
