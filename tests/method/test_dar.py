"""evaluate.py: answers, directly and by describe-and-respond (DaR), repeat from what is recorded."""

import json
from pathlib import Path

import pytest
from commands import call, lines

from stic_min import InputError, sampler
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.runtime.work import row_seed
from stic_min.text import TEMPLATES, with_description, with_image


def test_ask(runs):
    question, adapter, folder = "What is in the picture?", runs.out / "stage2", runs.tiny / "images"
    command = ["evaluate", "ask", question, "--model", runs.model, "--adapter", adapter, "--device", "cpu",
               "--max-new-tokens", 12]
    llava = load_llava(runs.model, adapter=adapter)
    for pictures in ([], [folder / "scene_01.jpg"], [folder / "scene_01.jpg", folder / "scene_02.png"]):
        prompt = TEMPLATES[llava.config.template].prompt(with_image(question, len(pictures)))
        [answer] = llava.generate([prompt], [[open_image(p) for p in pictures]], max_new_tokens=12)
        assert answer and call(*command, *[flag for p in pictures for flag in ("--image", p)]) == f"{answer}\n"
    # describe-and-respond: both times with the picture
    ask = "Detail the composition and subjects within the frame."
    prompt, pictures = TEMPLATES[llava.config.template].prompt, [[open_image(folder / "scene_01.jpg")]]
    [description] = llava.generate([prompt(with_image(ask))], pictures, max_new_tokens=12)
    text = with_image(with_description(description, question))
    [answer] = llava.generate([prompt(text)], pictures, max_new_tokens=12)
    said = call(*command, "--image", folder / "scene_01.jpg", "--dar")
    assert said == f"Description: {description}\n\n{answer}\n"
    marked = [*command[:2], f"<image>\n{question}", *command[3:]]  # a mark of the user's own changes nothing
    assert call(*marked, "--image", folder / "scene_01.jpg", "--dar") == said
    with pytest.raises(InputError, match="--dar describes a picture first"):
        call(*command, "--dar")


def test_answers_of_scienceqa(runs):
    problems = json.loads((runs.tiny / "scienceqa" / "problems.json").read_text())
    direct, dar = (lines(runs.out / "results" / f"scienceqa-stage2-{mode}.jsonl") for mode in ("direct", "dar"))
    assert [r["question_id"] for r in direct] == [r["question_id"] for r in dar] == list(problems)
    for record, problem in zip(direct, problems.values()):
        assert record["prompt"].startswith("<image>\n") is bool(problem["image"]) and record["adapter"] == "stage2"
        assert record["prompt"].endswith("Answer with the option's letter from the given choices directly.")
        assert problem["question"] in record["prompt"]
    assert [r["prompt"] for r in dar] == [r["prompt"] for r in direct]  # free of the description, as scorers read it
    described = lines(runs.out / "results" / "scienceqa-stage2-dar.descriptions.jsonl")
    shown = [f"images/test/{id}/{p['image']}" for id, p in problems.items() if p["image"]]
    assert [d["image"] for d in described] == shown


def test_an_answer_of_scienceqa_can_be_repeated(runs):
    llava, seen = load_llava(runs.model, adapter=runs.out / "stage2"), 0
    for mode in ("direct", "dar"):
        file = runs.out / "results" / f"scienceqa-stage2-{mode}.jsonl"
        descriptions = lines(file.with_suffix(".descriptions.jsonl")) if mode == "dar" else []
        descriptions = {Path(d["image"]).parent.name: d["description"] for d in descriptions}
        for record in lines(file):
            text = record["prompt"].removeprefix("<image>\n")
            pictures = [open_image(p) for p in (runs.tiny / "scienceqa/images/test" / record["question_id"]).glob("*")]
            described = descriptions.get(record["question_id"])
            text = with_description(described, text) if described is not None else text
            prompt = TEMPLATES[llava.config.template].prompt(with_image(text, len(pictures)))
            assert llava.generate([prompt], [pictures], max_new_tokens=16) == [record["text"]]
            seen += 1
    assert seen == 12


def test_sampled_answers_do_not_depend_on_the_batch(runs, tmp_path):
    files = []
    for number, flags in enumerate((["--batch-size", 1], ["--batch-size", 4], ["--seed", 1])):
        call(*runs.commands["dar"], "--temperature", 1, *flags, "--out", tmp_path / f"{number}")
        file, described = sorted((tmp_path / f"{number}").glob("*.jsonl"), key=lambda path: len(path.name))
        files.append([r["text"] for r in lines(file)] + [d["description"] for d in lines(described)])
    [first] = [r for r in lines(tmp_path / "0" / file.name) if r["question_id"] == "11"]  # without a picture
    llava = load_llava(runs.model, adapter=runs.out / "stage2")
    prompt, seed = TEMPLATES[llava.config.template].prompt(first["prompt"]), row_seed(0, "answer", "11")
    [again] = sampler.sample(llava, [prompt], [[]], [seed], max_new_tokens=16, temperature=1.0)
    assert llava.tokenizer.decode(again.ids) == first["text"]
    assert files[0] == files[1] and all(a != b for a, b in zip(files[0], files[2]))


@pytest.mark.parametrize("mode", ["direct", "dar"])
def test_scores_can_be_repeated_without_the_model(runs, mode):
    answers = runs.out / "results" / f"scienceqa-stage2-{mode}.jsonl"
    command = ["evaluate", "score", "scienceqa", "--answers", answers, "--data", runs.tiny / "scienceqa"]
    again, saved = json.loads(call(*command, "--json")), json.loads(answers.with_suffix(".scores.json").read_text())
    assert (again["groups"]["average"]["n"], again["missing"]) == (6, 0) and again.items() <= saved.items()
    assert (saved["run"]["mode"], saved["run"]["adapter"]) == (mode, "stage2")
    assert "6 questions, 0 without a prediction" in call(*command) and call(*command) in runs.printed[mode]
