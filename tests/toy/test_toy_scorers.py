"""The toy benchmarks' scorers: every number worked out by hand, then through evaluate.py."""

import json

import pytest
from commands import call

from stic_min import InputError
from stic_min.scorers.common import proportion, wilson
from stic_min.toy import captions as toy_captions
from stic_min.toy import vqa as toy_vqa

VOCABULARY = ["ring", "red ring", "red circle", "blue square", "green star"]


def caption(qid, objects, signature):
    return {"question_id": qid, "image": f"images/{qid}.png", "text": "Describe.", "objects": objects,
            "signature": signature, "vocabulary": VOCABULARY}  # fmt: skip


def answers(**texts):
    return [{"question_id": qid, "prompt": "<image>\nDescribe.", "text": text} for qid, text in texts.items()]


# ---------------------------------------------------------------- what counts as a mention


@pytest.mark.parametrize("text, expected", [
    ("", []), ("nothing of the kind", []),
    ("a red circle", ["red circle"]), ("(red circle)", ["red circle"]), ("A RED Circle.", ["red circle"]),
    # every mention, in the order of the text
    ("A green star, a red circle and a green star.", ["green star", "red circle", "green star"]),
    # where names overlap, only the longer one
    ("a red ring", ["red ring"]), ("a blue ring", ["ring"]), ("a ring, a red ring", ["ring", "red ring"]),
    # neither plurals nor parts of longer words
    ("two red circles, two rings", []), ("a spring", []), ("a bored ring", ["ring"]),
    ("infrared ring", ["ring"]), ("a redcircle", []), ("red, circle", []), ("circle red", []),
])  # fmt: skip
def test_mentions(text, expected):
    assert toy_captions.mentions(text, VOCABULARY) == expected
    assert toy_captions.mentions(text, VOCABULARY[::-1]) == expected


# ---------------------------------------------------------------- captions

# id  present                  signature              mentions                       wrong, right, absent
# a   red circle, blue square  green star, red ring   red circle 2x, blue square     0 of 3, 2 of 2, 0 of 2
# b   red circle, green star   green star, red ring   green star, red ring 2x, ring  3 of 4, 1 of 3, 1 of 1
# c   ring                     red ring, blue square  none                           0 of 0, 0 of 0, 0 of 2
# d   blue square, red ring,   red ring, green star   missing                        0 of 0, 0 of 0, 0 of 0
#     green star
# e   ring                     green star, red ring   red circle                     1 of 1, 0 of 1, 0 of 2
# Of b's two signature objects, the green star is present: mentioned, but not an absent one.
CAPTIONS = [
    caption("a", ["blue square", "red circle"], ["green star", "red ring"]),
    caption("b", ["green star", "red circle"], ["green star", "red ring"]),
    caption("c", ["ring"], ["red ring", "blue square"]),
    caption("d", ["blue square", "green star", "red ring"], ["red ring", "green star"]),
    caption("e", ["ring"], ["green star", "red ring"]),
]
CAPTION_ANSWERS = answers(
    e="A red circle.",
    a="A RED CIRCLE, a blue square and the same red circle.",
    b="A green star. A red ring, Red Ring; a ring.",
    c="Nothing here: rings, red circles, a redcircle.",
)
CAPTION_SCORES = {
    "chair_i": 50.0,  # wrong 0 + 3 + 0 + 0 + 1 = 4 of 3 + 4 + 0 + 0 + 1 = 8 mentions
    "chair_s": 40.0,  # b, e of 5 captions, including the missing one
    "precision": 50.0,  # right 2 + 1 = 3 of 2 + 3 + 1 = 6 objects mentioned, each counted once per caption
    "recall": 33.33,  # 3 of 2 + 2 + 1 + 3 + 1 = 9 objects present, including those of the missing caption
    "f1": 40.0,  # 2 * 1/2 * 1/3 / (1/2 + 1/3) = 2/5
    "signature": 14.29,  # b's red ring, of a 2, b 1, c 2, d 0, e 2 = 7 absent ones
    "mentioned": 1.6,  # 8 mentions in 5 captions
    "n": 5,
    "missing": 1,
}


@pytest.mark.parametrize("question, text, values", [
    # a repeated wrong mention counts twice in CHAIR_i (2 of 3), once in CHAIR_s and in precision (1 of 2)
    (CAPTIONS[0], "red circle, ring, ring", {"chair_i": 66.67, "chair_s": 100.0, "precision": 50.0}),
    # a repeated right mention: 1 wrong of 3, precision 1 of 2, as above
    (CAPTIONS[0], "red circle, ring, red circle", {"chair_i": 33.33, "precision": 50.0, "recall": 50.0}),
    # one of the two absent signature objects, twice: 1 of 2, not 2 of 2
    (CAPTIONS[0], "green star, green star", {"chair_i": 100.0, "signature": 50.0, "mentioned": 2.0}),
    # a signature object that is present is right, and not an absent one
    (CAPTIONS[1], "green star", {"chair_i": 0.0, "recall": 50.0, "f1": 66.67, "signature": 0.0}),
    # both signature objects present: the rate over nothing is 0
    (CAPTIONS[3], "red ring, green star, blue square", {"recall": 100.0, "f1": 100.0, "signature": 0.0}),
    # the red ring is absent, the ring is present: mentioning one does not mention the other
    (CAPTIONS[2], "a red ring", {"chair_i": 100.0, "recall": 0.0, "signature": 50.0, "mentioned": 1.0}),
    # no mention at all
    (CAPTIONS[0], "", {"chair_i": 0.0, "chair_s": 0.0, "precision": 0.0, "recall": 0.0, "missing": 0}),
])  # fmt: skip
def test_one_caption(question, text, values):
    scores = toy_captions.score([question], answers(**{question["question_id"]: text}))
    assert {key: scores[key] for key in values} == values


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("text, answer, right", [
    ("yes", "yes", True), ("YES.", "yes", True), (" yes \n", "yes", True), ("a", "A", True),
    ("Upper Left.", "upper left", True),
    ("", "yes", False), ("yes..", "yes", False), ("yes, it is", "yes", False), ("ye", "yes", False),
    ("A. red ring", "A", False), ("2", "two", False), ("left", "upper left", False),
])  # fmt: skip
def test_is_right(text, answer, right):
    assert toy_vqa.is_right(text, answer) is right


def question(qid, kind, answer):
    return {"question_id": qid, "image": "images/0.png", "type": kind, "text": "?", "answer": answer}


# p, q, r: place, right, wrong and missing; s, t: count, both right; u: color, missing
QUESTIONS = [
    question("p", "place", "center"), question("s", "count", "two"), question("q", "place", "upper left"),
    question("r", "place", "center"), question("t", "count", "zero"), question("u", "color", "red"),
]  # fmt: skip
QUESTION_ANSWERS = answers(t="Zero", q="center", p="Center.", s="two")
QUESTION_SCORES = {
    "accuracy": 50.0,  # p, s, t of 6 questions, not the mean of the types
    "types": {
        "color": {"n": 1, "accuracy": 0.0},
        "count": {"n": 2, "accuracy": 100.0},
        "place": {"n": 3, "accuracy": 33.33},
    },
    "n": 6,
    "missing": 2,
}


# ---------------------------------------------------------------- both benchmarks

BENCHMARKS = {
    "toycaptions": (toy_captions, CAPTIONS, CAPTION_ANSWERS, CAPTION_SCORES),
    "toyvqa": (toy_vqa, QUESTIONS, QUESTION_ANSWERS, QUESTION_SCORES),
}
both = pytest.mark.parametrize("scorer, questions, given, scores", BENCHMARKS.values(), ids=BENCHMARKS)


def write_data(folder):
    entries = [{key: value for key, value in q.items() if key != "vocabulary"} for q in CAPTIONS]
    (folder / "captions.json").write_text(json.dumps({"vocabulary": VOCABULARY, "captions": entries}))
    (folder / "questions.json").write_text(json.dumps([q | {"note": "ignored"} for q in QUESTIONS]))


@both
def test_scores_and_report(scorer, questions, given, scores):
    numbers = scorer.score(questions, given)
    assert {key: numbers[key] for key in scores} == scores
    assert scorer.score(questions[::-1], given[::-1]) == numbers
    in_capitals = [record | {"text": record["text"].upper()} for record in given]
    assert scorer.score(questions, in_capitals) == numbers
    number = [questions[0] | {"question_id": "7"}], [given[0] | {"question_id": 7}]  # ids match as text
    assert scorer.score(*number)["missing"] == 0
    nothing = scorer.score(questions, [])
    assert nothing["missing"] == nothing["n"] == len(questions)
    assert not any(nothing.get(name) for name in (*toy_captions.RATES, "mentioned", "accuracy"))
    values = [50.0, 0.0, 100.0, 33.33] if scorer is toy_vqa else [scores[key] for key in toy_captions.RATES]
    head, *lines = scorer.report(scores).split("\n")
    assert f" {scores['missing']} without" in head
    assert all(f" {value:.2f}" in line for value, line in zip(values, lines, strict=True))


@both
def test_score_and_interval(scorer, questions, given, scores):
    """In the form of every benchmark: the headline and its parts, each with a 95% interval around it."""
    numbers = scorer.score(questions, given)
    headline, parts = ("chair_i", toy_captions.RATES) if scorer is toy_captions else ("accuracy", scores["types"])
    assert round(numbers["score"], 2) == scores[headline] and list(numbers["groups"]) == list(parts)
    assert numbers.get("better") == ("lower" if scorer is toy_captions else None)
    for part in (numbers, *numbers["groups"].values()):
        low, high = part["interval"]
        assert 0 <= low <= part["score"] <= high <= 100 and low < high
    if scorer is toy_captions:
        assert {name: round(part["score"], 2) for name, part in numbers["groups"].items()} == {
            name: scores[name] for name in parts}  # fmt: skip
        assert numbers["groups"]["chair_s"] == proportion([True, True, False, False, False])
        assert numbers["interval"] == numbers["groups"]["chair_i"]["interval"]
    else:
        hits = [True, True, True, False, False, False]
        assert numbers["groups"]["count"] == proportion([True, True])
        assert {key: numbers[key] for key in ("score", "interval", "n", "correct")} == proportion(hits)


def test_intervals_of_rates():
    """From resampled captions; Wilson's over the cases where there is no spread; everything without any case."""
    rows = [(1, 4), (0, 1)] * 50
    rate = toy_captions.rate(rows)
    assert rate["score"] == 20 and rate["n"] == 100
    low, high = rate["interval"]
    assert 18 < low < 20 < high < 22  # the captions differ, but their ratio hardly
    assert toy_captions.rate([(0, 3), (0, 7)])["interval"] == wilson(0, 10)
    assert toy_captions.rate([(3, 3), (0, 0)]) == {"score": 100.0, "interval": wilson(1, 3), "n": 2}
    assert toy_captions.rate([(0, 0)])["interval"] == pytest.approx([0, 100])
    assert toy_captions.rate([(1, 2), (0, 0), (0, 0), (0, 0)])["score"] == 50  # many resamples have no case


@both
def test_mismatched_answers(scorer, questions, given, scores):
    qid = given[0]["question_id"]
    for asked, wrong, named in (
        (questions, given + given[:1], repr(qid)),  # two answers to one question
        (questions, given + answers(zz="x"), "'zz'"),  # an answer to no question
        (questions, given + [{"text": "x"}], "question_id"),
        (questions, given[1:] + [{"question_id": qid}], "'text'"),
        (questions, given[1:] + [{"question_id": qid, "text": None}], "'text'"),
        (questions + questions[:1], given, "question id"),
        ([], [], "no questions"),
    ):
        with pytest.raises(InputError) as error:
            scorer.score(asked, wrong)
        assert str(error.value).startswith("toy ") and named in str(error.value)


ENTRY = {key: value for key, value in CAPTIONS[0].items() if key != "vocabulary"}


@pytest.mark.parametrize("scorer, name, content, named", [
    (toy_captions, "captions.json", None, "no such file: "),
    (toy_vqa, "questions.json", [], ""),
    (toy_captions, "captions.json", [ENTRY], "'captions'"),
    (toy_captions, "captions.json", {"vocabulary": VOCABULARY, "captions": []}, ""),
    *[(toy_captions, "captions.json", {"captions": [ENTRY], "vocabulary": value}, "'vocabulary'")
      for value in (None, [], [""], ["Ring"], "red ring")],
    *[(toy_captions, "captions.json", {"vocabulary": VOCABULARY, "captions": [ENTRY, ENTRY | {key: None}]},
       f", entry 1: '{key}'") for key in ENTRY],
    *[(toy_vqa, "questions.json", [QUESTIONS[0], QUESTIONS[1] | {key: 1}], f", entry 1: '{key}'")
      for key in QUESTIONS[0]],
])  # fmt: skip
def test_broken_data_is_named(tmp_path, scorer, name, content, named):
    if content is not None:
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        scorer.load(tmp_path)
    message = str(error.value).removeprefix("no such file: ") if content is None else str(error.value)
    assert message.startswith(str(tmp_path / name)) and named in str(error.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_score_command(tmp_path, monkeypatch, name):
    monkeypatch.delenv("RANK", raising=False)
    scorer, questions, given, scores = BENCHMARKS[name]
    write_data(tmp_path)
    assert scorer.load(tmp_path) == scorer.load(str(tmp_path)) == questions
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in given))
    command = ["evaluate", "score", name, "--answers", path, "--data", tmp_path]
    numbers = json.loads(call(*command, "--json"))
    assert numbers.pop("answers") == {"n": len(given), "empty": 0, "cut": None}
    assert numbers == scorer.score(questions, given) and scores.items() <= numbers.items()
    assert call(*command).startswith(f"{scorer.report(scores)}\nanswers: {len(given)}, 0 empty")
    path.write_text(json.dumps(given[0] | {"question_id": "zz"}))
    with pytest.raises(InputError, match="'zz'") as error:
        call(*command)
    assert str(error.value).startswith(f"{path}: toy ")
