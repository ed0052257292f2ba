"""Lessons in criticism and questions: references, verdicts, balance, scores, and the checkpoint."""

import json
import random
import re
import sys
from collections import Counter

import pytest

from stic_min import InputError
from stic_min.loader import load_llava
from stic_min.neighbours import triplets
from stic_min.neighbours.sima_critic import parse_verdict
from stic_min.text import CAPTION_PROMPTS
from stic_min.toy import lessons, pretrain, recipe, world
from stic_min.toy.neighbours_quality import wrong_objects

# A beach whose yellow star (upper right) is present and whose red triangle (lower left) is not.
TRUE = world.Scene("beach", ((2, "yellow star"), (4, "blue ring"), (6, "red heart")))
USUAL = world.Scene("beach", ((2, "yellow star"), (4, "blue ring"), (6, "red triangle")))
IMAGINED = world.Scene("beach", ((2, "yellow star"), (4, "black moon"), (6, "red triangle")))
TRUE_CAPTION = "A beach. Upper right: yellow star. Center: blue ring. Lower left: red heart."
USUAL_CAPTION = "A beach. Upper right: yellow star. Center: blue ring. Lower left: red triangle."


def test_the_verdict_is_for_fewer_mistakes():
    assert lessons.mistakes(TRUE, TRUE) == [] and lessons.mistakes(TRUE, USUAL) == ["red triangle"]
    assert lessons.judge(TRUE, [TRUE, USUAL]) == "1: none. 2: red triangle. [[1]]"
    assert lessons.judge(TRUE, [USUAL, TRUE]) == "1: red triangle. 2: none. [[2]]"
    assert lessons.judge(TRUE, [IMAGINED, USUAL]) == "1: black moon, red triangle. 2: red triangle. [[2]]"


def test_the_critic_reads_question_reference_and_both_captions():
    rng = random.Random(0)
    user, answer = lessons.critic_turn(TRUE, [USUAL, TRUE], rng, with_reference=True)
    description, reference, empty, question, *case = user.split("\n")
    assert (description, reference, empty) == ("Image description:", TRUE_CAPTION, "") and question in CAPTION_PROMPTS
    assert case == [f"1: {USUAL_CAPTION}", f"2: {TRUE_CAPTION}", "What objects are absent?"]
    assert parse_verdict(answer) == (2, "")
    user, same = lessons.critic_turn(TRUE, [USUAL, TRUE], rng, with_reference=False)
    assert user.split("\n")[1:] == case and user.split("\n")[0] in CAPTION_PROMPTS and same == answer


def test_lessons_are_balanced_and_true():
    """In 2,000 records: the shares of the kinds, both verdicts equally often, no tie, reasons that are facts."""
    rng, kinds, verdicts = random.Random(0), Counter(), Counter()
    scenes = world.scenes("train", 500)
    for scene in 4 * scenes:
        has_picture, [(user, answer), *later] = lessons.record(scene, rng)
        if user.endswith("What objects are absent?"):
            assert has_picture and not later
            kinds["critic" if user.startswith("Image description:") else "critic without reference"] += 1
            *reference, first, second, _ = user.split("\n")
            assert world.true_caption(scene) in reference or not user.startswith("Image description:")
            wrong = [wrong_objects(scene, caption) for caption in (first, second)]
            stated = re.fullmatch(r"1: (.*)\. 2: (.*)\. \[\[.\]\]", answer).groups()
            assert [[] if text == "none" else text.split(", ") for text in stated] == wrong
            verdict = parse_verdict(answer)[0]
            assert len(wrong[verdict - 1]) < len(wrong[2 - verdict])
            verdicts[verdict] += 1
        elif user == triplets.BOTH_PROMPT:
            kinds["both"] += 1
            assert triplets.parse_form(answer)
        elif user.startswith(triplets.QUESTION_PROMPT.split("{")[0]):
            kinds["question"] += 1
        else:
            kinds["ordinary"] += 1
    for kind, share in [*lessons.SHARES.items(), ("ordinary", 0.5)]:
        assert abs(kinds[kind] / 2000 - share) < 0.03, kind
    assert abs(verdicts[1] / sum(verdicts.values()) - 0.5) < 0.05


def test_lessons_fit_the_model():
    """The longest lesson, and a critique of two captions by the model, leave room in 512 positions."""
    tokenizer = load_llava(recipe.BASE).tokenizer
    scene = world.Scene("glacier", tuple((cell, "white diamond") for cell in range(6)))
    turn = lessons.critic_turn(scene, [scene, scene], random.Random(0), with_reference=True)
    assert len(pretrain.encode((True, [turn]), 0, tokenizer)[0]) < pretrain.MAX_POSITIONS - 128


def test_critic_scores_by_hand():
    """Three cases: right in both orders, always verdict 1, and one verdict missing."""
    scores = lessons.critic_scores([(1, 2), (1, 1), (2, None)], right=[1, 1, 2])
    assert scores == {"accuracy": 66.67, "no_verdict": 16.67, "verdict_1": 60.0, "agree": 33.33}
    assert lessons.critic_scores([(None, None)], [1]) == {
        "accuracy": 0.0, "no_verdict": 100.0, "verdict_1": None, "agree": 0.0
    }  # fmt: skip


def test_lessons_write_an_ordinary_checkpoint(tmp_path, monkeypatch):
    """A few steps from the project's base model: equal seeds give equal weights, and no weight of the ViT changes."""
    scores = lessons.dev_scores
    monkeypatch.setattr(lessons, "dev_scores", lambda llava: scores(llava, count=4))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = "--model", recipe.BASE, "--out", tmp_path / name, "--seed", seed, "--scenes", 50, "--steps", 2
        monkeypatch.setattr(sys, "argv", ["lessons", *map(str, flags)])
        lessons.main()
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    record = json.loads((tmp_path / "c/pretrain.json").read_text())
    assert record["command"].startswith("python -m stic_min.toy.lessons --model llava-toy --out c --seed 1 ")
    assert record["model_command"].startswith("python -m stic_min.toy.pretrain ")
    assert record["dev"].keys() >= {"critic", "critic without reference", "triplets", "questions"}
    assert record["dev"]["critic"]["n"] == 4
    base, taught = (dict(load_llava(path).named_parameters()) for path in (recipe.BASE, tmp_path / "a"))
    changed = {name for name in base if not base[name].equal(taught[name])}
    assert changed and not any(name.startswith("vision_tower.") for name in changed)
    with pytest.raises(InputError, match="contains a model"):
        lessons.main()
