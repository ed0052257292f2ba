"""evaluate.py: direct answers, and describe-and-respond (DaR)."""

import json
from pathlib import Path

import pytest
from commands import call, lines

from stic_min import InputError, sampler
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.runtime.work import row_seed
from stic_min.text import TEMPLATES, with_description, with_image

QUESTION = "What is in the picture?"


@pytest.fixture
def ask(runs):
    """`evaluate.py ask` with the adapter of stage 2, and the same model."""
    adapter = runs.out / "stage2"
    options = ["--model", runs.model, "--adapter", adapter, "--device", "cpu", "--max-new-tokens", 12]
    return ["evaluate", "ask", QUESTION, *options], load_llava(runs.model, adapter=adapter)


@pytest.mark.parametrize("names", [[], ["scene_01.jpg"], ["scene_01.jpg", "scene_02.png"]])
def test_ask_answers_directly(runs, ask, names):
    command, llava = ask
    paths = [runs.tiny / "images" / name for name in names]
    prompt = TEMPLATES[llava.config.template].prompt(with_image(QUESTION, len(paths)))
    [answer] = llava.generate([prompt], [[open_image(path) for path in paths]], max_new_tokens=12)
    assert answer and call(*command, *[flag for path in paths for flag in ("--image", path)]) == f"{answer}\n"


def test_ask_describes_then_responds(runs, ask):
    """Both times with the image."""
    command, llava = ask
    template, path = TEMPLATES[llava.config.template], runs.tiny / "images" / "scene_01.jpg"
    images = [[open_image(path)]]
    x_des = "Detail the composition and subjects within the frame."
    [description] = llava.generate([template.prompt(with_image(x_des))], images, max_new_tokens=12)
    text = with_image(with_description(description, QUESTION))
    [answer] = llava.generate([template.prompt(text)], images, max_new_tokens=12)
    printed = call(*command, "--image", path, "--dar")
    assert printed == f"Description: {description}\n\n{answer}\n"
    marked = [*command[:2], f"<image>\n{QUESTION}", *command[3:]]  # the user's own mark changes nothing
    assert call(*marked, "--image", path, "--dar") == printed
    with pytest.raises(InputError, match="--dar describes the image first"):
        call(*command, "--dar")


def test_answers_of_scienceqa(runs):
    problems = json.loads((runs.tiny / "scienceqa" / "problems.json").read_text())
    results = runs.out / "results"
    direct, dar = (lines(results / f"scienceqa-stage2-{mode}.jsonl") for mode in ("direct", "dar"))
    assert [r["question_id"] for r in direct] == [r["question_id"] for r in dar] == list(problems)
    for record, problem in zip(direct, problems.values()):
        assert record["adapter"] == "stage2"
        assert record["prompt"].startswith("<image>\n") is bool(problem["image"])
        assert record["prompt"].endswith("Answer with the option's letter from the given choices directly.")
        assert problem["question"] in record["prompt"]
    assert [r["prompt"] for r in dar] == [r["prompt"] for r in direct]  # for the scorers: no description
    described = lines(results / "scienceqa-stage2-dar.descriptions.jsonl")
    images = [f"images/test/{key}/{p['image']}" for key, p in problems.items() if p["image"]]
    assert [d["image"] for d in described] == images


@pytest.mark.parametrize("mode", ["direct", "dar"])
def test_an_answer_of_scienceqa_can_be_regenerated_from_its_record(runs, mode):
    llava = load_llava(runs.model, adapter=runs.out / "stage2")
    file = runs.out / "results" / f"scienceqa-stage2-{mode}.jsonl"
    descriptions = lines(file.with_suffix(".descriptions.jsonl")) if mode == "dar" else []
    descriptions = {Path(d["image"]).parent.name: d["description"] for d in descriptions}
    assert len(lines(file)) == 6
    for record in lines(file):
        folder = runs.tiny / "scienceqa" / "images" / "test" / record["question_id"]
        images = [open_image(path) for path in folder.glob("*")]
        text = record["prompt"].removeprefix("<image>\n")
        if record["question_id"] in descriptions:
            text = with_description(descriptions[record["question_id"]], text)
        prompt = TEMPLATES[llava.config.template].prompt(with_image(text, len(images)))
        assert llava.generate([prompt], [images], max_new_tokens=16) == [record["text"]]


def test_sampled_answers_do_not_depend_on_the_batch(runs, tmp_path):
    texts = []
    for number, flags in enumerate((["--batch-size", 1], ["--batch-size", 4], ["--seed", 1])):
        call(*runs.commands["dar"], "--temperature", 1, *flags, "--out", tmp_path / f"{number}")
        file, described = sorted((tmp_path / f"{number}").glob("*.jsonl"), key=lambda path: len(path.name))
        texts.append([r["text"] for r in lines(file)] + [d["description"] for d in lines(described)])
    assert texts[0] == texts[1] and all(a != b for a, b in zip(texts[0], texts[2]))

    [record] = [r for r in lines(tmp_path / "0" / file.name) if r["question_id"] == "11"]  # it has no image
    llava = load_llava(runs.model, adapter=runs.out / "stage2")
    prompt = TEMPLATES[llava.config.template].prompt(record["prompt"])
    seed = row_seed(0, "answer", "11")
    [again] = sampler.sample(llava, [prompt], [[]], [seed], max_new_tokens=16, temperature=1.0)
    assert llava.tokenizer.decode(again.ids) == record["text"]


@pytest.mark.parametrize("mode", ["direct", "dar"])
def test_scores_are_reproduced_without_the_model(runs, mode):
    answers = runs.out / "results" / f"scienceqa-stage2-{mode}.jsonl"
    command = ["evaluate", "score", "scienceqa", "--answers", answers, "--data", runs.tiny / "scienceqa"]
    again = json.loads(call(*command, "--json"))
    saved = json.loads(answers.with_suffix(".scores.json").read_text())
    assert (again["groups"]["average"]["n"], again["missing"]) == (6, 0) and again.items() <= saved.items()
    assert (saved["run"]["mode"], saved["run"]["adapter"]) == (mode, "stage2")
    assert "6 questions, 0 without a prediction" in call(*command) and call(*command) in runs.printed[mode]
