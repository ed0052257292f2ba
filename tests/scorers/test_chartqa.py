"""ChartQA: every rule on cases written by hand, then loading and bad input, then the values of the official scorers."""

import json

import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import chartqa
from stic_min.text import TEMPLATES, with_description, with_image

SENTENCE = "Answer the question using a single word or phrase."

# ---- numbers and matches


@pytest.mark.parametrize("text, number", [
    ("5", 5), ("-1.5", -1.5), (" 5 ", 5), ("1e3", 1000), ("1_000", 1000), ("٣", 3),  # whatever Python takes
    ("5%", 0.05), ("5%%", 0.05), ("5 %", 0.05), ("%5", None), ("5% ", None),  # the sign has to be the end
    ("1,000", None), ("$5", None), ("five", None), ("", None), ("%", None), ("1/2", None), ("5 apples", None),
])  # fmt: skip
def test_to_float(text, number):
    assert chartqa.to_float(text) == (None if number is None else pytest.approx(number, abs=1e-12))


@pytest.mark.parametrize("text, label, right", [
    # numbers: to 5 % of the label, inclusive, and not of the answer
    ("10", "10", True), ("10.5", "10", True), ("9.5", "10", True), ("10.51", "10", False), ("9.49", "10", False),
    ("19", "20", True), ("20", "19", False), ("-10", "10", False), ("-10.5", "-10", True), ("10.0", "10", True),
    ("2015", "1950", True), ("1950", "2100", False),  # years, too
    # percentages are fractions
    ("5%", "0.05", True), ("0.05", "5%", True), ("5", "5%", False), ("5%", "5", False), ("5.2%", "5%", True),
    # no 5 % of zero: as text
    ("0", "0", True), ("0.0", "0", False), ("0", "0.0", False), ("0.01", "0", False), ("0%", "0", False),
    # not a number: the same letters, in any case
    ("Blue", "blue", True), ("blue.", "blue", False), ("1,000", "1,000", True), ("1000", "1,000", False),
    ("1,000", "1000", False), ("[1, 2]", "[1, 2]", True), ("[1,2]", "[1, 2]", False), ("", "", True),
    ("nan", "5", False), ("nan", "nan", False), ("inf", "5", False), ("inf", "inf", False), ("NaN", "0", False),
    ("5", "five", False),
])  # fmt: skip
def test_is_relaxed_match(text, label, right):
    assert chartqa.is_relaxed_match(text, label) is right


# ---- loading


def entry(image="1.png", query="How many?", label="10"):
    return {"imgname": image, "query": query, "label": label}


def write(folder, human, augmented):
    (folder / "test_human.json").write_text(json.dumps(human))
    (folder / "test_augmented.json").write_text(json.dumps(augmented))


def test_load(tmp_path):
    """People's first, numbered within their split. No picture is opened."""
    write(tmp_path, [entry(), entry("2.png", "Which?", "Yes")], [entry("3.png", "What?\n", "5%")])
    questions = chartqa.load(tmp_path)
    assert questions == [
        {"question_id": "human-0", "image": "png/1.png", "text": f"How many?\n{SENTENCE}",
         "prompt": f"How many?\n{SENTENCE}", "label": "10", "split": "human"},
        {"question_id": "human-1", "image": "png/2.png", "text": f"Which?\n{SENTENCE}",
         "prompt": f"Which?\n{SENTENCE}", "label": "Yes", "split": "human"},
        {"question_id": "augmented-0", "image": "png/3.png", "text": f"What?\n\n{SENTENCE}",
         "prompt": f"What?\n\n{SENTENCE}", "label": "5%", "split": "augmented"},
    ]  # fmt: skip
    assert chartqa.load(str(tmp_path), suffix=chartqa.SUFFIX) == questions


@pytest.mark.parametrize("suffix, text", [("Answer.", "How many?\nAnswer."), ("", "How many?")])
def test_load_with_another_suffix(tmp_path, suffix, text):
    write(tmp_path, [entry()], [entry()])
    for question in chartqa.load(tmp_path, suffix):
        assert question["text"] == question["prompt"] == text


@pytest.mark.parametrize("entries, named", [
    ([], "not a non-empty list"), ({}, "not a non-empty list"), (5, "not a non-empty list"),
    ([entry(), []], "entry 1: 'imgname' is missing or not a string"),
    ([entry(image=None)], "entry 0: 'imgname' is missing or not a string"),
    ([entry(query=["x"])], "entry 0: 'query' is missing or not a string"),
    ([entry(), entry(label=10)], "entry 1: 'label' is missing or not a string"),
    ([{"imgname": "1.png", "query": "q"}], "entry 0: 'label' is missing or not a string"),
    ([entry(query="\ud800")], "entry 0: query '\\ud800"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["test_human.json", "test_augmented.json"])
def test_load_rejects(tmp_path, name, entries, named):
    write(tmp_path, [entry()], [entry()])
    (tmp_path / name).write_text(json.dumps(entries))
    with pytest.raises(InputError) as error:
        chartqa.load(tmp_path)
    assert str(tmp_path / name) in str(error.value) and named in str(error.value) and "\n" not in str(error.value)


# ---- scores


@pytest.fixture
def questions(tmp_path):
    """Labels 10, blue, 20 by people, 0.0 by a program."""
    write(tmp_path, [entry(), entry(label="blue"), entry(label="20")], [entry(label="0.0")])
    return chartqa.load(tmp_path)


# human-2 is not answered. Right: human-0 by all, human-1 once it is stripped, augmented-0 where 0.0 is the answer.
ANSWERS = [
    {"question_id": "augmented-0", "prompt": "q", "text": "0"},
    {"question_id": "human-0", "prompt": "q", "text": "10.5"},
    {"question_id": "human-1", "prompt": "q", "text": "Blue "},
]


def test_score(questions):
    scores = chartqa.score(questions, ANSWERS)
    # 1 of 4: centre (1 + z^2/2) / (4 + z^2), z = 1.96: 37.25 %, half width 32.69 %
    assert scores.pop("interval") == pytest.approx([4.56, 69.94], abs=0.01)
    human, augmented = scores["groups"]["human"], scores["groups"]["augmented"]
    assert human.pop("interval") == pytest.approx([6.15, 79.23], abs=0.01)
    assert augmented.pop("interval") == pytest.approx([0, 79.35], abs=0.01)
    assert scores == {
        "score": 25, "n": 4, "correct": 1, "missing": 1, "rule": "lmms_eval",
        "mean_of_splits": pytest.approx(100 / 6),  # of 1 in 3 and 0 in 1
        "groups": {"human": {"score": pytest.approx(100 / 3), "n": 3, "correct": 1},
                   "augmented": {"score": 0, "n": 1, "correct": 0}},
    }  # fmt: skip


@pytest.mark.parametrize("rule, correct, human", [("lmms_eval", 1, 1), ("vlmevalkit", 2, 2), ("vlmevalkit_2024", 2, 2)])
def test_score_by_rule(questions, rule, correct, human):
    scores = chartqa.score(questions, ANSWERS, rule=rule)
    assert (scores["rule"], scores["correct"], scores["groups"]["human"]["correct"]) == (rule, correct, human)


def test_the_old_rule_exchanges_answer_and_label(tmp_path):
    """5 % of the answer instead of the label, and zero is special as an answer instead of as a label."""
    write(tmp_path, [entry(label="19"), entry(label="20"), entry(label="0")], [entry(label="0.5")])
    questions, texts = chartqa.load(tmp_path), {"human-0": "20", "human-1": "21", "human-2": "0.0", "augmented-0": "0"}
    answers = [{"question_id": qid, "text": text} for qid, text in texts.items()]
    right = {rule: chartqa.score(questions, answers, rule=rule)["correct"] for rule in chartqa.RULES}
    assert right == {"lmms_eval": 1, "vlmevalkit": 1, "vlmevalkit_2024": 2}  # 20/19 is off by 5.3 % or by 5 %
    # label 0, answer 1e-9: as text (wrong), or |0 - 1e-9| / 1e-9 (wrong); label 0 and answer "0": as text in both
    one = [questions[2]]
    for text, found in (("1e-9", 0), ("0", 1)):
        for rule in chartqa.RULES:
            assert chartqa.score(one, [{"question_id": "human-2", "text": text}], rule=rule)["correct"] == found


def test_score_leaves_an_empty_split_out(questions):
    scores = chartqa.score(questions[:2], ANSWERS[1:])
    assert list(scores["groups"]) == ["human"] and scores["mean_of_splits"] == scores["score"] == 50


def test_a_missing_answer_is_wrong_even_where_the_label_is_empty(tmp_path):
    write(tmp_path, [entry(label="")], [entry(label="")])
    questions = chartqa.load(tmp_path)
    scores = chartqa.score(questions, [{"question_id": "human-0", "text": ""}])
    assert (scores["correct"], scores["missing"]) == (1, 1)


def test_report(questions):
    assert chartqa.report(chartqa.score(questions, ANSWERS)).split("\n") == [
        "ChartQA test: 4 questions, 1 without an answer; relaxed accuracy in %, rule lmms_eval",
        "all             25.0 [4.6, 69.9]   n=4",
        "human           33.3 [6.1, 79.2]   n=3",
        "augmented       0.0 [0.0, 79.3]   n=1",
        "mean of splits  16.7",
    ]


# ---- prompts, for which there is no official script: the common prefix rule


@pytest.mark.parametrize("conv, full", [
    ("vicuna_v1", "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                  "helpful, detailed, and polite answers to the user's questions. USER: {user} ASSISTANT:"),
    ("mistral_instruct", "[INST] {user} [/INST]"),
])  # fmt: skip
def test_prompts(questions, conv, full):
    text = questions[0]["text"]
    for user, expected in (
        (with_image(text), f"<image>\nHow many?\n{SENTENCE}"),
        (with_image(with_description("A chart.", text)),
         f"<image>\nImage description:\nA chart.\n\nHow many?\n{SENTENCE}"),
    ):
        assert user == expected and TEMPLATES[conv].prompt(user) == full.format(user=expected)


# ---- values of the official scorers (skipped where the shared data is not at hand)


FIELDS = {"lmms_eval": "score", "vlmevalkit": "vlmevalkit", "vlmevalkit_2024": "vlmevalkit_2024"}


@pytest.mark.parametrize("rule", chartqa.RULES)
def test_official_values(tmp_path, rule):
    rows, expected = shared("chartqa_relaxed.jsonl"), shared("expected_aggregates.json")["chartqa_relaxed.jsonl"]
    assert len(rows) == 232 and sum(r["score"] != r[FIELDS["vlmevalkit"]] for r in rows) == 3
    splits = {split: [r for r in rows if r["split"] == split] for split in chartqa.SPLITS}
    write(tmp_path, *([entry(label=r["target"]) for r in splits[split]] for split in chartqa.SPLITS))
    questions, cases = chartqa.load(tmp_path), [r for own in splits.values() for r in own]
    answers = [{"question_id": q["question_id"], "text": r["pred"]} for q, r in zip(questions, cases)]
    for q, a, r in zip(questions, answers, cases):
        assert chartqa.score([q], [a], rule=rule)["correct"] == r[FIELDS[rule]], r

    scores, expected_scores = chartqa.score(questions, answers, rule=rule), expected[FIELDS[rule]]
    assert {split: own["n"] for split, own in scores["groups"].items()} == expected["n"]
    found = {split: own["score"] for split, own in scores["groups"].items()}
    found |= {"overall_pooled": scores["score"], "mean_of_splits": scores["mean_of_splits"]}
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected_scores.items()}
