"""The answers that flipped between two runs on the same questions: wrong to right, and right to wrong.

Compared are the base model asked directly with each tuned one (with DaR, if there is such a run), and each
model asked directly with the same model and DaR. Whether an answer is right is decided by the benchmark's own
scorer, one question at a time.
"""

import io
import math
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stic_min import InputError
from stic_min.formats.image_folder import image_path
from stic_min.report import record as records
from stic_min.report.gallery import Images, gallery, image_tag
from stic_min.report.images import read_thumbnail
from stic_min.report.options import Options, recorded_folder
from stic_min.report.page import html_table, note
from stic_min.scorers import audit, harness, tables

SIDE = 200  # pixels of a thumbnail
NOTE = """The p-value is that of McNemar's exact test: how likely flips are to be at least this uneven if each
went either way with probability 1/2. Questions that only one of the two runs answered are not compared."""


class NoFlips(Exception):
    """Why there is nothing to show for a benchmark, in words for the page."""


@dataclass
class Run:
    """The answers of one model, asked in one way, to one benchmark."""

    row: tables.Row
    label: str
    settings: dict  # of its .scores.json
    answers: dict[str, dict]  # {question key as text: record}
    descriptions: dict[str, str]  # {image: description}
    judged: dict | None  # verdicts of a judge, where they are one per question


def mcnemar(gains: int, losses: int) -> float:
    """The two-sided exact p-value: the probability that as many fair coins fall at least as unevenly."""
    flips = gains + losses
    tail = sum(math.comb(flips, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**flips)


# ---------------------------------------------------------------- what is in the folder


def beside(file, suffix):
    """The file with another suffix than .scores.json."""
    return Path(str(file).removesuffix(".scores.json") + suffix)


def read_run(benchmark, row):
    """The run of a row; None without its answers."""
    name = benchmark.name
    path = beside(row.files[name], ".jsonl")
    if not path.is_file():
        return None
    result = row.results[name]
    answers = benchmark.read_answers(path)
    for record in answers:
        if not isinstance(record.get("text"), str):
            raise InputError(f"{path}: the answer to {record.get(benchmark.key)!r} has no 'text'")
    descriptions = audit.read_descriptions(beside(row.files[name], ""), result["run"]) or {}
    return Run(
        row,
        row.label.removeprefix("ours, "),
        result["run"],
        {str(record.get(benchmark.key)): record for record in answers},
        {image: record["description"] for image, record in descriptions.items()},
        read_verdicts(benchmark, row.files[name], result),
    )


def read_verdicts(benchmark, file, result):
    """The saved verdicts of MM-Vet's and MathVista's judge; None without a judge or such a file."""
    judge = result.get("judge")
    if not judge or benchmark.name not in ("mmvet", "mathvista"):
        return None
    own = "" if tables.comparable(result) else ".own-prompt"
    paths = judge.get("files") or [beside(file, own + suffix) for suffix in benchmark.judged_files({})]
    return benchmark.read_judged(paths) if all(Path(path).is_file() for path in paths) else None


def find_pairs(runs):
    """[(run, run)]: base and tuned first, then without and with DaR."""
    same = lambda a, b, *names: all(a.settings.get(name) == b.settings.get(name) for name in names)
    setting = ("model", "template", "image_mode", "suffix")
    model = (*setting, "adapter", "fingerprint")
    bases = [run for run in runs if not run.row.tuned and not run.row.dar]
    with_dar = [run for run in runs if run.row.dar]
    best = [run for run in runs if run.row.tuned
            and (run.row.dar or not any(same(run, other, *model) for other in with_dar))]  # fmt: skip
    pairs = [(base, run) for base in bases for run in best if same(base, run, *setting)]
    direct = [run for run in runs if not run.row.dar]
    return pairs + [(a, b) for a in direct for b in with_dar if same(a, b, *model)]


def find_questions(benchmark, runs, options):
    """(questions, their data folder). Raises NoFlips if no folder has the questions of these runs."""
    files = [beside(run.row.files[benchmark.name], ".jsonl") for run in runs]
    recorded = [recorded_folder(records.of_output(file), "--data") for file in files]
    reasons = []
    for folder in [*options.data, *filter(None, recorded)]:
        try:
            questions = harness.load_questions(benchmark, folder, runs[0].settings.get("suffix"))
            entries = harness.make_entries(benchmark, questions)
            for run, file in zip(runs, files):
                harness.check_prompts(benchmark, file, list(run.answers.values()), entries)
            return questions, folder
        except InputError as error:
            if folder in options.data:  # the page names no other path
                reasons.append(str(error))
    advice = ": give the benchmark's data folder, python -m stic_min.report ... --data FOLDER"
    raise NoFlips("its questions were not found" + (f" ({'; '.join(reasons)})" if reasons else advice))


# ---------------------------------------------------------------- right or wrong


def is_right(benchmark, questions, run):
    """Whether a question (all rotations of its options, in MMBench) is answered right. Where a scorer gives
    points, half of them are enough; where it counts faults, there must be none."""
    answers = [run.answers[str(question[benchmark.key])] for question in questions]
    options = {}
    if run.judged is not None:
        ids = [question["question_id"] for question in questions]
        options["judged"] = {key: run.judged[key] for i in ids for key in (i, f"v1_{i}") if key in run.judged}
    scores = benchmark.score(questions, answers, **options)
    return scores["score"] == 0 if scores.get("better") == "lower" else scores["score"] >= 50


def compare(benchmark, groups, first, second):
    """[(questions, right in the first run, right in the second run)] of what both have answered."""
    common = first.answers.keys() & second.answers.keys()
    results = []
    for questions in groups:
        if all(str(question[benchmark.key]) in common for question in questions):
            results.append((questions, *(is_right(benchmark, questions, run) for run in (first, second))))
    return results


# ---------------------------------------------------------------- HTML


def reference(question):
    """The reference answer as text, "" if the question has none."""
    answer = question.get("answer", question.get("label", question.get("reference", "")))
    if isinstance(answer, int):  # ScienceQA
        return f"{chr(ord('A') + answer)}. {question['choices'][answer]}"
    if "options" in question:  # MMBench; without its text where the table has "None" for it
        return f"{answer}. {question['options'].get(answer, '')}"
    if "objects" in question:  # the toy world's captions
        return ", ".join(question["objects"])
    if "answers" in question:  # TextVQA
        return ", ".join(f"{text} ({count})" for text, count in Counter(question["answers"]).most_common())
    return answer


def thumbnail_key(benchmark, question, folder, images):
    """The key of a question's image in `images`; "" if it can't be read."""
    try:
        get_bytes = benchmark.image_bytes
        source = io.BytesIO(get_bytes(question)) if get_bytes else image_path(folder, question["image"])
        return images.add(read_thumbnail(source, SIDE))
    except InputError:
        return ""


def answer_text(benchmark, questions, run):
    """The answer as text; for MMBench's rotations, one line each."""
    texts = [run.answers[str(question[benchmark.key])]["text"] for question in questions]
    if len(texts) == 1:
        return texts[0]
    lines = []
    for question, text in zip(questions, texts):
        mark = "✓" if is_right(benchmark, [question], run) else "✗"
        lines.append(f"\n{mark} {text} (right: {question['answer']})")
    return "".join(lines)


def flip(benchmark, questions, verdicts, runs, image):
    """One flipped question as HTML. image: the key of its image, if it has a readable one."""
    question = questions[0]
    shown = "<span class=note>no image</span>"
    if image:
        shown = image_tag(image, f"image of question {question['question_id']}")
    parts = [shown, f"<div><p class=text>{escape(question['text'])}</p>"]
    if text := reference(question):
        parts.append(note(f"Reference: {text}"))
    for run, right in zip(runs, verdicts):
        mark = "<span class=right>✓ right</span>" if right else "<span class=wrong>✗ wrong</span>"
        text = escape(answer_text(benchmark, questions, run)) or "<small>(empty)</small>"
        parts.append(f"<p class=text>{mark} <b>{escape(run.label)}:</b> {text}</p>")
        if description := harness.find_description(question, run.descriptions):
            summary = f"<summary>description by {escape(run.label)}</summary>"
            parts.append(f"<details>{summary}<p class=text>{escape(description)}</p></details>")
    return f"<article class=card>{''.join(parts)}</div></article>"


def remark(benchmark, runs):
    """What right means in a benchmark, where it is not obvious."""
    notes = {
        "textvqa": "Right: at least half of the points.",
        "mmvet": "Right: at least half of the judge's points.",
        "mmbench": "Right: in all orders of the options.",
        "toycaptions": "Right: no object that is not in the image.",
    }
    text = notes.get(benchmark.name, "")
    if benchmark.name in ("mmbench", "mathvista") and any(run.judged is None for run in runs):
        text += " Answers that only a judge can read count as wrong here."
    return note(text)


def benchmark_section(benchmark, rows, options, images):
    """The flips of one benchmark as HTML. Raises NoFlips, and InputError for a damaged file of answers."""
    if benchmark.name == "llavabench":
        raise NoFlips("a judge rates its answers, which are neither right nor wrong")
    runs = [read_run(benchmark, row) for row in rows if benchmark.name in row.results]
    runs = [run for run in runs if run]
    if benchmark.name == "mmvet":
        runs = [run for run in runs if run.judged is not None]
    pairs = find_pairs(runs)
    if not pairs:
        raise NoFlips("no two runs to compare: base and tuned, or without and with DaR")
    questions, folder = find_questions(benchmark, runs, options)
    groups = {}
    for question in questions:
        groups.setdefault(harness.get_group(benchmark, question), []).append(question)
    keys = {None: None}  # {name of an image: its key in `images`}
    tuned = [pair for pair in pairs if pair[0].row.tuned != pair[1].row.tuned]
    opened = (tuned or pairs[:1])[-1]
    lines, lists = [], []
    for pair in pairs:
        results = compare(benchmark, groups.values(), *pair)
        count = Counter((before, after) for _, before, after in results)
        gains, losses = count[False, True], count[True, False]
        title = f"{pair[0].label} → {pair[1].label}"
        counts = [len(results), count[True, True], gains, losses, count[False, False]]
        change = f"{100 * (gains - losses) / len(results):+.1f}" if results else "–"
        lines.append([title, *map(str, counts), change, f"{mcnemar(gains, losses):.2g}"])
        flips = [(group, verdicts) for group, *verdicts in results if verdicts[0] != verdicts[1]]
        items = []
        for group, verdicts in flips:
            name = group[0]["image"]
            if name not in keys:
                keys[name] = thumbnail_key(benchmark, group[0], folder, images)
            items.append(flip(benchmark, group, verdicts, pair, keys[name]))
        kinds = {"show": (["wrong to right", "right to wrong"], [int(right) for _, (right, _) in flips])}
        body = gallery("flipped answers", items, images, kinds) if items else "<p>No answer flipped.</p>"
        summary = f"<summary>{escape(title)}: {len(items)} flipped</summary>"
        lists.append(f"<details{' open' if pair is opened else ''}>{summary}{body}</details>")
    if unreadable := sum(key == "" for key in keys.values()):
        lists.append(note(f"{unreadable} images could not be read."))
    header = ["", "compared", "both right", "wrong to right", "right to wrong", "both wrong", "points", "p"]
    table = html_table(header, lines, f"Flipped answers, {tables.TITLES[benchmark.name]}")
    return remark(benchmark, runs) + table + "".join(lists)


def section(path: str | Path, options: Options) -> str:
    """The flips between the runs in a folder of scores as HTML, from an <h3> on. Raises InputError like
    `read_results`, and for a damaged file of answers."""
    rows = tables.read_results(path)
    images = Images()
    parts, missing = [], []
    for name in tables.benchmarks_of(rows):
        title = tables.TITLES[name]
        try:
            body = benchmark_section(harness.get_benchmark(name), rows, options, images)
        except NoFlips as error:
            missing.append(note(f"{title}: {error}."))
            continue
        parts.append(f"<h4>{escape(title)}</h4>{body}")
    return f"<h3>Flipped answers</h3>{note(NOTE) if parts else ''}{''.join(parts)}{''.join(missing)}"
