"""The page of a descriptions file: what it counts, shows and escapes."""

import json

import pytest
from pages import Elements, blocks, images_of, index, sources

from stic_min import InputError
from stic_min.report import descriptions
from stic_min.report.options import Options
from stic_min.text import CAPTION_PROMPTS, DESCRIBE_PROMPT

A, B = "scene_01.jpg", "scene_02.png"


def record(i, image=A, description="A red house.", **fields):
    return {"id": f"{i}", "image": image, "prompt": CAPTION_PROMPTS[i % 2], "description": description,
            "finish": "stop", "template": "vicuna_v1", "model": "m"} | fields  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def talk(i, image=A, turns=1):
    conversation = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A <house>."}]
    later = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
    return {"id": f"{i}", "image": image, "conversations": conversation + later * (turns - 1)}


def section(path, **options):
    html = descriptions.section(path, Options(**options))
    return Elements(html), html


def test_counts_settings_and_cards(tiny, tmp_path):
    file = write(tmp_path / "d.jsonl", [
        record(0, finish="length"), record(1, B, "One two three four."), record(2, "gone.jpg", "Red."),
    ])  # fmt: skip
    page, html = section(file, images=[tiny / "images"])
    assert html.startswith("<h2>Descriptions: d.jsonl</h2>")
    [summary, *_] = page.texts("p")
    assert "3 descriptions of 3 images, 2.7 words on average (1 to 4)." in summary  # (3 + 4 + 1) / 3
    assert "1 (33.3%) was cut off" in summary
    cells = page.texts("td")
    assert cells == [CAPTION_PROMPTS[0], "2", "2.0", "1", CAPTION_PROMPTS[1], "1", "4.0", "0"]
    assert page.texts("dd") == ["m", "vicuna_v1"]
    assert [e[1]["alt"] for e in page.all("img")] == [A, B]
    assert all(e[1]["src"].startswith(("data:image/png;", "data:image/jpeg;")) for e in page.all("img"))
    missing = f"The images of 1 of 3 descriptions are missing: not found in {tiny / 'images'}, or not readable."
    assert missing in page.texts("p")
    cards = page.texts("article")
    assert "3 words, cut off at the maximum length" in cards[0] and "4 words, ended by itself" in cards[1]
    assert "no image" in cards[2] and len(blocks(html)) == 1  # one page is enough


def test_instructions_of_the_recorded_command_are_infused(tiny, tmp_path):
    file = write(tmp_path / "d.jsonl", [record(0), record(1, B, "Waves.")])
    (tmp_path / "talks.json").write_text(json.dumps([talk(0, turns=4), talk(1, B)]))
    command = f"generate_pairs.py --describe {tmp_path / 'talks.json'} --images {tiny / 'images'} --out d.jsonl"
    (tmp_path / "d.run.json").write_text(json.dumps({"record": {"command": command}}))
    page, _ = section(file)
    first, second = page.texts("pre")
    # As train_stage2.py builds it: image, description, instruction; then the answer and the end token.
    system = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
              "detailed, and polite answers to the user's questions. ")  # fmt: skip
    assert second == system + (
        "USER: <image>\nImage description:\nWaves.\n\nWhat? ASSISTANT: A <house>.</s>"
    )
    assert first == system + (
        "USER: <image>\nImage description:\nA red house.\n\nWhat? ASSISTANT: A <house>.</s>"
        "USER: Where? ASSISTANT: There.</s>\n(2 more turns)"
    )
    assert page.texts("mark")[1:] == ["Image description:\nA red house.\n\n", "Image description:\nWaves.\n\n"]
    assert [e[1]["alt"] for e in page.all("img")] == [A, B]  # the recorded --images
    assert not any("placeholder" in text for text in page.texts("p"))


@pytest.mark.parametrize("case", ["no record", "moved", "other"])
def test_unknown_instructions_become_a_placeholder(tmp_path, case):
    file = write(tmp_path / "d.jsonl", [record(0)])
    expected = {"no record": "is not recorded", "moved": "talks.json, is not where it was",
                "other": "talks.json does not have the instructions of these"}  # fmt: skip
    if case != "no record":
        command = f"generate_pairs.py --describe={tmp_path / 'talks.json'} --images {tmp_path / 'gone'}"
        (tmp_path / "d.run.json").write_text(json.dumps({"record": {"command": command}}))
    if case == "other":
        (tmp_path / "talks.json").write_text(json.dumps([talk(7)]))
    page, html = section(file)
    assert any(expected[case] in text for text in page.texts("p")) and str(tmp_path) not in html
    [prompt] = page.texts("pre")
    assert prompt.endswith(
        "USER: <image>\nImage description:\nA red house.\n\n(the instruction about this image) ASSISTANT:"
    )


def test_published_files_without_records(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"image": A, "description": "A house."}, {"image": B, "description": "A boat."}]))
    page, _ = section(file)
    text = " ".join(page.texts("p"))
    assert "How they ended is not recorded." in text and "Their prompts are not recorded." in text
    assert "mistral_instruct, an assumption" in text and "pass their folder with --images" in text
    assert page.texts("pre")[0].startswith("[INST] <image>\nImage description:\nA house.")


def test_descriptions_of_evaluate(tiny, tmp_path):
    settings = {"benchmark": "scienceqa", "mode": "dar", "template": "mistral_instruct"}
    dar = {"image": f"images/{A}", "description": "A house.", "finish": "stop"} | settings
    page, _ = section(write(tmp_path / "x-dar.descriptions.jsonl", [dar]), data=[tiny])
    assert page.texts("td")[0] == DESCRIBE_PROMPT and len(page.all("img")) == 1
    assert "(the question about this image) [/INST]" in page.texts("pre")[0]
    blind = dar | {"image": "", "mode": "blind-dar"}
    page, _ = section(write(tmp_path / "x-blind-dar.descriptions.jsonl", [blind]), data=[tiny])
    assert "generated without seeing an image" in page.texts("p")[0]
    assert page.texts("pre")[0].startswith("[INST] Image description:\n") and not page.all("img")


def test_text_is_escaped(tiny, tmp_path):
    evil = "</script><script>alert(1)</script> & <b>"
    records = [record(i, A, f"{evil} {i}", prompt=evil, model=evil) for i in range(60)]
    page, html = section(write(tmp_path / "<i>.jsonl", records), images=[tiny / "images"])
    assert "<script>alert" not in html and "<b> 3" not in html
    assert page.texts("h2") == ["Descriptions: <i>.jsonl"]
    assert page.texts("p", **{"class": "text"})[:2] == [f"{evil} 0", f"{evil} 1"]
    data = [e for e in page.all("script") if e[1].get("type") == "application/json"]
    assert len(data) == 3 and len(page.all("script")) == 4  # index, two more pages, the program
    for block in data[1:]:
        assert "<" not in block[2]
        inner = Elements("".join(json.loads(block[2])))
        assert inner.texts("p", **{"class": "text"})[0].startswith(evil) and not inner.all("script")


def test_paging_keeps_every_description_once(tiny, tmp_path):
    records = [record(i, description=f"Number {i}.", finish="length" if i % 10 == 0 else "stop") for i in range(50)]
    page, html = section(write(tmp_path / "d.jsonl", records), images=[tiny / "images"])
    cut = [int(i % 10 == 0) for i in range(50)]
    assert index(html) == {"noun": "descriptions", "count": 50, "filters": [cut]}
    cards = [card for block in blocks(html) for card in block]
    assert [f"Number {i}." in card for i, card in enumerate(cards)] == [True] * 50
    assert len(page.all("article")) == 24 and [len(block) for block in blocks(html)] == [24, 24, 2]
    assert images_of(html) == [[uri] for uri in sources(html).values()] * 50
    assert page.all("button") and page.all("select") and page.all("noscript")


def test_page_is_written_next_to_the_file(tiny, tmp_path):
    file = write(tmp_path / "d.jsonl", [record(0)])
    (tmp_path / "d.jsonl.lock").touch()
    out = descriptions.write(file, Options(images=[tiny / "images"]))
    assert out == tmp_path / "d.html"
    html = out.read_text()
    assert html.startswith("<!doctype html>") and "file is incomplete" in html
    assert "<h1>Descriptions: d.jsonl</h1>" in html and "<h2>Gallery</h2>" in html


def test_bad_records_name_file_and_record(tmp_path):
    cases = [([record(0), record(1, description=3)], "d.jsonl, line 2: no description"),
             ([record(0, image=None)], "d.jsonl, line 1: no image"),
             ([{"id": "a", "conversations": []}], "d.jsonl contains instructions")]  # fmt: skip
    for records, message in cases:
        with pytest.raises(InputError, match=message):
            descriptions.section(write(tmp_path / "d.jsonl", records), Options())
