"""What evaluation stores is looked at: verdicts that can't be read, answers that are empty, cut off or all the same,
files of two runs next to each other; and what --check reports before there is anything."""

import json
import os
import shutil
import sys
from unittest import mock

import pytest
from commands import call, lines
from judge_server import JudgeServer
from tiny import write_json

import evaluate
from stic_min.runtime import process
from stic_min.scorers import harness

pytest_plugins = ["benchmark_world"]  # the fixtures world and own

KEY = "sk-not-to-be-seen"
JUDGED = ["llavabench", "mmbench", "mmvet", "mathvista"]


@pytest.fixture
def fails(capsys):
    """fails(command): it ends with status 1 -> what it printed, and the one line of the error."""

    def fails(*command):
        with mock.patch.object(sys, "argv", ["evaluate", *map(str, command)]), pytest.raises(SystemExit) as stop:
            process.run(evaluate.main)
        out, err = capsys.readouterr()
        [error] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 1 and len(error) <= 300
        return out, error.removeprefix("error: ")

    return fails


def command(world, name, out, *flags):
    model = ["--model", world / "llava-v1.6-tiny", "--device", "cpu", "--image-mode", "pad", "--max-new-tokens", 8]
    return [name, *model, "--data", world / name, "--out", out, *flags]


def run(world, name, out, *flags):
    return call("evaluate", *command(world, name, out, *flags))


def warnings(capsys):
    return [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if "warning: " in line]


def saved(out, stem):
    return json.loads((out / f"{stem}.scores.json").read_text())


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


no_weights = lambda: mock.patch("stic_min.loader.load_llava", side_effect=AssertionError("loaded"))


# ---------------------------------------------------------------- verdicts of a judge

READ = {"llavabench": "8 6\nWell.", "mmbench": "A", "mmvet": "0.5", "mathvista": "3"}
VERDICTS = {"llavabench": 3, "mmbench": 6, "mmvet": 3, "mathvista": 4}  # one run of each


def judged_by(server, world, name, tmp_path, *flags):
    """`score` of answers that only a judge can read."""
    questions = harness.get_benchmark(name).load(world / name)
    path = tmp_path / "answers.jsonl"
    write_lines(path, [{"question_id": q["question_id"], "text": f"so? {i}"} for i, q in enumerate(questions)])
    once = ["--judge-runs", 1] if name in ("llavabench", "mmvet") else []
    at = ["--judge", "--judge-url", server.url, "--judge-key", KEY, *once]
    return ["score", name, "--answers", path, "--data", world / name, *at, *flags]


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("said", [None, "", "<think>Okay, the", "<think>Okay</think>\n", "Hm! 8 / 9?"])
def test_verdicts_that_can_not_be_read_give_no_score(world, tmp_path, capsys, fails, name, said):
    """All but one; each benchmark would have counted them: as 0, as (-1, -1), as a random or the nearest option."""
    said = "Hmm" if name == "mathvista" and said and said[0] == "H" else said  # any text is an extraction
    server = JudgeServer(verdict=lambda body: READ[name] if "so? 0" in body["messages"][-1]["content"] else said)
    with server:
        asked = judged_by(server, world, name, tmp_path)
        if said == "Hmm":
            assert json.loads(call("evaluate", *asked, "--json"))["unread"] == 0
            return
        out, error = fails(*asked)
        count = VERDICTS[name] - 1
        assert error.startswith(f"{tmp_path / 'answers.jsonl'}: {count} of the judge's verdicts could not be read (")
        assert "--judge-max-tokens" in error and "--allow-unread" in error and out == ""
        numbers = json.loads(call("evaluate", *asked, "--allow-unread", "--json"))
        assert numbers["unread"] == count and numbers["unread_share"] == pytest.approx(count / VERDICTS[name])
        share = f"{count / VERDICTS[name]:.1%}"
        assert warnings(capsys) == [f"{count} of the judge's verdicts could not be read ({share} of all)"]
        text = call("evaluate", *asked, "--allow-unread")
    assert f"unreadable verdicts of the judge: {count} (" in text


@pytest.mark.parametrize("name", JUDGED)
def test_a_verdict_behind_thoughts_counts_as_one_without(world, tmp_path, name):
    scores = []
    for before in "", "<think>\nIs it 1 or B?\n</think>\n\n", "It is 1 or B.</think>":
        with JudgeServer(verdict=lambda body, before=before: before + READ[name]) as server:
            asked = judged_by(server, world, name, tmp_path, "--json")
            scores.append(json.loads(call("evaluate", *asked)))
    assert scores[0] == scores[1] == scores[2] and scores[0]["unread"] == 0


def test_a_few_unread_verdicts_are_a_warning(own, tmp_path, capsys):
    """One of 64 grades is less than 2%."""
    entry = json.loads((own / "mmvet" / "mm-vet.json").read_text())["v1_1"]
    write_json(own / "mmvet" / "mm-vet.json", {f"v1_{i}": entry for i in range(64)})
    said = lambda body: "" if "so? 63" in body["messages"][-1]["content"] else "0.5"
    with JudgeServer(verdict=said) as server:
        text = call("evaluate", *judged_by(server, own, "mmvet", tmp_path))
    assert warnings(capsys) == ["1 of the judge's verdicts could not be read (1.6% of all)"]
    assert "unreadable verdicts of the judge: 1 (1.6%)" in text


def test_published_verdicts_are_looked_at_too(world, tmp_path, fails):
    grades = {f"v1_{i}": {"content": ["<think>"], "score": [0.0], "model": ["m"]} for i in range(3)}
    write_json(tmp_path / "grades.json", grades)
    asked = ["score", "mmvet", "--data", world / "mmvet", "--judged", tmp_path / "grades.json"]
    assert "3 of the judge's verdicts could not be read (100.0% of all)" in fails(*asked)[1]
    assert json.loads(call("evaluate", *asked, "--allow-unread", "--json"))["score"] == 0


def test_flags_of_the_judges_request(world, tmp_path):
    flags = ["--judge-max-tokens", 4096, "--judge-token-field", "max_completion_tokens", "--judge-no-temperature"]
    with JudgeServer(verdict=lambda body: "0.5") as server:
        call("evaluate", *judged_by(server, world, "mmvet", tmp_path, *flags))
    assert {tuple(request.body) for request in server.requests} == {("model", "messages", "max_completion_tokens")}
    assert {request.body["max_completion_tokens"] for request in server.requests} == {4096}


@pytest.mark.parametrize("flags", [["--judge-max-tokens", 9], ["--judge-token-field", "max_tokens"],
                                   ["--judge-no-temperature"]])  # fmt: skip
def test_flags_that_need_a_judge(world, tmp_path, fails, flags):
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "x"}])
    error = fails("score", "mmvet", "--answers", answers, "--data", world / "mmvet", *flags)[1]
    assert error == f"{flags[0]} requires --judge"


# ---------------------------------------------------------------- answers and descriptions


def test_how_answers_and_descriptions_ended_is_counted(world, tmp_path):
    said = run(world, "scienceqa", tmp_path, "--dar")
    stem = "scienceqa-base-dar"
    answers, described = lines(tmp_path / f"{stem}.jsonl"), lines(tmp_path / f"{stem}.descriptions.jsonl")
    finishes = [[record["finish"] for record in records] for records in (answers, described)]
    assert {"stop", "length"} >= {finish for found in finishes for finish in found}
    numbers = saved(tmp_path, stem)
    for name, found, total in zip(("answers", "descriptions"), finishes, (6, 4)):
        cut = found.count("length")
        assert (numbers[name]["n"], numbers[name]["empty"], numbers[name]["cut"]) == (total, 0, cut) and cut > 0
        assert f"{name}: {total}, " in said and f"{cut} cut off by --max-new-tokens" in said
    assert numbers["descriptions"]["missing"] == 0 and "finish" not in numbers["run"]


def test_empty_ones_too_and_files_without_an_ending_go_on(world, tmp_path):
    """Files of earlier versions don't say how a text ended: they are resumed, and nothing is claimed of them."""
    run(world, "chartqa", tmp_path, "--dar")
    whole = (tmp_path / "chartqa-base-dar.scores.json").read_text()
    for kind, field in ("", "text"), (".descriptions", "description"):
        path = tmp_path / f"chartqa-base-dar{kind}.jsonl"
        first, *others = [{k: v for k, v in record.items() if k != "finish"} for record in lines(path)]
        write_lines(path, [first | {field: " "}, *others])
    said = run(world, "chartqa", tmp_path, "--dar")
    assert "4 of them already in" in said and "answers: 4, 1 empty\ndescriptions: 2, 0 missing, 1 empty\n" in said
    assert saved(tmp_path, "chartqa-base-dar")["answers"] == {"n": 4, "empty": 1, "cut": None}
    write_lines(path, lines(path)[1:])
    score = ["score", "chartqa", "--answers", tmp_path / "chartqa-base-dar.jsonl", "--data", world / "chartqa"]
    assert "descriptions: 1, 1 missing, 0 empty" in call("evaluate", *score)
    assert json.loads(whole)["answers"]["empty"] == 0


@pytest.mark.parametrize("texts, warning", [
    (["", "", "", ""], ["all 4 answers are empty"]), (["B"] * 4, ["all 4 answers are the same: 'B'"]),
    (["B", "B", "B", "A"], []), (["", "", "", "A"], [])])
def test_answers_that_are_all_the_same(world, tmp_path, capsys, texts, warning):
    questions = harness.get_benchmark("chartqa").load(world / "chartqa")
    records = [{"question_id": q["question_id"], "text": text} for q, text in zip(questions, texts)]
    answers = write_lines(tmp_path / "a.jsonl", records)
    call("evaluate", "score", "chartqa", "--answers", answers, "--data", world / "chartqa")
    assert warnings(capsys) == warning


# ---------------------------------------------------------------- files of two runs


@pytest.fixture
def two(world, tmp_path):
    """The files of a run with another seed's name and model put beside those of a first one."""
    run(world, "chartqa", tmp_path, "--dar", "--limit", 2)
    return tmp_path, ["score", "chartqa", "--answers", tmp_path / "chartqa-base-dar.jsonl", "--data", world / "chartqa"]


def change(path, **fields):
    write_lines(path, [record | fields for record in lines(path)])


def test_scores_of_another_run_do_not_say_what_was_asked(two, capsys):
    """Their --limit is not that of these answers."""
    out, score = two
    change(out / "chartqa-base-dar.jsonl", model="another")
    change(out / "chartqa-base-dar.descriptions.jsonl", model="another")
    call("evaluate", *score)
    path = out / "chartqa-base-dar.scores.json"
    assert warnings(capsys) == [f"{path} is from another run, with model 'llava-v1.6-tiny': it will be replaced"]
    run = saved(out, "chartqa-base-dar")["run"]
    assert (run["model"], run["limit"]) == ("another", None)


def test_descriptions_of_another_run(two, fails):
    out, score = two
    path = out / "chartqa-base-dar.descriptions.jsonl"
    change(path, adapter="stage2")
    assert fails(*score)[1] == f"{path}, line 1: written with adapter 'stage2', but the answers with None"


def test_a_table_of_scores_beside_other_answers(two, fails):
    out, _ = two
    change(out / "chartqa-base-dar.jsonl", fingerprint="ffffffffffff")
    path = out / "chartqa-base-dar"
    other = f"{path}.scores.json: not the score of the answers in {path}.jsonl; run `score` again"
    assert fails("table", out)[1] == other


def test_mmvets_score_of_other_answers_is_not_shown(world, tmp_path):
    """That of an earlier run with another seed, whose answers file was taken away."""
    said = run(world, "mmvet", tmp_path)
    settings = {k: v for k, v in lines(tmp_path / "mmvet-base-direct.jsonl")[0].items()
                if k not in ("question_id", "prompt", "text", "finish")}  # fmt: skip
    for seed, shown in (0, True), (1, False):
        result = {"run": settings | {"seed": seed, "limit": None}}
        write_json(tmp_path / "mmvet-base-direct.scores.json", result)
        said = run(world, "mmvet", tmp_path)
        assert ("the score is in" in said) is shown and ("no score yet" in said) is not shown


# ---------------------------------------------------------------- --check


def check(world, name, out, *flags):
    with no_weights():
        said = run(world, name, out, "--check", *flags)
    assert not out.exists()
    return {line[2:14].strip(): line[15:] for line in said.splitlines()[:-1]} | {"last": said.splitlines()[-1]}


def test_check_reports_on_each_benchmark(world, tmp_path):
    counts = {"scienceqa": ("6", "4", "natural science 4, language science 1, social science 1"),
              "textvqa": ("3", "2", None), "chartqa": ("4", "2", "human 2, augmented 2"),
              "llavabench": ("3", "2", "conv 1, detail 1, complex 1"),
              "mmbench": ("6", "2", "coarse_perception 4, logic_reasoning 2"),
              "mmvet": ("3", "2", "ocr 1, math 1, rec 2, spat 1"),
              "mathvista": ("4", "2", "text 1, integer 1, float 1, list 1")}  # fmt: skip
    for name, (questions, images, groups) in counts.items():
        said = check(world, name, tmp_path / "out")
        path = tmp_path / "out" / f"{name}-base-direct.jsonl"
        assert said["questions"] == f"{questions}, {questions} of them not yet in {path}"
        assert said["images"] == f"{images}, 0 of them can't be read" and said.get("of them") == groups
        assert said["tokens"].startswith("a question with its image: ")
        assert said["last"] == "check passed: no problems found"
        assert said["memory"].startswith("about ") and f" for {questions} responses, assuming " in said["time"]
        judge = {"llavabench": "not given (--judge): no score", "mmvet": "not given (--judge): no score"}
        wrong = "not given (--judge): answers that only a judge can read count as wrong"
        assert said["judge"] == judge.get(name, wrong if name in JUDGED else "not needed")


def test_check_with_dar_counts_both_calls(world, tmp_path):
    said = check(world, "chartqa", tmp_path / "out", "--dar")
    path = tmp_path / "out" / "chartqa-base-dar.descriptions.jsonl"
    assert said["descriptions"] == f"2, 2 of them not yet in {path}"
    flags = ["--check", "--dar", "--limit", 9]
    with no_weights():
        said = run(world, "chartqa", tmp_path / "out", *flags).splitlines()
        blind = run(world, "chartqa", tmp_path / "out", *flags, "--blind").splitlines()
    for report, descriptions in (said, 2), (blind, 1):
        assert [line.split(" for ")[1] for line in report if line.startswith("  time")] == [
            f"{descriptions} responses, assuming 8 tokens each", "4 responses, assuming 5 tokens each"]  # fmt: skip


def test_check_says_what_is_already_there_and_refuses_what_does_not_go_with_it(world, tmp_path, fails):
    run(world, "chartqa", tmp_path, "--dar", "--limit", 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    said = run(world, "chartqa", tmp_path, "--dar", "--check")
    assert "questions    4, 2 of them not yet in " in said
    _, error = fails(*command(world, "chartqa", tmp_path, "--dar", "--check", "--seed", 1))
    assert "was written with seed 0, but this run has 1" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name, fatal", [("mmvet", True), ("textvqa", True), ("chartqa", False), ("scienceqa", False)])
def test_check_counts_images_that_can_not_be_read(own, tmp_path, fails, name, fatal):
    picture = own / name / harness.get_benchmark(name).load(own / name)[0]["image"]
    picture.write_bytes(picture.read_bytes()[:100])
    if fatal:
        said, error = fails(*command(own, name, tmp_path / "out", "--check"))
        assert f"can't be asked; {name} is scored only as a whole" in said
        assert error == "the run would fail for 1 reason"
    else:
        said = run(own, name, tmp_path / "out", "--check")
    assert ", 1 of them can't be read\n    unread     can't read image " in said and str(picture) in said


def test_check_fails_where_nothing_can_be_asked(own, tmp_path, fails):
    shutil.rmtree(own / "chartqa" / "png")
    said, error = fails(*command(own, "chartqa", tmp_path / "out", "--check", "--dar"))
    assert "problem      none of the 4 questions could be asked" in said and "2, 2 of them can't be read" in said


def test_check_names_questions_that_are_too_long(own, tmp_path):
    path = own / "chartqa" / "test_human.json"
    entries = json.loads(path.read_text())
    write_json(path, [entries[0] | {"query": "what " * 5000}, entries[1]])
    said = run(own, "chartqa", tmp_path / "out", "--check")
    assert "not asked    1 questions: human-0\n" in said and "tokens longer than the model's limit" in said


@pytest.mark.parametrize("flags, message", [
    (["--adapter", "images"], "no adapter in "), (["--judge", "--judge-key", "a b"], "the judge's key is empty or has"),
    (["--vision", "images"], "images"), (["--data", "images"], "mm-vet.json")])
def test_check_fails_where_the_run_would(own, tmp_path, fails, flags, message):
    (own / "images").mkdir()
    flags = [own / flag if flag == "images" else flag for flag in flags]
    for check in ["--check"], []:
        assert message in fails(*command(own, "mmvet", tmp_path / "out", *check, *flags))[1]
    assert not (tmp_path / "out").exists()


def test_check_with_a_judge_leaves_its_replies_alone(world, tmp_path):
    store = tmp_path / "mmvet-base-direct.judge.jsonl"
    store.write_text('{"where": "v1_0, ru')  # of a run that is under way: not to be mended
    said = run(world, "mmvet", tmp_path, "--check", "--judge", "--judge-key", "k", "--judge-url", "http://127.0.0.1:9/v1")
    assert "gpt-4-0613 at http://127.0.0.1:9/v1/chat/completions will be asked for 15 verdicts" in said
    assert store.read_text() == '{"where": "v1_0, ru'


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flag", ["--model", "--adapter", "--vision", "--data", "--out"])
def test_a_file_in_the_place_of_a_folder(world, tmp_path, fails, flag):
    path = tmp_path / "file"
    path.write_text("{}")
    with no_weights():
        _, error = fails(*command(world, "chartqa", tmp_path / "out", flag, path))
    assert error == f"{flag} {path} is a file, not a folder"


def test_a_table_of_a_file(tmp_path, fails):
    (tmp_path / "file").write_text("{}")
    assert fails("table", tmp_path / "file")[1] == f"{tmp_path / 'file'} is a file, not a folder"


@pytest.mark.parametrize("flag", ["--answers", "--judged", "--judge-prompts", "--image", "--tokenizer"])
def test_a_folder_in_the_place_of_a_file(world, tmp_path, fails, flag):
    asked = {"--image": ["ask", "What?", "--model", world / "llava-v1.6-tiny"],
             "--tokenizer": ["ask", "What?", "--model", world / "llava-v1.6-tiny"]}  # fmt: skip
    score = ["score", "mmvet", "--data", world / "mmvet"]
    assert fails(*asked.get(flag, score), flag, tmp_path)[1] == f"{flag} {tmp_path} is a folder, not a file"


def test_an_output_that_can_not_be_written_is_said_before_the_model_is_loaded(world, tmp_path, fails):
    (tmp_path / "file").write_text("")
    with no_weights():
        _, error = fails(*command(world, "chartqa", tmp_path / "file" / "results"))
    assert error.endswith(f": {tmp_path / 'file'} is a file")
    with no_weights(), mock.patch.object(os, "access", lambda *_: False):
        _, error = fails(*command(world, "chartqa", tmp_path / "out"))
    assert error.endswith(f": {tmp_path} is not writable")


@pytest.mark.parametrize("name, count", [("chartqa", 4), ("mmbench", 3)])
def test_a_limit_above_what_is_there(world, tmp_path, capsys, name, count):
    """Whole questions are counted, not their rows."""
    run(world, name, tmp_path, "--limit", count)
    assert not any("--limit" in line for line in warnings(capsys))
    answers = ["score", name, "--answers", tmp_path / f"{name}-base-direct.jsonl", "--data", world / name]
    for asked in command(world, name, tmp_path), command(world, name, tmp_path, "--check"), answers:
        call("evaluate", *asked, "--limit", 500)
        assert [line for line in warnings(capsys) if "--limit" in line] == [f"--limit 500: only {count} questions"]


@pytest.mark.parametrize("content", [None, b"", b"GIF89a", b"text"])
def test_ask_with_an_image_that_can_not_be_read(world, tmp_path, fails, content):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with no_weights():
        _, error = fails("ask", "What?", "--model", world / "llava-v1.6-tiny", "--device", "cpu", "--image", path)
    assert error.startswith(f"can't read image {path}: ")
