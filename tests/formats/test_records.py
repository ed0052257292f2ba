"""Data files in the formats of other projects: images as lists, lists of names, preference pairs in every
form."""

import json

import pytest

from stic_min import InputError, data
from stic_min.formats import records
from stic_min.formats.records import IMAGE_KEYS
from stic_min.runtime import files

PARTS = lambda text: [{"type": "image", "text": None}, {"type": "text", "text": text}]
MESSAGE = lambda role, content: {"role": role, "content": content}
LLAVA = lambda *said: [{"from": ("human", "gpt")[i], "value": text} for i, text in enumerate(said)]
QUESTION, GOOD, BAD = "What is it?", "A house.", "A boat."

FORMS = {
    "ours": {
        "image": "a.jpg",
        "chosen": [MESSAGE("user", f"<image>\n{QUESTION}"), MESSAGE("assistant", GOOD)],
        "rejected": [MESSAGE("user", QUESTION), MESSAGE("assistant", BAD)],
    },
    "TRL, prompt in both": {
        "images": ["a.jpg"],
        "chosen": [MESSAGE("user", PARTS(QUESTION)), MESSAGE("assistant", [{"type": "text", "text": GOOD}])],
        "rejected": [MESSAGE("user", PARTS(QUESTION)), MESSAGE("assistant", [{"type": "text", "text": BAD}])],
    },
    "TRL, prompt of parts": {
        "images": ["a.jpg"],
        "prompt": [MESSAGE("user", PARTS(QUESTION))],
        "chosen": [MESSAGE("assistant", [{"type": "text", "text": GOOD}])],
        "rejected": [MESSAGE("assistant", [{"type": "text", "text": BAD}])],
    },
    "TRL, content as text": {
        "image": "a.jpg",
        "prompt": [MESSAGE("user", QUESTION)],
        "chosen": [MESSAGE("assistant", GOOD)],
        "rejected": [MESSAGE("assistant", BAD)],
    },
    "TRL, texts": {"images": ["a.jpg"], "prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "a prompt, and the whole in both": {
        "image": "a.jpg",
        "prompt": QUESTION,
        "chosen": [MESSAGE("user", QUESTION), MESSAGE("assistant", GOOD)],
        "rejected": [MESSAGE("user", QUESTION), MESSAGE("assistant", BAD)],
    },
    "POVID": {
        "id": "1",
        "image": "a.jpg",
        "conversations": LLAVA(f"<image>\n{QUESTION}", GOOD),
        "rejected_conversations": LLAVA(f"<image>\n{QUESTION}", BAD),
    },
    "RLHF-V": {
        "ds_name": "RLHF-V",
        "image": {"bytes": "...", "path": "0.jpg"},
        "text": json.dumps({"question": QUESTION, "chosen": GOOD, "rejected": BAD}),
        "image_path": "a.jpg",
    },
    "RLHF-V, text as an object": {
        "image": "a.jpg",
        "text": {"question": QUESTION, "chosen": GOOD, "rejected": BAD},
        "image_path": "1",
    },
    "RLAIF-V": {"image": {"path": "a.jpg"}, "question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory": {
        "images": ["a.jpg"],
        "conversations": LLAVA(f"<image>{QUESTION}"),
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_are_one_pair(tmp_path, form):
    (tmp_path / "pairs.json").write_text(json.dumps([FORMS[form]]))
    [pair] = data.read_pairs(tmp_path / "pairs.json")
    assert (pair.image, pair.prompt) == ("a.jpg", f"<image>\n{QUESTION}")
    assert (pair.chosen, pair.rejected) == (GOOD, BAD)
    assert pair.chosen_stopped and pair.rejected_stopped and records.record_kind(FORMS[form]) == "pairs"


@pytest.mark.parametrize("change, complaint", [
    ({"prompt": None}, r"chosen is \['assistant'\] instead of one user .*; expected: {\"image\": ..., "),
    ({"prompt": [MESSAGE("system", "Hi"), MESSAGE("user", "Q")]},
     r"\['system', 'user', 'assistant'\] instead"),
    ({"prompt": [MESSAGE("user", "Q"), MESSAGE("assistant", "A")] * 60}, r"\.\.\."),
    ({"images": ["a.jpg", "b.jpg"]}, "2 images, but a sample has one"),
    ({"images": [5]}, "image is not a file name"), ({"images": []}, "no image"),
    ({"chosen": [{"type": "image"}]}, r"chosen is \['user', None\] instead of one user"),
    ({"chosen": " "}, "chosen, assistant: no content")])
def test_unknown_forms_are_an_error_that_gives_the_expected_one(change, complaint):
    with pytest.raises(InputError, match=f"^x.*{complaint}") as error:
        data.parse_pair("x", FORMS["TRL, texts"] | change)
    assert len(str(error.value)) <= 300
    with pytest.raises(InputError, match="x: not a preference pair; expected: "):
        data.parse_pair("x", {"image": "a.jpg", "prompt": "Q", "win": "A", "lose": "B"})


@pytest.mark.parametrize("text", [
    '["a.jpg", "b.jpg"]', '\ufeff[\r\n "a.jpg",\r\n "b.jpg"]', "\ufeffa.jpg\r\n\r\n b.jpg\r\n",
    "a.jpg\nb.jpg"])
def test_lists_of_names(tmp_path, text):
    (tmp_path / "names").write_bytes(text.encode())
    assert records.read_names(tmp_path / "names") == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("text, complaint", [
    ("[]", "no image names"), ("\ufeff\r\n", "no image names"), ('["a.jpg", ', "not JSON"),
    ('{"image": "a.jpg"}', "contains JSON objects, not image names"),
    ('{"description": 1}', "contains descriptions .*, not image names"),
    (json.dumps([FORMS["POVID"]]), "contains preference pairs .*, not image names")])
def test_files_without_names_are_an_error(tmp_path, text, complaint):
    (tmp_path / "names").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"^{tmp_path}/names.*{complaint}"):
        records.read_names(tmp_path / "names")


def test_a_name_that_starts_with_a_bracket(tmp_path):
    (tmp_path / "names").write_text("[1].jpg\n[2].jpg\n")
    assert records.read_names(tmp_path / "names") == ["[1].jpg", "[2].jpg"]


def test_byte_order_marks_and_crlf(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('\ufeff{"a": 1}\r\n{"a": 2}\r\n'.encode())
    assert [record for _, record in files.read_records(tmp_path / "x.jsonl")] == [{"a": 1}, {"a": 2}]
    (tmp_path / "x.json").write_bytes('\ufeff{"a": 1}'.encode())
    assert files.read_json(tmp_path / "x.json") == {"a": 1}


def test_long_names_are_shortened_in_the_middle():
    assert files.brief("a" * 80) == "a" * 80 and files.brief("\n") == "\\n"
    assert files.brief("a" * 60 + "b" * 900 + "c.jpg") == "a" * 50 + "..." + "b" * 22 + "c.jpg"


def test_instructions_without_exactly_one_image_are_skipped(tmp_path):
    talk = LLAVA("Q", "A")
    named = ["a.jpg", "b.jpg"], ["a.jpg"]
    listed = [{"id": i, "image": image, "conversations": talk} for i, image in enumerate(named)]
    listed.append({"id": 2, "image": 5, "conversations": talk})
    listed.append({"id": 3, "images": ["b.jpg"], "conversations": talk})
    path = tmp_path / "x.json"
    path.write_text(json.dumps(listed))
    entries, total = records.image_records(path, skipped := {})
    assert [(key, record["image"]) for _, key, record in entries] == [("1", "a.jpg"), ("3", "b.jpg")]
    assert total == 4
    assert skipped == {"0": f"{path}, record 0: 2 images, but a sample has one",
                       "2": f"{path}, record 2: image is not a file name"}
    infusion = data.Infusion(path)
    described = [{"id": 1, "image": "a.jpg", "description": "D"}, {"image": ["b.jpg"], "description": "D"}]
    assert [infusion("d", record).key for record in described] == ["1", "3"]
    assert infusion.summary().endswith(f"; 2 records skipped, the first: {skipped['0']}")
    with pytest.raises(InputError, match="record 0: 2 images"):
        infusion("d", {"id": 0, "image": "a.jpg", "description": "D"})


def test_instructions_by_image_path(tmp_path):
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "So."}]
    records = [{"id": str(i), key: "a.jpg", "conversations": talk} for i, key in enumerate(IMAGE_KEYS)]
    (tmp_path / "i.json").write_text(json.dumps(records))
    entries, _ = data.image_records(tmp_path / "i.json")
    assert [record["image"] for _, _, record in entries] == ["a.jpg"] * len(records)
