"""ScienceQA: every rule on cases written by hand, then the official values for published predictions."""

import json

import pytest
from official import shared

from stic_min import InputError
from stic_min.scorers import scienceqa
from stic_min.text import TEMPLATES, with_description, with_image

SENTENCE = "Answer with the option's letter from the given choices directly."


# ---- parsing

@pytest.mark.parametrize("text, letter", [
    # rule 1: the whole text is a letter A-E
    ("A", "A"), ("E", "E"), ("F", "FAILED"), ("b", "FAILED"), ("", "FAILED"), (" B", "FAILED"),
    ("B\n", "FAILED"), ("AB", "FAILED"), ("ABCDE", "FAILED"),
    # rule 2: a letter A-E, a full stop, a space
    ("B. rock", "B"), ("E. ", "E"), ("A. x B. y", "A"), ("B.", "FAILED"), ("B.rock", "FAILED"),
    ("B.\nrock", "FAILED"), ("(B)", "FAILED"), ("B) x", "FAILED"), ("b. rock", "FAILED"),
    ("F. rock", "FAILED"), (" B. rock", "FAILED"),
    # rule 3: exactly one "The answer is X" with any one character but a newline after it
    ("The answer is B.", "B"), ("So The answer is D, yes", "D"), ("The answer is Because", "B"),
    ("The answer is Z.", "Z"), ("The answer is B", "FAILED"), ("The answer is B\n", "FAILED"),
    ("The answer is b.", "FAILED"), ("the answer is B.", "FAILED"), ("The answer is (B).", "FAILED"),
    ("The answer is B. The answer is B.", "FAILED"), ("The answer is B. The answer is C", "B"),
    # the order: rule 2 before rule 3, and rule 3 still applies after "C;"
    ("D. The answer is E.", "D"), ("C; The answer is D.", "D"),
])
def test_parse(text, letter):
    assert scienceqa.parse(text) == letter


@pytest.mark.parametrize("text, num_choices, index", [
    ("A", 2, 0), ("B", 2, 1), ("C", 2, -1), ("C", 3, 2), ("E", 5, 4), ("no idea", 2, -1),
    ("The answer is C.", 2, -1), ("The answer is F.", 6, -1), ("The answer is Z.", 26, -1)])
def test_predicted_index(text, num_choices, index):
    assert scienceqa.predicted_index(text, num_choices) == index


@pytest.mark.parametrize("text, letter", [
    # outer blanks and the case of a lone letter do not count
    ("A", "A"), ("e", "E"), (" b\n", "B"), ("F", "FAILED"), ("AB", "FAILED"), ("", "FAILED"), (" ", "FAILED"),
    # a capital and a full stop, whatever comes then
    ("B.", "B"), ("B.rock", "B"), ("B.\nrock", "B"), (" B. rock", "B"), ("b.", "FAILED"), ("b. rock", "FAILED"),
    ("F. rock", "FAILED"), ("B) x", "FAILED"), ("(B)", "FAILED"),
    # and no sentence
    ("The answer is B.", "FAILED"),
])  # fmt: skip
def test_parse_lmms_eval(text, letter):
    assert scienceqa.parse_lmms_eval(text) == letter


@pytest.mark.parametrize("text, num_choices, llava, lmms_eval", [
    ("B.", 2, -1, 1), ("c", 2, -1, -1), ("c", 3, -1, 2), ("The answer is B.", 2, 1, -1), ("B. rock", 2, 1, 1)])
def test_predicted_index_by_rule(text, num_choices, llava, lmms_eval):
    assert scienceqa.RULES == ("llava", "lmms_eval")
    assert scienceqa.predicted_index(text, num_choices, "llava") == llava
    assert scienceqa.predicted_index(text, num_choices, "lmms_eval") == lmms_eval


# ---- prompts and loading

def problem(**fields):
    return {"question": "Which is a liquid?", "choices": ["milk", "rock"], "answer": 0, "hint": "",
            "image": None, "subject": "natural science", "grade": "grade2", **fields}


def write(folder, problems, ids):
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["0"], "test": ids}))


@pytest.mark.parametrize("fields, text", [
    ({}, "Which is a liquid?\nA. milk\nB. rock"),
    ({"hint": "Look."}, "Context: Look.\nWhich is a liquid?\nA. milk\nB. rock"),
    ({"choices": list("vwxyz")}, "Which is a liquid?\nA. v\nB. w\nC. x\nD. y\nE. z"),
    # one pass from the left: 2 spaces -> 1, 3 -> 2 (a pair and a single), 4 -> 2, and no second pass
    ({"question": "a  b   c    d"}, "a b  c  d\nA. milk\nB. rock"),
    ({"hint": " x"}, "Context: x\nWhich is a liquid?\nA. milk\nB. rock"),  # "Context: " + " x" is a pair
    ({"question": "\n q ", "choices": ["m", "r \n"]}, "q \nA. m\nB. r"),  # stripped at the ends only
])
def test_prompt(fields, text):
    assert scienceqa.prompt(problem(**fields)) == text


def test_load(tmp_path):
    pictured = problem(hint="Look.", image="image.png", answer=1)
    write(tmp_path, {"7": problem(), "12": pictured, "0": problem()}, ["12", "7"])
    first, second = scienceqa.load(tmp_path)
    assert first == {
        "question_id": "12", "image": "images/test/12/image.png", "answer": 1, "choices": ["milk", "rock"],
        "text": f"Context: Look.\nWhich is a liquid?\nA. milk\nB. rock\n{SENTENCE}", "hint": "Look.",
        "subject": "natural science", "grade": "grade2"}
    assert (second["question_id"], second["image"], second["hint"]) == ("7", None, "")
    assert second["text"] == f"Which is a liquid?\nA. milk\nB. rock\n{SENTENCE}"
    assert scienceqa.load(str(tmp_path)) == [first, second]


def test_load_takes_problems_without_the_optional_fields(tmp_path):
    write(tmp_path, {"7": {"question": "q", "choices": ["m"], "answer": 0}}, ["7"])
    assert scienceqa.load(tmp_path) == [{
        "question_id": "7", "image": None, "text": f"q\nA. m\n{SENTENCE}", "answer": 0, "choices": ["m"],
        "hint": "", "subject": None, "grade": None}]


@pytest.mark.parametrize("problems, ids, named", [
    ({"7": problem()}, ["8"], "pid_splits.json: test id '8'"),
    ({"7": problem()}, ["7", "7"], "pid_splits.json: 'test' is not a list of distinct ids"),
    ({"7": problem()}, None, "pid_splits.json: 'test' is not a list of distinct ids"),
    ({"7": problem(answer=2)}, ["7"], "problems.json: problem '7': answer 2"),
    ({"7": problem(answer=-1)}, ["7"], "problems.json: problem '7': answer -1"),
    ({"7": problem(answer="A")}, ["7"], "problems.json: problem '7': answer 'A'"),
    ({"7": problem(choices=None)}, ["7"], "problems.json: problem '7' needs"),
    ({"7": problem(question=None)}, ["7"], "problems.json: problem '7' needs"),
    ({"7": problem(image="../../secret.png")}, ["7"], "problems.json: problem '7': image '../../secret.png'"),
    ({"7": problem(image="..")}, ["7"], "problems.json: problem '7': image '..'"),
    ({"7": problem(image="sub/x.png")}, ["7"], "problems.json: problem '7': image 'sub/x.png'"),
    ([], ["7"], "problems.json: not a JSON object"),
    ({"7": problem(image=5)}, ["7"], "problems.json: problem '7': image 5 is not text"),
    ({"7": problem(hint=["x"])}, ["7"], "problems.json: problem '7': hint ['x'] is not text"),
    ({"7": problem(subject={})}, ["7"], "problems.json: problem '7': subject {} is not text"),
    ({"7": problem(grade=[2])}, ["7"], "problems.json: problem '7': grade [2] is not text"),
    ({"7": problem(question="\ud800")}, ["7"], "problems.json: problem '7': prompt \"\\ud800\\nA. milk"),
])
def test_load_rejects(tmp_path, problems, ids, named):
    write(tmp_path, problems, ids)
    with pytest.raises(InputError) as error:
        scienceqa.load(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


# ---- scores

def question(qid, answer=0, image=None, hint="", subject=None, grade=None, num_choices=2):
    return {"question_id": qid, "answer": answer, "image": image, "hint": hint, "subject": subject,
            "grade": grade, "choices": [""] * num_choices}


# id  image hint subject grade | answer  prediction            right
# 1   yes   yes  NAT     6     | A       "A"                   yes
# 2   yes   no   SOC     7     | B       "B. rock"             yes, but its recorded prompt has no <image>
# 3   no    yes  LAN     1     | A       "The answer is B."    no
# 4   no    no   NAT     12    | B       "B."                  no
# 5   yes   no   -       -     | A       missing               no
# 6   no    no   -       -     | C of 2  "C" is out of range   no (answer 2 stands for a damaged key)
# 7   yes   yes  NAT     2     | A       "(A)"                 no
QUESTIONS = [
    question("1", 0, "i.png", "h", "natural science", "grade6"),
    question("2", 1, "i.png", "", "social science", "grade7"),
    question("3", 0, None, "h", "language science", "grade1"),
    question("4", 1, None, "", "natural science", "grade12"),
    question("5", 0, "i.png", ""),
    question("6", 2, None, ""),
    question("7", 0, "i.png", "h", "natural science", "grade2"),
]
ANSWERS = [
    {"question_id": "7", "prompt": "<image>\nq", "text": "(A)"},
    {"question_id": "1", "prompt": "<image>\nq", "text": "A"},
    {"question_id": "2", "prompt": "q", "text": "B. rock"},
    {"question_id": "3", "prompt": "q", "text": "The answer is B."},
    {"question_id": "4", "prompt": "q", "text": "B."},
    {"question_id": "6", "prompt": "q", "text": "C"},
]


def counts(scores):
    """The groups without their intervals."""
    return {group: {"n": own["n"], "correct": own["correct"], "acc": round(own["score"], 2)}
            for group, own in scores["groups"].items()}  # fmt: skip


def test_score():
    def group(correct, n, acc):
        return {"n": n, "correct": correct, "acc": acc}
    scores = scienceqa.score(QUESTIONS, ANSWERS)
    assert counts(scores) == {
        "average": group(2, 7, 28.57),  # 1 and 2
        "IMG": group(2, 4, 50.0),  # 1 2 5 7: the missing one is in it
        "TXT": group(1, 3, 33.33),  # 1 3 7
        "NO": group(0, 2, 0.0),  # 4 6
        "NAT": group(1, 3, 33.33),  # 1 4 7
        "SOC": group(1, 1, 100.0),  # 2
        "LAN": group(0, 1, 0.0),  # 3
        "G1-6": group(1, 3, 33.33),  # 1 3 7
        "G7-12": group(1, 2, 50.0),  # 2 4
        "img_acc": group(1, 2, 50.0),  # 1 7: by prompt, so neither 2 nor the missing 5
    }
    assert scores.pop("groups")["IMG"] == {name: scores.pop(name) for name in ("score", "interval", "n", "correct")}
    assert scores == {"missing": 1, "rule": "llava"}


def test_score_is_exact_and_has_wilson_intervals():
    groups = scienceqa.score(QUESTIONS, ANSWERS)["groups"]
    assert groups["average"]["score"] == pytest.approx(200 / 7, abs=1e-12)
    # 2 of 4: centre 50, half width 100 * z / (4 + z^2) * sqrt(1 + z^2 / 4), z = 1.96
    assert groups["IMG"]["interval"] == pytest.approx([15.00, 85.00], abs=0.01)


def test_score_by_the_rule_of_lmms_eval():
    """4's "B." counts there; a sentence ("The answer is B.") would not, were it right."""
    scores = scienceqa.score(QUESTIONS, ANSWERS, rule="lmms_eval")
    assert scores["rule"] == "lmms_eval"
    found = counts(scores)
    assert (found["average"]["correct"], found["IMG"]["correct"], found["NO"]["correct"]) == (3, 2, 1)
    sentence = [{"question_id": "1", "prompt": "", "text": "The answer is A."}]
    assert scienceqa.score([question("1")], sentence)["score"] == 100
    assert scienceqa.score([question("1")], sentence, rule="lmms_eval")["score"] == 0


def test_score_leaves_empty_groups_out():
    right = {"n": 1, "correct": 1, "acc": 100.0}
    scores = scienceqa.score([question("1", hint="h")], [{"question_id": "1", "text": "A"}])
    assert counts(scores) == {"average": right, "TXT": right}
    # without images the headline is the average
    assert (scores["score"], scores["n"], scores["correct"], scores["missing"]) == (100, 1, 1, 0)
    assert scores["interval"] == scores["groups"]["average"]["interval"]


@pytest.mark.parametrize("recorded", [None, 5, ["<"], ""])
def test_a_recorded_prompt_may_be_anything(recorded):
    scores = scienceqa.score([question("1")], [{"question_id": "1", "text": "A", "prompt": recorded}])
    assert "img_acc" not in scores["groups"]


def test_report():
    lines = scienceqa.report(scienceqa.score(QUESTIONS, ANSWERS)).split("\n")
    assert lines[0] == "ScienceQA test: 7 questions, 1 without a prediction; accuracy in %, rule llava"
    assert lines[2] == "IMG        50.00 [15.00, 85.00]   n=4"
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert list(cells) == ["average", "IMG", "TXT", "NO", "NAT", "SOC", "LAN", "G1-6", "G7-12", "img_acc"]
    assert cells["average"][0] == "28.57" and cells["img_acc"][0] == "50.00"
    assert (cells["NAT"][0], cells["NAT"][-1]) == ("33.33", "n=3")
    assert (cells["G7-12"][0], cells["G7-12"][-1]) == ("50.00", "n=2")
    assert "does not say" in lines[-1] and "IMG (with an image) is what LLaVA publishes for v1.5" in lines[-1]


def test_report_without_images_has_no_line_for_img():
    scores = scienceqa.score([question("1")], [{"question_id": "1", "text": "A"}])
    assert [line.split()[:2] for line in scienceqa.report(scores).split("\n")[1:-1]] == [
        ["average", "100.00"], ["NO", "100.00"]]  # fmt: skip


# ---- values of the official scorers (skipped where the shared data is not at hand)

def test_official_parser():
    rows = shared("scienceqa_parse.jsonl")
    assert len(rows) == 125
    for r in rows:
        index = scienceqa.predicted_index(r["text"], r["num_choices"])
        assert (scienceqa.parse(r["text"]), index) == (r["parsed"], r["pred_idx"]), r
        assert (index == r["answer"]) == r["correct"], r
        lenient = scienceqa.predicted_index(r["text"], r["num_choices"], "lmms_eval")
        assert (lenient == r["answer"]) == r["lmms_eval_correct"], r
    assert sum(r["correct"] != r["lmms_eval_correct"] for r in rows) == 3


def test_official_aggregate_of_the_parser_cases():
    rows = shared("scienceqa_parse.jsonl")
    expected = shared("expected_aggregates.json")["scienceqa_parse.jsonl"]
    questions = [question(r["id"], r["answer"], num_choices=r["num_choices"]) for r in rows]
    answers = [{"question_id": r["id"], "text": r["text"]} for r in rows]
    scores = scienceqa.score(questions, answers)
    assert {"n": scores["n"], "correct": scores["correct"]} == {"n": expected["n"], "correct": expected["correct"]}
    assert scores["score"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert scienceqa.score(questions, answers, rule="lmms_eval")["correct"] == 7


def test_published_predictions_of_llava_v15_13b():
    key, rows = shared("scienceqa_test_key.jsonl"), shared("scienceqa_pred_llava_v1.5_13b.jsonl")
    expected = shared("expected_aggregates.json")["scienceqa_pred_llava_v1.5_13b.jsonl"]["from_text"]
    key = {k["qid"]: k for k in key}
    assert len(rows) == len(key) == 4241
    for r in rows:
        index = scienceqa.predicted_index(r["text"], key[r["qid"]]["num_choices"])
        assert (scienceqa.parse(r["text"]), index) == (r["parsed"], r["pred_idx"]), r

    questions = [question(qid, k["answer"], "i.png" if k["has_image"] else None, "h" if k["has_text"] else "",
                          k.get("subject"), k.get("grade"), k["num_choices"]) for qid, k in key.items()]
    answers = [{"question_id": r["qid"], "text": r["text"],
                "prompt": "<image>\nq" if key[r["qid"]]["has_image"] else "q"} for r in rows]
    scores = scienceqa.score(questions, answers)
    expected.update({g.replace("_", "-"): v for g, v in expected.pop("partial_metadata_subset").items()})
    assert counts(scores) == {**expected, "img_acc": expected["IMG"]} and scores["missing"] == 0
    found = counts(scores)
    assert (found["average"]["acc"], found["img_acc"]["acc"], round(scores["score"], 2)) == (74.39, 71.64, 71.64)
    whole = shared("expected_aggregates.json")["scienceqa_pred_llava_v1.5_13b.jsonl"]["published_file_acc"]
    assert scores["groups"]["average"]["score"] == pytest.approx(whole, abs=1e-6)


def test_official_prompts(tmp_path):
    rows = [r for r in shared("prompts.jsonl") if r["benchmark"] == "scienceqa"]
    assert len(rows) == 6
    for r in rows:
        item = r["item"]
        picture = "image.png" if item["has_image"] else None
        write(tmp_path, {"1": {"answer": 0, "image": picture, **item}}, ["1"])
        [q] = scienceqa.load(tmp_path)
        image = "<image>\n" if q["image"] else ""
        dar = f"Image description:\n{r['description']}\n\n" if r["mode"] == "dar" else ""
        assert image + q["text"] == r["recorded_prompt"]
        assert image + dar + q["text"] == r["user_message"]
        text = with_description(r["description"], q["text"]) if r["mode"] == "dar" else q["text"]
        user = with_image(text) if q["image"] else text
        assert user == r["user_message"] and TEMPLATES[r["conv"]].prompt(user) == r["full_prompt"]
