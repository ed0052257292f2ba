"""Describe-and-respond where the model's sequence is short: the description gives way, the question never does."""

from argparse import Namespace
from dataclasses import replace

import pytest
from PIL import Image

import evaluate
from stic_min import sampler
from stic_min.loader import load_llava
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, infused, with_image

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
    return Namespace(max_new_tokens=8, temperature=0.0, top_p=None, seed=0, dar=True, **more)


def test_a_long_description_is_cut_to_what_fits(llava, picture, capsys):
    description = "A red house with a brown door under a yellow sun. " * 20
    full, empty = length(llava, infused(description, QUESTION)), length(llava, infused("", QUESTION))
    assert evaluate.fit(llava, description, QUESTION, [picture], arguments()) == description
    assert capsys.readouterr().err == ""
    for limit in (full - 1, full - 50, empty + 3):
        shorten(llava, limit)
        kept = evaluate.fit(llava, description, QUESTION, [picture], arguments())
        assert description.startswith(kept) and len(kept) < len(description)
        assert limit - 4 <= length(llava, infused(kept, QUESTION)) <= limit  # as much as fits, to a word
        assert capsys.readouterr().err.startswith("warning: a description is cut from ")
    shorten(llava, empty - 1)
    assert evaluate.fit(llava, description, QUESTION, [picture], arguments()) is None


def test_room_is_left_for_an_answer(llava, picture):
    """Where the sequence ends with the model's positions, at least 128 tokens or --max-new-tokens are kept free."""
    config = llava.config
    for positions in (300, 400):
        llava.config = replace(config, max_length=positions, decoder=replace(config.decoder, max_positions=positions))
        long = evaluate.fit(llava, "one two three " * 100, QUESTION, [picture], arguments())
        assert positions - 8 - 4 <= length(llava, infused(long, QUESTION)) <= positions - 8


def test_the_question_is_asked_even_if_no_description_fits(llava, picture, monkeypatch):
    question = QUESTION * 6
    assert length(llava, question) > length(llava, DESCRIBE_PROMPT)
    shorten(llava, length(llava, question))
    prompts, sample = [], sampler.sample

    def record(llava, asked, *rest, **options):
        prompts.extend(asked)
        return sample(llava, asked, *rest, **options)

    monkeypatch.setattr(sampler, "sample", record)
    [text], [description] = evaluate.answer(llava, ["q"], [question], ["p"], [[picture]], arguments())
    template = TEMPLATES[llava.config.template]
    assert prompts == [template.prompt(with_image(user)) for user in (DESCRIBE_PROMPT, question)]
    assert text and description is None


def test_what_is_not_there_is_not_described(llava, picture, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "ask", lambda llava, names, texts, *_: asked.append((names, texts)) or texts)
    pictures = [None, "p"], [[], [picture]]
    answers, descriptions = evaluate.answer(llava, ["a", "b"], [QUESTION, "Why?"], *pictures, arguments())
    assert asked[0] == (["p"], [with_image(DESCRIBE_PROMPT)])
    described = with_image(infused(with_image(DESCRIBE_PROMPT), "Why?"))  # the stand-in describes by its prompt
    assert answers == [QUESTION, described] and descriptions == [None, with_image(DESCRIBE_PROMPT)]


def test_one_description_a_picture(llava, picture):
    """Questions about the same picture share its description, also where it is sampled, whatever the batch."""
    other, args = picture.rotate(90), arguments()
    args.temperature = 0.7
    asked = [("a", QUESTION, "p", [picture]), ("b", "Why?", "p", [picture]), ("c", QUESTION, "o", [other])]
    _, together = evaluate.answer(llava, *map(list, zip(*asked)), args)
    assert together[0] == together[1] != together[2]
    alone = [evaluate.answer(llava, *([part] for part in question), args)[1][0] for question in asked]
    assert alone == together
