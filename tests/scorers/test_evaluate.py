"""Describe-and-respond: one description per image. If the sequence is too short, the description is cut."""

from dataclasses import replace

import pytest
from PIL import Image

from stic_min import InputError, dar
from stic_min.generate import Sampling
from stic_min.loader import load_llava
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import Ranks
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, with_description, with_image

QUESTION = "What colour is the house?"


@pytest.fixture
def llava(tiny):
    return load_llava(tiny / "llava-v1.6-tiny", image_mode="pad")  # 16 positions per image


@pytest.fixture
def image(tiny):
    return Image.open(tiny / "images" / "scene_01.jpg")


def shorten(llava, length):
    llava.config = replace(llava.config, max_length=length)


def length(llava, user):
    return len(llava.tokenizer.encode_prompt(TEMPLATES[llava.config.template].prompt(with_image(user)))) - 1 + 16


SAMPLING = Sampling(max_new_tokens=8, temperature=0.0, top_p=None, seed=0)


def test_a_long_description_is_cut_to_what_fits(llava, image, capsys):
    description = "A red house with a brown door under a yellow sun. " * 20
    full, empty = length(llava, with_description(description, QUESTION)), length(llava, with_description("", QUESTION))
    assert dar.truncate_description(llava, description, QUESTION, [image], SAMPLING) == description
    assert capsys.readouterr().err == ""
    for limit in (full - 1, full - 50, empty + 3):
        shorten(llava, limit)
        kept = dar.truncate_description(llava, description, QUESTION, [image], SAMPLING)
        assert description.startswith(kept) and len(kept) < len(description)
        assert limit - 4 <= length(llava, with_description(kept, QUESTION)) <= limit  # as much as fits, to a word
        assert capsys.readouterr().err.startswith("warning: a description was truncated from ")
    shorten(llava, empty - 1)
    assert dar.truncate_description(llava, description, QUESTION, [image], SAMPLING) is None


def test_room_is_left_for_an_answer(llava, image):
    """Where the sequence ends with the model's positions, at least 128 tokens or --max-new-tokens are kept free."""
    config = llava.config
    for positions in (300, 400):
        llava.config = replace(config, max_length=positions, decoder=replace(config.decoder, max_positions=positions))
        long = dar.truncate_description(llava, "one two three " * 100, QUESTION, [image], SAMPLING)
        assert positions - 8 - 4 <= length(llava, with_description(long, QUESTION)) <= positions - 8


def test_the_question_is_asked_even_if_no_description_fits(llava, image):
    question = QUESTION * 6
    shorten(llava, length(llava, question))
    assert dar.user_text(llava, question, "A red house.", [image], SAMPLING) == question


def test_what_is_asked(llava, image):
    """The description, if there is one, is put between <image> and the question."""
    text = lambda *parts: dar.user_text(llava, *parts, SAMPLING)
    assert text(QUESTION, None, []) == text(QUESTION, None, [image]) == QUESTION
    assert text("Why?", "A house.", [image]) == "Image description:\nA house.\n\nWhy?"
    assert llava.chat_prompt("Why?").count("<image>\nWhy?") == 1
    expected = llava.generate([llava.chat_prompt(QUESTION)], [[image]], max_new_tokens=8)
    assert [dar.answer_one(llava, QUESTION, [image], SAMPLING, "answer", "question")] == expected


def test_descriptions_in_their_file(llava, image, tmp_path, capsys):
    """One per image, the same for any batch size also when sampled. An unreadable image has none; one that is too large
    for the model's sequence is reported; existing descriptions are not generated again."""
    questions = {"p": [image], "o": [image.rotate(90)], "broken": None, "": []}

    def read(question):
        if question is None:
            raise InputError("no such image")
        return question

    def describe(name, batch_size, questions):
        output = Output(tmp_path / f"{name}.jsonl", "image", {}, Ranks(0, 1, llava.device)).start()
        sampling = replace(SAMPLING, temperature=0.7, batch_size=batch_size)
        return dar.describe_images(llava, questions, read, output, sampling, "scienceqa")

    alone = describe("alone", 1, questions)
    assert list(alone) == ["p", "o", ""] and len(set(alone.values())) == 3
    assert describe("together", 4, questions) == alone
    assert describe("together", 4, {"p": None}) == alone  # read() would fail: it is not called
    assert "4 images to describe, 0 of them" in capsys.readouterr().out
    shorten(llava, length(llava, DESCRIBE_PROMPT) - 1)
    assert list(describe("long", 4, questions)) == [""]
    assert "p is not described" in capsys.readouterr().err
