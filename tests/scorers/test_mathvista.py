"""MathVista: every rule on cases written by hand, then the official values for published predictions."""

import json

import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import mathvista
from stic_min.scorers.judge import Reply
from stic_min.text import TEMPLATES, with_description, with_image

INTEGER = {"question_type": "free_form", "answer_type": "integer"}
FLOAT = {"question_type": "free_form", "answer_type": "float"}
LIST = {"question_type": "free_form", "answer_type": "list"}
CITIES = {"question_type": "multi_choice", "answer_type": "text", "choices": ["hong kong", "osaka", "14", "B"]}
METADATA = {"source": "IconQA", "category": "general-vqa", "task": "math word problem", "context": "table",
            "grade": "college", "language": "english", "skills": ["logical reasoning"]}  # fmt: skip


# ---- extraction


@pytest.mark.parametrize("question, response, extraction", [
    (CITIES, "", ""), (INTEGER, "", ""), (LIST, "", ""),  # an empty response is an extraction
    (CITIES, "osaka", "osaka"), (CITIES, "14", "14"), (CITIES, "B", "B"),  # a choice as it is, here one called B
    (CITIES, "A", None), (CITIES, "(A)", None), (CITIES, "Osaka", None), (CITIES, "osaka.", None),
    (INTEGER, "14", "14"), (INTEGER, " -3\n", "-3"), (INTEGER, "007", "7"), (INTEGER, "1_000", "1000"),
    (INTEGER, "１２", "12"), (INTEGER, "14.0", None), (INTEGER, "14 m", None), (INTEGER, " ", None),
    (FLOAT, "14", "14.0"), (FLOAT, ".5", "0.5"), (FLOAT, "1e3", "1000.0"), (FLOAT, "nan", "nan"),
    (FLOAT, "1,000", None), (FLOAT, "$1.45", None),
    (LIST, "[1, 2]", None), (LIST, "14", None),
])  # fmt: skip
def test_extract(question, response, extraction):
    assert mathvista.extract(question, response) == extraction


@pytest.mark.parametrize("response, extraction", [
    ('So: The answer is "14". Right?', "14"),
    ('The answer is "a". No, "b".', 'a". No, "b'),  # to the last quote
    ('The answer is "14"', None), ('the answer is "14".', None), ("The answer is 14.", None),
    ('The answer is "1\n4".', None),
])  # fmt: skip
def test_extract_quick(response, extraction):
    assert mathvista.extract(INTEGER, response, quick=True) == extraction
    assert mathvista.extract(CITIES, response, quick=True) == extraction
    assert mathvista.extract(INTEGER, response) is None


# ---- normalisation


@pytest.mark.parametrize("a, b, steps", [
    ("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2),
    ("tokyo", "tok", 2), ("flaw", "lawn", 2),
])  # fmt: skip
def test_distance(a, b, steps):
    assert mathvista.distance(a, b) == mathvista.distance(b, a) == steps


@pytest.mark.parametrize("extraction, choices, prediction", [
    ("B", ["x", "yy", "zzz"], "yy"), (" B\n", ["x", "yy", "zzz"], "yy"),  # a letter
    ("(c) or (a)", ["x", "yy", "zzz"], "zzz"), ("so (b)", ["x", "yy", "zzz"], "yy"),  # the first in brackets, any case
    ("b", ["aaa", "bbb"], "bbb"), ("B.", ["A.", "c", "d"], "A."),  # no letter by itself: the nearest text
    ("(Z)", ["yes", "no"], "no"), ("(1)", ["(2)", "1"], "(2)"),  # Z is no choice's letter; the brackets are gone
    ("140 degrees", ["135", "140"], "140"),
    ("", ["long", "ab", "cd"], "ab"),  # the shortest, the first of them: never unanswered
    ("xx", ["xy", "yx"], "xy"),  # the first of the nearest
    (["A"], ["14", "['B']"], "['B']"), (2, ["1", "2"], "2"),  # any JSON value, as text
])  # fmt: skip
@pytest.mark.parametrize("rule", mathvista.RULES)
def test_normalize_choices(extraction, choices, prediction, rule):
    assert mathvista.normalize({**CITIES, "choices": choices}, extraction, rule) == prediction


@pytest.mark.parametrize("extraction, lenient, strict", [
    ("14", "14", "14"), (" 14 ", "14", "14"), ("-0", "0", "0"), (14, "14", "14"),
    ("14.0", "14", None), ("14.9", "14", None), ("-0.5", "0", None), ("1e3", "1000", None),
    ("9007199254740993", "9007199254740992", "9007199254740993"),  # through a float
    ("", None, None), ("14%", None, None), ("1,400", None, None), ("nan", None, None), ("inf", None, None),
    ([14], None, None), (None, None, None),
])  # fmt: skip
def test_normalize_integers(extraction, lenient, strict):
    assert mathvista.normalize(INTEGER, extraction) == lenient
    assert mathvista.normalize(INTEGER, extraction, "lenient_int") == lenient
    assert mathvista.normalize(INTEGER, extraction, "strict_int") == strict


@pytest.mark.parametrize("extraction, precision, prediction", [
    ("1.25", 1, "1.2"), ("1.25", 1.0, "1.2"), ("1.35", 1, "1.4"), ("2.675", 2, "2.67"),  # to even; binary 2.67499...
    ("1", 2, "1.0"), ("-0.04", 1, "-0.0"), ("inf", 1, "inf"), ("nan", 2, "nan"), (1.25, 1, "1.2"),
    ("1.2 m", 1, None), ("", 1, None), ({}, 1, None), (None, 1, None),
])  # fmt: skip
@pytest.mark.parametrize("rule", mathvista.RULES)
def test_normalize_floats(extraction, precision, prediction, rule):
    assert mathvista.normalize({**FLOAT, "precision": precision}, extraction, rule) == prediction


@pytest.mark.parametrize("extraction, prediction", [
    ("[1, 2]", "[1, 2]"), (" [1,2]", " [1,2]"), ([1, 2], "[1, 2]"), ("", ""), (None, None)])  # fmt: skip
def test_normalize_lists(extraction, prediction):
    assert mathvista.normalize(LIST, extraction) == prediction


# ---- loading


def problem(**fields):
    return {"question": "How many?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": None,
            "answer": "4", **INTEGER, "pid": "1", "metadata": METADATA, **fields}  # fmt: skip


def write(folder, content, name="testmini.json"):
    (folder / name).write_text(json.dumps(content))
    return folder


HINT_CHOICE = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
HINT_INTEGER = ("Hint: Please answer the question requiring an integer answer and provide the final value, "
                "e.g., 1, 2, 3, at the end.")  # fmt: skip


@pytest.mark.parametrize("fields, text", [
    ({}, f"{HINT_INTEGER}\nQuestion: How many?"),
    ({"unit": "g"}, f"{HINT_INTEGER}\nQuestion: How many? (Unit: g)"),
    ({"unit": "", "query": ""}, f"{HINT_INTEGER}\nQuestion: How many?"),
    ({**CITIES, "choices": ["x", "y"], "unit": "m"},
     f"{HINT_CHOICE}\nQuestion: How many? (Unit: m)\nChoices:\n(A) x\n(B) y"),
    ({"question": " How? \n"}, f"{HINT_INTEGER}\nQuestion:  How?"),
    ({**FLOAT, "precision": 1},
     "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final "
     "value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How many?"),
    ({**FLOAT, "precision": 2.0},
     "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the "
     "final value, e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How many?"),
    (LIST,
     "Hint: Please answer the question requiring a Python list as an answer and provide the final list, "
     "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: How many?"),
    ({"query": " Hint: own\nQuestion: own \n"}, "Hint: own\nQuestion: own"),  # the file's own comes first
])  # fmt: skip
def test_query(tmp_path, fields, text):
    [q] = mathvista.load(write(tmp_path, {"1": problem(**fields)}))
    assert q["text"] == q["prompt"] == text


def test_load(tmp_path):
    fields = ("question", "image", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata")
    expected = [{"question_id": pid, **{f: problem()[f] for f in fields}, "text": "q", "prompt": "q"} for pid in "73"]
    listed = [problem(pid="7", query="q"), problem(pid=3, query="q", decoded_image=0)]
    assert mathvista.load(write(tmp_path, listed, "annot_testmini.json")) == expected
    # {pid: problem}; the repository has a file of the other name too, without problems
    write(tmp_path, {"7": {"solution": None}}, "annot_testmini.json")
    assert mathvista.load(write(tmp_path, {"7": problem(query="q"), "3": problem(query="q")})) == expected


def test_load_for_scoring_alone(tmp_path):
    bare = {k: v for k, v in problem().items() if k not in ("question", "image")}
    [q] = mathvista.load(write(tmp_path, {"1": bare}))
    assert (q["question_id"], q["image"], q["text"]) == ("1", None, "")
    assert mathvista.score([q], [{"question_id": "1", "text": "4"}])["score"] == 100


@pytest.mark.parametrize("content, named", [
    ("[", "not JSON"), ("3", "not a JSON"), ("{}", "no problems"), ("[]", "no problems"),
    ("[3]", "entry 0: not a JSON object"), ('{"1": []}', "entry 0: not a JSON object"),
    ('[{"question_type": "free_form"}]', "not a JSON object with a 'pid'"),
    (json.dumps([problem(), problem()]), "pid '1' is repeated"),
    (json.dumps([problem(pid=1), problem()]), "pid '1' is repeated"),
    ('{"1": {"solution": null}}', "problem '1': 'question_type'"),
    *((json.dumps({"9": problem(**{field: value})}), f"problem '9': {field!r}") for field, value in [
        ("question_type", "open"), ("question_type", ["multi_choice"]), ("answer_type", "text"), ("answer_type", {}),
        ("answer", 4), ("answer", None), ("question", 4), ("image", ["1.jpg"]), ("unit", 3), ("query", True),
        ("metadata", None), ("metadata", {**METADATA, "task": None}), ("metadata", {**METADATA, "skills": "x"}),
        ("metadata", {**METADATA, "skills": [1]}), ("metadata", {k: METADATA[k] for k in list(METADATA)[1:]})]),
    *((json.dumps([problem(**{**CITIES, "choices": value})]), "'choices'") for value in (None, [], "AB", [1, 2])),
    *((json.dumps([problem(**{**FLOAT, "precision": value})]), "'precision'") for value in (None, 3, "1", [1])),
    (json.dumps([problem(question=None)]), "neither 'question' nor 'query'"),
    (json.dumps([problem(question="", query=" ")]), "neither 'question' nor 'query'"),
    (json.dumps([problem(question="\ud800")]), "not valid Unicode"),
])  # fmt: skip
def test_load_rejects(tmp_path, content, named):
    (tmp_path / "testmini.json").write_text(content)
    with pytest.raises(InputError) as error:
        mathvista.load(tmp_path)
    assert named in str(error.value) and "testmini.json" in str(error.value) and "\n" not in str(error.value)


# ---- scores


def question(pid, kind=INTEGER, answer="4", text="q", **tags):
    return {"question_id": pid, "image": None, "text": text, "answer": answer, "choices": None, "precision": 1, **kind,
            "metadata": {**METADATA, **tags}}  # fmt: skip


QUESTIONS = [
    question("1", task="a", skills=["s", "t", "s"]),  # a skill given twice counts once
    question("2", task="b", skills=["t"], context="pie chart"),
    question("3", CITIES, "osaka", task="b"),
    question("4", CITIES, "B", task="b"),
    question("5", task="c"),
    question("6", FLOAT, "0.5", task="c"),
]
ANSWERS = [
    {"question_id": "6", "text": "0.46"},  # right, rounded
    {"question_id": "1", "text": "4"},  # right
    {"question_id": "2", "text": "It is 4"},  # not extracted
    {"question_id": "3", "text": "B"},  # B is the text of a choice, but then read as the letter of osaka
    {"question_id": "4", "text": ""},  # the choice nearest to "", which is the right one
]


def counts(scores):
    return {name: (own["correct"], own["n"]) for name, own in scores["groups"].items()}


def test_score_by_rules_alone():
    scores = mathvista.score(QUESTIONS, ANSWERS)
    assert (scores["correct"], scores["n"], scores["missing"], scores["unextracted"]) == (4, 6, 1, 1)
    assert scores["score"] == pytest.approx(100 * 4 / 6) and scores["rule"] == "lenient_int"
    low, high = scores["interval"]  # Wilson: (4 + z^2/2 -+ z sqrt(4 * 2 / 6 + z^2/4)) / (6 + z^2), z^2 = 3.8415
    assert (low, high) == (pytest.approx(30.00, abs=0.01), pytest.approx(90.32, abs=0.01))
    assert counts(scores) == {
        "question_type|free_form": (2, 4), "question_type|multi_choice": (2, 2),
        "answer_type|float": (1, 1), "answer_type|integer": (1, 3), "answer_type|text": (2, 2),
        "language|english": (4, 6), "source|IconQA": (4, 6), "category|general-vqa": (4, 6),
        "task|a": (1, 1), "task|b": (2, 3), "task|c": (1, 2),
        "context|pie chart": (0, 1), "context|table": (4, 5), "grade|college": (4, 6),
        "skills|logical reasoning": (3, 4), "skills|s": (1, 1), "skills|t": (1, 2)}  # fmt: skip
    assert list(scores["groups"])[:2] == ["question_type|free_form", "question_type|multi_choice"]


def test_score_with_extractions():
    judged = {"1": "4.2", "2": 4, "3": "(A)", "4": "(D)", "5": "4", "6": None}
    scores = mathvista.score(QUESTIONS, ANSWERS, judged)
    # 5 has no answer, whatever was extracted; 6 has no extraction
    assert (scores["correct"], scores["missing"], scores["unextracted"]) == (3, 1, 1)
    assert mathvista.score(QUESTIONS, ANSWERS, judged, rule="strict_int")["correct"] == 2  # without 1
    alone = mathvista.score(QUESTIONS, None, judged)
    assert (alone["correct"], alone["missing"], alone["unextracted"]) == (4, 0, 1)


def test_score_of_no_answers():
    scores = mathvista.score(QUESTIONS, [])
    assert (scores["score"], scores["missing"], scores["unextracted"]) == (0, 6, 0)


JUDGED = dict.fromkeys("123456", "")


@pytest.mark.parametrize("questions, answers, judged, named", [
    (QUESTIONS, ANSWERS, {"1": ""}, "'2' is without an extraction (5 such"),
    (QUESTIONS, None, {**JUDGED, "7": ""}, "'7' is not a problem's pid (1 such"),
    (QUESTIONS, None, {}, "'1' is without an extraction"),
])
def test_score_rejects(questions, answers, judged, named):
    with pytest.raises(InputError) as error:
        mathvista.score(questions, answers, judged)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_report():
    lines = mathvista.report(mathvista.score(QUESTIONS, ANSWERS)).split("\n")
    assert lines[0].startswith("MathVista testmini: 6 problems, 1 without an answer") and "lenient_int" in lines[0]
    assert lines[1].startswith("A lower bound: 1 answers")
    assert lines[2].split() == ["all", "66.7", "[30.0,", "90.3]", "n=6"]
    assert [line for line in lines if not line.startswith(" ")][3:] == [
        "question type", "answer type", "task", "context", "skills"]  # fmt: skip
    assert ["pie", "chart", "0.0", "[0.0,", "79.3]", "n=1"] in [line.split() for line in lines]
    assert not any("IconQA" in line or "college" in line for line in lines)

    full = mathvista.report(mathvista.score(QUESTIONS, None, JUDGED, rule="strict_int"))
    assert "lower bound" not in full and "strict_int" in full


# ---- answers and extractions as they are exchanged


def test_read_answers(tmp_path):
    path = tmp_path / "answers"
    path.write_text(json.dumps({"7": {"query": "q", "response": "4", "answer": "4"}, "3": {"response": ""}}, indent=4))
    assert mathvista.read_answers(path) == [
        {"question_id": "7", "prompt": "q", "text": "4"}, {"question_id": "3", "prompt": "", "text": ""}]  # fmt: skip
    records = [{"question_id": "7", "prompt": "q", "text": "4"}, {"question_id": "3", "prompt": "q", "text": "5"}]
    for some in (records, records[:1]):  # a single line is a JSON object, too
        path.write_text("\n".join(map(json.dumps, some)))
        assert mathvista.read_answers(path) == some


@pytest.mark.parametrize("content, named", [
    ('{"7": {"query": "q"}}', "problem '7': no 'response'"), ('{"7": {"response": 4}}', "problem '7': no 'response'"),
    ('{"7": ', "line 1: not JSON"), ("3", "line 1: not a JSON object"), ("", "empty"), (None, "can't read"),
])  # fmt: skip
def test_read_answers_rejects(tmp_path, content, named):
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        mathvista.read_answers(path)
    assert named in str(error.value) and "answers.json" in str(error.value) and "\n" not in str(error.value)


def test_official(tmp_path):
    questions = mathvista.load(write(tmp_path, {"1": problem(unit="g"), "2": problem(pid="2")}))
    ending, text = mathvista.official(questions, [{"question_id": "1", "prompt": "", "text": "Four."}])
    query = f"{HINT_INTEGER}\nQuestion: How many? (Unit: g)"
    assert ending == ".json"
    assert json.loads(text) == {"1": {**problem(unit="g"), "query": query, "response": "Four."}}
    (tmp_path / "results.json").write_text(text)
    assert mathvista.read_answers(tmp_path / "results.json") == [{"question_id": "1", "prompt": query, "text": "Four."}]
    with pytest.raises(InputError, match="'9' is not a question id"):
        mathvista.official(questions, [{"question_id": "9", "text": ""}])


def test_read_judged(tmp_path):
    judged = {"7": "4", "3": "", "5": None, "6": [1, 2]}
    path = tmp_path / "extractions"
    path.write_text(json.dumps({pid: {"response": "r", "extraction": e} for pid, e in judged.items()}))
    assert mathvista.read_judged([path]) == judged
    path.write_text("\n".join(json.dumps({"pid": int(pid), "extraction": e}) for pid, e in judged.items()))
    assert mathvista.read_judged([path]) == judged
    [(ending, text)] = mathvista.judged_files(judged).items()
    path.write_text(text)
    assert ending == ".extractions.json" and mathvista.read_judged([path]) == judged


@pytest.mark.parametrize("content, named", [
    ('{"7": {"response": "4"}}', "problem '7': no 'extraction'"),
    ('{"pid": "7"}\n', "line 1: no 'extraction'"),
    ('{"extraction": "4"}\n', "line 1: its 'pid' is missing"),
    ('{"pid": [7], "extraction": "4"}\n', "line 1: its 'pid' is repeated or not a pid"),
    ('{"pid": "7", "extraction": "4"}\n{"pid": 7, "extraction": "4"}', "line 2: its 'pid' is repeated"),
    ("{}", "line 1: its 'pid' is missing"), ("[]", "empty"), (None, "can't read"),
])  # fmt: skip
def test_read_judged_rejects(tmp_path, content, named):
    path = tmp_path / "judged.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        mathvista.read_judged([path])
    assert named in str(error.value) and "judged.jsonl" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="2 files of extractions; expected one"):
        mathvista.read_judged([path, path])


# ---- the judge

class FakeJudge:
    """Replies in their order; keeps what it is asked."""

    def __init__(self, texts, replies, cut=False):
        self.texts, self.replies, self.asked, self.cut = texts, list(replies), [], cut

    def ask(self, where, messages, *, temperature, max_tokens):
        self.asked.append((where, messages, temperature, max_tokens))
        return Reply(self.replies.pop(0), "gpt-4-0613", self.cut)

    def map(self, function, items):
        return [function(item) for item in items]


def test_judge_is_asked_what_the_rules_leave_open():
    questions = [question("1"), question("2", text="Q2"), question("3"), question("4", CITIES, text="Q4")]
    answers = [{"question_id": "1", "text": "14"}, {"question_id": "2", "text": "Fourteen."},
               {"question_id": "4", "text": "It is A."}]  # fmt: skip
    fake = FakeJudge({"few_shot": "\nSHOTS\n", "suffix": "\n\nSUFFIX "}, [" 14\n", "", "  ", "A"])
    assert mathvista.judge(questions, answers, fake) == {"1": "14", "2": "14", "3": None, "4": "A"}
    first, *others = fake.asked
    content = "SHOTS\n\nQ2\n\nFourteen.\n\nSUFFIX "
    assert first == ("problem 2, attempt 1", [{"role": "user", "content": content}], 0, 256)
    assert [where for where, *_ in others] == [f"problem 4, attempt {n}" for n in (1, 2, 3)]
    assert {messages[0]["content"] for _, messages, _, _ in others} == {"SHOTS\n\nQ4\n\nIt is A.\n\nSUFFIX "}


def test_a_silent_judge_is_asked_five_times():
    fake = FakeJudge(mathvista.OWN_PROMPTS, [""] * 5)
    assert mathvista.judge([question("1")], [{"question_id": "1", "text": "so"}], fake) == {"1": ""}
    assert len(fake.asked) == 5


def test_a_judge_that_is_cut_off_has_not_extracted_anything():
    fake = FakeJudge(mathvista.OWN_PROMPTS, ["Let me think about the"] * 5, cut=True)
    assert mathvista.judge([question("1")], [{"question_id": "1", "text": "so"}], fake) == {"1": ""}


def test_extractions_that_the_judge_did_not_give_are_counted():
    """A choice is official all the same, the nearest to "": no silent one. An empty answer is not the judge's fault."""
    questions = [question("1"), question("2", CITIES), question("3", CITIES), question("4")]
    answers = [{"question_id": qid, "text": text} for qid, text in (("1", "so"), ("2", "so"), ("3", ""))]
    judged = {"1": "", "2": "", "3": "", "4": None}
    scores = mathvista.score(questions, answers, judged)
    assert (scores["unread"], scores["unread_share"], scores["missing"]) == (2, 0.5, 1)
    assert mathvista.score(questions, None, judged)["unread"] == 0  # whether there were answers is not known then
    assert "unread" not in mathvista.score(questions, answers)


def test_judge_rejects():
    fake = FakeJudge(mathvista.OWN_PROMPTS, [])
    with pytest.raises(InputError, match="problem '1' has no question"):
        mathvista.judge([question("1", text="")], [{"question_id": "1", "text": "so"}], fake)
    with pytest.raises(InputError, match="'2' is not a question id"):
        mathvista.judge([question("1")], [{"question_id": "2", "text": "so"}], fake)


def test_own_prompts_show_every_type():
    shots = mathvista.OWN_PROMPTS["few_shot"]
    assert [shots.count(hint) for hint in mathvista.HINTS.values()] == [1] * 5
    assert shots.count("\n\nExtracted answer: ") == 5 and shots == shots.strip()
    assert mathvista.OWN_PROMPTS["suffix"] == "\n\nExtracted answer: "


def test_from_data_to_scores(tmp_path):
    """Load, answers in the official form, the judge, its file, scores."""
    choice = {**CITIES, "choices": ["hong kong", "osaka"], "answer": "osaka", "pid": "2"}
    questions = mathvista.load(write(tmp_path, {"1": problem(), "2": problem(**choice)}))
    answers = [{"question_id": "1", "text": "4"}, {"question_id": "2", "text": "The second."}]
    (tmp_path / "results.json").write_text(mathvista.official(questions, answers)[1])
    answers = mathvista.read_answers(tmp_path / "results.json")
    assert mathvista.score(questions, answers)["score"] == 50

    judged = mathvista.judge(questions, answers, FakeJudge(mathvista.OWN_PROMPTS, ["B"]))
    (tmp_path / "judged.json").write_text(mathvista.judged_files(judged)[".extractions.json"])
    scores = mathvista.score(questions, answers, mathvista.read_judged([tmp_path / "judged.json"]))
    assert (scores["score"], scores["unextracted"]) == (100, 0)


# ---- values of the official scorers (skipped where the shared data is not at hand)


def test_official_extraction_rules():
    rows = shared("mathvista_extract_rules.jsonl")
    assert len(rows) == 43
    for r in rows:
        assert mathvista.extract(r, r["response"], r["quick_extract"]) == r["extraction"], r


def test_official_normalisation():
    name = "mathvista_normalize.jsonl"
    rows, expected = shared(name), shared("expected_aggregates.json")[name]
    correct = {rule: 0 for rule in mathvista.RULES}
    for r in rows:
        for rule, ending in zip(mathvista.RULES, ("", "_strict_int")):
            prediction = mathvista.normalize(r, r["extraction"], rule)
            right = prediction == r["answer"]
            assert (prediction, right) == (r[f"prediction{ending}"], r[f"correct{ending}"]), (r, rule)
            correct[rule] += right
    assert len(rows) == expected["n"] == 112
    assert list(correct.values()) == [expected["correct"], expected["correct_strict_int"]]


@pytest.fixture(scope="module")
def testmini(tmp_path_factory):
    """The 1000 problems by `load`, from a data folder that has what scoring needs."""
    tags = ("task", "category", "context", "grade", "language", "source", "skills")
    rows = shared("mathvista_testmini_key.jsonl")
    problems = {r["pid"]: {k: v for k, v in r.items() if k not in tags} | {"metadata": {t: r[t] for t in tags}}
                for r in rows}  # fmt: skip
    questions = mathvista.load(write(tmp_path_factory.mktemp("mathvista"), problems, "annot_testmini.json"))
    assert len(questions) == 1000
    return questions


@pytest.mark.parametrize("name", ["bard", "gpt4_2shot_code", "llava_llama_2_13b", "llavar", "random_guess"])
def test_published_predictions(testmini, name, tmp_path):
    name = f"mathvista_pred_{name}.jsonl"
    rows, expected = {r["pid"]: r for r in shared(name)}, shared("expected_aggregates.json")[name]
    assert len(rows) == 1000
    for q in testmini:
        r = rows[q["question_id"]]
        prediction = mathvista.normalize(q, r["extraction"])
        assert (prediction, prediction == q["answer"]) == (r["prediction"], r["true_false"]), r
        strict = mathvista.normalize(q, r["extraction"], "strict_int") == q["answer"]
        assert strict == r.get("true_false_strict_int", r["true_false"]), r

    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows.values())))
    judged = mathvista.read_judged([path])
    published = {}
    for rule, key in zip(mathvista.RULES, ("int_of_float", "strict_int")):
        scores = mathvista.score(testmini, None, judged, rule)
        groups = {name: list(count) for name, count in counts(scores).items()}
        sources = [groups.pop(name) for name in list(groups) if name.startswith("source|")]  # not in the expected ones
        assert groups == expected[f"breakdown_{key}"] and len(groups) == 43
        assert [sum(column) for column in zip(*sources)] == [scores["correct"], 1000] and len(sources) == 31
        assert scores["correct"] == expected[f"correct_{key}"] and (scores["missing"], scores["unextracted"]) == (0, 0)
        assert scores["score"] == pytest.approx(scores["correct"] / 10, abs=1e-9)
        published[rule] = round(scores["score"], 1)
    assert expected["published_accuracy"] in published.values()


def test_official_prompts(tmp_path):
    rows = [r for r in shared("prompts.jsonl") if r["benchmark"] == "mathvista"]
    assert len(rows) == 4
    for r in rows:
        item = problem(**CITIES, question="Which is larger?")
        built = {**item, "choices": ["x", "y"]}  # without a query: the same text is put together
        for content in ({**item, **r["item"]}, built):
            [q] = mathvista.load(write(tmp_path, {"1": content}))
            assert q["prompt"] == r["recorded_prompt"]
            text = with_description(r["description"], q["text"]) if r["mode"] == "dar" else q["text"]
            assert with_image(text) == r["user_message"]
            assert TEMPLATES[r["conv"]].prompt(with_image(text)) == r["full_prompt"]


def test_official_judge_texts():
    texts = shared("judge_prompts.json")[mathvista.PROMPTS]
    assert set(texts) - {"source"} == set(mathvista.OWN_PROMPTS)
    fake = FakeJudge(texts, ["14"])
    mathvista.judge([question("1", text="QUERY")], [{"question_id": "1", "text": "RESPONSE"}], fake)
    [(_, [message], _, _)] = fake.asked
    assert message["content"] == f"{texts['few_shot'].strip()}\n\nQUERY\n\nRESPONSE\n\nExtracted answer: "
