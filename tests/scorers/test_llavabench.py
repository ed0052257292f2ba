"""LLaVA-Bench: what the judge is asked and says, scores and bad input by hand, then the official scripts' values."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import llavabench
from stic_min.text import TEMPLATES, with_description, with_image

# ---- reviews

@pytest.mark.parametrize("review, pair", [
    ("8 9", (8.0, 9.0)), ("8 9\nBoth are fine.", (8.0, 9.0)), ("7.5 10", (7.5, 10.0)), ("8,9", (8.0, 9.0)),
    ("-1 5", (-1.0, 5.0)), ("100 0", (100.0, 0.0)), ("8 9\t", (8.0, 9.0)), ("8 9\r\nx", (8.0, 9.0)),
    # three pieces
    ("8, 9", (-1, -1)), ("8  9", (-1, -1)), ("8 9 ", (-1, -1)), (" 8 9", (-1, -1)), ("8 9 7", (-1, -1)),
    # one piece
    ("", (-1, -1)), ("8", (-1, -1)), ("8\t9", (-1, -1)), ("\n8 9", (-1, -1)), ("8;9", (-1, -1)),
    # no numbers
    ("8/10 9/10", (-1, -1)), ("Scores: 8", (-1, -1)), ("8. 9!", (-1, -1)), ("eight nine", (-1, -1)), (",", (-1, -1)),
])  # fmt: skip
def test_parse(review, pair):
    assert llavabench.parse(review) == pair


def test_parse_lets_nan_and_infinity_through():
    first, second = llavabench.parse("nan inf")
    assert math.isnan(first) and second == math.inf


# ---- the judge

def question(qid, category="conv", **fields):
    return {"question_id": qid, "image": "images/001.jpg", "text": f"Question {qid}?", "prompt": f"Question {qid}?",
            "category": category, "caption": "A cat.\nA mat.", "reference": f"Reference {qid}.", **fields}  # fmt: skip


def answers(*ids):
    return [{"question_id": qid, "prompt": "p", "text": f"Answer {qid}."} for qid in ids]


class Judge:
    """Answers by table: {where: content}, "8 6\\nWell." for all others. Items are done in a random order."""

    def __init__(self, said, runs=1):
        self.texts, self.runs = {"system": "SYSTEM", "role": "Helper", "rule": "RULE"}, runs
        self.said, self.asked = said, {}

    def ask(self, where, messages, *, temperature, max_tokens):
        assert where not in self.asked
        self.asked[where] = (messages, temperature, max_tokens)
        return SimpleNamespace(content=self.said.get(where, "8 6\nWell."), model="judge-0")

    def map(self, function, items):
        items = list(items)
        results = {i: function(items[i]) for i in random.Random(0).sample(range(len(items)), len(items))}
        return [results[i] for i in range(len(items))]


REQUEST = """[Context]
A cat.
A mat.

[Question]
Question 7?

[Helper 1]
Reference 7.

[End of Helper 1]

[Helper 2]
Answer 7.

[End of Helper 2]

[System]
RULE

"""


def test_judge_request():
    judge = Judge({})
    [[review]] = llavabench.judge([question(7, "detail")], answers(7), judge)
    messages = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": REQUEST}]
    assert judge.asked == {"7, run 1": (messages, 0.2, 1024)}
    assert review == {"id": 1, "question_id": 7, "category": "llava_bench_detail", "content": "8 6\nWell.",
                      "tuple": [8.0, 6.0], "model": "judge-0"}  # fmt: skip


def test_judge_reviews_every_answer_in_every_run():
    judge = Judge({"7, run 2": "9 3", "3, run 1": "8, 9", "3, run 2": "nan 5"}, runs=2)
    runs = llavabench.judge([question(7), question(3, "complex")], answers(3, 7), judge)
    short = [[(r["id"], r["question_id"], r["content"], r["tuple"]) for r in run] for run in runs]
    assert short == [[(1, 7, "8 6\nWell.", [8.0, 6.0]), (2, 3, "8, 9", [-1, -1])],
                     [(1, 7, "9 3", [9.0, 3.0]), (2, 3, "nan 5", [-1, -1])]]  # fmt: skip
    assert judge.asked["7, run 1"] == judge.asked["7, run 2"] and len(judge.asked) == 4
    assert "Answer 3." in judge.asked["3, run 2"][0][1]["content"]


def test_own_prompts_have_the_official_shape():
    official, own = shared("judge_prompts.json")[llavabench.PROMPTS], llavabench.OWN_PROMPTS
    assert own.keys() == official.keys() - {"source"} and own["role"] == official["role"]
    assert all(own[key] != official[key] for key in ("system", "rule"))


# ---- files

QUESTIONS = [
    {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What is it?"},
    {"question_id": 1, "image": "001.jpg", "category": "detail", "text": "Describe it."},
    {"question_id": 2, "image": "002.jpg", "category": "complex", "text": "Why?"},
]
CONTEXT = [{"image": "002.jpg", "caption": "One line."}, {"image": "001.jpg", "caption": ["First.", "Second."]}]
REFERENCES = [{"answer_id": f"a{i}", "question_id": i, "text": f"Reference {i}.", "model_id": "gpt4"} for i in range(3)]


def write(folder, questions=QUESTIONS, context=CONTEXT, references=REFERENCES):
    files = {"questions.jsonl": questions, "context.jsonl": context, "answers_gpt4.jsonl": references}
    for name, records in files.items():
        write_lines(folder / name, records)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_load(tmp_path):
    write(tmp_path)
    questions = llavabench.load(tmp_path)
    assert questions == llavabench.load(str(tmp_path))
    assert questions[0] == {
        "question_id": 0, "image": "images/001.jpg", "text": "What is it?", "prompt": "What is it?",
        "category": "conv", "caption": "First.\nSecond.", "reference": "Reference 0."}  # fmt: skip
    assert [q["question_id"] for q in questions] == [0, 1, 2]
    assert (questions[2]["caption"], questions[2]["reference"]) == ("One line.", "Reference 2.")


def changed(records, number, **fields):
    return [record | fields if i == number else record for i, record in enumerate(records)]


@pytest.mark.parametrize("files, complaint", [
    *[({"questions": changed(QUESTIONS, 1, **{key: value})}, f"questions.jsonl, line 2: no {key}")
      for key in ("image", "text") for value in (None, "", 7, ["x"])],
    *[({"questions": changed(QUESTIONS, 1, category=value)}, f".jsonl, line 2: category {value!r} is not one of")
      for value in (None, "other", "llava_bench_conv", ["conv"])],
    ({"questions": changed(QUESTIONS, 1, question_id=0)}, "questions.jsonl, line 2: question_id 0 is repeated"),
    ({"questions": changed(QUESTIONS, 1, question_id="0")}, "questions.jsonl, line 2: question_id '0' is repeated"),
    *[({"questions": changed(QUESTIONS, 1, question_id=value)}, f"line 2: question_id {value!r} is not an id")
      for value in (None, [1], 1.0, True)],
    ({"questions": changed(QUESTIONS, 1, image="9.jpg")}, "line 2: image '9.jpg' is not in context.jsonl"),
    ({"questions": []}, "questions.jsonl: empty"),
    ({"questions": ["x"]}, "questions.jsonl, line 1: not a JSON object"),
    ({"context": changed(CONTEXT, 1, image=None)}, "context.jsonl, line 2: no image"),
    *[({"context": changed(CONTEXT, 1, caption=value)}, "context.jsonl, line 2: no caption")
      for value in (None, "", [], ["x", 7], [""], 7, {"a": "b"})],
    ({"references": REFERENCES[:2]}, "answers_gpt4.jsonl: 2 answers to 3 questions"),
    ({"references": [*REFERENCES[:2], *REFERENCES]}, "answers_gpt4.jsonl: 5 answers to 3 questions"),
    ({"references": [REFERENCES[0], *REFERENCES[:0:-1]]},
     "answers_gpt4.jsonl, line 2: question_id is 2, but the question on the same line is 1"),
    ({"references": changed(REFERENCES, 1, question_id=None)}, "answers_gpt4.jsonl, line 2: question_id is None"),
    ({"references": changed(REFERENCES, 2, text=None)}, "answers_gpt4.jsonl, line 3: no text"),
])  # fmt: skip
def test_load_rejects(tmp_path, files, complaint):
    write(tmp_path, **files)
    with pytest.raises(InputError) as error:
        llavabench.load(tmp_path)
    assert complaint in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def review(qid, *pair, category="conv"):
    return {"question_id": qid, "category": f"llava_bench_{category}", "content": "x", "tuple": list(pair)}


def test_read_judged(tmp_path):
    first = [review(0, 8.0, 9.0), review(1, -1, -1, category="detail") | {"id": 2, "answer1_id": "a"}]
    second = [{"question_id": 0, "content": "8 9\nx"}]
    paths = [write_lines(tmp_path / "1.jsonl", first), write_lines(tmp_path / "2.jsonl", second)]
    assert llavabench.read_judged(paths) == [first, second]
    files = llavabench.judged_files([first, second])
    assert list(files) == [".reviews-1.jsonl", ".reviews-2.jsonl"]
    for text, run in zip(files.values(), [first, second]):
        assert [json.loads(line) for line in text.removesuffix("\n").split("\n")] == run


@pytest.mark.parametrize("record, complaint", [
    (None, "line 2: not a JSON object"),
    *[(review(0) | {"tuple": value}, "line 2: needs a 'tuple' of two numbers or, instead, the text 'content'")
      for value in (None, [], [8.0], [8.0, 9.0, 7.0], ["8", "9"], [8.0, None], [True, 9.0], {"0": 8, "1": 9}, "89")],
    ({"question_id": 0, "category": "llava_bench_conv"}, "line 2: needs a 'tuple'"),
    ({"question_id": 0, "content": ["8 9"]}, "line 2: needs a 'tuple'"),
    ({"content": "8 9"}, "line 2: no question_id"),
])  # fmt: skip
def test_read_judged_rejects(tmp_path, record, complaint):
    right = write_lines(tmp_path / "right.jsonl", [review(0, 8.0, 9.0)])
    path = write_lines(tmp_path / "r.jsonl", [review(1, 8.0, 9.0), record])
    with pytest.raises(InputError) as error:
        llavabench.read_judged([right, path])
    assert f"r.jsonl, {complaint}" in str(error.value) and "\n" not in str(error.value)


# ---- scores

#  id  category  run 1    run 2
#  0   conv      9 6      8 4
#  1   conv      8 5      8 6
#  2   complex   7 8      failed
ASKED = [question(0), question(1), question(2, "complex")]
RUN1 = [review(2, 7.0, 8.0, category="complex"), review(0, 9.0, 6.0), review(1, 8.0, 5.0)]
RUN2 = [review(0, 8.0, 4.0), review(1, 8.0, 6.0), review(2, -1, -1, category="complex")]


def figures(scores):
    return [scores[key] for key in ("score", "reference", "model", "runs", "n")]


def test_score_of_one_run():
    scores = llavabench.score(ASKED, None, [RUN1])
    # means 24/3 and 19/3 = 6.333: 79.2 % (79.1625); the mean of the ratios would be 81.2
    assert figures(scores) == [79.2, 80.0, 63.3, [79.2], 3]
    assert figures(scores["groups"]["conv"]) == [64.7, 85.0, 55.0, [64.7], 2]  # 5.5 of 8.5: 64.706
    assert figures(scores["groups"]["complex"]) == [114.3, 70.0, 80.0, [114.3], 1]  # 8 of 7
    assert list(scores["groups"]) == ["conv", "complex"]
    assert (scores["missing"], scores["unread"]) == (0, 0)


def test_means_are_rounded_before_they_are_divided():
    # means 1/3 and 2/3 of three: 0.333 and 0.667 give 200.3, the exact ones 200.0
    run = [review(0, 1.0, 2.0), review(1, 0.0, 0.0), review(2, 0.0, 0.0, category="complex")]
    with pytest.raises(InputError, match=r"reference's ratings \(complex\) average to 0"):
        llavabench.score(ASKED, None, [run])
    assert llavabench.score([question(0), question(1), question(2)], None, [
        [review(0, 1.0, 2.0), review(1, 0.0, 0.0), review(2, 0.0, 0.0)]])["score"] == 200.3  # fmt: skip


def test_a_failed_review_counts_as_a_pair_of_minus_1():
    scores = llavabench.score(ASKED, None, [RUN2])
    # (8 + 8 - 1) / 3 = 5 and (4 + 6 - 1) / 3 = 3
    assert figures(scores) == [60.0, 50.0, 30.0, [60.0], 3]
    assert scores["unread"] == 1
    assert figures(scores["groups"]["complex"]) == [100.0, -10.0, -10.0, [100.0], 1]


def test_runs_are_averaged():
    scores = llavabench.score(ASKED, answers(2, 0, 1), [RUN1, RUN2])
    assert scores["runs"] == [79.2, 60.0] and (scores["unread"], scores["n"]) == (1, 3)
    assert [scores[key] for key in ("score", "reference", "model")] == pytest.approx([69.6, 65.0, 46.65], abs=1e-9)
    conv = scores["groups"]["conv"]
    assert conv["runs"] == [64.7, 62.5] and conv["score"] == pytest.approx(63.6, abs=1e-9)


def test_content_counts_where_there_is_no_tuple():
    questions = [question(0), question(1)]
    run = [{"question_id": "0", "content": "8 6\nx"}, {"question_id": 1, "content": "9 9", "tuple": [4.0, 1.0]}]
    assert figures(llavabench.score(questions, None, [run])) == [58.3, 60.0, 35.0, [58.3], 2]  # 3.5 of 6
    for content, failed in (("8 and 6", 1), ("-1 6", 0), ("-1 -1", 1)):
        run[0]["content"] = content
        assert llavabench.score(questions, None, [run])["unread"] == failed


def test_intervals_are_over_questions():
    # pairs 8 4 and 4 4: a draw of two gives 12/16, and 8/16 or 1 when one is drawn twice
    scores = llavabench.score([question(0), question(1)], None, [[review(0, 8.0, 4.0), review(1, 4.0, 4.0)]])
    assert scores["interval"] == [50.0, 100.0] and scores["score"] == 66.7
    # both runs are in it: 4 of 8 and 6 of 8 make 10 of 16, 2 of 8 and 4 of 8 make 6 of 16
    runs = [[review(0, 8.0, 4.0), review(1, 8.0, 2.0)], [review(0, 8.0, 6.0), review(1, 8.0, 4.0)]]
    assert llavabench.score([question(0), question(1)], None, runs)["interval"] == [37.5, 62.5]
    # independent pairs: the interval of a ratio by its linearisation
    generator = np.random.default_rng(1)
    pairs = np.stack([generator.integers(7, 11, 400), generator.integers(3, 10, 400)], 1).astype(float)
    scores = llavabench.score([question(i) for i in range(400)], None, [[review(i, *p) for i, p in enumerate(pairs)]])
    ratio = pairs[:, 1].mean() / pairs[:, 0].mean()
    half = 100 * 1.96 * (pairs[:, 1] - ratio * pairs[:, 0]).std() / pairs[:, 0].mean() / 20
    assert scores["interval"] == pytest.approx([100 * ratio - half, 100 * ratio + half], abs=0.15 * half)


def test_interval_without_the_draws_that_have_no_ratio():
    # two times the first and two times the second, and the reference has 0
    scores = llavabench.score([question(i) for i in range(4)], None, [
        [review(0, 1.0, 3.0), review(1, -1, -1), review(2, 9.0, 9.0), review(3, 9.0, 9.0)]])  # fmt: skip
    assert all(map(math.isfinite, scores["interval"]))


@pytest.mark.parametrize("given, judged, complaint", [
    (None, None, "LLaVA-Bench is graded by a judge model: --judge, or --judged FILE with official reviews"),
    (None, [], "LLaVA-Bench is graded by a judge model"),
    (None, [RUN1, RUN2[:1]], "LLaVA-Bench reviews, run 2: 2 of 3 questions have no review, the first is '1'"),
    (None, [RUN1, RUN2 + RUN2[:1]], "LLaVA-Bench reviews, run 2: '0' is repeated"),
    (None, [RUN1 + [review(9, 8.0, 8.0)]], "LLaVA-Bench reviews, run 1: '9' is not a question id"),
    (None, [[review(0, 8.0, 8.0, category="detail"), *RUN2[1:]]],
     "run 1: '0' has category 'llava_bench_detail', the question's is 'llava_bench_conv'"),
    (None, [[review(0, 8.0, 8.0) | {"category": "conv"}, *RUN2[1:]]], "run 1: '0' has category 'conv'"),
    *[(None, [RUN1, [review(0, 8.0, value), *RUN2[1:]]], "run 2: '0' has the ratings (8.0, ")
      for value in (math.nan, math.inf, -math.inf, 10**400)],
    (None, [[{"question_id": 0, "content": "nan 8"}, *RUN2[1:]]], "run 1: '0' has the ratings (nan, 8.0)"),
    (None, [[review(0, 1.0, 8.0), review(1, -1, -1), RUN2[2]]], "reference's ratings (conv) average to 0"),
])  # fmt: skip
def test_score_rejects(given, judged, complaint):
    with pytest.raises(InputError) as error:
        llavabench.score(ASKED, given, judged)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_report():
    lines = llavabench.report(llavabench.score(ASKED, None, [RUN1, RUN2])).split("\n")
    assert lines[0] == "LLaVA-Bench (In-the-Wild): 3 questions, 1 of 6 reviews without two scores"
    assert lines[1] == "2 runs of the judge: 79.2 60.0"
    cells = [line.split() for line in lines[2:]]
    assert cells[0] == ["score", "[95%", "interval]", "reference", "model", "n"]
    assert [row[:2] + row[4:] for row in cells[1:]] == [
        ["all", "69.6", "65.0", "46.6", "3"],
        ["conv", "63.6", "82.5", "52.5", "2"],
        ["complex", "107.2", "30.0", "35.0", "1"],
    ]


def test_from_files_to_scores(tmp_path):
    write(tmp_path)
    questions = llavabench.load(tmp_path)
    judge = Judge({"0, run 1": "10 7.5\nx", "1, run 2": "no"}, runs=2)
    judged = llavabench.judge(questions, answers(0, 1, 2), judge)
    request = judge.asked["0, run 1"][0][1]["content"]
    assert request.startswith("[Context]\nFirst.\nSecond.\n\n[Question]\nWhat is it?\n\n[Helper 1]\nReference 0.\n\n")
    paths = []
    for suffix, text in llavabench.judged_files(judged).items():
        paths.append(tmp_path / f"run{suffix}")
        paths[-1].write_text(text)
    scores = llavabench.score(questions, answers(0, 1, 2), llavabench.read_judged(paths))
    assert scores == llavabench.score(questions, None, judged)
    # run 1: 19.5 of 26; run 2: 11 of 15
    assert (scores["runs"], scores["unread"]) == ([75.0, 73.3], 1)
    assert list(scores["groups"]) == ["conv", "detail", "complex"]


# ---- values of the official scripts (skipped where the shared data is not at hand)

def test_official_parser():
    rows = shared("llavabench_parse.jsonl")
    assert len(rows) == 8
    for row in rows:
        expected = [math.nan if value is None else value for value in row["tuple"]]
        assert llavabench.parse(row["review"]) == pytest.approx(expected, abs=1e-9, nan_ok=row["has_nan"]), row


@pytest.mark.parametrize("name, n", [
    ("llavabench_reviews_llava_v1.5_7b_eval1.jsonl", 60), ("llavabench_synthetic_tuples.json", 24)])  # fmt: skip
def test_official_scores(tmp_path, name, n):
    reviews, expected = shared(name), shared("expected_aggregates.json")[name]
    assert len(reviews) == n
    asked = [QUESTIONS[0] | {"question_id": r["question_id"], "category": r["category"].removeprefix("llava_bench_")}
             for r in reviews]  # fmt: skip
    write(tmp_path, asked, references=[{"question_id": r["question_id"], "text": "x"} for r in reviews])
    judged = llavabench.read_judged([write_lines(tmp_path / "reviews.jsonl", reviews)])
    scores = llavabench.score(llavabench.load(tmp_path), None, judged)
    found = {"all": scores} | {f"llava_bench_{key}": own for key, own in scores["groups"].items()}
    assert {key: {"n": own["n"], "ratio": own["score"], "reference": own["reference"], "model": own["model"]}
            for key, own in found.items()} == expected  # fmt: skip
    assert scores["unread"] == sum(r["tuple"] == [-1, -1] for r in reviews)


def test_official_reviews_say_what_was_read_from_them():
    for row in shared("llavabench_reviews_llava_v1.5_7b_eval1.jsonl"):
        assert list(llavabench.parse(row["content"])) == row["tuple"], row


def test_official_request():
    texts = shared("judge_prompts.json")["llava_bench"]
    judge = Judge({})
    judge.texts = texts
    llavabench.judge([question(7)], answers(7), judge)
    [([system, user], _, _)] = judge.asked.values()
    assert system["content"] == texts["system"] and "helpful and precise assistant" in texts["system"]
    assert user["content"] == REQUEST.replace("Helper", "Assistant").replace("RULE", texts["rule"])


def test_official_prompts(tmp_path):
    rows = [row for row in shared("prompts.jsonl") if row["benchmark"] == "llava_bench"]
    assert len(rows) == 4
    for row in rows:
        write(tmp_path, changed(QUESTIONS, 0, text=row["item"]["question"]))
        q = llavabench.load(tmp_path)[0]
        user = with_image(with_description(row["description"], q["text"]) if row["mode"] == "dar" else q["text"])
        assert q["prompt"] == row["recorded_prompt"]
        assert user == row["user_message"]
        assert TEMPLATES[row["conv"]].prompt(user) == row["full_prompt"]
