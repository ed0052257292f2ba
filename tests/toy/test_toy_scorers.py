"""The toy benchmarks' scorers: every number on captions and answers written by hand, then through the command."""

import json

import pytest
from commands import call

from stic_min import InputError
from stic_min.scorers.common import match_answers
from stic_min.toy import captions as toy_captions
from stic_min.toy import vqa as toy_vqa

VOCABULARY = ["ring", "red ring", "red circle", "blue square", "green star"]


def caption(qid, objects, signature):
    return {"question_id": qid, "image": f"images/{qid}.png", "text": "Describe.", "objects": objects,
            "signature": signature, "vocabulary": VOCABULARY}


def answers(**texts):
    return [{"question_id": qid, "prompt": "<image>\nDescribe.", "text": text} for qid, text in texts.items()]


# ---- what counts as a mention

@pytest.mark.parametrize("text, found", [
    ("", []), ("A nice day.", []),
    ("a red circle", ["red circle"]), ("red circle", ["red circle"]), ("(red circle)", ["red circle"]),
    ("A RED Circle.", ["red circle"]),
    # every mention, in the order of the text
    ("A green star, a red circle and a green star.", ["green star", "red circle", "green star"]),
    ("red circle red circle", ["red circle", "red circle"]),
    # names that overlap: the longer one, and that only
    ("a red ring", ["red ring"]), ("a ring", ["ring"]), ("a blue ring", ["ring"]),
    ("a ring, a red ring, a ring", ["ring", "red ring", "ring"]),
    # neither plurals nor parts of longer words
    ("two red circles, two rings", []), ("a spring", []), ("ringed", []), ("a bored ring", ["ring"]),
    ("infrared ring", ["ring"]), ("a redcircle", []), ("red_circle", []), ("red, circle", []), ("circle red", []),
])  # fmt: skip
def test_mentions(text, found):
    assert toy_captions.mentions(text, VOCABULARY) == found
    assert toy_captions.mentions(text, VOCABULARY[::-1]) == found


@pytest.mark.parametrize("vocabulary", [["ring", "ring box", "a.b"], ["a.b", "ring box", "ring"]])
def test_mentions_of_names_that_begin_alike(vocabulary):
    assert toy_captions.mentions("a ring box, a ring; a.b, axb", vocabulary) == ["ring box", "ring", "a.b"]


# ---- captions

# id  there                     signature              mentions                           wrong, right, absent said
# a   red circle, blue square   green star, red ring   red circle 2x, blue square         0 of 3, 2 of 2, 0 of 2
# b   red circle, green star    green star, red ring   green star, red ring 2x, ring      3 of 4, 1 of 3, 1 of 1
# c   ring                      red ring, blue square  none                               0 of 0, 0 of 0, 0 of 2
# d   blue square, red ring,    red ring, green star   missing                            0 of 0, 0 of 0, 0 of 0
#     green star
# e   ring                      green star, red ring   red circle                         1 of 1, 0 of 1, 0 of 2
# Of the two signature objects of b, the green star is there: said, but not as an absent one.
CAPTIONS = [
    caption("a", ["blue square", "red circle"], ["green star", "red ring"]),
    caption("b", ["green star", "red circle"], ["green star", "red ring"]),
    caption("c", ["ring"], ["red ring", "blue square"]),
    caption("d", ["blue square", "green star", "red ring"], ["red ring", "green star"]),
    caption("e", ["ring"], ["green star", "red ring"]),
]
SAID = answers(
    e="A red circle.",
    a="A RED CIRCLE, a blue square and the same red circle.",
    b="A green star. A red ring, Red Ring; a ring.",
    c="Nothing here: rings, red circles, a redcircle.",
)
SCORES = {
    "chair_i": 50.0,  # wrong 0 + 3 + 0 + 0 + 1 = 4 of 3 + 4 + 0 + 0 + 1 = 8 mentions
    "chair_s": 40.0,  # b, e of 5 captions, the missing one among them
    "precision": 50.0,  # right 2 + 1 = 3 of 2 + 3 + 1 = 6 objects said, each counted once a caption
    "recall": 33.33,  # 3 of 2 + 2 + 1 + 3 + 1 = 9 objects there, those of the missing caption among them
    "f1": 40.0,  # 2 * 1/2 * 1/3 / (1/2 + 1/3) = 2/5
    "signature": 14.29,  # b's red ring, of a 2, b 1, c 2, d 0, e 2 = 7 that are absent
    "mentioned": 1.6,  # 8 mentions in 5 captions
    "n": 5,
    "missing": 1,
}


def test_caption_score():
    assert toy_captions.score(CAPTIONS, SAID) == SCORES
    assert toy_captions.score(CAPTIONS[::-1], SAID[::-1]) == SCORES
    in_capitals = [record | {"text": record["text"].upper()} for record in SAID]
    assert toy_captions.score(CAPTIONS, in_capitals) == SCORES


@pytest.mark.parametrize("question, text, values", [
    # a repeated wrong mention counts twice in CHAIR_i (2 of 3), once in CHAIR_s and in precision (1 of 2)
    (CAPTIONS[0], "red circle, ring, ring", {"chair_i": 66.67, "chair_s": 100.0, "precision": 50.0, "recall": 50.0,
                                             "f1": 50.0, "signature": 0.0, "mentioned": 3.0}),
    # a repeated right mention: 1 wrong of 3, precision 1 of 2, as above
    (CAPTIONS[0], "red circle, ring, red circle", {"chair_i": 33.33, "precision": 50.0, "recall": 50.0}),
    # both absent signature objects; none of the two that are there: everything said is wrong
    (CAPTIONS[0], "green star, red ring", {"chair_i": 100.0, "precision": 0.0, "recall": 0.0, "f1": 0.0,
                                           "signature": 100.0}),
    # one of the absent signature objects, twice: 1 of 2, not 2 of 2
    (CAPTIONS[0], "green star, green star", {"chair_i": 100.0, "signature": 50.0, "mentioned": 2.0}),
    # a signature object that is there is right, and no absent one
    (CAPTIONS[1], "green star", {"chair_i": 0.0, "chair_s": 0.0, "precision": 100.0, "recall": 50.0, "f1": 66.67,
                                 "signature": 0.0}),
    # both signature objects there: the rate over nothing is 0
    (CAPTIONS[3], "red ring, green star, blue square", {"precision": 100.0, "recall": 100.0, "f1": 100.0,
                                                        "signature": 0.0}),
    # the red ring is not there, the ring is: the one is no mention of the other
    (CAPTIONS[2], "a red ring", {"chair_i": 100.0, "recall": 0.0, "signature": 50.0, "mentioned": 1.0}),
    (CAPTIONS[2], "a ring", {"chair_i": 0.0, "recall": 100.0, "signature": 0.0}),
    # no mention at all
    (CAPTIONS[0], "rings", {"chair_i": 0.0, "chair_s": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0,
                            "signature": 0.0, "mentioned": 0.0, "n": 1, "missing": 0}),
    (CAPTIONS[0], "", {"chair_i": 0.0, "precision": 0.0, "mentioned": 0.0, "missing": 0}),
])  # fmt: skip
def test_one_caption(question, text, values):
    scores = toy_captions.score([question], answers(**{question["question_id"]: text}))
    assert {key: scores[key] for key in values} == values


def test_without_any_caption_every_rate_is_0():
    assert toy_captions.score(CAPTIONS, []) == {**dict.fromkeys(toy_captions.RATES, 0.0), "mentioned": 0.0, "n": 5,
                                                "missing": 5}


def test_caption_report():
    head, *lines = toy_captions.report(SCORES).split("\n")
    assert head.startswith("toy captions: 5 pictures, 1 without a caption, 1.60 objects")
    numbers = {line.rsplit(maxsplit=1)[0]: line.rsplit(maxsplit=1)[1] for line in lines}
    assert list(numbers.values()) == ["50.00", "40.00", "50.00", "33.33", "40.00", "14.29"]
    assert [name.split()[0].rstrip(",") for name in numbers] == [
        "CHAIR_i", "CHAIR_s", "precision", "recall", "F1", "absent"]  # fmt: skip


# ---- questions

@pytest.mark.parametrize("text, answer, right", [
    ("yes", "yes", True), ("Yes", "yes", True), ("YES.", "yes", True), (" yes \n", "yes", True),
    ("yes.\n", "yes", True), ("A", "A", True), ("a", "A", True), ("B.", "B", True), ("Upper Left.", "upper left", True),
    ("no", "yes", False), ("", "yes", False), (".", "yes", False), ("yes..", "yes", False), ("yes!", "yes", False),
    ("yes, it is", "yes", False), ("The answer is yes", "yes", False), ("yes no", "yes", False), ("ye", "yes", False),
    ("A. red ring", "A", False), ("(A)", "A", False), ("2", "two", False), ("upper  left", "upper left", False),
    ("left", "upper left", False), ("red rings", "red ring", False),
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
REPLIES = answers(t="Zero", q="center", p="Center.", s="two")


VQA_SCORES = {
    "accuracy": 50.0,  # p, s, t of 6 questions, not the mean of the types
    "types": {
        "color": {"n": 1, "accuracy": 0.0},
        "count": {"n": 2, "accuracy": 100.0},
        "place": {"n": 3, "accuracy": 33.33},
    },
    "n": 6,
    "missing": 2,
}


def test_vqa_score():
    scores = toy_vqa.score(QUESTIONS, REPLIES)
    assert scores == toy_vqa.score(QUESTIONS[::-1], REPLIES[::-1]) == VQA_SCORES
    assert list(scores["types"]) == ["color", "count", "place"]
    nothing = toy_vqa.score(QUESTIONS, [])
    assert (nothing["accuracy"], nothing["missing"]) == (0.0, 6)
    assert {own["accuracy"] for own in nothing["types"].values()} == {0.0}


def test_vqa_report():
    lines = toy_vqa.report(VQA_SCORES).split("\n")
    assert lines[0].startswith("toy questions: 6, 2 without an answer")
    assert [line.split() for line in lines[1:]] == [
        ["all", "50.00", "n=6"], ["color", "0.00", "n=1"], ["count", "100.00", "n=2"], ["place", "33.33", "n=3"],
    ]  # fmt: skip


# ---- answers to questions

def test_match_answers():
    records = match_answers("toy", [{"question_id": "7"}, {"question_id": "b"}], [{"question_id": 7, "text": ""}])
    assert records == {"7": {"question_id": 7, "text": ""}}  # an id written as a number; b has no answer
    assert match_answers("toy", QUESTIONS, REPLIES) == {record["question_id"]: record for record in REPLIES}


@pytest.mark.parametrize("score, name, questions, right", [
    (lambda questions, answers: match_answers("toy", questions, answers), "toy", QUESTIONS, REPLIES),
    (toy_captions.score, "toy captions", CAPTIONS, SAID),
    (toy_vqa.score, "toy questions", QUESTIONS, REPLIES),
], ids=["match_answers", "captions", "vqa"])  # fmt: skip
def test_answers_that_do_not_match(score, name, questions, right):
    own = right[0]["question_id"]
    assert score(questions, right)  # what follows differs in one thing each
    for asked, given, complaint in (
        (questions, right + right[:1], f"{name} answers: {own!r} is repeated"),
        (questions, right + answers(zz="x"), f"{name} answers: 'zz' is not a question id"),
        (questions, right + [{"text": "x"}], f"{name} answers: record {len(right) + 1} has no question_id"),
        (questions, right[1:] + [{"question_id": own}], f"{name} answers: {own!r} has no 'text'"),
        (questions, right[1:] + [{"question_id": own, "text": None}], f"{name} answers: {own!r} has no 'text'"),
        (questions, right[1:] + [{"question_id": own, "text": ["x"]}], f"{name} answers: {own!r} has no 'text'"),
        (questions + questions[:1], right, f"{name}: a question id is repeated"),
        ([], [], f"{name}: no questions"),
    ):
        with pytest.raises(InputError) as error:
            score(asked, given)
        assert str(error.value) == complaint


# ---- files

def write_captions(folder):
    captions = [{key: value for key, value in q.items() if key != "vocabulary"} for q in CAPTIONS]
    (folder / "captions.json").write_text(json.dumps({"vocabulary": VOCABULARY, "captions": captions}))


def write_questions(folder):
    (folder / "questions.json").write_text(json.dumps([q | {"note": "left out"} for q in QUESTIONS]))


def test_load(tmp_path):
    write_captions(tmp_path)
    write_questions(tmp_path)
    assert toy_captions.load(tmp_path) == toy_captions.load(str(tmp_path)) == CAPTIONS
    assert toy_vqa.load(tmp_path) == toy_vqa.load(str(tmp_path)) == QUESTIONS


ONE = {key: value for key, value in CAPTIONS[0].items() if key != "vocabulary"}
lacking = lambda record, key: {k: v for k, v in record.items() if k != key}


NO_LIST, MISSING = ": not a non-empty list", "is missing or not a"


@pytest.mark.parametrize("scorer, name, content, complaint", [
    *[(scorer, name, content, complaint)
      for scorer, name in ((toy_captions, "captions.json"), (toy_vqa, "questions.json"))
      for content, complaint in (
          (None, "no such file: "), (b"", ": not JSON"), (b'[{"question_id": ', ": not JSON"),
          (b"\xff", ": not JSON"), (b"[" * 200_000, ": not JSON"))],
    *[(toy_captions, "captions.json", content, ": has no 'captions'") for content in ([], 3, "text", [ONE], {})],
    *[(toy_captions, "captions.json", {"vocabulary": VOCABULARY, "captions": value}, NO_LIST)
      for value in (None, [], {"a": ONE}, "text")],
    *[(toy_captions, "captions.json", {"vocabulary": VOCABULARY, "captions": [ONE, lacking(ONE, key)]},
       f", entry 1: '{key}' {MISSING}") for key in ONE],
    *[(toy_captions, "captions.json", {"vocabulary": VOCABULARY, "captions": [ONE | {key: None}]},
       f", entry 0: '{key}' {MISSING}") for key in ONE],
    *[(toy_captions, "captions.json", {"captions": [ONE]} | own, ": 'vocabulary' is not a list of names")
      for own in ({}, {"vocabulary": None}, {"vocabulary": []}, {"vocabulary": [""]}, {"vocabulary": "red ring"})],
    *[(toy_vqa, "questions.json", content, NO_LIST) for content in ({}, [], {"a": QUESTIONS[0]}, 3, "text")],
    *[(toy_vqa, "questions.json", [entry], f", entry 0: 'question_id' {MISSING} str") for entry in (None, {}, [], 1)],
    *[(toy_vqa, "questions.json", [QUESTIONS[0], lacking(QUESTIONS[1], key)], f", entry 1: '{key}' {MISSING} str")
      for key in QUESTIONS[0]],
    *[(toy_vqa, "questions.json", [QUESTIONS[0] | {key: 1}], f", entry 0: '{key}' {MISSING} str")
      for key in QUESTIONS[0]],
])  # fmt: skip
def test_load_names_a_missing_or_broken_file(tmp_path, scorer, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError) as error:
        scorer.load(tmp_path)
    path = tmp_path / name
    expected = f"{complaint}{path}" if content is None else f"{path}{complaint}"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


# ---- the command

@pytest.mark.parametrize("name, write, said, scores", [
    ("toycaptions", write_captions, SAID, SCORES),
    ("toyvqa", write_questions, REPLIES, VQA_SCORES),
])  # fmt: skip
def test_score_command(tmp_path, monkeypatch, name, write, said, scores):
    monkeypatch.delenv("RANK", raising=False)
    write(tmp_path)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in said))
    command = ["evaluate", "score", name, "--answers", path, "--data", tmp_path]
    numbers = json.loads(call(*command, "--json"))
    empty = sum(record["text"] == "" for record in said)
    assert numbers.pop("answers") == {"n": len(said), "empty": empty, "cut": None} and numbers == scores
    scorer = {"toycaptions": toy_captions, "toyvqa": toy_vqa}[name]
    assert call(*command) == f"{scorer.report(scores)}\nanswers: {len(said)}, {empty} empty\n"

    path.write_text(json.dumps(said[0] | {"question_id": "zz"}))
    with pytest.raises(InputError, match="'zz' is not a question id$") as error:
        call(*command)
    assert str(error.value).startswith(f"{path}: toy ")
    with pytest.raises(InputError) as error:
        call(*command[:-1], tmp_path / "elsewhere")
    assert str(error.value).startswith(f"no such file: {tmp_path / 'elsewhere'}/")
