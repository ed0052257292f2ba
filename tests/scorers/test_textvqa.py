"""TextVQA: every rule on cases written by hand, then loading and bad input, then the values of the official scorers."""

import json

import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import textvqa
from stic_min.text import TEMPLATES, with_description, with_image

SENTENCE = "Answer the question using a single word or phrase."

# ---- the question in a prompt


def prompt(question, tokens="ACME, co"):
    return f"{question}\nReference OCR token: {tokens}\n{SENTENCE}"


@pytest.mark.parametrize("text, question", [
    # LLaVA's form: three lines, the question first; in lower case, and not stripped
    (prompt("What is it?"), "what is it?"), (prompt(" What is it? "), " what is it? "),
    (prompt("What is it?", ""), "what is it?"),  # 115 pictures have no tokens, the blank after the colon stays
    # the tokens may come first
    (f"Reference OCR token: x\nWhat is it?\n{SENTENCE}", "what is it?"),
    # two lines: without tokens
    (f"What is it?\n{SENTENCE}", "what is it?"), ("Reference OCR token: x\nb", "reference ocr token: x"),
    # LLaVA-1.0's form: the first "Question:" to the next "Short answer:", over lines
    ("OCR tokens: a, b. Question: What is it? Short answer:", "what is it?"),
    ("OCR tokens: a\nQuestion: What\nis it? Short answer: b Short answer:", "what\nis it?"),
])  # fmt: skip
def test_question_in(text, question):
    assert textvqa.question_in(text, "here") == question


@pytest.mark.parametrize("text", [
    "", "What is it?",  # one line
    f"What is it?\nReference OCR tokens: x\n{SENTENCE}",  # three lines without the exact words
    "Image description:\nfoo\n\n" + prompt("What is it?"), "<image>\n" + prompt("What is it?"),  # more than three
    "OCR tokens: a\nb", "OCR tokens: a Question: What is it?",  # the start decides, also where the rest is missing
])  # fmt: skip
def test_question_in_no_known_form(text):
    with pytest.raises(InputError) as error:
        textvqa.question_in(text, "here")
    assert str(error.value).startswith("here: the prompt '") and "\n" not in str(error.value)


# ---- normalising


@pytest.mark.parametrize("text, llava, vlmevalkit", [
    # case, outer blanks, newlines and tabs, blanks in a row
    (" STOP ", "stop", "stop"), ("a\nstop\tsign", "stop sign", "stop sign"), ("no   exit", "no exit", "no exit"),
    # commas and question marks: LLaVA drops them first, so "digit,digit" has no effect there
    ("red,green", "redgreen", "red green"), ("1,000", "1000", "1000"), ("why?not", "whynot", "why not"),
    ("1,2-3", "12 3", "123"),
    # a mark between letters becomes a blank; one blank beside any of its kind and all of them vanish
    ("a-b", "b", "b"), ("x-y", "x y", "x y"), ("x-y -z", "xy z", "xy z"), ("x- y-z", "x yz", "x yz"),
    ('"x"', "x", "x"), ('say "x"', "say x", "say x"), ("(x)[y]{z}", "x y z", "x y z"), ("x_y=z", "x y z", "x y z"),
    ("x/y; z/w", "x y z w", "x y z w"),  # each kind for itself
    # untouched: apostrophes, colon, percent and others
    ("12:30", "12:30", "12:30"), ("5%&#*$", "5%&#*$", "5%&#*$"), ("caf\xe9", "caf\xe9", "caf\xe9"),
    # 's: LLaVA sets it apart
    ("Bob's", "bob 's", "bob's"), ("boss'", "boss'", "boss'"),
    # full stops: kept before a digit, and (VLMEvalKit) after one
    ("u.s.a.", "usa", "usa"), ("1.5", "1.5", "1.5"), (".5", ".5", ".5"), ("5.", "5", "5."), ("v1.x", "v1x", "v1.x"),
    ("." * 33, ".", "."), ("." * 32, "", ""),  # 32 of them at most
    # numbers, articles
    ("None", "0", "0"), ("zero one TEN eleven", "0 1 10 eleven", "0 1 10 eleven"), ("The a an theme", "theme", "theme"),
    ("the one", "1", "1"), ("anonymous", "anonymous", "anonymous"),
    # contractions, by whole word
    ("dont", "don't", "don't"), ("Dont", "don't", "don't"), ("don't", "don't", "don't"), ("dontx", "dontx", "dontx"),
    ("couldntve", "couldntve", "couldntve"), ("couldn'tve", "couldn't've", "couldn't've"),
    ("somebody'd", "somebodyd", "somebodyd"), ("Im", "im", "im"), ("id've", "id've", "id've"),
    ("", "", ""), ("the", "", ""), ("?", "", ""),
])  # fmt: skip
def test_normalize(text, llava, vlmevalkit):
    assert textvqa.RULES == ("llava", "vlmevalkit")
    assert textvqa.normalize(text) == textvqa.normalize(text, "llava") == llava
    assert textvqa.normalize(text, "vlmevalkit") == vlmevalkit


# ---- accuracy of one answer


@pytest.mark.parametrize("matches, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)])
def test_accuracy(matches, expected):
    references = ["Nokia"] * matches + ["other"] * (10 - matches)
    for turned in (references, references[::-1]):
        assert textvqa.accuracy("nokia.", turned) == pytest.approx(expected, abs=1e-12)


def test_accuracy_by_rule():
    """References are normalised as the answer is: "red,green" is one word for LLaVA, two for VLMEvalKit."""
    references = ["redgreen"] * 4 + ["red green"] * 1 + ["x"] * 5
    assert textvqa.accuracy("red,green", references) == 1
    assert textvqa.accuracy("red,green", references, "vlmevalkit") == pytest.approx(0.3)


# ---- loading


def annotation(image, question, answers=("x",) * 10):
    return {"question_id": 34602, "image_id": image, "question": question, "answers": list(answers)}


def line(qid, question, **more):
    return {"question_id": qid, "image": f"{qid}.jpg", "text": prompt(question), "category": "default"} | more


def write(folder, annotations, lines):
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": annotations}))
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text(text)


TEN = [str(n) for n in range(10)]


def test_load(tmp_path):
    """In the order of LLaVA's file, which capitalises; a picture may have several questions. No picture is opened."""
    known = [annotation("00a", "what is it?", TEN), annotation("00b", "who?"), annotation("00a", "Where?")]
    write(tmp_path, known, [line("00b", "Who?"), line("00a", "Where?"), line("00a", "What is it?")])
    questions = textvqa.load(tmp_path)
    assert questions[2] == {
        "key": 3, "question_id": "00a", "image": "train_images/00a.jpg", "text": prompt("What is it?"),
        "prompt": prompt("What is it?"), "answers": TEN,
    }  # fmt: skip
    assert [(q["key"], q["question_id"]) for q in questions] == [(1, "00b"), (2, "00a"), (3, "00a")]
    assert textvqa.load(str(tmp_path)) == questions and textvqa.KEY == "key" and textvqa.MAX_NEW_TOKENS == 128


@pytest.mark.parametrize("annotations, lines, named", [
    ([], [line("a", "q")], "val.json: not a non-empty list"),
    ({}, [line("a", "q")], "val.json: not a non-empty list"),
    ([5], [line("a", "q")], "val.json, entry 0: 'image_id' is missing or not a string"),
    ([annotation("a", "q"), annotation(7, "q")], [line("a", "q")], "val.json, entry 1: 'image_id'"),
    ([annotation("a", None)], [line("a", "q")], "val.json, entry 0: 'question' is missing or not a string"),
    ([annotation("a", "q") | {"answers": "x" * 10}], [line("a", "q")], "entry 0: 'answers' is missing or not a list"),
    ([annotation("a", "q", TEN[:9])], [line("a", "q")], "val.json, entry 0: 'answers' are not ten texts"),
    ([annotation("a", "q", TEN + ["x"])], [line("a", "q")], "val.json, entry 0: 'answers' are not ten texts"),
    ([annotation("a", "q", range(10))], [line("a", "q")], "val.json, entry 0: 'answers' are not ten texts"),
    ([annotation("a", "q")], [], "ocr.jsonl: empty"),
    ([annotation("a", "q")], [[5]], "ocr.jsonl, record 0: not a JSON object"),
    ([annotation("a", "q")], [line("a", "q"), 5], "ocr.jsonl, line 2: not a JSON object"),
    ([annotation("a", "q")], [line("a", "q", question_id=5)], "ocr.jsonl, line 1: no question_id"),
    ([annotation("a", "q")], [line("a", "q", image=None)], "ocr.jsonl, line 1: no image"),
    ([annotation("a", "q")], [line("a", "q", text=["q"])], "ocr.jsonl, line 1: no text"),
    ([annotation("a", "q")], [line("a", "q", text="q")], "ocr.jsonl, line 1: the prompt 'q' has an unknown form"),
    ([annotation("a", "q")], [line("a", "q"), line("b", "Q")], "line 2: TextVQA_0.5.1_val.json has no question 'q'"),
    ([annotation("a", "q")], [line("a", "other")], "line 1: TextVQA_0.5.1_val.json has no question 'other' about 'a'"),
])  # fmt: skip
def test_load_rejects(tmp_path, annotations, lines, named):
    write(tmp_path, annotations, lines)
    with pytest.raises(InputError) as error:
        textvqa.load(tmp_path)
    assert named in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, named", [
    ("TextVQA_0.5.1_val.json", None, "no such file: "), ("TextVQA_0.5.1_val.json", b"[]", "has no 'data'"),
    ("llava_textvqa_val_v051_ocr.jsonl", b'{"text": ', "line 1: not JSON"),
    ("llava_textvqa_val_v051_ocr.jsonl", b"\xff", "not UTF-8"),
])  # fmt: skip
def test_load_names_a_missing_or_broken_file(tmp_path, name, content, named):
    write(tmp_path, [annotation("a", "q")], [line("a", "q")])
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        textvqa.load(tmp_path)
    assert name in str(error.value) and named in str(error.value) and "\n" not in str(error.value)


# ---- scores


@pytest.fixture
def questions(tmp_path):
    """Two questions about picture a, one about b; the references of each are n times its own word."""
    known = [annotation("a", "what?", ["cup"] * 10), annotation("a", "who?", ["bob"] * 2 + ["x"] * 8),
             annotation("b", "what?", ["Bob's"] + ["y"] * 9)]  # fmt: skip
    write(tmp_path, known, [line("a", "What?"), line("a", "Who?"), line("b", "What?")])
    return textvqa.load(tmp_path)


def answer(image, question, text):
    return {"question_id": image, "prompt": prompt(question), "text": text}


ANSWERS = [answer("b", "What?", "bob's"), answer("a", "Who?", "Bob"), answer("a", "What?", "mug")]


def test_score(questions):
    """0 of ten, two of ten, one of ten: (0 + 0.6 + 0.3) / 3. The answers' order and their key, if any, do not count."""
    scores = textvqa.score(questions, ANSWERS)
    low, high = scores.pop("interval")
    assert scores.pop("score") == pytest.approx(30, abs=1e-9) and 0 <= low < 30 < high <= 60
    assert scores == {"n": 3, "missing": 0, "rule": "llava", "groups": {}}
    keyed = [record | {"key": key} for key, record in zip((3, 2, 1), ANSWERS)]
    assert textvqa.score(questions, keyed)["score"] == pytest.approx(30, abs=1e-9)
    assert textvqa.score(questions, ANSWERS[::-1])["score"] == pytest.approx(30, abs=1e-9)


def test_score_by_rule(questions):
    answers = [answer("b", "What?", "Bob 's"), *ANSWERS[1:]]  # LLaVA's own form of "Bob's"
    assert textvqa.score(questions, answers)["score"] == pytest.approx(30, abs=1e-9)
    scores = textvqa.score(questions, answers, rule="vlmevalkit")
    assert (scores["score"], scores["rule"]) == (pytest.approx(20, abs=1e-9), "vlmevalkit")


def test_score_of_part_of_the_questions(questions):
    assert textvqa.score(questions[1:2], ANSWERS[1:2])["score"] == pytest.approx(60, abs=1e-9)


def test_a_question_asked_twice_is_answered_twice(tmp_path):
    """The official scorer takes the later references for both."""
    known = [annotation("a", "who?", ["x"] * 10), annotation("a", "Who?", ["bob"] * 10)]
    write(tmp_path, known, [line("a", "Who?"), line("a", "Who?")])
    questions, one = textvqa.load(tmp_path), answer("a", "Who?", "bob")
    assert (textvqa.score(questions, [one, one])["score"], questions[0]["key"], questions[1]["key"]) == (100, 1, 2)
    for answers, named in (
        ([one], "1 of 2 questions have no answer"),
        ([one] * 3, "record 3: 'who?' about 'a' is answered"),
    ):
        with pytest.raises(InputError) as error:
            textvqa.score(questions, answers)
        assert named in str(error.value)


@pytest.mark.parametrize("answers, named", [
    (ANSWERS[1:] + [answer("b", "Who?", "x")], "answers, record 3: 'who?' about 'b' is not among the questions"),
    (ANSWERS[:2], "1 of 3 questions have no answer, the first is 'what?' about 'a'"),
    (ANSWERS[:1], "2 of 3 questions have no answer, the first is 'what?' about 'a'"),
    ([], "3 of 3 questions have no answer, the first is 'what?' about 'a'"),
    ([ANSWERS[0] | {"prompt": "What?"}], "answers, record 1: the prompt 'What?' has an unknown form"),
    ([ANSWERS[0] | {"prompt": "Image description:\nA cup.\n\n" + prompt("What?")}], "or a description in it"),
    ([ANSWERS[0] | {"prompt": None}], "answers, record 1: no 'prompt'"),
    ([ANSWERS[0] | {"question_id": []}], "record 1: 'what?' about '[]' is not among"),
])  # fmt: skip
def test_score_rejects(questions, answers, named):
    with pytest.raises(InputError) as error:
        textvqa.score(questions, answers)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_report(questions):
    scores = textvqa.score(questions, ANSWERS) | {"interval": [1.25, 54.96]}
    assert textvqa.report(scores).split("\n") == [
        "TextVQA val: 3 questions, 0 without an answer; accuracy in %",
        "all (rule llava)   30.0 [1.2, 55.0]",
    ]


# ---- values of the official scorers (skipped where the shared data is not at hand)


def test_official_tables():
    tables = shared("textvqa_tables.json")
    assert len(tables["contractions"]) == 120
    assert textvqa.CONTRACTIONS == tables["contractions"] and textvqa.NUMBERS == tables["numbers"]


@pytest.mark.parametrize("name, count, different", [
    ("textvqa_normalize.jsonl", 198, 23), ("textvqa_normalize_real.jsonl", 646, 12)])  # fmt: skip
def test_official_normalisation(name, count, different):
    rows = shared(name)
    assert (len(rows), sum(r["expected"] != r["vlmevalkit"] for r in rows)) == (count, different)
    for r in rows:
        assert textvqa.normalize(r["input"]) == r["expected"], r
        assert textvqa.normalize(r["input"], "vlmevalkit") == r["vlmevalkit"], r


def test_official_scores(tmp_path):
    rows, expected = shared("textvqa_score.jsonl"), shared("expected_aggregates.json")["textvqa_score.jsonl"]
    assert len(rows) == expected["n"] == 62
    for r in rows:
        assert textvqa.accuracy(r["pred"], r["answers"]) == pytest.approx(r["score"], abs=1e-9), r
        assert textvqa.accuracy(r["pred"], r["answers"], "vlmevalkit") == pytest.approx(r["vlmevalkit_score"], abs=1e-9)
    # the same from files, all about one picture
    write(tmp_path, [annotation("a", r["id"], r["answers"]) for r in rows], [line("a", r["id"].upper()) for r in rows])
    questions, answers = textvqa.load(tmp_path), [answer("a", r["id"].upper(), r["pred"]) for r in rows]
    for rule, name in (("llava", "accuracy"), ("vlmevalkit", "vlmevalkit_accuracy")):
        scores = textvqa.score(questions, answers, rule)
        assert scores["score"] == pytest.approx(100 * expected[name], abs=1e-6)
        assert scores["interval"][0] < scores["score"] < scores["interval"][1]


def test_official_questions_in_prompts():
    rows = shared("textvqa_prompt_key.jsonl")
    assert (len(rows), sum(r["question_key"] is None for r in rows)) == (38, 2)
    for r in rows:
        if r["question_key"] is None:
            with pytest.raises(InputError):
                textvqa.question_in(r["prompt"], r["id"])
        else:
            assert textvqa.question_in(r["prompt"], r["id"]) == r["question_key"], r


def test_official_prompts(tmp_path):
    rows = [r for r in shared("prompts.jsonl") if r["benchmark"] == "textvqa"]
    assert len(rows) == 4
    for r in rows:
        question, tokens = r["item"]["question"], ", ".join(r["item"]["ocr_tokens"])
        write(tmp_path, [annotation("a", question)], [line("a", question, text=prompt(question, tokens))])
        [q] = textvqa.load(tmp_path)
        assert q["prompt"] == r["recorded_prompt"]
        user = with_image(with_description(r["description"], q["text"]) if r["mode"] == "dar" else q["text"])
        assert user == r["user_message"] and TEMPLATES[r["conv"]].prompt(user) == r["full_prompt"]
