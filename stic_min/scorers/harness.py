"""The registry of benchmarks, and their questions as they are asked and recorded. No model code."""

import functools
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass

from stic_min import InputError
from stic_min.runtime import console
from stic_min.runtime.files import check_text, read_records
from stic_min.runtime.work import subset
from stic_min.text import with_image

MODULES = {
    "scienceqa": "stic_min.scorers.scienceqa",
    "textvqa": "stic_min.scorers.textvqa",
    "chartqa": "stic_min.scorers.chartqa",
    "llavabench": "stic_min.scorers.llavabench",
    "mmbench": "stic_min.scorers.mmbench",
    "mmvet": "stic_min.scorers.mmvet",
    "mathvista": "stic_min.scorers.mathvista",
    "toycaptions": "stic_min.toy.captions",
    "toyvqa": "stic_min.toy.vqa",
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as the commands see it: what its module defines, and defaults for what it does not."""

    name: str
    title: str  # one line, for help
    data_files: str  # the files that `load` expects, one per line
    load: Callable
    score: Callable
    report: Callable
    key: str  # the field that identifies a question and its line in the answers file
    max_new_tokens: int
    complete: bool  # no score unless every question has an answer
    grouped_by: str | None
    rules: tuple[str, ...]  # the first is the default
    suffix: str | None  # the last line of the prompt, where it is an option
    read_answers: Callable
    official: Callable | None
    image_bytes: Callable | None  # for images inside the data file
    judge: Callable | None
    official_judge: str | None
    runs: int | None  # of the judge, where it is asked several times
    prompts: str | None  # the judge's entry in --judge-prompts
    own_prompts: dict | None
    read_judged: Callable | None
    judged_files: Callable | None


@functools.cache
def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Its module is imported on first use."""
    module = importlib.import_module(MODULES[name])
    optional = lambda field, default=None: getattr(module, field, default)
    title, is_longer, _ = module.__doc__.split("\n")[0].partition("): ")  # "ScienceQA (...): the prompt, ..."
    return Benchmark(
        name=name,
        title=title + ")" if is_longer else title.removesuffix("."),
        data_files=optional("DATA_FILES", ""),
        load=module.load,
        score=module.score,
        report=module.report,
        key=optional("KEY", "question_id"),
        max_new_tokens=optional("MAX_NEW_TOKENS", 1024),
        complete=optional("COMPLETE", False),
        grouped_by=optional("GROUPED_BY"),
        rules=optional("RULES", ()),
        suffix=module.SUFFIX if name == "chartqa" else None,
        read_answers=optional("read_answers", lambda path: [record for _, record in read_records(path)]),
        official=optional("official"),
        image_bytes=optional("image_bytes"),
        judge=optional("judge"),
        official_judge=optional("OFFICIAL_JUDGE"),
        runs=optional("RUNS"),
        prompts=optional("PROMPTS"),
        own_prompts=optional("OWN_PROMPTS"),
        read_judged=optional("read_judged"),
        judged_files=optional("judged_files"),
    )


# ---------------------------------------------------------------- questions


def load_questions(benchmark: Benchmark, data, suffix=None) -> list[dict]:
    """The benchmark's questions. suffix: replaces ChartQA's."""
    questions = benchmark.load(data) if suffix is None else benchmark.load(data, suffix=suffix)
    for question in questions:
        check_text(str(question[benchmark.key]), f"{data}: question id")
    return questions


def get_group(benchmark, question):
    """The unit that is counted and sampled: the question itself, or all rotations of its options."""
    return question.get("group", question[benchmark.key])


def sample_questions(benchmark, questions, limit, seed):
    """A random subset of `limit` questions (None: all), in their order; rotations stay together."""
    groups = dict.fromkeys(get_group(benchmark, q) for q in questions)
    chosen = set(subset(list(groups), limit, seed))
    return [q for q in questions if get_group(benchmark, q) in chosen]


def warn_of_limit(benchmark, questions, limit):
    count = len({get_group(benchmark, q) for q in questions})
    if limit and limit > count:
        console.warn(f"--limit {limit}: only {count} questions")


def get_recorded_prompt(question):
    """The prompt in the answers file. It never contains the description, because scorers read it."""
    if "prompt" in question:
        return question["prompt"]
    return with_image(question["text"]) if question["image"] else question["text"]


def make_entries(benchmark, questions):
    """{key: the record in the answers file, without the answer}."""
    key = benchmark.key
    return {q[key]: {key: q[key], "question_id": q["question_id"], "prompt": get_recorded_prompt(q)}
            for q in questions}  # fmt: skip


def check_prompts(benchmark, path, records, entries):
    """Raises InputError if our answers are to other questions than those with the same ids in the data."""
    prompts = {str(key): entry["prompt"] for key, entry in entries.items()}
    for record in records:
        key = str(record.get(benchmark.key))
        if key in prompts and record.get("prompt") != prompts[key]:
            change = f"the text of question {key!r} has changed since these answers were written"
            raise InputError(f"{path}: {change}; choose another --out or delete the file")


def find_description(question, descriptions):
    """The description of the question's image, or a blind describer's for all images; None without image."""
    if question["image"] is None:
        return None
    return descriptions.get("", descriptions.get(question["image"]))


def open_images(benchmark, question, data):
    """The question's images: a list of one, or none. Raises InputError if it can't be read."""
    from stic_min.formats.image_folder import image_path  # here, because scoring needs no torch
    from stic_min.images import open_image

    if question["image"] is None:
        return []
    if benchmark.image_bytes:
        encoded = io.BytesIO(benchmark.image_bytes(question))
        return [open_image(encoded, f"of question {question['question_id']}")]
    return [open_image(image_path(data, question["image"]))]


def format_help(benchmark):
    """The description of a benchmark for `evaluate.py BENCHMARK --help`."""
    name = benchmark.name
    flags = f"--model llava-v1.6-mistral-7b --data data/{name} --out results/ --dar"
    lines = [benchmark.title, "", "Example:", f"  python evaluate.py {name} {flags}"]
    if benchmark.data_files:
        lines += ["", "Files in --data, and where to get them:"]
        lines += [f"  {line}" for line in benchmark.data_files.splitlines()]
    return "\n".join(lines)
