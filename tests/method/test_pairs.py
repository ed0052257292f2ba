"""generate_pairs.py: what Algorithm 1 samples, and that every record repeats from what it says about itself."""


import pytest
from chain import with_images
from commands import call, lines

import generate_pairs
from stic_min import sampler
from stic_min.images import corrupt, open_image
from stic_min.loader import load_llava
from stic_min.runtime.work import row_seed, subset
from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS, TEMPLATES, with_image


def test_what_algorithm_1_draws(tiny):
    folder = tiny / "images"
    plans = {i: generate_pairs.plan_pair(f"{i}.jpg", 0) for i in range(400)}
    assert 160 < sum(plan["x_b"] is None for plan in plans.values()) < 240  # half; 4 standard deviations are 40
    assert all((plan["x_b"] is None) is (plan["corruption_seed"] is not None) for plan in plans.values())
    assert len({plan["corruption_seed"] for plan in plans.values()}) == 1 + sum(not p["x_b"] for p in plans.values())
    assert {plan["x"] for plan in plans.values()} == set(CAPTION_PROMPTS)
    assert {plan["x_b"] for plan in plans.values()} == {*HALLUCINATION_PROMPTS, None}
    described = [generate_pairs.description_rows(f"{i}", "a.jpg", None, 0)[0][0][0] for i in range(400)]
    assert set(described) == set(CAPTION_PROMPTS)
    assert generate_pairs.plan_pair("0.jpg", 0) == plans[0]
    for i in range(9):
        _, record = generate_pairs.pair_rows(f"{i}.jpg", open_image(next(folder.iterdir())), 0)
        made = record(["y_w", "y_l"], ["stop", "length"])
        assert (made["chosen"][1]["content"], made["chosen_finish"]) == ("y_w", "stop")
        assert (made["rejected"][1]["content"], made["rejected_finish"]) == ("y_l", "length")
    drawn = lambda seed: [generate_pairs.plan_pair(f"{i}.jpg", seed)["x"] for i in range(9)]
    assert drawn(0) == [plans[i]["x"] for i in range(9)] != drawn(1)


def test_pairs_have_the_published_format(runs):
    pairs = lines(runs.out / "pairs.jsonl")
    assert [pair["image"] for pair in pairs] == sorted(p.name for p in (runs.tiny / "images").iterdir())
    template, mode = ("mistral_instruct", "anyres") if "v1.6" in runs.model.name else ("vicuna_v1", "pad")
    settings = {"model": runs.model.name, "adapter": None, "template": template, "image_mode": mode, "seed": 0,
                "temperature": 0.2, "top_p": None, "max_new_tokens": 16, "chosen_prompt": GOOD_PROMPT}
    for pair in pairs:
        assert settings.items() <= pair.items()
        for side in ("chosen", "rejected"):
            assert [set(message) for message in pair[side]] == [{"role", "content"}] * 2
            assert [message["role"] for message in pair[side]] == ["user", "assistant"] and pair[side][1]["content"]
            assert pair[f"{side}_finish"] in ("stop", "length")
        assert pair["chosen"][0] == pair["rejected"][0]  # x, never x_g or x_b
        x = pair["chosen"][0]["content"].removeprefix("<image>\n")
        assert x in CAPTION_PROMPTS and pair["chosen"][0]["content"] == f"<image>\n{x}"
        if pair["image_corruption"]:
            assert pair["hallu_prompt"] == "" and pair["rejected_prompt"] == x
            assert pair["corruption"]["kind"] in ("low_resolution", "color_jitter")
        else:
            assert pair["hallu_prompt"] == pair["rejected_prompt"] and pair["corruption"] is None
            assert pair["hallu_prompt"] in HALLUCINATION_PROMPTS
    assert {pair["image_corruption"] for pair in pairs} == {True, False}
    assert f"8 pairs in {runs.out / 'pairs.jsonl'}, 0 skipped" in runs.printed["pairs"]


@pytest.mark.parametrize("corrupted", [True, False])
def test_a_pair_can_be_repeated_from_what_is_recorded(runs, corrupted):
    pair = next(p for p in lines(runs.out / "pairs.jsonl") if p["image_corruption"] is corrupted)
    llava = load_llava(runs.model, template=pair["template"], image_mode=pair["image_mode"])
    picture = bad = open_image(runs.tiny / "images" / pair["image"])
    if corrupted:
        bad, drawn = corrupt(picture, pair["corruption"]["seed"])
        assert pair["corruption"].items() >= drawn.items()
    for side, view in (("chosen", picture), ("rejected", bad)):
        prompt = TEMPLATES[pair["template"]].prompt(with_image(pair[f"{side}_prompt"]))
        seed = row_seed(pair["seed"], pair["image"], side)
        options = {key: pair[key] for key in ("max_new_tokens", "temperature", "top_p")}
        [again] = sampler.sample(llava, [prompt], [[view]], [seed], **options)
        assert llava.tokenizer.decode(again.ids) == pair[side][1]["content"] and again.finish == pair[f"{side}_finish"]


def test_descriptions_carry_the_records_ids(runs):
    descriptions = lines(runs.out / "descriptions.jsonl")
    assert [(d["id"], d["image"]) for d in descriptions] == [(r["id"], r["image"]) for r in with_images(runs.tiny)]
    assert all(d["prompt"] in CAPTION_PROMPTS and d["description"] and d["adapter"] == "stage1" for d in descriptions)


def test_a_description_can_be_repeated_from_what_is_recorded(runs):
    descriptions = lines(runs.out / "descriptions.jsonl")
    llava = load_llava(runs.model, adapter=runs.out / "stage1")
    template = TEMPLATES[llava.config.template]
    for d in descriptions[:3]:
        prompt, picture = template.prompt(with_image(d["prompt"])), open_image(runs.tiny / "images" / d["image"])
        seed, options = row_seed(0, d["id"], "description"), {"max_new_tokens": 16, "temperature": 0.2}
        [again] = sampler.sample(llava, [prompt], [[picture]], [seed], **options)
        assert (llava.tokenizer.decode(again.ids), again.finish) == (d["description"], d["finish"])


def test_some_pictures_only(runs, tmp_path):
    whole = {pair["image"]: pair for pair in lines(runs.out / "pairs.jsonl")}
    (tmp_path / "names").write_text("scene_06.png\nscene_02.png\n")
    call(*runs.commands["pairs"], "--out", tmp_path / "named.jsonl", "--names", tmp_path / "names")
    assert lines(tmp_path / "named.jsonl") == [whole["scene_06.png"], whole["scene_02.png"]]
    call(*runs.commands["pairs"], "--out", tmp_path / "few.jsonl", "--limit", 3)
    names = [pair["image"] for pair in lines(tmp_path / "few.jsonl")]
    assert names == subset(sorted(whole), 3, seed=0) and lines(tmp_path / "few.jsonl") == [whole[n] for n in names]


def test_top_p_is_used(runs, tmp_path):
    answers = []
    for number, flags in enumerate((["--temperature", 0], ["--temperature", 1, "--top-p", 1e-9], ["--temperature", 1])):
        call(*runs.commands["pairs"], *flags, "--limit", 3, "--out", tmp_path / f"{number}")
        answers.append([pair["chosen"] for pair in lines(tmp_path / f"{number}")])
    assert answers[0] == answers[1] != answers[2]  # so small a mass leaves the most probable token alone
