"""generate_pairs.py: what Algorithm 1 samples, and that every response can be regenerated from its record."""

from dataclasses import replace

import pytest
from chain import with_images
from commands import call, lines
from PIL import Image

import generate_pairs
from stic_min import InputError, sampler
from stic_min.generate import Response, Sampling, generate, prepare_ahead, prompt_length, sampler_requests
from stic_min.images import corrupt, open_image
from stic_min.loader import load_llava
from stic_min.runtime.ranks import Ranks
from stic_min.runtime.work import row_seed, subset
from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS, TEMPLATES, with_image


def test_what_algorithm_1_samples():
    image = Image.new("RGB", (40, 30), "red")
    jobs = [generate_pairs.pair_job(f"{i}.jpg", image, 0) for i in range(400)]
    corrupted = [job for job in jobs if job.fields["corruption"]]
    assert 160 < len(corrupted) < 240  # half of them; 4 standard deviations are 40
    for job in jobs:
        x, x_b, corruption = (job.fields[name] for name in ("x", "hallu_prompt", "corruption"))
        preferred, dispreferred = job.queries
        assert preferred.prompt == GOOD_PROMPT and preferred.images[0] is image
        assert (corruption is None) is (dispreferred.images[0] is image) is bool(x_b)
        assert dispreferred.prompt == (x_b or x)
    assert {job.fields["x"] for job in jobs} == set(CAPTION_PROMPTS)
    assert {job.fields["hallu_prompt"] for job in jobs} == {*HALLUCINATION_PROMPTS, ""}
    assert len({job.fields["corruption"]["seed"] for job in corrupted}) == len(corrupted)
    assert len({query.seed for job in jobs for query in job.queries}) == 800


def test_what_algorithm_1_samples_depends_on_seed_and_name_only():
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    fields = lambda seed, image: [generate_pairs.pair_job(f"{i}.jpg", image, seed).fields for i in range(9)]
    assert fields(0, images[0]) == fields(0, images[1]) != fields(1, images[0])


def test_images_are_not_kept_until_their_responses_are_complete(tiny):
    llava = load_llava(tiny / "llava-v1.5-tiny")
    names = [[path.name] for path in sorted((tiny / "images").iterdir())]
    prepare = lambda group: [generate_pairs.pair_job(group[0], open_image(tiny / "images" / group[0]), 0)]
    prepared = list(prepare_ahead(llava, names, prepare))
    queries = [query for _, jobs, _, _ in prepared for job in jobs for query in job.queries]
    assert len(queries) == 2 * len(names) and {query.images for query in queries} == {None}


def test_a_description_is_asked_for_by_a_captioning_prompt():
    image = Image.new("RGB", (40, 30))
    jobs = [generate_pairs.description_job(f"{i}", "a.jpg", image, 0) for i in range(400)]
    assert {job.queries[0].prompt for job in jobs} == set(CAPTION_PROMPTS)


def test_chosen_is_the_preferred_response():
    for i in range(9):
        job = generate_pairs.pair_job(f"{i}.jpg", Image.new("RGB", (40, 30)), 0)
        record = generate_pairs.pair_record(job, [Response("y_g", "stop"), Response("y_b", "length")])
        assert (record["chosen"][1]["content"], record["chosen_finish"]) == ("y_g", "stop")
        assert (record["rejected"][1]["content"], record["rejected_finish"]) == ("y_b", "length")


def test_pairs_have_the_published_format(runs):
    pairs = lines(runs.out / "pairs.jsonl")
    assert [pair["image"] for pair in pairs] == sorted(path.name for path in (runs.tiny / "images").iterdir())
    template, mode = ("mistral_instruct", "anyres") if "v1.6" in runs.model.name else ("vicuna_v1", "pad")
    settings = {"model": runs.model.name, "adapter": None, "template": template, "image_mode": mode, "seed": 0}
    settings |= {"temperature": 0.2, "top_p": None, "max_new_tokens": 16, "chosen_prompt": GOOD_PROMPT}
    for pair in pairs:
        assert settings.items() <= pair.items()
        for side in ("chosen", "rejected"):
            assert [set(message) for message in pair[side]] == [{"role", "content"}] * 2
            assert [message["role"] for message in pair[side]] == ["user", "assistant"]
            assert pair[side][1]["content"]
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
def test_a_pair_can_be_regenerated_from_its_record(runs, corrupted):
    pair = next(p for p in lines(runs.out / "pairs.jsonl") if p["image_corruption"] is corrupted)
    llava = load_llava(runs.model, template=pair["template"], image_mode=pair["image_mode"])
    image = rejected_image = open_image(runs.tiny / "images" / pair["image"])
    if corrupted:
        rejected_image, parameters = corrupt(image, pair["corruption"]["seed"])
        assert pair["corruption"].items() >= parameters.items()
    for side, shown in (("chosen", image), ("rejected", rejected_image)):
        prompt = TEMPLATES[pair["template"]].prompt(with_image(pair[f"{side}_prompt"]))
        seed = row_seed(pair["seed"], pair["image"], side)
        options = {key: pair[key] for key in ("max_new_tokens", "temperature", "top_p")}
        [again] = sampler.sample(llava, [prompt], [[shown]], [seed], **options)
        assert llava.tokenizer.decode(again.ids) == pair[side][1]["content"]
        assert again.finish == pair[f"{side}_finish"]


def test_descriptions_carry_the_records_ids(runs):
    descriptions = lines(runs.out / "descriptions.jsonl")
    records = with_images(runs.tiny)
    assert [(d["id"], d["image"]) for d in descriptions] == [(r["id"], r["image"]) for r in records]
    assert all(d["prompt"] in CAPTION_PROMPTS and d["description"] for d in descriptions)
    assert all(d["adapter"] == "stage1" for d in descriptions)


def test_a_description_can_be_regenerated_from_its_record(runs):
    descriptions = lines(runs.out / "descriptions.jsonl")
    llava = load_llava(runs.model, adapter=runs.out / "stage1")
    template = TEMPLATES[llava.config.template]
    for d in descriptions[:3]:
        prompt = template.prompt(with_image(d["prompt"]))
        image = open_image(runs.tiny / "images" / d["image"])
        seed = row_seed(0, d["id"], "description")
        [again] = sampler.sample(llava, [prompt], [[image]], [seed], max_new_tokens=16, temperature=0.2)
        assert (llava.tokenizer.decode(again.ids), again.finish) == (d["description"], d["finish"])


def test_each_rank_samples_only_its_own_images(runs):
    llava, image = load_llava(runs.model), Image.new("RGB", (40, 30))
    prepare = lambda group: [generate_pairs.description_job(*group, "a.jpg", image, 0)]
    sampling = Sampling(max_new_tokens=1, temperature=0.0, top_p=None, seed=0)
    groups = [["0"], ["1"], ["2"]]
    for rank, expected in enumerate((["0", "2"], ["1"])):
        sampled = generate(llava, groups, prepare, sampling, Ranks(rank, 2, "cpu"), "descriptions")
        assert [job.key for job, _ in sampled] == expected


def test_a_prompt_may_be_as_long_as_the_models_limit(runs):
    llava = load_llava(runs.model)
    jobs = [generate_pairs.description_job("a", "a.jpg", Image.new("RGB", (40, 30)), 0)]
    [request] = sampler_requests(llava, jobs)
    length = prompt_length(llava, request)
    llava.config = replace(llava.config, max_length=length)
    assert sampler_requests(llava, jobs)[0].ids == request.ids
    llava.config = replace(llava.config, max_length=length - 1)
    with pytest.raises(InputError, match=f"a: the prompt has {length} tokens, but the model's limit is {length - 1}"):
        sampler_requests(llava, jobs)


def test_pairs_of_named_images_and_of_a_random_subset(runs, tmp_path):
    pairs = {pair["image"]: pair for pair in lines(runs.out / "pairs.jsonl")}
    (tmp_path / "names").write_text("scene_06.png\nscene_02.png\n")
    call(*runs.commands["pairs"], "--out", tmp_path / "named.jsonl", "--names", tmp_path / "names")
    assert lines(tmp_path / "named.jsonl") == [pairs["scene_06.png"], pairs["scene_02.png"]]
    call(*runs.commands["pairs"], "--out", tmp_path / "few.jsonl", "--limit", 3)
    names = subset(sorted(pairs), 3, seed=0)
    assert lines(tmp_path / "few.jsonl") == [pairs[name] for name in names]


def test_top_p_is_applied(runs, tmp_path):
    greedy = ["--temperature", 0]
    tiny_top_p = ["--temperature", 1, "--top-p", 1e-9]  # leaves only the most probable token
    random = ["--temperature", 1]
    responses = []
    for number, flags in enumerate((greedy, tiny_top_p, random)):
        call(*runs.commands["pairs"], *flags, "--limit", 3, "--out", tmp_path / f"{number}")
        responses.append([pair["chosen"] for pair in lines(tmp_path / f"{number}")])
    assert responses[0] == responses[1] != responses[2]
