"""MM-Vet: what the judge is asked and says, scores and bad input by hand, then the official evaluator's values."""

import json
import math
import random
from types import SimpleNamespace

import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import mmvet
from stic_min.text import TEMPLATES, with_description, with_image

# ---- replies of the judge

@pytest.mark.parametrize("content, value", [
    ("0.5", 0.5), ("0.0", 0.0), ("1", 1.0), ("1.0", 1.0), ("+0.5", 0.5), (".5", 0.5), ("5e-1", 0.5), ("-0.0", 0.0),
    # all before the first blank, then stripped of other white space
    ("0.5 | x", 0.5), ("0.5 0.7", 0.5), ("0.5\n", 0.5), ("\t0.5\n", 0.5), (" 0.5", None), ("", None), (" ", None),
    ("0.5\n0.7", None), ("0.5|", None), ("0.5.", None), ("score: 0.5", None), ("one", None),
    # out of range; infinity is, NaN is not
    ("1.1", None), ("-0.1", None), ("10", None), ("inf", None), ("-inf", None),
])  # fmt: skip
def test_parse(content, value):
    assert mmvet.parse(content) == value


def test_parse_lets_nan_through():
    assert math.isnan(mmvet.parse("nan")) and math.isnan(mmvet.parse("NaN | "))


# ---- the judge

def question(number, *capabilities, answer="a cat", text="What is it?"):
    return {"question_id": number, "image": f"images/v1_{number}.png", "text": text, "prompt": text, "answer": answer,
            "capabilities": list(capabilities or ("rec",))}  # fmt: skip


def answers(**texts):
    return [{"question_id": int(key[1:]), "prompt": "p", "text": text} for key, text in texts.items()]


class Judge:
    """Answers by table: {where: content}, "0.5" for all others. Items are done in a random order, as in threads."""

    def __init__(self, said, runs=1):
        self.texts, self.runs = {"few_shot": "SHOTS\n", "retry_suffix": "\nAGAIN: "}, runs
        self.said, self.asked = said, {}

    def ask(self, where, messages, *, temperature, max_tokens):
        assert where not in self.asked
        self.asked[where] = (messages, temperature, max_tokens)
        return SimpleNamespace(content=self.said.get(where, "0.5"), model=f"judge-{len(where)}")

    def map(self, function, items):
        items = list(items)
        results = {i: function(items[i]) for i in random.Random(0).sample(range(len(items)), len(items))}
        return [results[i] for i in range(len(items))]


def test_judge_request():
    judge = Judge({"v1_7, run 1, attempt 1": "0.3 |"})
    judged = mmvet.judge([question(7, answer="-1<AND>-5<OR>no <AND> x")], answers(v7="A cat.\nOr two | "), judge)
    row = "What is it? | -1 <AND> -5 <OR> no  <AND>  x | A cat.\nOr two |  | "
    assert judge.asked == {"v1_7, run 1, attempt 1": ([{"role": "user", "content": "SHOTS\n\n" + row}], 0.0, 3)}
    assert judged == {"v1_7": {"content": ["0.3"], "score": [0.3], "model": ["judge-22"]}}


def test_judge_asks_again():
    # two replies that cannot be read and a NaN, then 1.0
    contents = ["Correct", " 0.4", "nan", "1.0"]
    judge = Judge({f"v1_7, run 1, attempt {i}": content for i, content in enumerate(contents, 1)})
    judged = mmvet.judge([question(7)], answers(v7="A cat."), judge)
    assert judged == {"v1_7": {"content": ["1.0"], "score": [1.0], "model": ["judge-22"]}}
    request = "SHOTS\n\nWhat is it? | a cat | A cat. | "
    assert [(own[0]["content"], temperature, most) for own, temperature, most in judge.asked.values()] == [
        (request, 0.0, 3),
        (request + "\nAGAIN: ", 0.0, 3),
        (request + "\nAGAIN: ", 0.5, 3),
        (request + "\nAGAIN: ", 1.0, 3),
    ]


def test_judge_gives_0_after_five_failures():
    judge = Judge({f"v1_7, run 1, attempt {i}": f"no {i}" for i in range(1, 9)})
    judged = mmvet.judge([question(7), question(12)], answers(v7="A cat.", v12="B"), judge)
    assert judged["v1_7"] == {"content": ["no"], "score": [0.0], "model": ["judge-22"]}
    asked = [temperature for where, (_, temperature, _) in judge.asked.items() if where.startswith("v1_7")]
    assert asked == [0.0, 0.0, 0.5, 1.0, 1.5]


def test_grades_that_the_judge_did_not_give_are_counted():
    """From what it said, so in files of others too: 0 without a grade is not a 0."""
    contents, scores = ["0.0", "", "nan", "no", "0", "0.5"], [0.0, 0.0, 0.0, 0.0, 0, 0.5]
    judged = {"v1_7": {"content": contents, "score": scores, "model": ["m"] * 6}}
    found = mmvet.score([question(7)], None, judged)
    assert (found["unread"], found["unread_share"]) == (3, 0.5)


def test_a_judge_that_gives_no_grade_at_all_is_no_judge():
    judge = Judge({f"v1_7, run 1, attempt {i}": f"no {i}" for i in range(1, 9)})
    with pytest.raises(InputError, match="MM-Vet: none of the judge's replies is a grade, the first is 'no'"):
        mmvet.judge([question(7)], answers(v7="A cat."), judge)


def test_judge_grades_every_answer_in_every_run():
    said = {"v1_7, run 2, attempt 1": "0.7", "v1_12, run 1, attempt 1": "x", "v1_12, run 1, attempt 2": "0.9"}
    judge = Judge(said, runs=2)
    judged = mmvet.judge([question(7), question(12)], answers(v12="B", v7="A"), judge)
    assert judged == {"v1_7": {"content": ["0.5", "0.7"], "score": [0.5, 0.7], "model": ["judge-22"] * 2},
                      "v1_12": {"content": ["0.9", "0.5"], "score": [0.9, 0.5], "model": ["judge-23"] * 2}}  # fmt: skip
    assert list(judged) == ["v1_7", "v1_12"]
    assert " | A | " in judge.asked["v1_7, run 2, attempt 1"][0][0]["content"]
    assert " | B | " in judge.asked["v1_12, run 2, attempt 1"][0][0]["content"]


def test_own_prompts_have_the_official_shape():
    official = shared("judge_prompts.json")[mmvet.PROMPTS]
    own = mmvet.OWN_PROMPTS
    assert own.keys() == official.keys() - {"source"} and all(own[key] != official[key] for key in own)
    for texts in own, official:
        _, table = texts["few_shot"].split("\n\n")
        head, ruler, *rows = table.removesuffix("\n").split("\n")
        assert (head, ruler) == ("Question | Ground truth | Prediction | Correctness", "--- | --- | --- | ---")
        assert len(rows) == 7 and all(len(row.split(" | ")) == 4 for row in rows)
        assert all(mmvet.parse(row.split(" | ")[3]) is not None for row in rows)
        assert texts["retry_suffix"].startswith("\n") and texts["retry_suffix"].endswith(": ")


# ---- files

ENTRY = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "imagesource": "u",
         "capability": ["math", "ocr"]}  # fmt: skip


def write(folder, content, name="mm-vet.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_load(tmp_path):
    write(tmp_path, {"v1_0": ENTRY, "v1_12": ENTRY | {"imagename": "dog.jpg", "capability": ["rec"]}})
    first = {"question_id": 0, "image": "images/v1_0.png", "text": "What is x?", "prompt": "What is x?",
             "answer": "-1<AND>-5", "capabilities": ["ocr", "math"]}  # fmt: skip
    second = first | {"question_id": 12, "image": "images/dog.jpg", "capabilities": ["rec"]}
    assert mmvet.load(tmp_path) == mmvet.load(str(tmp_path)) == [first, second]


@pytest.mark.parametrize("content, complaint", [
    ({}, "mm-vet.json: no questions"),
    ({"12": ENTRY}, "'12' is not an id of the form v1_12"), ({"v1_": ENTRY}, "'v1_' is not an id"),
    ({"v1_01": ENTRY}, "'v1_01' is not an id"), ({"v1_" + "9" * 5000: ENTRY}, "is not an id"),
    ({"v1_1\n": ENTRY}, "is not an id"),
    ({"v1_0": ENTRY, "v1_1": [ENTRY]}, "'v1_1' is not a JSON object"),
    *[({"v1_3": ENTRY | {key: value}}, f"'v1_3': no {key}")
      for key in ("question", "answer", "imagename") for value in (None, "", 7)],
    *[({"v1_3": ENTRY | {"capability": value}}, "'v1_3': capability is not a list of some of rec, ocr, know, gen, spat")
      for value in (None, [], "rec", ["rec", "rec"], ["rec", "see"], [["rec"]], [None], {"rec": 1})],
])  # fmt: skip
def test_load_rejects(tmp_path, content, complaint):
    write(tmp_path, content)
    with pytest.raises(InputError) as error:
        mmvet.load(tmp_path)
    assert complaint in str(error.value) and "mm-vet.json" in str(error.value) and "\n" not in str(error.value)


def test_read_answers(tmp_path):
    expected = [{"question_id": 12, "text": "A"}, {"question_id": 0, "text": "B"}]
    assert mmvet.read_answers(write(tmp_path, '{"v1_12": "A",\n "v1_0": "B"}')) == expected
    lines = '{"question_id": 12, "text": "A"}\n{"question_id": "v1_0", "text": "B"}\n'
    assert mmvet.read_answers(write(tmp_path, lines)) == expected
    one = '{"question_id": "v1_12", "prompt": "p", "text": "A"}\n'  # JSON lines, though it is one JSON object as well
    assert mmvet.read_answers(write(tmp_path, one)) == [{"question_id": 12, "prompt": "p", "text": "A"}]
    # what is no id stays for match_answers to name
    assert mmvet.read_answers(write(tmp_path, '{"x": "A"}')) == [{"question_id": "x", "text": "A"}]


@pytest.mark.parametrize("content, complaint", [
    (None, "can't read"), ("", "empty"), ('{"v1_0": ', "line 1: not JSON"), ("[1]", "record 0: not a JSON object"),
    ('{"question_id": 1, "text": ""}\nx', "line 2: not JSON")])  # fmt: skip
def test_read_answers_rejects(tmp_path, content, complaint):
    path = str(tmp_path / "a.json") if content is None else write(tmp_path, content, "a.json")
    with pytest.raises(InputError) as error:
        mmvet.read_answers(path)
    assert "a.json" in str(error.value) and complaint in str(error.value) and "\n" not in str(error.value)


def test_official_answers(tmp_path):
    questions, records = [question(3), question(12), question(4)], answers(v12="é\n", v3="A")
    suffix, text = mmvet.official(questions, records)
    assert suffix == ".json" and list(json.loads(text).items()) == [("v1_3", "A"), ("v1_12", "é\n")]
    assert mmvet.read_answers(write(tmp_path, text)) == [
        {"question_id": 3, "text": "A"}, {"question_id": 12, "text": "é\n"}]  # fmt: skip
    with pytest.raises(InputError, match="MM-Vet answers: '5' is not a question id"):
        mmvet.official(questions, answers(v5="A"))


def graded(*scores):
    return {"content": [str(score) for score in scores], "score": list(scores), "model": ["gpt-4"] * len(scores)}


def test_read_judged(tmp_path):
    first = write(tmp_path, {"v1_0": graded(0.1, 0.2), "v1_1": graded(1, 0)}, "a.json")
    second = write(tmp_path, {"v1_1": graded(0.3), "v1_0": graded(0.4)}, "b.json")
    assert mmvet.read_judged([first]) == {"v1_0": graded(0.1, 0.2), "v1_1": graded(1, 0)}
    both = {"v1_0": graded(0.1, 0.2, 0.4), "v1_1": graded(1, 0, 0.3)}
    assert mmvet.read_judged([first, second]) == both
    [(suffix, text)] = mmvet.judged_files(both).items()
    assert suffix == ".grades.json" and mmvet.read_judged([write(tmp_path, text, "c.json")]) == both


@pytest.mark.parametrize("content, complaint", [
    ("[]", "not a JSON object"), ("{", "not JSON"),
    *[(json.dumps({"v1_0": graded(0.5), "v1_1": entry}), "'v1_1' needs lists 'content', 'score' and 'model'")
      for entry in (0.5, None, {}, {"score": [0.5]}, graded(0.5) | {"score": 0.5}, graded(0.5) | {"model": ["a", "b"]},
                    graded(0.5) | {"content": []})],
    *[(json.dumps({"v1_0": graded(0.5), "v1_1": graded(0.5, value)}), f"'v1_1' has the grade {value!r}, which is not")
      for value in (math.nan, math.inf, -0.1, 1.5, 10**400, None, "0.5", True)],
])  # fmt: skip
def test_read_judged_rejects(tmp_path, content, complaint):
    right = write(tmp_path, {"v1_0": graded(0.5)}, "right.json")
    path = write(tmp_path, content, "g.json")
    with pytest.raises(InputError) as error:
        mmvet.read_judged([right, path])
    assert "g.json: " in str(error.value) and complaint in str(error.value) and "\n" not in str(error.value)


# ---- scores

#       needs      run 1  run 2  mean
# v1_0  rec         1.0    0.5   0.75
# v1_1  rec, ocr    0.0    0.5   0.25
# v1_2  ocr, rec    0.5    0.5   0.5
# v1_3  math        0.9    0.1   0.5
QUESTIONS = [question(0, "rec"), question(1, "rec", "ocr"), question(2, "ocr", "rec"), question(3, "math")]
JUDGED = {"v1_3": graded(0.9, 0.1), "v1_0": graded(1.0, 0.5), "v1_1": graded(0.0, 0.5), "v1_2": graded(0.5, 0.5)}


def numbers(scores):
    return {name: (own["score"], own["n"]) for name, own in scores.items()}


def test_score():
    scores = mmvet.score(QUESTIONS, None, JUDGED)
    assert scores["score"] == pytest.approx(50.0, abs=1e-9)  # (0.75 + 0.25 + 0.5 + 0.5) / 4
    assert scores["runs"] == pytest.approx([60.0, 40.0], abs=1e-9)  # (1 + 0 + 0.5 + 0.9) / 4, (0.5 * 3 + 0.1) / 4
    assert scores["std"] == pytest.approx(10.0, abs=1e-9)  # of a population: not 14.1
    assert (scores["n"], scores["missing"]) == (4, 0)
    assert numbers(scores["groups"]) == {"rec": (50.0, 3), "ocr": (37.5, 2), "math": (50.0, 1)}  # v1_0 to 2; 1 and 2; 3
    assert list(scores["groups"]) == ["rec", "ocr", "math"]
    # v1_1 and v1_2 need the same two, in whatever order; the largest set comes first
    assert numbers(scores["integrations"]) == {"ocr_rec": (37.5, 2), "rec": (75.0, 1), "math": (50.0, 1)}
    assert list(scores["integrations"]) == ["ocr_rec", "rec", "math"]
    assert scores == mmvet.score(QUESTIONS, answers(v2="", v1="", v0="", v3=""), JUDGED)


def test_intervals_are_over_questions():
    scores = mmvet.score(QUESTIONS, None, JUDGED)
    low, high = scores["interval"]
    assert 25 <= low < 50 < high <= 75  # of four draws from 75, 25, 50, 50
    # one question drawn again and again has no spread: Wilson's interval for 0.5 of 1, 50 -+ 50 z / sqrt(1 + z^2)
    assert scores["groups"]["math"]["interval"] == pytest.approx([5.462, 94.538], abs=1e-3)
    # 218 grades of 0 and 1, half of them each: 1.96 * 50 / sqrt(218) = 6.64 to either side
    many = {f"v1_{i}": graded(i % 2) for i in range(218)}
    low, high = mmvet.score([question(i) for i in range(218)], None, many)["interval"]
    assert (low, high) == pytest.approx((50 - 6.64, 50 + 6.64), abs=0.7)


@pytest.mark.parametrize("given, judged, complaint", [
    (None, None, "MM-Vet is graded by a judge model: --judge, or --judged FILE with official grades"),
    (None, {}, "4 of 4 questions have no grade, the first is 'v1_0'"),
    (None, JUDGED | {"v1_9": graded(0, 0)}, "MM-Vet grades: 'v1_9' is not a question id"),
    (None, {"v1_1": graded(0), "v1_0": graded(0)}, "MM-Vet: 2 of 4 questions have no grade, the first is 'v1_2'"),
    (None, JUDGED | {"v1_1": graded()}, "MM-Vet: 1 of 4 questions have no grade, the first is 'v1_1'"),
    (None, JUDGED | {"v1_1": graded(0)}, "runs for all questions: 'v1_0' has 2 grades, 'v1_1' has 1"),
])  # fmt: skip
def test_score_rejects(given, judged, complaint):
    with pytest.raises(InputError) as error:
        mmvet.score(QUESTIONS, given, judged)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_report():
    lines = mmvet.report(mmvet.score(QUESTIONS, None, JUDGED)).split("\n")
    assert lines[0].startswith("MM-Vet: 4 questions")
    assert lines[1] == "2 runs of the judge: 60.0 40.0, std 10.0"
    cells = [line.split() for line in lines]
    assert cells[2][:2] == ["all", "50.0"] and cells[2][-1] == "n=4"
    assert cells[4] == ["ocr", "37.5", "[25.0,", "50.0]", "n=2"]
    assert [row[0] for row in cells[3:6]] == ["rec", "ocr", "math"]
    assert lines[6] == "by exact set of capabilities:"
    assert [row[:2] for row in cells[7:]] == [["ocr_rec", "37.5"], ["rec", "75.0"], ["math", "50.0"]]


def test_from_files_to_scores(tmp_path):
    write(tmp_path, {f"v1_{i}": ENTRY | {"capability": q["capabilities"]} for i, q in enumerate(QUESTIONS)})
    questions = mmvet.load(tmp_path)
    said = mmvet.read_answers(write(tmp_path, {f"v1_{i}": f"answer {i}" for i in range(4)}, "result.json"))
    judged = mmvet.judge(questions, said, Judge({"v1_3, run 1, attempt 1": "1.0"}, runs=2))
    grades = write(tmp_path, mmvet.judged_files(judged)[".grades.json"], "run.grades.json")
    scores = mmvet.score(questions, said, mmvet.read_judged([grades]))
    assert scores == mmvet.score(questions, said, judged)
    assert numbers(scores["groups"]) == {"rec": (50.0, 3), "ocr": (50.0, 2), "math": (75.0, 1)}
    assert (scores["score"], scores["runs"]) == (56.25, [62.5, 50.0])


# ---- values of the official evaluator (skipped where the shared data is not at hand)

def test_official_parser():
    rows = shared("mmvet_parse.jsonl")
    assert len(rows) == 9
    for row in rows:
        value = mmvet.parse(row["content"])
        assert math.isnan(value) if row["nan"] else value == row["score"], row


@pytest.mark.parametrize("runs", [1, 3])
def test_official_scores_of_llava_v15_7b(tmp_path, runs):
    name = f"mmvet_grades_llava_v1.5_7b_{runs}runs.json"
    grades, everything = shared(name), shared("expected_aggregates.json")[name]
    expected = everything["expected"]
    write(tmp_path, {key: ENTRY | {"capability": own} for key, own in shared("mmvet_capabilities.json").items()})
    questions = mmvet.load(tmp_path)
    assert len(questions) == len(grades) == 218

    scores = mmvet.score(questions, None, mmvet.read_judged([write(tmp_path, grades, "grades.json")]))
    groups = scores["groups"] | {"total": scores}
    assert groups.keys() | {"std", "runs", "integrations"} == expected.keys()
    for key, own in groups.items():
        assert own["score"] == pytest.approx(expected[key]["exact"], abs=1e-9), key
        assert round(own["score"], 1) == expected[key]["rounded"], key
        assert f"{own['score']:.1f}" == everything["published_csv"][key], key
    assert round(scores["std"], 1) == expected["std"] and [round(run, 1) for run in scores["runs"]] == expected["runs"]
    assert {key: {"n": own["n"], "score": round(own["score"], 1)} for key, own in scores["integrations"].items()} == (
        expected["integrations"])  # fmt: skip
    published = everything["published_integration_csv"]
    assert {key: f"{own['score']:.1f}" for key, own in scores["integrations"].items()} == published

    # the runs one by one, put together from files of their own
    parts = [write(tmp_path, {key: {field: own[field][i : i + 1] for field in own} for key, own in grades.items()},
                   f"{i}.json") for i in range(runs)]  # fmt: skip
    assert mmvet.score(questions, None, mmvet.read_judged(parts)) == scores


def test_official_request():
    texts = shared("judge_prompts.json")["mm_vet"]
    judge = Judge({"v1_7, run 1, attempt 1": "?"})
    judge.texts = texts
    mmvet.judge([question(7)], answers(v7="A cat."), judge)
    first, second = (messages[0]["content"] for messages, _, _ in judge.asked.values())
    assert first.startswith("Compare the ground truth and prediction from AI models")
    assert first.endswith(" | 1.0\n\nWhat is it? | a cat | A cat. | ")
    assert second == first + "\nPredict the correctness of the answer (digit): "


def test_official_prompts(tmp_path):
    rows = [row for row in shared("prompts.jsonl") if row["benchmark"] == "mm_vet"]
    assert len(rows) == 4
    for row in rows:
        write(tmp_path, {"v1_0": ENTRY | {"question": row["item"]["question"]}})
        [q] = mmvet.load(tmp_path)
        user = with_image(with_description(row["description"], q["text"]) if row["mode"] == "dar" else q["text"])
        assert q["prompt"] == row["recorded_prompt"]
        assert user == row["user_message"]
        assert TEMPLATES[row["conv"]].prompt(user) == row["full_prompt"]
