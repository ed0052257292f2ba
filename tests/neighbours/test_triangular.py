"""Triangular consistency: its three tasks, parser and score by hand, and the whole method on a tiny checkpoint."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from chain import identical, log, stop_after
from commands import call, call_two_ranks, ended, lines

from stic_min import InputError
from stic_min.data import parse_instruction
from stic_min.formats.records import image_records
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.neighbours import triangular
from stic_min.neighbours.triplets import (
    QUESTION_PROMPT,
    TASKS,
    Triplet,
    consistency_scores,
    instruction_record,
    parse_form,
    select,
)

METHOD = "stic_min.neighbours.triangular"
MODEL = "llava-v1.5-tiny"
BOAT = Triplet("a-1", "a.jpg", "What floats?\nAnswer briefly.", "A boat.")


# ---------------------------------------------------------------- tasks and parser


def test_the_three_tasks():
    record = lambda *mixture: instruction_record(BOAT, mixture, seed=0)
    turns = lambda user, answer: [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
    assert record(1, 0, 0) == {
        "id": "a-1", "image": "a.jpg", "task": "answer",
        "conversations": turns("<image>\nWhat floats?\nAnswer briefly.", "A boat."),
    }  # fmt: skip
    assert record(0, 1, 0) == {
        "id": "a-1", "image": "a.jpg", "task": "question",
        "conversations": turns("<image>\nWhich question about this image has the following answer?\nA boat.",
                               "What floats?\nAnswer briefly."),
    }  # fmt: skip
    assert record(0, 0, 1) == {
        "id": "a-1", "image": "a.jpg", "task": "both",
        "conversations": turns(
            "<image>\nAsk a question about this image and answer it, in this form:\nQuestion: ...\nAnswer: ...",
            "Question: What floats?\nAnswer briefly.\nAnswer: A boat."),
    }  # fmt: skip


@pytest.mark.parametrize("text, texts", [
    ("Question: What floats?\nAnswer: A boat.", ("What floats?", "A boat.")),
    ("Question: Which?\nA. one\nB. two\nAnswer the question.\nAnswer: A",
     ("Which?\nA. one\nB. two\nAnswer the question.", "A")),
    ("Question: What?\nAnswer: First line.\n\nSecond line.", ("What?", "First line.\n\nSecond line.")),
    ("Question: Is it <image>?\nAnswer: <image>Yes.", ("Is it ?", "Yes.")),
    ("Question: What is an Answer: line?\nAnswer: This.", ("What is an Answer: line?", "This.")),
    ("What floats?\nA boat.", None),
    ("Sure! Question: What?\nAnswer: A boat.", None),
    ("Sure!\nQuestion: What?\nAnswer: A boat.", None),
    ("Question: What floats?", None),
    ("Answer: A boat.", None),
    ("Answer: A boat.\nQuestion: What?", None),
    ("Question: What? Answer: A boat.", ("What?", "A boat.")),
    ("Question: Which? A. one B. two Answer: A", ("Which? A. one B. two", "A")),
    ("Question: What? Answer: A boat. Answer: B.", None),
    ("Sure! Question: What? Answer: A boat.", None),
    ("Question: What?\nIt is on this line. Answer: A boat.", None),
    ("Question: What?\nAnswer: A.\nQuestion: And?\nAnswer: B.", None),
    ("Question: What?\nAnswer: A.\nAnswer: B.", None),
    ("Question: \nAnswer: A boat.", None),
    ("Question: What?\nAnswer: ", None),
    ("Question: What?\nAnswer: <image>", None),
    ("question: What?\nanswer: A boat.", None),
    ("", None),
])  # fmt: skip
def test_parser(text, texts):
    assert parse_form(text) == texts


def test_a_response_that_was_cut_off_is_malformed():
    job = SimpleNamespace(key="a.jpg#1", fields={"image": "a.jpg"})
    record = lambda finish: triangular.triplet_record(
        job, SimpleNamespace(text="Question: What?\nAnswer: A boat on the", finish=finish)
    )
    assert (record("stop")["question"], record("stop")["answer"]) == ("What?", "A boat on the")
    assert record("length") == record("stop") | {"question": None, "answer": None, "finish": "length"}


def test_tasks(tiny, tmp_path):
    """Each of the 11 turns about an image becomes one task, and back."""
    command = [METHOD, "tasks", "--instructions", tiny / "instructions.json"]
    out = tmp_path / "new" / "tasks.json"
    printed = call(*command, "--out", out)
    assert "11 turns of 8 records with an image, 10 in all; 0 turns do not fit" in printed
    turns = {}
    for entry in image_records(tiny / "instructions.json")[0]:
        instruction = parse_instruction(*entry)
        for number, (user, answer) in enumerate(instruction.turns, 1):
            question = user.removeprefix("<image>\n")
            turns[f"{instruction.key}-{number}"] = Triplet("", instruction.image, question, answer)
    records = json.loads(out.read_text())
    assert [record["id"] for record in records] == list(turns) and len(records) == 11
    for entry in image_records(out)[0]:
        _, key, record = entry
        [(user, answer)] = parse_instruction(*entry).turns
        assert record["image"] == turns[key].image
        assert (user.removeprefix("<image>\n"), answer) == turns[key].turn(record["task"])
    count = Counter(record["task"] for record in records)
    assert set(count) == set(TASKS)
    assert f"11 records in {out}: " + ", ".join(f"{count[t]} {t}" for t in TASKS) in printed
    run_json = json.loads((tmp_path / "new" / "tasks.json.run.json").read_text())
    assert "tasks --instructions" in run_json["record"]["command"] and len(run_json["record"]["source"]) == 64

    call(*command, "--out", out)  # again
    assert json.loads(out.read_text()) == records
    with pytest.raises(InputError, match=f"{out} already exists, with other content; choose another --out"):
        call(*command, "--out", out, "--seed", 1)
    call(*command, "--out", tmp_path / "few.json", "--limit", 3)
    few = json.loads((tmp_path / "few.json").read_text())
    assert len(few) == 3 and all(record in records for record in few)  # a task depends on seed and id only


def test_mixture():
    triplets = [Triplet(f"{i}", "a.jpg", "What?", "This.") for i in range(2000)]
    count = Counter(instruction_record(triplet, (2, 1, 1), 0)["task"] for triplet in triplets)
    assert 910 < count["answer"] < 1090 and 420 < count["both"] < 580  # 4 standard deviations


# ---------------------------------------------------------------- score and selection


def test_log_probs_are_those_of_both_directions_per_token(runs, tmp_path):
    llava = load_llava(runs.model, adapter=runs.out / "stage1")
    name = "scene_05.jpg"
    image = open_image(runs.tiny / "images" / name)
    for question, answer in (("What is the car doing?", "Driving"), ("Day?", "It is day, the sky is blue.")):
        triplet = Triplet("x", name, question, answer)
        logps = triangular.mean_logps(llava, triangular.pack(llava, triplet, llava.tiles(image)))
        ask = QUESTION_PROMPT.format(answer=answer)
        for logp, user, response in zip(logps, (question, ask), (answer, question)):
            tokens = llava.tokenizer.encode(response)  # and the end token
            expected = llava.response_logp(llava.chat_prompt(user), response, [image]) / (len(tokens) + 1)
            assert logp == pytest.approx(expected.item(), rel=1e-5)


def test_consistency_by_hand():
    """z = (x - mean) / deviation, then the minimum.

    A: -1 -2 -3, mean -2, deviation sqrt(2/3):           z =  a  0 -a  with a = sqrt(3/2)
    Q: -10 -30 -20, mean -20, deviation sqrt(200/3):     z =  a -a  0
    """
    a = 1.5**0.5
    assert consistency_scores([(-1, -10), (-2, -30), (-3, -20)]) == pytest.approx([a, -a, -a])
    assert consistency_scores([(-1, -5), (-3, -5)]) == [0, -1]  # Q is equal everywhere: z = 0
    assert consistency_scores([(-2, -7)]) == [0]


def test_selection_and_its_control():
    scores = [0.5, -1.0, 2.0, 0.5, 0.0, 0.5]
    assert select(scores, 1, seed=0) == [2]
    assert select(scores, 3, seed=0) == select(scores, 3, seed=1) == [0, 2, 3]  # of equal ones, the first
    assert select(scores, 6, seed=0) == [0, 1, 2, 3, 4, 5]
    chosen = {tuple(select(scores, 3, seed, at_random=True)) for seed in range(50)}
    assert all(len(set(indices)) == 3 and sorted(indices) == list(indices) for indices in chosen)
    assert len(chosen) > 5 and {i for indices in chosen for i in indices} == set(range(6))
    assert select(scores, 3, 7, at_random=True) == select(scores[::-1], 3, 7, at_random=True)  # not by score


def write_scores(path, logps, **changes):
    """logps: {(question, answer): (of the answer, of the question)}"""
    records = [
        {"id": f"a.jpg#{i}", "image": "a.jpg", "question": q, "answer": a, "logp_answer": x, "logp_question": y}
        for i, ((q, a), (x, y)) in enumerate(logps.items(), 1)
    ]
    records[0] |= changes
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_select(tmp_path):
    scores, out = tmp_path / "scores.jsonl", tmp_path / "update.json"
    logps = {("Q1?", "A1"): (-1.0, -10.0), ("Q2?", "A2"): (-2.0, -30.0), ("Q3?", "A3"): (-3.0, -20.0)}
    records = write_scores(scores, logps)
    with open(scores, "a") as file:  # sampled again: counts once
        file.write(json.dumps(records[1] | {"id": "a.jpg#4"}) + "\n")
    printed = call(METHOD, "select", "--scores", scores, "--out", out, "--keep", 0.34)
    assert "1 of 3 triplets, the best; 1 repeat an earlier one" in printed
    assert "log p(A | I, Q) per token: -1.0000 on average, -2.0000 over all" in printed
    turns = [{"from": "human", "value": "<image>\nQ1?"}, {"from": "gpt", "value": "A1"}]
    assert json.loads(out.read_text()) == [
        {"id": "a.jpg#1", "image": "a.jpg", "conversations": turns, "task": "answer", "consistency": 1.224745}
    ]
    control = lambda seed: [METHOD, "select", "--scores", scores, "--random", "--seed", seed, "--keep", 0.34]
    ids = set()
    for seed in range(8):
        assert "1 of 3 triplets, sampled at random" in call(*control(seed), "--out", tmp_path / f"{seed}.json")
        ids.add(json.loads((tmp_path / f"{seed}.json").read_text())[0]["id"])
    assert ids == {"a.jpg#1", "a.jpg#2", "a.jpg#3"}
    call(METHOD, "select", "--scores", scores, "--out", tmp_path / "all.json", "--keep", 1, "--mixture", 0, 1, 0)
    tasks = [record["task"] for record in json.loads((tmp_path / "all.json").read_text())]
    assert tasks == ["question"] * 3


# ---------------------------------------------------------------- the whole method


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A model tuned to write triplets in the form, nearly always, and the commands of every step."""
    out = tmp_path_factory.mktemp("triangular")
    talk = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    names = sorted(path.name for path in (tiny / "images").iterdir())
    texts = [(question, answer) for question in ("What is it?", "Is it day?") for answer in ("The sun.", "A boat.")]
    records = [
        {"id": f"{name}{copy}", "image": name, "conversations": talk(*texts[(i + copy) % 4])}
        for copy in range(24) for i, name in enumerate(names)
    ]  # fmt: skip
    (out / "instructions.json").write_text(json.dumps(records))
    at = ["--model", tiny / MODEL, "--images", tiny / "images", "--device", "cpu"]
    tune = [METHOD, "train", *at, "--projector-lr", 1e-3, "--lora-dropout", 0, "--batch-size", 4, "--micro-batch", 4]
    write = [METHOD, "triplets", *at, "--adapter", out / "tuned", "--per-image", 2, "--temperature", 0.4,
             "--max-new-tokens", 30]  # fmt: skip
    score = [METHOD, "score", *at, "--adapter", out / "tuned", "--triplets", out / "triplets.jsonl"]
    tasks = [METHOD, "tasks", "--instructions", out / "instructions.json", "--mixture", 0, 0, 1]
    call(*tasks, "--out", out / "tasks.json")
    call(*tune, "--lora-r", 8, "--lr", 2e-2, "--instructions", out / "tasks.json", "--out", out / "tuned")
    printed = {"triplets": call(*write, "--out", out / "triplets.jsonl"),
               "score": call(*score, "--out", out / "scores.jsonl")}  # fmt: skip
    commands = dict(tasks=tasks, tune=tune, write=write, score=score)
    return SimpleNamespace(out=out, tiny=tiny, names=names, printed=printed, **commands)


def test_triplets(world):
    records = lines(world.out / "triplets.jsonl")
    assert [record["id"] for record in records] == [f"{name}#{n}" for name in world.names for n in (1, 2)]
    good = [record for record in records if record["question"] is not None]
    assert len(good) >= 4 and len({record["response"] for record in good}) >= 2
    for record in records:
        texts = parse_form(record["response"]) if record["finish"] == "stop" else None
        assert (record["question"], record["answer"]) == (texts or (None, None))
        assert record["adapter"] == "tuned" and record["temperature"] == 0.4 and record["images"] == "images"
    assert f"16 triplets in {world.out / 'triplets.jsonl'}, 0 skipped; " in world.printed["triplets"]
    assert f"\n{16 - len(good)} of the responses are malformed" in world.printed["triplets"]
    run_json = json.loads((world.out / "triplets.run.json").read_text())["record"]
    assert run_json["finished"] and run_json["requested"] == 16 and run_json["skipped"] == 0


def test_scores_are_those_of_the_adapter(world):
    good = [record for record in lines(world.out / "triplets.jsonl") if record["question"] is not None]
    scores = lines(world.out / "scores.jsonl")
    assert [record["id"] for record in scores] == [record["id"] for record in good]
    assert f"{len(good)} triplets scored in {world.out / 'scores.jsonl'}, 0 skipped" in world.printed["score"]
    llava = load_llava(world.tiny / MODEL, adapter=world.out / "tuned")
    for record in scores[:4]:
        image = open_image(world.tiny / "images" / record["image"])
        logp = llava.response_logp(llava.chat_prompt(record["question"]), record["answer"], [image]).item()
        tokens = len(llava.tokenizer.encode_response(record["answer"]))
        assert record["logp_answer"] == pytest.approx(logp / tokens, abs=2e-5)


def test_two_ranks_write_the_same_files(world, tmp_path):
    triplets, scores = tmp_path / "triplets.jsonl", tmp_path / "scores.jsonl"
    call_two_ranks([*world.write, "--out", triplets], [*world.score, "--out", scores],
                   [*world.score, "--out", tmp_path / "check", "--check"],
                   [*world.tasks, "--out", tmp_path / "tasks.json"])  # fmt: skip
    for file in (triplets, scores, tmp_path / "tasks.json"):
        assert file.read_bytes() == (world.out / file.name).read_bytes()
    assert not (tmp_path / "check").exists()


@pytest.mark.parametrize("step, file", [("write", "triplets.jsonl"), ("score", "scores.jsonl")])
def test_a_restart_computes_only_what_is_missing(world, step, file, tmp_path):
    command = [*getattr(world, step), "--out", tmp_path / file]
    whole = (world.out / file).read_bytes()
    first, _, third, fourth, *_ = whole.splitlines(keepends=True)
    (tmp_path / file).write_bytes(first + fourth[:40])  # the second is lost, the last cut in two
    (tmp_path / f"{file}.part1").write_bytes(third + b"{")  # another rank's
    for count in (2, len(lines(world.out / file))):
        assert f"{count} of them already in" in call(*command)
        assert (tmp_path / file).read_bytes() == whole
    changed = {"write": ["--temperature", 0.6], "score": ["--dtype", "bfloat16"]}[step]
    with pytest.raises(InputError, match=f"{file} was written with .*, but this run has .*; choose another --out"):
        call(*command, *changed)
    with pytest.raises(InputError, match=f"{file} was written with images 'images', but this run has '.*'; choose"):
        call(*command, "--images", tmp_path, *(["--names", __file__] if step == "write" else []))
    assert (tmp_path / file).read_bytes() == whole


def test_more_triplets_per_image_extend_the_file(world, tmp_path):
    few, more = tmp_path / "few.jsonl", [*world.write, "--limit", 2, "--per-image"]
    call(*more, 1, "--out", few)
    assert "4 triplets to generate, 2 of them already in" in call(*more, 2, "--out", few)
    assert all(record in lines(world.out / "triplets.jsonl") for record in lines(few)) and len(lines(few)) == 4


def test_the_update_continues_from_the_tuned_adapter(world, tmp_path):
    update, whole, stopped = tmp_path / "update.json", tmp_path / "whole", tmp_path / "stopped"
    call(METHOD, "select", "--scores", world.out / "scores.jsonl", "--out", update, "--mixture", 1, 1, 1)
    command = [*world.tune, "--adapter", world.out / "tuned", "--lr", 1e-3, "--instructions", update,
               "--batch-size", 1, "--save-every", 1]  # fmt: skip
    call(*command, "--out", whole)
    assert len(log(whole)) == len(json.loads(update.read_text())) > 1
    settings = json.loads((whole / "run.json").read_text())
    assert settings["plain"] and settings["lora_r"] == 8 and "descriptions" not in settings
    assert settings["record"]["command"].startswith("train_stage2.py --plain --model")
    with stop_after(1), pytest.raises(SystemExit):
        call(*command, "--out", stopped)
    assert "resuming after step 1" in call(*command, "--out", stopped)
    assert identical(whole, stopped)


def test_check(world, tmp_path):
    out = tmp_path / "out.jsonl"
    printed = call(*world.write, "--out", out, "--check")
    assert "16 triplets to generate, 0 of them already in" in printed and "check passed" in printed
    printed = call(*world.score, "--out", out, "--check")
    count = len(lines(world.out / "scores.jsonl"))
    assert f"{count} to score, 0 skipped with a warning" in printed and "check passed" in printed
    printed = call(*world.score, "--out", world.out / "scores.jsonl", "--check")
    assert "0 to score, 0 skipped" in printed and "check passed" in printed
    for command in (world.write, world.score):
        status, message = ended(*command, "--out", out, "--check", "--images", world.out / "tuned")
        assert status == 1 and message.startswith("error: "), message
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- bad input


def test_bad_input(world, tmp_path):
    def fails(message, *command):
        status, line = ended(METHOD, *command)
        assert status == 1 and message in line, line

    out = ["--out", tmp_path / "out.json"]
    at = world.score[2:-2]
    file = tmp_path / "in.jsonl"
    scored = lines(world.out / "scores.jsonl")

    def write(*records):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    fails("can't read nowhere.json", "tasks", "--instructions", "nowhere.json", *out)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Hi.\nAnswer: no"}]
    write({"id": "a", "image": "a.jpg", "conversations": turns})
    fails("in.jsonl: no turn fits the form of a triplet", "tasks", "--instructions", file, *out)
    fails("record 0 (a): turns are", "tasks", "--instructions", bad_turns(tmp_path), *out)
    fails("is a folder, not a file", "tasks", "--instructions", file, "--out", tmp_path)

    fails("in.jsonl, line 1: not a triplet; expected: id, image, question, answer",
          "score", *at, "--triplets", file, *out)  # fmt: skip
    for name in ("id", "image", "question", "answer"):
        write(scored[0], scored[1] | {name: 7})
        fails(f"in.jsonl, line 2: no {name}", "score", *at, "--triplets", file, *out)
    write(scored[0], scored[0])
    fails("in.jsonl, line 2: ", "select", "--scores", file, *out)
    write(scored[0] | {"question": None, "answer": None})
    fails("in.jsonl: every response is malformed", "score", *at, "--triplets", file, *out)
    write(scored[0] | {"image": "../x.jpg"})
    fails("no scores: every triplet was skipped", "score", *at, "--triplets", file, *out)
    write(scored[0] | {"answer": "blue " * 4000})
    fails("no scores: every triplet was skipped", "score", *at, "--triplets", file, "--out", tmp_path / "long.jsonl")

    fails("has no scores; first run the step score", "select", "--scores", world.out / "triplets.jsonl", *out)
    for value in (None, "x", float("nan"), True, -1):
        write(scored[0] | {"logp_question": value})
        fails("has no scores; first run the step score", "select", "--scores", file, *out)

    base = world.write[2:-8]  # up to the images; without the adapter
    fails("every response is malformed: tune the model on the output of tasks first",
          "triplets", *base, "--max-new-tokens", 4, "--limit", 2, "--out", tmp_path / "base.jsonl")  # fmt: skip
    (tmp_path / "gone.txt").write_text("gone.jpg\n")
    fails("no triplets: every record was skipped", "triplets", *base, "--names", tmp_path / "gone.txt", *out)
    fails("no such image folder", "triplets", *base, "--images", tmp_path / "no", *out)


def bad_turns(folder):
    path = folder / "bad.json"
    path.write_text(json.dumps([{"id": "a", "image": "a.jpg", "conversations": [{"from": "human", "value": "Hi"}]}]))
    return path


def test_one_unreadable_image_costs_its_triplets_alone(world, tmp_path, capsys):
    scored = lines(world.out / "scores.jsonl")
    triplets, out = tmp_path / "triplets.jsonl", tmp_path / "scores.jsonl"
    triplets.write_text("".join(json.dumps(r) + "\n" for r in [scored[0] | {"image": "no.jpg"}, scored[1]]))
    printed = call(*world.score, "--triplets", triplets, "--out", out)
    assert f"1 triplets scored in {out}, 1 skipped" in printed
    assert "warning: skipped: no such image: " in capsys.readouterr().err
    assert [record["id"] for record in lines(out)] == [scored[1]["id"]]


@pytest.mark.parametrize("command, message", [
    ("tasks --instructions x --out y --mixture 0 0 0", "--mixture: at least one weight must be positive"),
    ("tasks --instructions x --out y --mixture 1 1", "expected 3 arguments"),
    ("tasks --instructions x --out y --mixture 1 1 -1", "-1 is not a number of at least 0"),
    ("select --scores x --out y --keep 0", "0 is not a number in (0, 1]"),
    ("triplets --model m --images i --out y --per-image 2 --temperature 0", "--per-image needs a --temperature"),
    ("triplets --model m --images i --out y --per-image 0", "0 is not a whole number of at least 1"),
    ("train --model m --images i --out y", "required: --instructions"),
    ("unknown", "invalid choice: 'unknown'"),
])  # fmt: skip
def test_bad_flags(command, message, capsys):
    with pytest.raises(SystemExit) as end:
        call(METHOD, *command.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("step", [[], ["tasks"], ["triplets"], ["score"], ["select"], ["train"]])
def test_help(step, capsys):
    with pytest.raises(SystemExit) as end:
        call(METHOD, *step, "--help")
    assert end.value.code == 0
