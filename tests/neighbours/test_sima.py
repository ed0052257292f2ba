"""SIMA: verdicts, the order of the two answers and the position bias by hand; then its steps on a tiny model.

The tiny model writes random text, in which there are no verdicts. Where a test needs some, the critic's sampler is
replaced; everything else is generated.
"""

import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from commands import call, call_two_ranks, ended, lines, start, wait_for
from PIL import Image

import train_stage1
from stic_min import InputError, sampler
from stic_min.data import read_pairs
from stic_min.generate import Response, sampler_requests
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.neighbours import sima
from stic_min.neighbours.sima_critic import (
    DEMONSTRATIONS,
    critic_prompt,
    decide,
    has_both_verdicts,
    parse_verdict,
    position_bias,
    preferences,
    read_template,
    report_lines,
)
from stic_min.runtime.files import sha256
from stic_min.runtime.work import row_seed
from stic_min.text import TEMPLATES, Tokenizer, with_image

SIMA = "stic_min.neighbours.sima"
NONE, OTHER = (None, "no number in double brackets"), (None, "neither [[1]] nor [[2]]")

# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize("critique, expected", [
    ("Response 1 adds a boat. Verdict: [[2]]", (2, "")),
    ("[[1]]", (1, "")),
    ("[[2]] is my verdict, because response 1 is wrong.", (2, "")),
    ("The best one is [[[1]]].", (1, "")),
    ("[[1]] [[1]]", (1, "")),
    ("At first [[1]], but then [[2]]", (2, "")),  # the last one counts
    ("At first [[2]], but then [[1]]\n", (1, "")),
    ("[[1]], since [[response one]] is right", (1, "")),  # brackets without a number
    ("", NONE),
    ("Response 1 is better. Verdict: 1", NONE),  # numbers without brackets do not count
    ("Verdict: [1]", NONE),
    ("Verdict: (2) or [[better]]", NONE),
    ("Verdict: [[1", NONE),  # cut off
    ("Verdict: [[1]", NONE),
    ("Verdict: [ [1] ]", NONE),
    ("[[]]", NONE),
    ("[[1 or 2]]", OTHER),
    ("[[3]]", OTHER),
    ("[[0]]", OTHER),
    ("[[12]]", OTHER),
    ("[[1.5]]", OTHER),
    ("[[-1]]", OTHER),
    ("[[ 1 ]]", OTHER),
    ("[[１]]", OTHER),  # a fullwidth digit
    ("[[Response 1]]", OTHER),
    ("[[1]], or rather [[1 or 2]]", OTHER),  # the last one counts
    ("[[1]] and [[3]]", OTHER),
    ("[[3]] and [[1]]", (1, "")),
])  # fmt: skip
def test_the_last_number_in_double_brackets_is_the_verdict(critique, expected):
    assert parse_verdict(critique) == expected


def test_critiques_with_both_verdicts_are_recognized():
    assert has_both_verdicts("[[1]] no, [[2]]") and has_both_verdicts("[[2]] [[2]] [[1]]")
    assert not any(map(has_both_verdicts, ("[[1]] [[1]]", "[[1]] or 2", "[[1 or 2]]", "")))


def record(*critiques, unjudged=None, key="a", ground_truth="A red house."):
    """A line of critiques.jsonl."""
    texts = [{"first": first, "text": text, "finish": "stop"} for first, text in zip(("sampled", "greedy"), critiques)]
    answers = {"sampled": "A red house.", "sampled_finish": "stop", "greedy": "A blue boat.", "greedy_finish": "length"}
    prompt = {"id": key, "image": "scene_01.jpg", "question": "What is it?", "ground_truth": ground_truth}
    return prompt | answers | {"critiques": texts, "unjudged": unjudged}


def test_which_answer_a_verdict_prefers():
    """First order: response 1 is the sampled answer. Second order: response 1 is the greedy one."""
    assert preferences(record("[[1]]")) == ["sampled"]
    assert preferences(record("[[2]]")) == ["greedy"]
    assert preferences(record("[[1]]", "[[1]]")) == ["sampled", "greedy"]
    assert preferences(record("[[1]]", "[[2]]")) == ["sampled", "sampled"]
    assert preferences(record("[[2]]", "[[1]]")) == ["greedy", "greedy"]
    assert preferences(record("[[2]]", "?")) == ["greedy", None]
    assert preferences(record(unjudged="identical answers")) == []


def test_which_records_give_a_pair():
    assert decide(record("[[1]]")) == ("sampled", "")
    assert decide(record("[[2]]")) == ("greedy", "")
    assert decide(record("[[2]]", "[[2]]")) == ("greedy", "")  # the first order decides
    assert decide(record("[[2]]", "?")) == ("greedy", "")
    assert decide(record("?", "[[1]]")) == NONE
    assert decide(record(unjudged="prompt too long")) == (None, "prompt too long")
    agreeing = lambda *critiques: decide(record(*critiques), agreeing=True)
    assert agreeing("[[1]]", "[[2]]") == ("sampled", "")
    assert agreeing("[[2]]", "[[1]]") == ("greedy", "")
    assert agreeing("[[1]]", "[[1]]") == agreeing("[[2]]", "[[2]]") == (None, "the two orders disagree")
    assert agreeing("[[1]]", "?") == agreeing("?", "[[1]]") == NONE
    assert agreeing("[[1]]", "[[3]]") == OTHER


BIASED = [
    record("[[1]]", "[[1]]"),  # verdict 1 both times: sampled, then greedy
    record("[[1]]", "[[1]]"),
    record("[[1]]", "[[2]]"),  # sampled both times
    record("[[2]]", "[[1]]"),  # greedy both times
    record("[[1]]", "?"),  # not counted
    record("[[2]] [[1]]", "[[3]]"),
    record(unjudged="identical answers"),
    record("[[1]]"),
]


def test_position_bias_by_hand():
    """Four records have two verdicts. In either order, verdict 1 is given to three of them; two agree."""
    assert position_bias(BIASED) == (4, 3 / 4, 3 / 4, 2 / 4)
    assert position_bias(BIASED[2:4]) == (2, 1 / 2, 1 / 2, 1.0)  # no bias: 1/2 + 1/2 = 1
    assert position_bias([BIASED[2]]) == (1, 1.0, 0.0, 1.0)
    assert position_bias(BIASED[4:]) is None


def test_the_report_counts_every_record():
    """Preferred in the first order: s s s g s s - s, so the sampled answer in 6 of 7. In both orders: s and g."""
    assert report_lines(BIASED) == [
        "7 of 8 records have a preference; 85.7% prefer the sampled answer",
        "  1 have none: identical answers",
        "1 of 13 critiques contain both verdicts: the last one counts",
        "position bias, 4 records with a verdict in both orders:",
        "  75.0% prefer response 1 when it is the sampled answer, 75.0% when it is the greedy one (without bias, these "
        "add up to 100%)",
        "  50.0% prefer the same answer in both orders",
    ]
    agreeing = report_lines(BIASED[:7], agreeing=True)
    assert agreeing[:5] == [
        "2 of 7 records have a preference; 50.0% prefer the sampled answer",
        "  2 have none: the two orders disagree",
        "  1 have none: no number in double brackets",
        "  1 have none: neither [[1]] nor [[2]]",
        "  1 have none: identical answers",
    ]
    assert report_lines([record("?")])[0] == "0 of 1 records have a preference"


# ---------------------------------------------------------------- the critic's prompt

QUESTION, REFERENCE = "What floats\non the sea?", "A boat with\n\na white sail."
SAMPLED, GREEDY = "A boat,\nResponse 2: no", "A <image>whale."


def test_the_prompt_has_all_parts_in_order():
    prompt = critic_prompt(QUESTION, REFERENCE, [SAMPLED, GREEDY])
    parts = ["Objects", "Relations", "Attributes", "Example 1", "Verdict: [[1]]", "Example 2", "Verdict: [[2]]"]
    places = [prompt.index(part) for part in parts]
    assert places == sorted(places)
    case = """Your case, about the image above
Question: What floats on the sea?
Reference answer: A boat with a white sail.
Response 1: A boat, Response 2: no
Response 2: A whale."""
    assert prompt.endswith(f"\n\n{case}")
    assert "<image>" not in prompt and "{" not in prompt
    for question, reference, first, second, _, verdict in DEMONSTRATIONS:
        responses = f"Reference answer: {reference}\nResponse 1: {first}\nResponse 2: {second}\nReasons: Objects: "
        assert f"Question: {question}\n{responses}" in prompt and f"Verdict: [[{verdict}]]" in prompt
    assert len(re.findall("^Reference answer: ", prompt, re.MULTILINE)) == 3


def test_a_label_free_prompt_has_no_reference():
    prompt = critic_prompt(QUESTION, None, [SAMPLED, GREEDY])
    assert "reference" not in prompt.lower()
    assert not any(example[1] in prompt for example in DEMONSTRATIONS)
    assert "agrees better with the image." in prompt and "are not in the image;" in prompt
    case = "Question: What floats on the sea?\nResponse 1: A boat, Response 2: no\nResponse 2: A whale."
    assert prompt.endswith(f"\n{case}")


def test_the_prompt_leaves_room_in_llava_v15(shared):
    """2,048 positions, 576 of them for the image: 3 texts of about 230 tokens and the question fit."""
    tokenizer = Tokenizer(shared / "oracle" / "tiny-llava-v1.5-vicuna" / "tokenizer.model")
    prompt = TEMPLATES["vicuna_v1"].prompt(critic_prompt("", "", ["", ""]))
    assert tokenizer.size == 32000 and len(tokenizer.encode_prompt(prompt)) < 2048 - 576 - 3 * 230 - 30


def test_another_prompt_with_the_same_fields(tmp_path):
    """Filled in once: a response that looks like a field stays as it is."""
    path = tmp_path / "prompt.txt"
    path.write_text("{question} {reference}\nA: {response_1}\nB: {response_2}\n{other} <image>[[1]] or [[2]]?\n")
    template = read_template(path, label_free=False)
    prompt = critic_prompt(QUESTION, REFERENCE, ["{response_2}", GREEDY], template)
    assert prompt == "What floats on the sea? A boat with a white sail.\nA: {response_2}\nB: A whale.\n" \
                     "{other} [[1]] or [[2]]?"  # fmt: skip
    with pytest.raises(InputError, match="prompt.txt: {reference} in the prompt; --label-free has no"):
        read_template(path, label_free=True)
    path.write_text("{response_1} {response_2}")
    assert critic_prompt("?", None, ["a", "b"], read_template(path, label_free=True)) == "a b"
    with pytest.raises(InputError, match="prompt.txt: no {reference} in the prompt"):
        read_template(path, label_free=False)
    path.write_text("{response_1}")
    with pytest.raises(InputError, match="no {response_2} in"):
        read_template(path, label_free=True)


@pytest.mark.parametrize("both", [False, True])
def test_the_second_query_swaps_the_answers(both):
    image = Image.new("RGB", (40, 30))
    job = sima.critic_job(record(), image, label_free=False, both_orders=both, seed=0)
    expected = [["A red house.", "A blue boat."], ["A blue boat.", "A red house."]][: 1 + both]
    assert [q.prompt for q in job.queries] == [critic_prompt("What is it?", "A red house.", pair) for pair in expected]
    assert all(query.images[0] is image for query in job.queries)
    assert len({query.seed for query in job.queries}) == 1 + both
    responses = [Response("[[2]]", "stop"), Response("[[1]]", "length")][: 1 + both]
    written = sima.critique_record(job.fields, responses)
    assert [c["first"] for c in written["critiques"]] == ["sampled", "greedy"][: 1 + both]
    assert preferences(written) == ["greedy", "greedy"][: 1 + both]


def test_a_label_free_query_does_not_contain_the_ground_truth():
    job = sima.critic_job(record(ground_truth="A secret."), Image.new("RGB", (40, 30)), True, True, 0)
    assert not any("secret" in query.prompt for query in job.queries)


# ---------------------------------------------------------------- pairs


def test_a_pair_has_the_verdicts_choice_as_chosen():
    pair = sima.pair_record(record("[[2]] It floats.", "?"), "greedy")
    user = {"role": "user", "content": "<image>\nWhat is it?"}
    assert pair["chosen"] == [user, {"role": "assistant", "content": "A blue boat."}]
    assert pair["rejected"] == [user, {"role": "assistant", "content": "A red house."}]
    assert (pair["chosen_finish"], pair["rejected_finish"]) == ("length", "stop")
    assert (pair["id"], pair["image"], pair["ground_truth"]) == ("a", "scene_01.jpg", "A red house.")
    assert pair["preferences"] == ["greedy", None] and pair["critiques"][0]["text"] == "[[2]] It floats."
    pair = sima.pair_record(record("[[1]]"), "sampled")
    assert pair["chosen"][1]["content"] == "A red house." and pair["chosen_finish"] == "stop"


def write_lines(path, records, **settings):
    path.write_text("".join(json.dumps(r | settings) + "\n" for r in records), encoding="utf-8")


VERDICTS = {"a": ("[[1]]", "[[2]]"), "b": ("[[1]]", "[[1]]"), "c": ("[[2]]", "[[1]]"), "d": ("1", "[[1]]")}


@pytest.fixture
def critiques(tmp_path):
    records = [record(*texts, key=key) for key, texts in VERDICTS.items()]
    records.append(record(unjudged="identical answers", key="e"))
    write_lines(tmp_path / "critiques.jsonl", records, model="M", critic_both_orders=True)
    return tmp_path / "critiques.jsonl"


def test_pairs_from_verdicts(critiques, tmp_path):
    command = [SIMA, "pairs", "--critiques", critiques, "--out"]
    printed = call(*command, tmp_path / "pairs.jsonl")
    pairs = lines(tmp_path / "pairs.jsonl")
    chosen = {pair["id"]: pair["chosen"][1]["content"] for pair in pairs}
    assert chosen == {"a": "A red house.", "b": "A red house.", "c": "A blue boat."}
    assert all(pair["model"] == "M" and pair["agreeing"] is False for pair in pairs)
    assert "3 of 5 records have a preference; 66.7% prefer the sampled answer\n" in printed
    assert "  1 have none: no number in double brackets\n  1 have none: identical answers\n" in printed
    assert printed.endswith(f"3 pairs in {tmp_path / 'pairs.jsonl'}\n")
    assert [(pair.prompt, pair.rejected_stopped) for pair in read_pairs(tmp_path / "pairs.jsonl")] == [
        ("<image>\nWhat is it?", False), ("<image>\nWhat is it?", False), ("<image>\nWhat is it?", True),
    ]  # fmt: skip

    printed = call(*command, tmp_path / "agreeing.jsonl", "--agreeing")
    assert [pair["id"] for pair in lines(tmp_path / "agreeing.jsonl")] == ["a", "c"]
    assert "1 have none: the two orders disagree" in printed
    with pytest.raises(InputError, match="written with agreeing False, but this run has True; choose another --out"):
        call(*command, tmp_path / "pairs.jsonl", "--agreeing")

    page = Path(call("stic_min.report.__main__", tmp_path / "pairs.jsonl").strip()).read_text(encoding="utf-8")
    assert page.count("<article class=pair>") == 3 and "<mark>blue boat</mark>" in page


def test_pairs_on_two_ranks_and_resumed(critiques, tmp_path):
    command = [SIMA, "pairs", "--critiques", critiques, "--out"]
    call(*command, tmp_path / "one.jsonl")
    whole = (tmp_path / "one.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[: whole.index(b"\n") + 30])
    call_two_ranks([*command, tmp_path / "two.jsonl"], [*command, tmp_path / "cut.jsonl"])
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "cut.jsonl").read_bytes() == whole


def damaged(path, **changes):
    """critiques.jsonl with other fields in its second record."""
    first, second, *_ = lines(path)
    changed = {name: value for name, value in (second | changes).items() if value is not Ellipsis}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(changed)}\n")


@pytest.mark.parametrize("changes, flags, message", [
    ({}, ["--agreeing"], "--agreeing: .* was written without --both-orders"),
    ({"critic_both_orders": True}, [],
     "line 2: critic_both_orders is True, but False in the first record: expected the records of one run"),
    ({"id": "a"}, [], "line 2: a appears twice"),
    ({"id": 7}, [], "line 2: no id"),
    ({"sampled": ""}, [], "line 2: no sampled"),
    ({"critiques": ...}, [], "line 2: no critiques; expected the output of sima critique"),
    ({"critiques": "[[1]]"}, [], "critiques.jsonl, b: no critique; expected the output of sima critique"),
    ({"critiques": [{"text": 1}]}, [], "critiques.jsonl, b: no critique; expected the output of sima critique"),
    ({"critiques": []}, [], "critiques.jsonl, b: no critique; expected the output of sima critique"),
])  # fmt: skip
def test_bad_critiques_are_one_line(critiques, changes, flags, message):
    write_lines(critiques, [r | {"critic_both_orders": False} for r in lines(critiques)])
    damaged(critiques, **changes)
    status, line = ended(SIMA, "pairs", "--critiques", critiques, "--out", critiques.with_name("pairs.jsonl"), *flags)
    assert status == 1 and re.fullmatch(f"error: .*{message}", line)


def test_no_verdict_at_all_is_an_error(critiques):
    write_lines(critiques, [record("Response 1 is better.")])
    status, line = ended(SIMA, "pairs", "--critiques", critiques, "--out", critiques.with_name("pairs.jsonl"))
    assert status == 1 and line == f"error: no pairs: no record of {critiques} has a preference"


# ---------------------------------------------------------------- the steps on a tiny model


@pytest.fixture(scope="module")
def steps(tiny, tmp_path_factory):
    """Answers and critiques of the tiny LLaVA-1.5, the critiques in both orders, with the commands."""
    out = tmp_path_factory.mktemp("sima")
    at = ["--model", tiny / "llava-v1.5-tiny", "--images", tiny / "images", "--device", "cpu", "--max-new-tokens", 8]
    answers = [SIMA, "answers", *at, "--instructions", tiny / "instructions.json", "--out"]
    critique = [SIMA, "critique", *at, "--both-orders", "--answers", out / "answers.jsonl", "--out"]
    printed = call(*answers, out / "answers.jsonl") + call(*critique, out / "critiques.jsonl")
    return SimpleNamespace(out=out, tiny=tiny, at=at, answers=answers, critique=critique, printed=printed)


def test_answers_have_the_question_the_reference_and_both_texts(steps):
    records = lines(steps.out / "answers.jsonl")
    instructions = json.loads((steps.tiny / "instructions.json").read_text())
    with_images = [r for r in instructions if "image" in r]
    assert [(r["id"], r["image"]) for r in records] == [(r["id"], r["image"]) for r in with_images]
    for r, instruction in zip(records, with_images):
        human, gpt = instruction["conversations"][:2]
        assert r["question"] == human["value"].replace("<image>", "").strip() and r["ground_truth"] == gpt["value"]
        assert r["sampled"] and r["greedy"] and (r["temperature"], r["top_p"], r["seed"]) == (0.8, 0.9, 0)
    assert sum(r["sampled"] != r["greedy"] for r in records) > 4
    assert f"8 answers in {steps.out / 'answers.jsonl'}, 0 skipped" in steps.printed


def test_each_answer_can_be_regenerated_alone(steps):
    """The greedy one at temperature 0, although it was generated next to the sampled one."""
    llava = load_llava(steps.tiny / "llava-v1.5-tiny")
    for r in lines(steps.out / "answers.jsonl")[:4]:
        prompt = llava.chat_prompt(r["question"])
        image = open_image(steps.tiny / "images" / r["image"])
        options = {"sampled": {"temperature": 0.8, "top_p": 0.9}, "greedy": {"temperature": 0.0}}
        for name, flags in options.items():
            seed = row_seed(0, r["id"], name)
            [again] = sampler.sample(llava, [prompt], [[image]], [seed], max_new_tokens=8, **flags)
            assert (llava.tokenizer.decode(again.ids), again.finish) == (r[name], r[f"{name}_finish"])
            naive = sampler.sample_naively(
                llava, prompt, [image], None if name == "greedy" else seed, max_new_tokens=8, temperature=0.8, top_p=0.9
            )
            assert naive.ids == again.ids


def test_both_answers_share_the_prefill_of_the_image(steps):
    llava = load_llava(steps.tiny / "llava-v1.5-tiny")
    question = {"id": "a", "question": "What is it?"}
    job = sima.answer_job(question, Image.new("RGB", (40, 30), "red"), seed=0)
    [group] = sampler.groups(sampler_requests(llava, [job]), max_size=2)
    assert [request.key for request in group] == [("a", 0), ("a", 1)] and group[1].seed is None


def test_critiques_can_be_regenerated_from_their_records(steps):
    llava = load_llava(steps.tiny / "llava-v1.5-tiny")
    r = lines(steps.out / "critiques.jsonl")[0]
    for critique, order in zip(r["critiques"], (("sampled", "greedy"), ("greedy", "sampled")), strict=True):
        text = critic_prompt(r["question"], r["ground_truth"], [r[name] for name in order])
        image = open_image(steps.tiny / "images" / r["image"])
        [again] = llava.generate([TEMPLATES["vicuna_v1"].prompt(with_image(text))], [[image]], max_new_tokens=8)
        assert critique["text"] == again and critique["first"] == order[0]
    settings = {"model": "llava-v1.5-tiny", "temperature": 0.8, "critic_temperature": 0.0, "critic_label_free": False}
    assert settings.items() <= r.items()
    assert "0 of 8 records have a preference\n  8 have none: no number in double brackets\n" in steps.printed


def test_two_ranks_write_the_same_files(steps, tmp_path):
    call_two_ranks(
        [*steps.answers, tmp_path / "answers.jsonl"],
        [*steps.critique, tmp_path / "critiques.jsonl", "--answers", tmp_path / "answers.jsonl"],
    )
    for name in ("answers.jsonl", "critiques.jsonl"):
        assert (tmp_path / name).read_bytes() == (steps.out / name).read_bytes()


@pytest.mark.parametrize("step", ["answers", "critique"])
def test_a_restart_generates_only_what_is_missing(steps, step, tmp_path):
    name = {"answers": "answers.jsonl", "critique": "critiques.jsonl"}[step]
    command = [*getattr(steps, step), tmp_path / name]
    whole = (steps.out / name).read_bytes()
    first, _, third, fourth, fifth, *_ = whole.splitlines(keepends=True)
    (tmp_path / name).write_bytes(first + third + fourth[:40])
    (tmp_path / f"{name}.part1").write_bytes(fifth + b"{")
    assert "8 to generate, 3 of them already in" in call(*command).replace(f" {name.removesuffix('.jsonl')}", "")
    assert (tmp_path / name).read_bytes() == whole
    assert {file.name for file in tmp_path.iterdir()} == {name, name.replace(".jsonl", ".run.json")}
    flag, setting = {"answers": ("--top-p", "top_p 0.9"), "critique": ("--label-free", "critic_label_free False")}[step]
    flags = [flag, 1] if step == "answers" else [flag]
    with pytest.raises(InputError, match=f"{name} was written with {setting}, but this run has"):
        call(*command, *flags)


def test_a_killed_step_resumes_with_the_same_result(steps, tmp_path):
    script, *args = [*steps.answers, tmp_path / "answers.jsonl", "--batch-size", 1]
    process = start(script, *args)
    wait_for(lambda: process.poll() is not None or (tmp_path / "answers.jsonl").exists())
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    call(script, *args)
    assert (tmp_path / "answers.jsonl").read_bytes() == (steps.out / "answers.jsonl").read_bytes()


def test_what_is_not_judged_is_recorded_and_counted(steps, tmp_path, capsys):
    """Identical answers, a prompt longer than the model's 4,096 tokens, and an image that is gone, but may return."""
    same, long, gone, *others = lines(steps.out / "answers.jsonl")
    same["greedy"] = same["sampled"]
    long["sampled"] = "mountains " * 3000
    gone["image"] = "gone.png"
    write_lines(tmp_path / "answers.jsonl", [same, long, gone, *others[:1]])
    command = [*steps.critique, tmp_path / "critiques.jsonl", "--answers", tmp_path / "answers.jsonl"]
    for too_long in (1, 0):  # the second time, only the image is looked for
        printed = call(*command)
        assert "3 critiques in" in printed and "1 skipped; 2 of 2 responses reached" in printed
        assert "1 have none: identical answers" in printed and "1 have none: prompt too long" in printed
        records = lines(tmp_path / "critiques.jsonl")
        assert [r["unjudged"] for r in records] == ["identical answers", "prompt too long", None]
        assert [len(r["critiques"]) for r in records] == [0, 0, 2]
        warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert sum("skipped: no such image" in line for line in warned) == 1
        assert sum("2: the critic's prompt is" in line and "tokens too long" in line for line in warned) == too_long
    call_two_ranks([*command[:-3], tmp_path / "two.jsonl", *command[-2:]])
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "critiques.jsonl").read_bytes()


def verdict_stream(texts):
    """A sampler whose critics say these texts in turn."""

    def stream(llava, requests, **options):
        for number, request in enumerate(requests):
            yield request.key, sampler.Sample(llava.tokenizer.encode(texts[number % len(texts)]), finish="stop")

    return mock.patch.object(sampler, "stream", stream)


def test_from_verdicts_to_an_adapter(steps, tmp_path):
    """Verdicts are 1 2, 1 1, 2 1 and none, in the order sampled first, greedy first."""
    texts = ["Objects. [[1]]", "[[2]]", "[[1]]", "[[1]]", "[[2]]", "[[1]]", "Response 1.", "[[2]]"]
    with verdict_stream(texts):
        printed = call(*steps.critique, tmp_path / "critiques.jsonl")
    answers = lines(steps.out / "answers.jsonl")
    assert [preferences(r) for r in lines(tmp_path / "critiques.jsonl")] == 2 * [
        ["sampled", "sampled"], ["sampled", "greedy"], ["greedy", "greedy"], [None, "sampled"],
    ]  # fmt: skip
    assert "6 of 8 records have a preference; 66.7% prefer the sampled answer" in printed
    assert "66.7% prefer response 1 when it is the sampled answer, 66.7% when it is the greedy one" in printed
    call(SIMA, "pairs", "--agreeing", "--critiques", tmp_path / "critiques.jsonl", "--out", tmp_path / "pairs.jsonl")
    pairs = lines(tmp_path / "pairs.jsonl")
    expected = [(answers[i]["sampled"], answers[i]["greedy"])[:: 1 if i % 4 == 0 else -1] for i in (0, 2, 4, 6)]
    assert [(pair["chosen"][1]["content"], pair["rejected"][1]["content"]) for pair in pairs] == expected

    train = [SIMA, "train", *steps.at[:6], "--pairs", tmp_path / "pairs.jsonl", "--lora-r", 4, "--batch-size", 2]
    assert "check passed" in call(*train, "--out", tmp_path / "sima", "--check")
    call(*train, "--out", tmp_path / "sima")
    run = json.loads((tmp_path / "sima" / "run.json").read_text())
    assert (run["alpha"], run["beta"], run["lr"], run["max_length"], run["lora_r"]) == (0, 0.1, 1e-7, 2048, 4)
    log = lines(tmp_path / "sima" / "log.jsonl")
    assert len(log) == 6 and all(step["alpha_nll"] == 0 for step in log)  # 3 epochs of 2 steps
    assert log[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_flags_of_train_take_precedence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sima", "train", "--model", "M", "--lr", "1e-6"])
    with mock.patch.object(train_stage1, "main") as main:
        sima.main()
    main.assert_called_once_with()
    assert sys.argv == ["train_stage1.py", "--alpha", "0", "--beta", "0.1", "--lr", "1e-7", "--epochs", "3",
                        "--max-length", "2048", "--model", "M", "--lr", "1e-6"]  # fmt: skip


# ---------------------------------------------------------------- input


def questions_of(steps, path):
    args = SimpleNamespace(instructions=path, images=steps.tiny / "images")
    available = sima.read_questions(args, SimpleNamespace(print=print))
    return [sima.parse_question(*entry) for entry in available.values()]


def test_sima_s_json_lines_are_read(steps, tmp_path, capsys):
    about = lambda image, text, **fields: {"image": image, "text": text} | fields
    write_lines(tmp_path / "sima.jsonl", [
        about("scene_01.jpg", "What is rejected?", ground_truth="A house."),
        about("scene_01.jpg", "<image>\nIs it day?", ground_truth="Yes."),
        about("scene_02.png", "What floats?", id=0),
        about("elsewhere.png", "What?", ground_truth="Nothing."),
        about("scene_03.png", "Night?", id=7, ground_truth="Yes."),
    ])  # fmt: skip
    fields = "id", "image", "question", "ground_truth"
    assert [tuple(q[name] for name in fields) for q in questions_of(steps, tmp_path / "sima.jsonl")] == [
        ("scene_01.jpg", "scene_01.jpg", "What is rejected?", "A house."),
        ("scene_01.jpg#2", "scene_01.jpg", "Is it day?", "Yes."),
        ("0", "scene_02.png", "What floats?", None),
        ("7", "scene_03.png", "Night?", "Yes."),
    ]
    assert "1 of 5 records have no image in" in capsys.readouterr().out


def test_only_a_label_free_critic_needs_no_reference(steps, tmp_path):
    write_lines(tmp_path / "sima.jsonl", [{"image": "scene_01.jpg", "text": "What is it?"}])
    call(*steps.answers, tmp_path / "answers.jsonl", "--instructions", tmp_path / "sima.jsonl")
    command = [*steps.critique, tmp_path / "critiques.jsonl", "--answers", tmp_path / "answers.jsonl"]
    with pytest.raises(InputError, match="answers.jsonl, scene_01.jpg: no ground_truth"):
        call(*command)
    call(*command, "--label-free")
    assert lines(tmp_path / "critiques.jsonl")[0]["critic_label_free"] is True


def test_another_prompt_is_asked_and_recorded(steps, tmp_path):
    (tmp_path / "prompt.txt").write_text("{response_1} or {response_2}?")
    command = [*steps.critique, tmp_path / "critiques.jsonl", "--label-free", "--prompt", tmp_path / "prompt.txt"]
    call(*command)
    r = lines(tmp_path / "critiques.jsonl")[0]
    assert r["critic_prompt"] == sha256(tmp_path / "prompt.txt")[:12]
    assert "critic_prompt" not in lines(steps.out / "critiques.jsonl")[0]
    llava = load_llava(steps.tiny / "llava-v1.5-tiny")
    image = open_image(steps.tiny / "images" / r["image"])
    prompt = llava.chat_prompt(f"{r['sampled']} or {r['greedy']}?")
    assert llava.generate([prompt], [[image]], max_new_tokens=8) == [r["critiques"][0]["text"]]
    (tmp_path / "prompt.txt").write_text("{response_1} and {response_2}?")
    with pytest.raises(InputError, match="critic_prompt"):
        call(*command)


def test_check_reads_everything_and_writes_nothing(steps, tmp_path):
    printed = call(*steps.answers, tmp_path / "answers.jsonl", "--check")
    assert "answers      8, 8 of them not yet in" in printed and "16 responses" in printed
    printed = call(*steps.critique, tmp_path / "critiques.jsonl", "--check")
    assert "critiques    8, 8 of them not yet in" in printed and "check passed" in printed
    assert not list(tmp_path.iterdir())
    assert "8, 0 of them not yet in" in call(*steps.critique, steps.out / "critiques.jsonl", "--check")


def test_another_critic_is_a_warning(steps, tmp_path, capsys):
    write_lines(tmp_path / "answers.jsonl", lines(steps.out / "answers.jsonl")[:1], fingerprint="0" * 12)
    call(*steps.critique, tmp_path / "critiques.jsonl", "--answers", tmp_path / "answers.jsonl")
    assert "warning: the critic is not the model that generated" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("[]", "instructions.json: empty"),
    ('{"image": "scene_01.jpg", "text": ""}', "line 1: no text"),
    ('{"image": "scene_01.jpg", "text": "<image> "}', "line 1: no question"),
    ('{"image": "scene_01.jpg", "text": "A", "ground_truth": 1}', "line 1: no ground_truth"),
    (r'{"image": "scene_01.jpg", "text": "A", "id": "\ud800"}', r"line 1: id '\\ud800' is not valid Unicode"),
    ('{"text": "What?"}', "line 1: no image"),
    ('{"image": "a.png", "text": "What?"}', "none of the images of .*instructions.json is in .*images"),
    ('{"image": "%s", "text": "What?"}' % ("a" * 999), "none of the images of .*instructions.json is in .*images"),
    ('{"image": "scene_01.jpg", "conversations": []}',
     r"\(scene_01.jpg\): turns are \[\], but human and gpt must alternate"),
])  # fmt: skip
def test_bad_questions_are_one_line(steps, tmp_path, text, message):
    (tmp_path / "instructions.json").write_text(text)
    status, line = ended(*steps.answers, tmp_path / "out.jsonl", "--instructions", tmp_path / "instructions.json")
    assert status == 1 and re.search(message, line) and line.startswith("error: ")


def test_answers_are_not_taken_for_something_else(steps, tmp_path):
    status, line = ended(*steps.critique, tmp_path / "out.jsonl", "--answers", steps.tiny / "instructions.json")
    assert status == 1 and line.endswith("record 0: no question; expected the output of sima answers")
