"""The interface of a benchmark's module (stic_min/scorers/__init__.py), checked for all seven on small data in
their official formats. What is special about one benchmark is in its own test file."""

import json
import shutil

import pytest
from benchmark_data import write_benchmarks
from tiny import write_scienceqa

from stic_min import InputError
from stic_min.scorers import harness, published
from stic_min.scorers.judge import Reply

NAMES = list(published.BENCHMARKS)
COMPLETE = ["textvqa", "llavabench", "mmvet"]  # no score unless every question has an answer
JUDGED = ["llavabench", "mmbench", "mmvet", "mathvista"]
NEEDS_JUDGE = ["llavabench", "mmvet"]
FILES = {
    "scienceqa": ["problems.json", "pid_splits.json"],
    "textvqa": ["TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"],
    "chartqa": ["test_human.json", "test_augmented.json"],
    "llavabench": ["questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"],
    "mmbench": ["mmbench_dev_20230712.tsv"],
    "mmvet": ["mm-vet.json"],
    "mathvista": ["annot_testmini.json"],
}
benchmarks = pytest.mark.parametrize("name", NAMES)
files = pytest.mark.parametrize("name, file", [(name, file) for name in NAMES for file in FILES[name]])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One folder per benchmark."""
    folder = tmp_path_factory.mktemp("contract")
    write_scienceqa(folder)
    write_benchmarks(folder)
    return folder


class Judge:
    """Gives the same verdict about everything; `asked` counts its requests."""

    def __init__(self, benchmark):
        self.texts, self.runs, self.asked = benchmark.own_prompts, 2, 0
        verdicts = {"llavabench": "8 6\nWell.", "mmbench": "A", "mmvet": "0.5", "mathvista": "3"}
        self.verdict = verdicts[benchmark.name]

    def ask(self, where, messages, *, temperature, max_tokens):
        self.asked += 1
        assert all(set(message) == {"role", "content"} for message in messages) and isinstance(where, str)
        return Reply(self.verdict, "judge-0")

    def map(self, function, items):
        return [function(item) for item in items]


@pytest.fixture
def asked(data, name):
    """(the benchmark, its questions, an answer to each)."""
    benchmark = harness.get_benchmark(name)
    questions = benchmark.load(data / name)
    entries = harness.make_entries(benchmark, questions).values()
    return benchmark, questions, [entry | {"text": f"Is it {i}?"} for i, entry in enumerate(entries)]


def score(benchmark, questions, answers, verdicts_of=None):
    """`score`, with a judge's verdicts where there is no score without them."""
    if benchmark.name not in NEEDS_JUDGE:
        return benchmark.score(questions, answers)
    verdicts = benchmark.judge(*(verdicts_of or (questions, answers)), Judge(benchmark))
    return benchmark.score(questions, answers, verdicts)


def fails(function, *args):
    """The message of the InputError that it raises, which is one line."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- load


@benchmarks
def test_questions(data, asked, name):
    """`load` takes a Path or a string. `text` is free of <image>; images are files in the folder."""
    benchmark, questions, _ = asked
    assert benchmark.load(str(data / name)) == questions and len(questions) >= 3
    keys = [question[benchmark.key] for question in questions]
    assert len(set(keys)) == len(keys) and all(type(key) in (int, str) for key in keys)
    for question in questions:
        assert {"question_id", "image", "text"} <= question.keys()
        assert question["text"].strip() and "<image>" not in question["text"]
        assert isinstance(question.get("prompt", ""), str)
        if question["image"] is not None:
            assert len(harness.open_images(benchmark, question, data / name)) == 1
            assert name == "mmbench" or (data / name / question["image"]).is_file()
        assert benchmark.grouped_by is None or benchmark.grouped_by in question


@files
def test_a_missing_data_file(data, tmp_path, name, file):
    folder = shutil.copytree(data / name, tmp_path / name)
    (folder / file).unlink()
    message = fails(harness.get_benchmark(name).load, folder)
    if name == "mathvista":
        assert message == f"{folder}: has neither testmini.json nor annot_testmini.json"
    elif file.endswith((".jsonl", ".tsv")):
        assert message == f"can't read {folder / file}: No such file or directory"
    else:
        assert message == f"no such file: {folder / file}"


@files
@pytest.mark.parametrize(
    "content", [b'{"7": ', b"\xff", b"5", b"", b"[" * 200_000],
    ids=["cut", "binary", "number", "empty", "deep"])  # fmt: skip
def test_a_broken_data_file(data, tmp_path, name, file, content):
    folder = shutil.copytree(data / name, tmp_path / name)
    (folder / file).write_bytes(content)
    message = fails(harness.get_benchmark(name).load, folder)
    assert message.startswith(str(folder / file))
    faults = ["not JSON", "not UTF-8 text", "not a JSON object", "not a non-empty list", ": empty",
              "has no rows", "not a table in UTF-8", "has no 'data'"]  # fmt: skip
    assert any(fault in message for fault in faults)


# ---- score and report


@benchmarks
def test_scores(asked, name):
    """`score`, `interval` and `n`, for all questions and for each group; nothing that JSON can't hold."""
    benchmark, questions, answers = asked
    scores = score(benchmark, questions, answers)
    assert {"score", "interval", "n", "missing", "groups"} <= scores.keys() and scores["missing"] == 0
    assert json.loads(json.dumps(scores)) == scores
    for entry in [scores, *scores["groups"].values()]:
        low, high = entry["interval"]
        assert low <= entry["score"] + 0.1 and entry["score"] <= high + 0.1  # LLaVA-Bench rounds its score
        assert type(entry["n"]) is int and 0 < entry["n"] <= len(questions)
    assert score(benchmark, questions, answers[::-1]) == scores  # in any order
    assert scores.get("rule") == (benchmark.rules[0] if benchmark.rules else None)
    for rule in benchmark.rules:
        assert benchmark.score(questions, answers, rule=rule)["rule"] == rule
    assert ("unread" in scores) == ("unread_share" in scores) == (name in NEEDS_JUDGE)


@benchmarks
def test_report(asked, name):
    benchmark, questions, answers = asked
    scores = score(benchmark, questions, answers)
    text = benchmark.report(scores)
    assert text.startswith(published.BENCHMARKS[name]) and text == text.strip() and text.count("\n") >= 1
    assert f"{scores['score']:.1f}" in text and f"{scores['interval'][0]:.1f}" in text
    assert benchmark.rules == () or benchmark.rules[0] in text


@benchmarks
def test_a_missing_answer(asked, name):
    """It is wrong, or there is no score."""
    benchmark, questions, answers = asked
    assert benchmark.complete is (name in COMPLETE)
    use = lambda: score(benchmark, questions, answers[1:], verdicts_of=(questions, answers))
    if name in COMPLETE:
        count = f"1 of {len(questions)} questions have no answer"
        assert fails(use).startswith(f"{published.BENCHMARKS[name]}: {count}, the first is ")
    else:
        scores = use()
        assert scores["missing"] == 1 and scores["n"] == score(benchmark, questions, answers)["n"]


def bad_answers(name, questions, answers):
    """[(questions, answers, the error message)]."""
    first, second = answers[:2]
    qid = second["question_id"]
    cases = [
        (questions, [first, second | {"question_id": "999"}], "'999' is not a question id"),
        (questions, answers + [second], f"{str(qid)!r} is repeated"),
        (questions, [{"prompt": second["prompt"], "text": "A"}], "record 1 has no question_id"),
        (questions, [{"question_id": qid}], f"{str(qid)!r} has no 'text'"),
        (questions, [second | {"text": 5}], f"{str(qid)!r} has no 'text'"),
        (questions + questions[:1], answers, "a question id is repeated"),
        ([], [], "no questions"),
    ]
    if name == "textvqa":  # joins by the question in the prompt; a question may come twice
        messages = ["record 2: 'is it day?' about '999' is not among the questions",
                    "record 4: 'is it day?' about '0a' is answered twice",
                    "record 1: 'is it day?' about 'None' is not among the questions",
                    "record 1: no 'prompt'", "record 1: no 'text'", "1 of 4 questions have no answer",
                    "no questions"]  # fmt: skip
        cases = [(*case[:2], message) for case, message in zip(cases, messages)]
    return cases


@benchmarks
def test_answers_that_do_not_match(asked, name):
    """`score`, `official` and `judge` reject them alike. The judge is not asked before."""
    benchmark, questions, answers = asked
    judge = Judge(benchmark) if name in JUDGED else None
    pair = (questions, answers)
    uses = [lambda bad_questions, bad: score(benchmark, bad_questions, bad, pair if bad_questions else None)]
    if benchmark.official:
        uses.append(benchmark.official)
    if judge:
        uses.append(lambda bad_questions, bad: benchmark.judge(bad_questions, bad, judge))
    for use in uses:
        for bad_questions, bad, expected in bad_answers(name, questions, answers):
            message = fails(use, bad_questions, bad)
            assert message.startswith(published.BENCHMARKS[name]) and expected in message
    assert judge is None or judge.asked == 0


# ---- answers and verdicts in files


@benchmarks
def test_answers_in_files(asked, tmp_path, name):
    """JSON lines, and the benchmark's own format, where it has one; the scores are the same."""
    benchmark, questions, answers = asked
    expected = score(benchmark, questions, answers)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in answers))
    assert benchmark.read_answers(path) == answers
    if benchmark.official:
        suffix, text = benchmark.official(questions, answers)
        official = tmp_path / f"official{suffix}"
        official.write_text(text, encoding="utf-8")
        assert score(benchmark, questions, benchmark.read_answers(official)) == expected
    assert str(tmp_path / "none.jsonl") in fails(benchmark.read_answers, tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", JUDGED)
def test_verdicts(asked, tmp_path, name):
    """A judge's verdicts give a score, and so do the files that they are written to."""
    benchmark, questions, answers = asked
    judge = Judge(benchmark)
    verdicts = benchmark.judge(questions, answers, judge)
    scores = benchmark.score(questions, answers, verdicts)
    assert judge.asked > 0 and scores["unread"] == 0 and scores["unread_share"] == 0
    assert benchmark.official_judge.startswith("gpt-")
    assert benchmark.prompts and all(benchmark.own_prompts.values())
    if benchmark.judged_files:
        paths = [tmp_path / f"a{suffix}" for suffix in benchmark.judged_files(verdicts)]
        for path, text in zip(paths, benchmark.judged_files(verdicts).values()):
            path.write_text(text)
        assert benchmark.score(questions, answers, benchmark.read_judged(paths)) == scores
        assert benchmark.score(questions, None, benchmark.read_judged(paths))["score"] == scores["score"]
        assert "none.json" in fails(benchmark.read_judged, [tmp_path / "none.json"])


@pytest.mark.parametrize("name", NEEDS_JUDGE)
def test_no_score_without_a_judge(asked, name):
    benchmark, questions, answers = asked
    expected = f"{published.BENCHMARKS[name]} is graded by a judge model: --judge, or --judged FILE"
    assert fails(benchmark.score, questions, answers, None).startswith(expected)
