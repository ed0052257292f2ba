"""Describe-and-respond: one description a picture, and where the sequence is short it gives way, never the question."""

from argparse import Namespace
from dataclasses import replace

import pytest
from PIL import Image

from stic_min import InputError, dar
from stic_min.loader import load_llava
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import Ranks
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, with_description, with_image

QUESTION = "What colour is the house?"


@pytest.fixture
def llava(tiny):
    return load_llava(tiny / "llava-v1.6-tiny", image_mode="pad")  # 16 positions a picture


@pytest.fixture
def picture(tiny):
    return Image.open(tiny / "images" / "scene_01.jpg")


def shorten(llava, length):
    llava.config = replace(llava.config, max_length=length)


def length(llava, user):
    return len(llava.tokenizer.encode_prompt(TEMPLATES[llava.config.template].prompt(with_image(user)))) - 1 + 16


def arguments(**more):
    return Namespace(command="scienceqa", max_new_tokens=8, temperature=0.0, top_p=None, seed=0, dar=True, **more)


def test_a_long_description_is_cut_to_what_fits(llava, picture, capsys):
    description = "A red house with a brown door under a yellow sun. " * 20
    full, empty = length(llava, with_description(description, QUESTION)), length(llava, with_description("", QUESTION))
    assert dar.fit(llava, description, QUESTION, [picture], arguments()) == description
    assert capsys.readouterr().err == ""
    for limit in (full - 1, full - 50, empty + 3):
        shorten(llava, limit)
        kept = dar.fit(llava, description, QUESTION, [picture], arguments())
        assert description.startswith(kept) and len(kept) < len(description)
        assert limit - 4 <= length(llava, with_description(kept, QUESTION)) <= limit  # as much as fits, to a word
        assert capsys.readouterr().err.startswith("warning: a description is cut from ")
    shorten(llava, empty - 1)
    assert dar.fit(llava, description, QUESTION, [picture], arguments()) is None


def test_room_is_left_for_an_answer(llava, picture):
    """Where the sequence ends with the model's positions, at least 128 tokens or --max-new-tokens are kept free."""
    config = llava.config
    for positions in (300, 400):
        llava.config = replace(config, max_length=positions, decoder=replace(config.decoder, max_positions=positions))
        long = dar.fit(llava, "one two three " * 100, QUESTION, [picture], arguments())
        assert positions - 8 - 4 <= length(llava, with_description(long, QUESTION)) <= positions - 8


def test_the_question_is_asked_even_if_no_description_fits(llava, picture):
    question = QUESTION * 6
    shorten(llava, length(llava, question))
    assert dar.user_text(llava, question, "A red house.", [picture], arguments()) == with_image(question)


def test_what_is_asked(llava, picture):
    """The description stands behind <image>, if there is one."""
    user = lambda *what: dar.user_text(llava, *what, arguments())
    assert user(QUESTION, None, []) == QUESTION and user(QUESTION, None, [picture]) == with_image(QUESTION)
    assert user("Why?", "A house.", [picture]) == "<image>\nImage description:\nA house.\n\nWhy?"
    prompt = TEMPLATES[llava.config.template].prompt(with_image(QUESTION))
    expected = llava.generate([prompt], [[picture]], max_new_tokens=8)
    assert [dar.say(llava, with_image(QUESTION), [picture], arguments(), "answer", "question")] == expected


def test_descriptions_in_their_file(llava, picture, tmp_path, capsys):
    """One a picture, the same in any batch also where it is sampled; a picture that can't be read has none, and one
    that is too large for the model's sequence says so; what is there is not made again."""
    shown = {"p": [picture], "o": [picture.rotate(90)], "broken": None, "": []}

    def read(question):
        if question is None:
            raise InputError("no such image")
        return question

    def describe(name, batch_size, shown):
        output = Output(tmp_path / f"{name}.jsonl", "image", {}, Ranks(0, 1, None)).start()
        args = arguments(batch_size=batch_size)
        args.temperature = 0.7
        return dar.describe_pictures(llava, shown, read, output, args, 8)

    alone = describe("alone", 1, shown)
    assert list(alone) == ["p", "o", ""] and len(set(alone.values())) == 3
    assert describe("together", 4, shown) == alone
    assert describe("together", 4, {"p": None}) == alone  # read() would fail: it is not called
    assert "4 pictures to describe, 0 of them" in capsys.readouterr().out
    shorten(llava, length(llava, DESCRIBE_PROMPT) - 1)
    assert list(describe("long", 4, shown)) == [""]
    assert "p is not described" in capsys.readouterr().err
