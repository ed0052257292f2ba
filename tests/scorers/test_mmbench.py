"""MMBench: every rule on cases worked out by hand, then the official toolkit's values."""

import base64
import csv
import random

import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import mmbench
from stic_min.scorers.common import proportion, with_interval
from stic_min.scorers.judge import Reply
from stic_min.text import TEMPLATES, with_description, with_image

SENTENCE = "Answer with the option's letter from the given choices directly."
PETS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}
PICTURE, OTHER = (base64.b64encode(bytes([i]) * 60).decode() for i in (1, 2))  # 80 characters each

# ---- matching


@pytest.mark.parametrize("text, letter", [
    # exactly one letter as a word of its own; these marks are spaces: . ( ) [ ] , : ; ! * # { }
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("[B]", "B"), ("{B}", "B"), ("#B", "B"), ("**B**", "B"), ("B,", "B"),
    ("Answer:B;", "B"), ("B!", "B"), ("B. rabbit", "B"), (" B\n", "B"), ("B B B", "B"), ("A rabbit", "A"),
    # other marks are not, letters out of the options are no letters, case matters
    ("B?", None), ("B-", None), ("B/C", None), ("`B`", None), ("b", None), ("BC", None), ("E", None), ("", None),
    # two letters: the text decides, if it is one option's
    ("B or C", None), ("B or C: the rabbit", "B"), ("Z, B or C", None),
    # Z, but only without a letter
    ("Z", "Z"), ("(Z)", "Z"), ("Z or B", "B"), ("z", None), ("Z rabbit", "Z"),
    # the text of exactly one option, in any case, anywhere
    ("It is a RABBIT, rabbit", "B"), ("rabbits and catfish", None), ("concatenated", "C"),
    # refusals, even with a letter; what the API said instead of an answer is matched as text only
    ("Cannot determine the answer, B", "Z"), ("I can't process this file. B", "Z"), ("Sorry, I can't help. B", "B"),
    ("Sorry, I can't help with images of people yet. rabbit", "Z"),
    ("I'm sorry, but without the image provided I say B", "Z"),
    ("Failed to obtain answer via API. B", None), ("Failed to obtain answer via API. rabbit", "B"),
    ("Failed to obtain answer via API. Cannot determine the answer", None),
])  # fmt: skip
def test_match(text, letter):
    assert mmbench.match(text, PETS) == mmbench.match(text, PETS, "2024") == mmbench.match(text, PETS, "2026") == letter


@pytest.mark.parametrize("text, old, new", [
    # the letter among the last four words
    ("B is so very right", "B", None), ("B is so right", "B", "B"), ("We say B is so right", "B", "B"),
    ("B I say since it is B", "B", None),                       # by its first occurrence
    # "answer is X", in any case, if no letter was taken before
    ("The answer is c, as all can see", None, "C"), ("the Correct ANSWER  is **d**", None, "D"),
    ("The answer is B, as all can see here", "B", "B"), ("the answer is (b)", None, None),
    ("the answer is e", None, None), ("answer is c, no, answer is d", None, "C"), ("the answers is c", None, None),
    ("the answer is cold", None, "C"),                          # no end of word
    ("the answer is between A and B", None, "B"),               # even "between", as two letters leave it open
    ("Z, the answer is c", "Z", "Z"),
    # text no longer than twice the four options together, 2 * (10 + 6 + 3 + 3) = 44 characters
    ("the rabbit".rjust(44, "."), "B", "B"), ("the rabbit".rjust(45, "."), "B", None),
])  # fmt: skip
def test_match_of_2026(text, old, new):
    assert (mmbench.match(text, PETS, "2024"), mmbench.match(text, PETS, "2026")) == (old, new)


def test_match_knows_no_letter_behind_the_options():
    two = {"A": "yes", "B": "no"}
    assert mmbench.match("C", two) is mmbench.match("answer is c", two, "2026") is None
    assert mmbench.match("Z C B", two) == "B"


# ---- loading

HEADER = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
          "comment", "split"]  # fmt: skip


def row(index, **cells):
    return {"index": str(index), "question": "Which?", "hint": "", **PETS, "answer": "A", "category": "pets",
            "image": PICTURE, "source": "s", "l2-category": "logic_reasoning", "comment": "", "split": "dev",
            **cells}  # fmt: skip


def write(folder, rows, header=HEADER):
    with open(folder / "mmbench_dev_20230712.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def loaded(folder, *rows, header=HEADER):
    return mmbench.load(write(folder, rows, header))


def test_load(tmp_path):
    first, second = loaded(tmp_path, row(3, hint="Look.", C="", D=""), row(2_000_005, answer="D"))
    prompt = "Look.\nWhich?\nA. teddy bear\nB. rabbit"
    assert first == {
        "question_id": 3, "group": 3, "image": first["image"], "encoded": PICTURE, "prompt": prompt,
        "text": f"{prompt}\n{SENTENCE}", "options": {"A": "teddy bear", "B": "rabbit"}, "answer": "A",
        "category": "pets", "l2": "logic_reasoning",
        "row": {"index": "3", "question": "Which?", "A": "teddy bear", "B": "rabbit", "C": "", "D": "", "answer": "A",
                "split": "dev"}}  # fmt: skip
    assert (second["question_id"], second["group"], second["answer"]) == (2_000_005, 5, "D")
    assert second["text"] == f"Which?\nA. teddy bear\nB. rabbit\nC. cat\nD. dog\n{SENTENCE}"
    assert second["options"] == PETS


@pytest.mark.parametrize("cell", ["", "NA", "N/A", "nan", "NaN", "NAN", "null", "None", "none", "NONE", "#N/A", "<NA>",
                                  "#N/A N/A"])  # fmt: skip
def test_absent_cells(tmp_path, cell):
    [question] = loaded(tmp_path, row(3, hint=cell, C=cell))  # D is there, but behind the cut
    assert question["prompt"] == "Which?\nA. teddy bear\nB. rabbit"
    assert question["options"] == {"A": "teddy bear", "B": "rabbit"}
    assert question["row"]["C"] == (cell if cell in ("NAN", "none", "NONE") else "")  # pandas keeps these three


def test_present_cells(tmp_path):
    [question] = loaded(tmp_path, row(3, hint="N/A?", C="no", D="0"))
    assert question["prompt"] == "N/A?\nWhich?\nA. teddy bear\nB. rabbit\nC. no\nD. 0"


def test_quotes_tabs_and_newlines_in_cells(tmp_path):
    [question] = loaded(tmp_path, row(3, question='"So"\twhich?\n\nSay', A='a "quoted" word'))
    assert question["prompt"].startswith('"So"\twhich?\n\nSay\nA. a "quoted" word\nB. rabbit')


def test_a_quote_inside_a_plain_cell_is_text(tmp_path):
    text = 'index\tquestion\tA\tB\tC\tD\tanswer\n1\tWhat is 5" wide?\ta "b"\t"c"\t""\t\tB\n\n'
    (tmp_path / "mmbench_dev_20230712.tsv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    [question] = mmbench.load(tmp_path)  # with a byte order mark, Windows line ends and an empty line
    assert question["prompt"] == 'What is 5" wide?\nA. a "b"\nB. c'


def test_scoring_needs_few_columns(tmp_path):
    [question] = loaded(tmp_path, row(3), header=["answer", "index", "question", "A", "B", "C", "D"])
    assert (question["image"], question["encoded"], question["category"], question["l2"]) == (None, None, "", "")
    with pytest.raises(InputError, match="^mmbench_dev_20230712.tsv, row 3: has no image$"):
        mmbench.image_bytes(question)


def test_pictures(tmp_path):
    longest = base64.b64encode(b"x" * 200_000).decode()  # longer than what the csv module takes by itself
    questions = loaded(tmp_path, row(1), row(1_000_001), row(2, image=OTHER), row(3, image="2"), row(4, image=longest),
                       row(5, image="MTIz"), row(6, image="99 "))  # fmt: skip
    images = [question["image"] for question in questions]
    assert images[0] == images[1] and images[2] == images[3]  # one picture, one name
    assert len(set(images)) == 5 and all(len(image) == 16 for image in images)
    assert questions[0]["encoded"] is questions[1]["encoded"]
    contents = [mmbench.image_bytes(question) for question in questions[:6]]
    assert contents == [b"\1" * 60] * 2 + [b"\2" * 60] * 2 + [b"x" * 200_000, b"123"]
    with pytest.raises(InputError, match="^mmbench_dev_20230712.tsv, row 6: its image is not base64$"):
        mmbench.image_bytes(questions[6])


def test_image_bytes(tmp_path):
    lines = PICTURE[:40] + "\n" + PICTURE[40:]
    whole, *broken = loaded(tmp_path, row(1, image=lines), row(2, image=PICTURE[:-1]), row(3, image="é" + PICTURE[1:]),
                            row(4, image="-_-_" + PICTURE[4:]))  # fmt: skip
    assert mmbench.image_bytes(whole) == b"\1" * 60
    for question in broken:
        with pytest.raises(InputError, match=rf"row {question['question_id']}: its image is not base64$"):
            mmbench.image_bytes(question)


def test_an_empty_image_cell_is_no_question_without_a_picture(tmp_path):
    [question] = loaded(tmp_path, row(1, image=""))
    assert question["image"]
    with pytest.raises(InputError, match="row 1: has no image$"):
        mmbench.image_bytes(question)


@pytest.mark.parametrize("rows, named", [
    ([row(1), row(2), row(1)], "row '1': the index is repeated or not a whole number"),
    ([row(1), row("01")], "row '01': the index is repeated"),
    ([row("1.0")], "row '1.0': the index is repeated or not a whole number"),
    ([row("")], "row '': the index is"), ([row(-1)], "row '-1': the index is"), ([row("²")], "row '²': the index is"),
    ([row("9" * 5000)], "the index is"),
    ([row(1), row(7, question="")], "row '7': has no question"), ([row(7, question="NA")], "row '7': has no question"),
    ([row(7, A="none")], "row '7': has no options"),
    ([row(7, answer="E")], "row '7': answer 'E' is not one of"), ([row(7, answer="")], "row '7': answer '' is not one"),
    ([row(7, answer="AB")], "row '7': answer 'AB' is not one"), ([], "mmbench_dev_20230712.tsv: has no rows"),
])  # fmt: skip
def test_load_rejects(tmp_path, rows, named):
    with pytest.raises(InputError) as error:
        loaded(tmp_path, *rows)
    assert "mmbench_dev_20230712.tsv" in str(error.value) and named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["index", "question", "A", "B", "C", "D", "answer"])
def test_load_names_a_missing_column(tmp_path, column):
    with pytest.raises(InputError, match=f"mmbench_dev_20230712.tsv: has no column '{column}'$"):
        loaded(tmp_path, row(1), header=[name for name in HEADER if name != column])


@pytest.mark.parametrize("content, named", [
    (b"", ": has no rows"), (b"index\tquestion\xff\n1\t2\n", ": not a table in UTF-8"),
    (b'index\tquestion\tA\tB\tC\tD\tanswer\n1\tq\ta\tb\tc\td\tA\n2\tq\ta\t"b\n', ": a quote is never closed"),
    (b"index\tquestion\tA\tB\tC\tD\tanswer\n1\tq\ta\tb\tc\td\tA\tx\n",
     ", row ending at line 2: 8 cells, the header has 7"),
    (b"\x89PNG\r\n\x1a\n", ": not a table in UTF-8"), (b"{}", ": has no rows"),
])  # fmt: skip
def test_load_names_a_missing_or_broken_file(tmp_path, content, named):
    if content is not None:
        (tmp_path / "mmbench_dev_20230712.tsv").write_bytes(content)
    with pytest.raises(InputError) as error:
        mmbench.load(tmp_path)
    assert f"mmbench_dev_20230712.tsv{named}" in str(error.value) and "\n" not in str(error.value)


# ---- answers in and out


def records(predictions):
    return [{"question_id": index, "text": text} for index, text in predictions.items()]


def test_official(tmp_path):
    questions = loaded(tmp_path, row(1, C="", D="", hint="h"), row(2, question='a "b"'), row(3))
    suffix, text = mmbench.official(questions, records({3: "(C)\tor\n D", 1: "A"}))
    assert (suffix, text) == (".tsv", (
        '"index"\t"question"\t"A"\t"B"\t"C"\t"D"\t"prediction"\t"answer"\t"split"\n'
        '"1"\t"Which?"\t"teddy bear"\t"rabbit"\t""\t""\t"A"\t"A"\t"dev"\n'
        '"2"\t"a ""b"""\t"teddy bear"\t"rabbit"\t"cat"\t"dog"\t""\t"A"\t"dev"\n'
        '"3"\t"Which?"\t"teddy bear"\t"rabbit"\t"cat"\t"dog"\t"(C)\tor\n D"\t"A"\t"dev"\n'))  # fmt: skip


ODD = ["A", "", "None", "nan", "N/A", "a\tb", "a\nb", "a\r\nb\r", '"', '"a"', 'a "b" c', "'", " A ", "a,b", "é 图 😀",
       "\n\n", "\\t"]  # fmt: skip


def written(folder, questions, answers):
    suffix, text = mmbench.official(questions, answers)
    (folder / f"sheet{suffix}").write_text(text, encoding="utf-8")
    return folder / f"sheet{suffix}"


@pytest.fixture
def odd_sheet(tmp_path):
    return written(tmp_path, loaded(tmp_path, *(row(i) for i in range(len(ODD)))), records(dict(enumerate(ODD))))


def test_what_official_writes_reads_back(odd_sheet):
    assert mmbench.read_answers(odd_sheet) == records({str(i): text for i, text in enumerate(ODD)})


def test_pandas_reads_what_official_writes(odd_sheet):
    pandas = pytest.importorskip("pandas")
    sheet = pandas.read_table(odd_sheet, keep_default_na=False)
    assert list(sheet.columns) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert list(sheet["index"]) == list(range(len(ODD))) and list(sheet["prediction"]) == ODD


def test_load_reads_a_table_as_pandas_does(tmp_path):
    pandas = pytest.importorskip("pandas")
    cells = [*ODD[2:], *sorted(mmbench.NAN), "NAN", "#n/a", " NA", "-nan "]
    questions = loaded(tmp_path, *(row(i, B=cell) for i, cell in enumerate(cells)))
    table = pandas.read_table(tmp_path / "mmbench_dev_20230712.tsv")
    assert [question["row"]["B"] for question in questions] == ["" if c != c else c for c in table["B"]]


def test_read_answers(tmp_path):
    (tmp_path / "a.CSV").write_text('split,prediction,index\ndev,"B, or\nC",7\ndev,nan,x\n')
    assert mmbench.read_answers(tmp_path / "a.CSV") == records({"7": "B, or\nC", "x": "nan"})
    (tmp_path / "a.jsonl").write_text('{"question_id": 7, "prompt": "q", "text": "B"}\n')
    assert mmbench.read_answers(tmp_path / "a.jsonl") == [{"question_id": 7, "prompt": "q", "text": "B"}]


@pytest.mark.parametrize("name, content, named", [
    ("a.tsv", b"index\ttext\n1\tA\n", "a.tsv: has no column 'prediction'"),
    ("a.csv", b"index\tprediction\n1\tA\n", "a.csv: has no column 'index'"),
    ("a.tsv", b"index\tprediction\n1\n", "a.tsv, row ending at line 2: 1 cells"),
    ("a.tsv", b"PK\x03\x04\xff", "a.tsv: not a table in UTF-8"), ("a.tsv", None, "a.tsv: No such file"),
    ("a.xlsx", b"PK\x03\x04\xff", "a.xlsx: not UTF-8 text"),
    ("a.jsonl", b"[1]", "a.jsonl, record 0: not a JSON object"),
])  # fmt: skip
def test_read_answers_rejects(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        mmbench.read_answers(tmp_path / name)
    assert named in str(error.value) and "\n" not in str(error.value)


# ---- scores


def question(index, answer="A", l2="logic_reasoning", category="pets", options=PETS):
    return {"question_id": index, "group": index % 1_000_000, "answer": answer, "options": options, "l2": l2,
            "category": category, "row": {"question": "Which?"}}  # fmt: skip


# group  rows              predictions              right  circle
# 1      1, 1000001 (B)    "A", "(B)"               2      yes
# 2      2, 1000002 (B)    "A", "A"                 1      no
# 3      3, 2000003        "teddy bear", missing    1      no
# 4      4                 "no idea"                0      no      unmatched
# 5      1000005 (C)       "It is a cat"            1      yes     the base row is not in the excerpt
# 6      6                 "Z"                      0      no      matched to Z
QUESTIONS = [
    question(1), question(2, l2="coarse_perception"), question(3, l2="coarse_perception", category="animals"),
    question(4, l2="something else", category=""), question(6, l2=""),
    question(1_000_001, "B"), question(1_000_002, "B", l2="coarse_perception"),
    question(1_000_005, "C", l2="finegrained_perception (cross-instance)", category="animals"),
    question(2_000_003, l2="coarse_perception", category="animals"),
]  # fmt: skip
PREDICTIONS = {1_000_002: "A", 1: "A", 1_000_001: "(B)", 2: "A", 3: "teddy bear", 4: "no idea",
               1_000_005: "It is a cat", 6: "Z"}  # fmt: skip


def part(correct, n):
    return proportion([True] * correct + [False] * (n - correct))


def test_score():
    assert mmbench.score(QUESTIONS, records(PREDICTIONS)) == {
        **part(2, 6),
        "groups": {"LR": part(1, 1), "FP-C": part(1, 1), "CP": part(0, 2)},
        "categories": {"animals": part(1, 2), "pets": part(1, 3)},  # 3 5; 1 2 6
        "vanilla": part(3, 5),  # 1 2 3 of 1 2 3 4 6
        "rows": part(5, 9),
        "missing": 1,
        "unmatched": 1,
        "rule": "2024",
    }
    assert mmbench.score(QUESTIONS, records(PREDICTIONS))["score"] == pytest.approx(100 * 2 / 6)


def test_score_knows_the_six_abilities_in_order():
    names = ["coarse_perception", "finegrained_perception (cross-instance)", "finegrained_perception (instance-level)",
             "relation_reasoning", "attribute_reasoning", "logic_reasoning"]  # fmt: skip
    scores = mmbench.score([question(i, l2=name) for i, name in enumerate(names)], records({0: "A", 2: "A"}))
    assert list(scores["groups"]) == ["LR", "AR", "RR", "FP-S", "FP-C", "CP"]
    assert [group["correct"] for group in scores["groups"].values()] == [0, 0, 0, 1, 0, 1]


def test_score_by_the_rule_of_2026():
    questions = [question(1), question(2, "C")]
    answers = records({1: "A is right for many reasons", 2: "the answer is c"})
    assert (mmbench.score(questions, answers)["correct"], mmbench.score(questions, answers)["unmatched"]) == (1, 1)
    scores = mmbench.score(questions, answers, rule="2026")
    assert (scores["rows"]["correct"], scores["unmatched"], scores["rule"]) == (1, 1, "2026")
    assert scores["vanilla"] == scores["rows"] and scores["score"] == 50


def test_score_with_a_judge():
    # The judge speaks about 4 only; what it says of a matched or a missing row is not listened to.
    judged = {4: "A", 1_000_002: "B", 2_000_003: "A", "random": 1}
    scores = mmbench.score(QUESTIONS, records(PREDICTIONS), judged)
    assert (scores["correct"], scores["rows"]["correct"], scores["vanilla"]["correct"]) == (3, 6, 4)
    assert (scores["unmatched"], scores["judged"], scores["unread"], scores["missing"]) == (1, 1, 1, 1)
    assert mmbench.score(QUESTIONS, records(PREDICTIONS), {4: "Z", "random": 0})["correct"] == 2


def test_score_leaves_empty_groups_out():
    scores = mmbench.score([question(1_000_001, l2="", category="")], [])
    assert "vanilla" not in scores and scores["groups"] == scores["categories"] == {}
    assert (scores["score"], scores["missing"], scores["unmatched"]) == (0, 1, 0)
    mmbench.report(scores)


def test_official_names_text_that_no_file_can_hold(tmp_path):
    with pytest.raises(InputError, match="MMBench answers: 1 .*is not valid Unicode"):
        mmbench.official(loaded(tmp_path, row(1)), records({1: "\ud800"}))


def test_report():
    lines = mmbench.report(mmbench.score(QUESTIONS, records(PREDICTIONS))).split("\n")
    assert lines[:2] == ["MMBench dev: 6 questions in 9 rows, 1 without an answer",
                         "1 answers match no option under rule 2024; they count as wrong"]  # fmt: skip
    values = {line[:42].strip(): line[42:].strip() for line in lines[3:]}
    assert list(values) == ["CircularEval", "vanilla (unrotated options)", "rows", "LR", "FP-C", "CP", "animals",
                            "pets"]  # fmt: skip
    assert values["CircularEval"].startswith("33.3 [9.7, 70.0]") and values["CircularEval"].endswith("n=6")
    assert values["rows"].split() == [*with_interval(part(5, 9)).split(), "n=9"]
    assert values["pets"].split() == [*with_interval(part(1, 3)).split(), "n=3"]

    lines = mmbench.report(mmbench.score(QUESTIONS, records(PREDICTIONS), {4: "A", "random": 1}, "2026")).split("\n")
    assert lines[1] == "1 answers match no option under rule 2026; 1 of them judged, 1 with a random letter"


# ---- judge


class Judge:
    """Answers from a table of replies by `where`, and keeps what it was asked."""

    def __init__(self, replies=(), template="Q {} O {} A {} =", cut=()):
        self.texts, self.replies, self.asked, self.cut = {"template": template}, dict(replies), {}, cut

    def ask(self, where, messages, *, temperature, max_tokens):
        assert where not in self.asked and (temperature, max_tokens) == (0, 1024)
        [message] = messages
        self.asked[where] = message["content"]
        assert message["role"] == "user"
        return Reply(self.replies[where], "judge-1", where in self.cut)

    def map(self, function, items):
        return [function(item) for item in items]


def test_judge_is_asked_about_unmatched_rows():
    judge = Judge({"4, attempt 1": "B."})
    judged = mmbench.judge(QUESTIONS, records(PREDICTIONS), judge)
    assert judged == {4: "B", "random": 0}
    options = "There are several options: \nA. teddy bear\nB. rabbit\nC. cat\nD. dog\n"
    assert judge.asked == {"4, attempt 1": f"Q Which? O {options} A no idea ="}


def test_judge_is_asked_up_to_three_times():
    questions, answers = [question(1), question(2), question(3)], records({1: "?", 2: "?", 3: "?"})
    replies = {"1, attempt 1": "A or B", "1, attempt 2": "the cat", "2, attempt 1": "", "2, attempt 2": "?",
               "2, attempt 3": "Z", "3, attempt 1": "?", "3, attempt 2": "?", "3, attempt 3": "?"}  # fmt: skip
    judge = Judge(replies)
    drawn = random.Random(3).choice(["A", "B", "C", "D", "Z"])
    assert mmbench.judge(questions, answers, judge) == {1: "C", 2: "Z", 3: drawn, "random": 1}
    assert judge.asked.keys() == replies.keys()


def test_a_reply_that_is_cut_off_is_not_read():
    """Its A is an article, or the first of two letters."""
    replies = {f"1, attempt {k}": "A kitten could be" for k in (1, 2, 3)}
    judged = mmbench.judge([question(1)], records({1: "?"}), Judge(replies, cut=replies))
    assert judged["random"] == 1
    scores = mmbench.score([question(1), question(2)], records({1: "?", 2: "A"}), judged)
    assert (scores["judged"], scores["unread"], scores["unread_share"]) == (1, 1, 0.5)


def test_drawn_letters_are_all_options_and_z():
    options = {"A": "yes", "B": "nope"}
    questions = [question(i, options=options) for i in range(60)]
    judge = Judge({f"{i}, attempt {k}": "?" for i in range(60) for k in (1, 2, 3)})
    judged = mmbench.judge(questions, records(dict.fromkeys(range(60), "?")), judge)
    assert judged.pop("random") == 60 and set(judged.values()) == {"A", "B", "Z"}


def test_judge_under_the_rule_of_2026():
    answers = records({1: "A is right for many reasons"})
    assert mmbench.judge([question(1)], answers, Judge()) == {"random": 0}
    judge = Judge({"1, attempt 1": "the answer is d"})
    assert mmbench.judge([question(1)], answers, judge, "2026") == {1: "D", "random": 0}


def test_braces_in_a_question_are_text():
    odd = question(1, options={"A": "{x}", "B": "{0}"}) | {"row": {"question": "{} {y}"}}
    judge = Judge({"1, attempt 1": "A"}, "{}|{}|{}|")
    mmbench.judge([odd], records({1: "{}"}), judge)
    assert judge.asked["1, attempt 1"] == "{} {y}|There are several options: \nA. {x}\nB. {0}\n|{}|"


@pytest.mark.parametrize("template", [None, 5, "", "{} {}", "{} {} {} {}"])
def test_judge_rejects_a_template_without_three_places(template):
    with pytest.raises(InputError, match="^judge prompts, mmbench_match: 'template' is not text with three {}"):
        mmbench.judge(QUESTIONS, records(PREDICTIONS), Judge(template=template))


def test_own_prompts():
    judge = Judge({"4, attempt 1": "A"})
    judge.texts = mmbench.OWN_PROMPTS
    mmbench.judge(QUESTIONS, records(PREDICTIONS), judge)
    assert judge.asked["4, attempt 1"].endswith(
        "Question: Which?\nOptions: There are several options: \nA. teddy bear\nB. rabbit\nC. cat\nD. dog\n\n"
        "Answer: no idea\nLetter: ")  # fmt: skip


# ---- values of the official scorers (skipped where the shared data is not at hand)


@pytest.mark.parametrize("rule", mmbench.RULES)
def test_official_matching(rule):
    cases = shared("mmbench_match.jsonl")
    assert len(cases) == 97
    for case in cases:
        options = {letter: str(text) for letter, text in case["options"].items()}  # cells of a table are text
        assert mmbench.match(case["prediction"], options, rule) == case[f"option_{rule}"], case


@pytest.mark.parametrize("rule", mmbench.RULES)
def test_official_circular_evaluation(tmp_path, rule):
    cases, expected = shared("mmbench_circular.jsonl"), shared("mmbench_circular_expected.json")
    aggregate = shared("expected_aggregates.json")["mmbench_circular.jsonl"]
    rows = [{**row(0), **dict.fromkeys("ABCD", ""), **case} for case in cases]
    questions = loaded(tmp_path, *rows)
    answers = records({case["index"]: case["prediction"] for case in cases})
    scores = mmbench.score(questions, answers, rule=rule)
    assert (scores["n"], scores["rows"]["n"], scores["missing"]) == (aggregate["groups"], aggregate["rows"], 0)
    assert scores["score"] / 100 == pytest.approx(aggregate[f"overall_{rule}"], abs=1e-9)
    assert scores["rows"]["score"] / 100 == pytest.approx(expected["per_row_accuracy"][rule], abs=1e-9)

    values = expected["exact_matching"][rule]
    found = {name: part["score"] / 100 for name, part in {**scores["groups"], **scores["categories"]}.items()}
    assert len(scores["groups"]) == 6 and len(scores["categories"]) == 9
    assert {"split": "dev", "Overall": scores["score"] / 100, **found} == pytest.approx(values, abs=1e-9)

    for group in expected["groups"]:
        own = [q for q in questions if q["group"] == group["g_index"]]
        ids = {q["question_id"] for q in own}
        alone = mmbench.score(own, [a for a in answers if a["question_id"] in ids], rule=rule)
        assert (alone["n"], alone["correct"]) == (1, group[f"hit_{rule}"]), group
    assert len(expected["groups"]) == scores["n"]


@pytest.mark.parametrize("rule", mmbench.RULES)
def test_published_predictions_of_llava_v15_13b(tmp_path, rule):
    cases = shared("mmbench_dev_llava_v1.5_13b.jsonl")
    expected = shared("expected_aggregates.json")["mmbench_dev_llava_v1.5_13b.jsonl"]
    rows = []
    for case in cases:  # the texts of the options were not redistributed
        cells = {letter: f"option {letter}" if letter in case["options"] else "" for letter in "ABCD"}
        rows.append(row(case["index"], **cells, answer=case["answer"]))
    questions = loaded(tmp_path, *rows)
    sheet = written(tmp_path, questions, records({case["index"]: case["prediction"] for case in cases}))
    scores = mmbench.score(questions, mmbench.read_answers(sheet), rule=rule)
    assert scores["score"] == pytest.approx(expected["circular_acc"], abs=1e-6)
    assert expected == {
        "rows": scores["rows"]["n"], "groups": scores["n"], "vanilla_hits_base": scores["vanilla"]["correct"],
        "rows_hits": scores["rows"]["correct"], "circular_hits": scores["correct"],
        "circular_acc": expected["circular_acc"]}  # fmt: skip
    assert (scores["missing"], scores["unmatched"]) == (0, 0)


def test_official_prompts(tmp_path):
    cases = [case for case in shared("prompts.jsonl") if case["benchmark"] == "mmbench"]
    assert len(cases) == 4
    for case in cases:
        item = case["item"]
        options = dict.fromkeys("ABCD", "") | dict(zip("ABCD", item["options"]))
        [q] = loaded(tmp_path, row(1, question=item["question"], hint=item["hint"], **options))
        assert q["prompt"] == case["recorded_prompt"]
        user = with_image(with_description(case["description"], q["text"]) if case["mode"] == "dar" else q["text"])
        assert user == case["user_message"]
        assert TEMPLATES[case["conv"]].prompt(user) == case["full_prompt"]


def test_official_judge_prompt():
    template = shared("judge_prompts.json")[mmbench.PROMPTS]["template"]
    judge = Judge({"4, attempt 1": "A"}, template)
    mmbench.judge(QUESTIONS, records(PREDICTIONS), judge)
    options = "There are several options: \nA. teddy bear\nB. rabbit\nC. cat\nD. dog\n"
    assert judge.asked == {"4, attempt 1": template.format("Which?", options, "no idea")}
