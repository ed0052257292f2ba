"""The paper's seven benchmarks end to end, direct and with DaR: small data in the official formats, a tiny checkpoint,
and a judge on this machine that fails now and then. Each run is made once undisturbed; one that is stopped in every
phase and given again has to leave the same files."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from commands import ENV, ROOT, call, call_two_ranks, lines, run, start
from judge_server import FAULTS, MODEL, SILENCE, JudgeServer

import evaluate
from stic_min import InputError, generate, sampler
from stic_min.runtime import process
from stic_min.runtime.output import Output
from stic_min.scorers import harness, judge, published
from stic_min.scorers.judge import Judge, read_reply
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES

pytest_plugins = ["benchmark_world"]  # the fixtures world and own

NAMES = list(published.BENCHMARKS)
JUDGED = ["llavabench", "mmbench", "mmvet", "mathvista"]
RULED = ["scienceqa", "textvqa", "chartqa", "mmbench", "mathvista"]
MODES = {"direct": [], "dar": ["--dar"]}
KEY = "sk-not-to-be-seen"
NOBODY = "http://127.0.0.1:9/v1"  # nothing answers there
runs = pytest.mark.parametrize("name, mode", [(name, mode) for name in NAMES for mode in MODES])


@pytest.fixture(scope="module", autouse=True)
def quick():
    with mock.patch.object(judge, "WAIT", 0.01):
        yield


def judged_at(url, timeout=1):
    return ["--judge", "--judge-url", url, "--judge-key", KEY, "--judge-timeout", timeout]


def command(world, name, mode, out, url=None):
    model = ["--model", world / "llava-v1.6-tiny", "--device", "cpu", "--image-mode", "pad", "--max-new-tokens", 8]
    asked = judged_at(url) if url else []
    return ["evaluate", name, *model, "--data", world / name, "--out", out, *MODES[mode], *asked]


@pytest.fixture(scope="session")
def running():
    with JudgeServer() as server:
        yield server


@pytest.fixture
def server(running):
    """A judge that does not fail, always at the same address: what it said is kept for that one."""
    running.plan()
    return running


@pytest.fixture(scope="session")
def clean(world, running, tmp_path_factory):
    """All seven, both ways, undisturbed: the folder, and what was printed."""
    out, said = tmp_path_factory.mktemp("clean"), {}
    running.plan()
    for name, mode in ((name, mode) for name in NAMES for mode in MODES):
        url = running.url if name in JUDGED else None
        said[name, mode] = call(*command(world, name, mode, out, url))
    return SimpleNamespace(out=out, said=said)


def files(folder, stem=""):
    """{name: content} without the replies, whose order depends on the threads, and the records of time and place."""
    kept = lambda name: ".judge." not in name and not name.endswith(".run.json")
    found = [path for path in folder.iterdir() if path.name.startswith(stem) and kept(path.name)]
    return {path.name: path.read_bytes() for path in found}


def replies(path, torn=False):
    """The usable replies of a store, each of which is there once: nothing was asked again that had an answer."""
    found, whole = [], path.read_text(encoding="utf-8").split("\n")
    assert torn or whole[-1] == ""
    for line in map(json.loads, whole[:-1]):
        try:
            found.append(((line["where"], line["request"]), read_reply(line["body"])))
        except ValueError:
            pass  # stored as it came, before it was read
    assert len(found) == len(dict(found)) and KEY not in "".join(whole)
    return dict(found)


# ---------------------------------------------------------------- stopped and given again


class Killed(BaseException):
    pass


def killed_writing(record):
    """Ends a run while it writes its `record`-th line: half of it is on disk."""
    left = [record]

    def append(self, record, append=Output.append):
        left[0] -= 1
        if left[0]:
            return append(self, record)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record)[:30])
        raise Killed

    return mock.patch.object(Output, "append", append)


@contextlib.contextmanager
def killed_asking(number, store):
    """Ends a run at its `number`-th request to the judge, with half a reply on disk."""
    left = [number]

    def post(self, *args, post=Judge.post):
        left[0] -= self.path == store  # not a thread that an earlier test left behind
        if left[0]:
            return post(self, *args)
        with open(store, "a", encoding="utf-8") as file:
            file.write('{"where": "v1_0, ru')
        raise Killed

    with mock.patch.object(judge, "WORKERS", 1), mock.patch.object(Judge, "post", post):
        yield


@runs
def test_stopped_in_every_phase_and_given_again_it_leaves_the_same_files(world, clean, server, tmp_path, name, mode):
    stem = f"{name}-base-{mode}"
    whole, store = files(clean.out, f"{stem}."), f"{stem}.judge.jsonl"
    described, answered = (whole.get(f"{stem}{kind}.jsonl", b"").count(b"\n") for kind in (".descriptions", ""))
    server.plan(*FAULTS)
    again = command(world, name, mode, tmp_path, server.url if name in JUDGED else None)
    for record in [2, described + answered // 2] if described else [answered // 2 + 1]:
        with pytest.raises(Killed), killed_writing(record):
            call(*again, "--batch-size", 2)
    assert (tmp_path / f"{stem}.jsonl").read_bytes().count(b"\n") == answered // 2 > 0
    if name in JUDGED:
        with pytest.raises(Killed), killed_asking(4, tmp_path / store):
            call(*again)
        assert 0 < len(replies(tmp_path / store, torn=True)) < len(replies(clean.out / store))
    assert not (tmp_path / f"{stem}.scores.json").exists()
    call(*again)
    assert files(tmp_path) == whole
    if name in JUDGED:
        assert replies(tmp_path / store) == replies(clean.out / store)
        assert len(server.faults) <= len(FAULTS) - 3  # 429, 500 and garbage at least


def test_a_real_kill_while_the_judge_is_asked(world, clean, server, tmp_path):
    store = tmp_path / "mmvet-base-dar.judge.jsonl"
    server.plan(*[None] * 5, *[SILENCE] * 9, every=1)
    script, *args = command(world, "mmvet", "dar", tmp_path)
    keys = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    process = start(script, *args, "--judge", env=ENV | keys)
    while process.poll() is None and (not store.exists() or len(replies(store, torn=True)) < 5):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "mmvet-base-dar.scores.json").exists()
    server.plan(*FAULTS)
    said = call(*command(world, "mmvet", "dar", tmp_path, server.url))
    assert "3 questions, 3 of them already in" in said
    assert files(tmp_path) == files(clean.out, "mmvet-base-dar.")
    assert replies(store) == replies(clean.out / store.name) and len(server.requests) - len(FAULTS) == 15 - 5


def test_two_ranks_write_the_same_files(world, clean, server, tmp_path):
    """The second one goes on with what four ranks once left."""
    whole = files(clean.out, "textvqa-base-dar.") | files(clean.out, "mmbench-base-dar.")
    first, second, *_, last = whole["mmbench-base-dar.jsonl"].splitlines(keepends=True)
    (tmp_path / "mmbench-base-dar.jsonl.part3").write_bytes(last + first)
    (tmp_path / "mmbench-base-dar.jsonl.part1").write_bytes(second[:50])
    call_two_ranks(command(world, "textvqa", "dar", tmp_path), command(world, "mmbench", "dar", tmp_path, server.url))
    assert files(tmp_path) == whole


# ---------------------------------------------------------------- what the files hold

FIRST = {  # id and recorded prompt of the first question
    "scienceqa": ("4", "<image>\nWhich part of the house lets people in?\nA. the roof\nB. the door\n"
                       "Answer with the option's letter from the given choices directly."),
    "textvqa": ("0a", "What colour is the house?\nReference OCR token: HOUSE, 12\n"
                      "Answer the question using a single word or phrase."),
    "chartqa": ("human-0", "How tall is the tallest bar?\nAnswer the question using a single word or phrase."),
    "llavabench": (0, "What is this?"), "mmvet": (0, "What is x?"),
    "mmbench": (241, "What is shown?\nA. a house\nB. a boat\nC. a tree"),
    "mathvista": ("1", "Hint: Please answer.\nQuestion: Which is larger?")}  # fmt: skip
PICTURES = {  # in the order of the questions; MMBench's have no names
    "scienceqa": [f"images/test/{n}/image.png" for n in (4, 18, 25, 52)],
    "textvqa": ["train_images/0a.jpg", "train_images/1b.jpg"], "chartqa": ["png/c1.png", "png/c2.png"],
    "llavabench": ["images/001.jpg", "images/002.jpg"], "mmvet": ["images/v1_0.png", "images/v1_1.jpg"],
    "mathvista": ["images/2.jpg", "images/1.jpg"]}  # fmt: skip
SETTINGS = {"model": "llava-v1.6-tiny", "adapter": None, "template": "mistral_instruct", "image_mode": "pad",
            "dtype": "float32", "temperature": 0.0, "top_p": None, "max_new_tokens": 8, "seed": 0}  # fmt: skip


def scores(out, stem):
    return json.loads((out / f"{stem}.scores.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_descriptions(world, clean, name):
    direct, dar = (lines(clean.out / f"{name}-base-{mode}.jsonl") for mode in MODES)
    described = lines(clean.out / f"{name}-base-dar.descriptions.jsonl")
    asked = harness.get_benchmark(name).load(world / name)
    assert (direct[0]["question_id"], direct[0]["prompt"]) == FIRST[name]
    assert [r["question_id"] for r in direct] == [r["question_id"] for r in dar] == [q["question_id"] for q in asked]
    assert [r["prompt"] for r in dar] == [r["prompt"] for r in direct]  # free of the description: scorers read it
    assert [r["text"] for r in dar] != [r["text"] for r in direct]
    assert all(SETTINGS.items() <= r.items() for r in [*direct, *dar, *described])
    assert {r["mode"] for r in direct} == {"direct"} and {r["mode"] for r in dar + described} == {"dar"}
    # one description a picture, also where questions share it
    pictures = list(dict.fromkeys(q["image"] for q in asked if q["image"]))
    assert [d["image"] for d in described] == pictures == PICTURES.get(name, pictures)
    assert len(pictures) < len(asked) and all(d["description"] for d in described)


@contextlib.contextmanager
def watched():
    """[(prompt, how many pictures)] of what is sampled meanwhile, in order."""
    asked, seen, prepare, stream = [], {}, generate.sampler_requests, sampler.stream

    def noting(llava, jobs):  # in worker threads, in any order
        requests = prepare(llava, jobs)
        queries = [query for job in jobs for query in job.queries]
        for request, query in zip(requests, queries):
            images = len(query.images)
            seen[id(request)] = request, (llava.chat_prompt(query.prompt, images), images)
        return requests

    def watching(llava, requests, **options):
        return stream(llava, (asked.append(seen[id(request)][1]) or request for request in requests), **options)

    with mock.patch.object(generate, "sampler_requests", noting), mock.patch.object(sampler, "stream", watching):
        yield asked


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_is_asked(world, clean, tmp_path, name):
    with watched() as asked:
        call(*command(world, name, "dar", tmp_path))
    described = {d["image"]: d["description"] for d in lines(clean.out / f"{name}-base-dar.descriptions.jsonl")}
    expected = [("[INST] <image>\nDetail the composition and subjects within the frame. [/INST]", 1)] * len(described)
    for q in harness.get_benchmark(name).load(world / name):
        text = q["text"] if q["image"] is None else (
            f"<image>\nImage description:\n{described[q['image']]}\n\n{q['text']}")  # fmt: skip
        expected.append((f"[INST] {text} [/INST]", int(q["image"] is not None)))
    assert asked[: len(described)] == expected[: len(described)]
    assert sorted(asked) == sorted(expected)  # those about one picture follow each other


def test_mmbenchs_sheet(clean):
    with open(clean.out / "mmbench-base-dar.tsv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    texts = [r["text"] for r in lines(clean.out / "mmbench-base-dar.jsonl")]
    assert rows[1] == ["1000241", "What is shown?", "a boat", "a tree", "a house", "", texts[1], "C", "dev"]
    assert [row[6] for row in rows] == texts
    assert [row[0] for row in rows] == ["241", "1000241", "2000241", "252", "1000252", "260"]


def test_mmvets_and_mathvistas_official_files(clean):
    texts = [r["text"] for r in lines(clean.out / "mmvet-base-dar.jsonl")]
    assert json.loads((clean.out / "mmvet-base-dar.json").read_text()) == dict(zip(["v1_0", "v1_1", "v1_2"], texts))
    official = json.loads((clean.out / "mathvista-base-direct.json").read_text())
    texts = [r["text"] for r in lines(clean.out / "mathvista-base-direct.jsonl")]
    assert {pid: problem["response"] for pid, problem in official.items()} == dict(zip("1234", texts))
    assert official["3"]["query"] == "Hint: Please answer.\nQuestion: What is the ratio?"
    assert official["3"]["answer"] == "1.2" and official["3"]["precision"] == 1


@runs
def test_scores_name_their_run(clean, name, mode):
    saved, (_, prompt) = scores(clean.out, f"{name}-base-{mode}"), FIRST[name]
    [first, *_] = lines(clean.out / f"{name}-base-{mode}.jsonl")
    same = {key: value for key, value in first.items() if key not in ("key", "question_id", "prompt", "text", "finish")}
    user = "<image>\n" + prompt.removeprefix("<image>\n")
    if name == "mmbench":
        user += "\nAnswer with the option's letter from the given choices directly."
    if mode == "dar":
        [described, *_] = lines(clean.out / f"{name}-base-dar.descriptions.jsonl")
        user = user.replace("<image>\n", f"<image>\nImage description:\n{described['description']}\n\n")
    assert saved["run"] == same | {"limit": None, "prompt": f"[INST] {user} [/INST]"}
    assert saved["benchmark"] == name and saved["missing"] == 0 and 0 <= saved["score"] <= 200
    assert saved["n"] == {"scienceqa": 4, "chartqa": 4, "mathvista": 4}.get(name, 3)
    if name in JUDGED:
        official = "gpt-3.5-turbo-0613" if name == "mmbench" else "gpt-4-0613"
        assert saved["judge"] == {"model": official, "served": [MODEL], "official": official, "comparable": False}
    else:
        assert "judge" not in saved


@runs
def test_what_is_printed(clean, name, mode):
    said, saved = clean.said[name, mode], scores(clean.out, f"{name}-base-{mode}")
    assert str(clean.out / f"{name}-base-{mode}.jsonl") in said
    assert harness.get_benchmark(name).report(saved) in said
    if name in JUDGED:
        assert f"judged by {MODEL} (the official judge is gpt-" in said
        assert "not comparable with published numbers: the judge's prompt was in our own words" in said
    assert ("\n  paper, LLaVA-1.6 7B  " in said) is (name not in JUDGED)


def test_verdicts_by_our_own_wording_are_in_files_that_say_so(clean):
    found = sorted(path.name for path in clean.out.glob("*own-prompt*") if "-dar" in path.name)
    assert found == [
        *(f"llavabench-base-dar.own-prompt.reviews-{run}.jsonl" for run in (1, 2, 3)),
        "mathvista-base-dar.own-prompt.extractions.json", "mmvet-base-dar.own-prompt.grades.json"]  # fmt: skip
    grades = json.loads((clean.out / "mmvet-base-dar.own-prompt.grades.json").read_text())
    assert list(grades) == ["v1_0", "v1_1", "v1_2"] and all(len(own["score"]) == 5 for own in grades.values())


# ---------------------------------------------------------------- flags


def test_the_release_describes_mmbench_without_looking(world, tmp_path):
    with watched() as asked:
        call(*command(world, "mmbench", "dar", tmp_path), "--preset", "released")
    stem = "mmbench-base-blind-dar"
    assert set(files(tmp_path)) == {f"{stem}{end}" for end in (".descriptions.jsonl", ".jsonl", ".tsv", ".scores.json")}
    prompt = TEMPLATES["vicuna_v1"].prompt
    describe, *asked = asked
    assert describe == (prompt(DESCRIBE_PROMPT), 0) and "<image>" not in DESCRIBE_PROMPT
    [described] = lines(tmp_path / f"{stem}.descriptions.jsonl")
    assert described["image"] == "" and (described["mode"], described["template"]) == ("blind-dar", "vicuna_v1")
    infused = f"USER: <image>\nImage description:\n{described['description']}\n\n"
    assert len(asked) == 6 and all(infused in prompt and pictures == 1 for prompt, pictures in asked)
    assert infused in scores(tmp_path, stem)["run"]["prompt"]
    before = files(tmp_path)
    call("evaluate", "score", "mmbench", "--answers", tmp_path / f"{stem}.jsonl", "--data", world / "mmbench")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name, mode", [("mmbench", "direct"), ("textvqa", "dar"), ("scienceqa", "direct")])
def test_what_else_the_release_does(world, tmp_path, name, mode):
    call(*command(world, name, mode, tmp_path), "--preset", "released")
    mode_of_release = "blind-dar" if mode == "dar" else mode  # the release's only DaR script is MMBench's, and blind
    answers = lines(tmp_path / f"{name}-base-{mode_of_release}.jsonl")
    assert {(r["template"], r["preset"]) for r in answers} == {("vicuna_v1", "released")}
    if mode == "dar":
        assert len(lines(tmp_path / f"{name}-base-blind-dar.descriptions.jsonl")) == 1
        call(*command(world, name, mode, tmp_path), "--preset", "released", "--no-blind")
        assert len(lines(tmp_path / f"{name}-base-dar.descriptions.jsonl")) == 2
        mode = "blind-dar"
    flags = ["--preset", "released", "--template", "mistral_instruct"]
    call(*command(world, name, mode.removeprefix("blind-"), tmp_path / "2"), *flags)
    assert {r["template"] for r in lines(tmp_path / "2" / f"{name}-base-{mode}.jsonl")} == {"mistral_instruct"}


def test_a_blind_describer_elsewhere(world, tmp_path):
    with watched() as asked:
        call(*command(world, "scienceqa", "dar", tmp_path), "--blind")
    [described] = lines(tmp_path / "scienceqa-base-blind-dar.descriptions.jsonl")
    _, *answers = [prompt for prompt, _ in asked]
    infused = f"[INST] <image>\nImage description:\n{described['description']}\n\n"
    pictured = [q["image"] is not None for q in harness.get_benchmark("scienceqa").load(world / "scienceqa")]
    assert [prompt.startswith(infused) for prompt in answers] == pictured == [1, 0, 1, 1, 0, 1]
    assert ["Image description" in prompt for prompt in answers] == pictured


def test_blind_needs_dar(world, tmp_path):
    with mock.patch("stic_min.loader.load_llava", side_effect=AssertionError):
        with pytest.raises(InputError, match="^--blind changes how descriptions are generated: it needs --dar$"):
            call(*command(world, "mmbench", "direct", tmp_path), "--blind")


@pytest.mark.parametrize("seed", range(4))
def test_limit_takes_whole_questions_of_mmbench(world, tmp_path, seed):
    call(*command(world, "mmbench", "direct", tmp_path), "--limit", 1, "--seed", seed)
    group = [r["question_id"] for r in lines(tmp_path / "mmbench-base-direct.jsonl")]
    assert group in ([241, 1000241, 2000241], [252, 1000252], [260])
    saved = scores(tmp_path, "mmbench-base-direct")
    assert (saved["n"], saved["rows"]["n"], saved["missing"], saved["run"]["limit"]) == (1, len(group), 0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_limit_then_the_rest(world, clean, server, tmp_path, name):
    stem, asked = f"{name}-base-dar", judged_at(server.url) if name in JUDGED else []
    again = command(world, name, "dar", tmp_path, server.url if name in JUDGED else None)
    call(*again, "--limit", 1)
    before, requests = files(tmp_path), len(server.requests)
    assert scores(tmp_path, stem)["run"]["limit"] == 1
    for limit in (["--limit", 1], []):  # a subset stays one
        score(world, tmp_path, name, "dar", *limit, *asked)
        assert files(tmp_path) == before and len(server.requests) == requests
    call(*again)
    assert files(tmp_path) == files(clean.out, f"{stem}.")


def test_how_often_the_judge_is_asked(world, server, tmp_path):
    call(*command(world, "mmvet", "direct", tmp_path, server.url), "--judge-runs", 2, "--judge-model", "gpt-4.1")
    assert len(server.requests) == 3 * 2 and {request.body["model"] for request in server.requests} == {"gpt-4.1"}
    saved = scores(tmp_path, "mmvet-base-direct")
    assert len(saved["runs"]) == 2 and saved["judge"]["model"] == "gpt-4.1"


@pytest.mark.parametrize("name", JUDGED)
def test_the_official_wording_makes_it_comparable(world, server, tmp_path, name):
    scorer = harness.get_benchmark(name)
    (tmp_path / "prompts.json").write_text(json.dumps({"another": 1, scorer.prompts: scorer.own_prompts}, indent=2))
    out, official = tmp_path / "out", ["--judge-prompts", tmp_path / "prompts.json"]
    said = call(*command(world, name, "direct", out, server.url), *official)
    assert scores(out, f"{name}-base-direct")["judge"]["comparable"] and not [*out.glob("*own-prompt*")]
    assert has_paper(name, said) and "not comparable" not in said
    verdicts = {"llavabench": "reviews-1.jsonl", "mmvet": "grades.json", "mathvista": "extractions.json"}
    assert name == "mmbench" or (out / f"{name}-base-direct.{verdicts[name]}").is_file()


@pytest.mark.parametrize("name", ["mmvet", "llavabench"])
@pytest.mark.parametrize("limit", [[], ["--limit", 2, "--seed", 3]])
def test_without_a_judge_it_says_how_to_get_a_score(world, server, tmp_path, monkeypatch, name, limit):
    said = call(*command(world, name, "dar", tmp_path), *limit)
    answers = tmp_path / f"{name}-base-dar.jsonl"
    head, hint = said.splitlines()[-2:]
    assert head == f"no score yet: {name} is graded by a judge model. Set OPENAI_API_KEY, then run:"
    assert hint.startswith(f"  python evaluate.py score {name} --answers {answers} --data {world / name} --judge")
    assert not [*tmp_path.glob("*.scores.json")]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    call("evaluate", *hint.split()[2:])
    saved = scores(tmp_path, f"{name}-base-dar")
    assert (saved["n"], saved["run"]["limit"]) == ((2, 2) if limit else (3, None))
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    said = call(*command(world, name, "dar", tmp_path), *limit)
    assert said.endswith(f"the score is in {tmp_path / f'{name}-base-dar.scores.json'}\n")


# ---------------------------------------------------------------- score, table


@pytest.fixture
def done(clean, tmp_path):
    """A copy of the clean folder."""
    return shutil.copytree(clean.out, tmp_path / "done")


def has_paper(name, said):
    """Whether the paper's row of the base model is printed below a score."""
    return f"\n  {'paper, LLaVA-1.6 7B':<44}{published.TABLE2[False, False][name]:>6}\n" in said


def score(world, out, name, mode, *flags):
    answers = out / f"{name}-base-{mode}.jsonl"
    return call("evaluate", "score", name, "--answers", answers, "--data", world / name, *flags)


@runs
def test_scoring_again_gives_the_same(world, clean, server, done, name, mode):
    """The judge's replies are there: it is not asked."""
    before, flags = files(done), judged_at(server.url) if name in JUDGED else []
    said, numbers = score(world, done, name, mode, *flags), json.loads(score(world, done, name, mode, "--json", *flags))
    saved = scores(done, f"{name}-base-{mode}")
    assert {"benchmark": name, "run": saved["run"]} | numbers == saved
    assert clean.said[name, mode].endswith(said) and said.count("\n") > 2
    assert files(done) == before and server.requests == []


@pytest.mark.parametrize("name, verdicts", [
    ("llavabench", [f"reviews-{run}.jsonl" for run in (1, 2, 3)]), ("mmvet", ["grades.json"]),
    ("mathvista", ["extractions.json"])])  # fmt: skip
def test_scoring_from_the_verdicts_that_a_run_wrote(world, done, name, verdicts):
    paths = [done / f"{name}-base-dar.own-prompt.{ending}" for ending in verdicts]
    saved = scores(done, f"{name}-base-dar")
    numbers = json.loads(score(world, done, name, "dar", "--judged", *paths, "--json"))
    assert numbers.pop("judge") == {"files": [str(path) for path in paths], "comparable": False}
    assert numbers.items() <= saved.items() and {"score", "interval", "groups"} <= numbers.keys()
    said = score(world, done, name, "dar", "--judged", *paths)
    assert "not comparable" in said and "paper, " not in said
    others = [path.rename(path.with_name(path.name.replace(".own-prompt", ""))) for path in paths]
    said = call("evaluate", "score", name, "--data", world / name, "--judged", *others)  # without the answers
    assert has_paper(name, said) and "not comparable" not in said  # what others publish does not say whose wording


def test_official_answers_files_are_scored_too(world, done):
    for name, ending in [("mmbench", ".tsv"), ("mathvista", ".json"), ("mmvet", ".json")]:
        judged = ["--judged", done / "mmvet-base-direct.own-prompt.grades.json"] if name == "mmvet" else []
        ours = json.loads(score(world, done, name, "direct", *judged, "--json"))
        before = files(done)
        official = done / f"{name}-base-direct{ending}"
        theirs = call("evaluate", "score", name, "--answers", official, "--data", world / name, *judged, "--json")
        theirs = json.loads(theirs)
        assert theirs.pop("answers") == ours.pop("answers") | {"cut": None}  # it does not say how its answers ended
        assert theirs == ours and files(done) == before  # nor what it was made with


@pytest.mark.parametrize("name", RULED)
def test_rules(world, done, name):
    before = files(done)
    for rule in harness.get_benchmark(name).rules:
        assert json.loads(score(world, done, name, "dar", "--rule", rule, "--json"))["rule"] == rule
    with pytest.raises(InputError, match=f"--rule lenient: {name} has {harness.get_benchmark(name).rules[0]} and "):
        score(world, done, name, "dar", "--rule", "lenient")
    assert files(done) == before


def test_a_question_ending_of_ones_own(world, tmp_path):
    call(*command(world, "chartqa", "direct", tmp_path), "--suffix", "Be brief.")
    assert lines(tmp_path / "chartqa-base-direct.jsonl")[1]["prompt"] == "Which is tallest?\nBe brief."
    before = files(tmp_path)
    assert "'Be brief.'" in score(world, tmp_path, "chartqa", "direct")
    assert files(tmp_path) == before


def test_scoring_imports_no_model_code(world, done):
    script = (
        "import sys, evaluate; evaluate.main()\n"
        "own = [name for name in sys.modules if name.startswith(('stic_min.', 'torch'))]\n"
        "print([name for name in own if not name.startswith(('stic_min.scorers', 'stic_min.runtime'))])"
    )
    args = ["score", "mmvet", "--answers", done / "mmvet-base-dar.jsonl", "--data", world / "mmvet"]
    said = run("-c", script, *args, "--judged", done / "mmvet-base-dar.own-prompt.grades.json").stdout
    assert "MM-Vet: 3 questions" in said
    loaded = {name.removeprefix("stic_min.") for name in re.findall("'(.*?)'", said.splitlines()[-1])}
    assert loaded == {"text", "toy", "toy.captions", "toy.vqa"}


def test_table(done):
    said = call("evaluate", "table", done)
    assert said.startswith((done / "tables.md").read_text()[:-1]) and (done / "report.html").is_file()
    two = said.partition("## Table 2")[2].partition("## ")[0].strip().splitlines()[3:]
    ours, theirs = ([row.split(" | ") for row in two if row.startswith(f"| {who}")] for who in ("ours", "paper"))
    assert len(ours) == 2 and len(theirs) == 4
    for mode, row in zip(MODES, ours):
        own = [scores(done, f"{name}-base-{mode}")["score"] for name in NAMES]
        assert row[-1].startswith(f"{sum(own) / 7:.1f} [") and row[1].startswith(f"{own[0]:.1f} [")
        assert ["‡ †" in cell for cell in row[1:]] == [False] * 4 + [True] * 5  # ScienceQA has two columns
    assert [row[-4:] for row in theirs] == [["–", "–", "–", "– |"]] * 4  # the judge's wording was our own


# ---------------------------------------------------------------- bad input: one line each, and nothing is lost


@pytest.fixture
def fails(capsys):
    """fails(command): it ends with status 1 -> the warnings and the one line of the error."""

    def fails(*command):
        with mock.patch.object(sys, "argv", [*map(str, command)]), pytest.raises(SystemExit) as stop:
            process.run(evaluate.main)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning: ", "error: "))]
        *warnings, error = said
        assert stop.value.code == 1 and error.startswith("error: ") and not any("error: " in line for line in warnings)
        return warnings, error.removeprefix("error: ")

    return fails


def change(path, edit):
    """Lets `edit` change the records of a JSON lines file in place."""
    records = lines(path)
    edit(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


no_model = lambda: mock.patch("stic_min.loader.load_llava", side_effect=AssertionError("loaded"))


@pytest.mark.parametrize("name, file", [
    ("scienceqa", "problems.json"), ("scienceqa", "pid_splits.json"), ("textvqa", "TextVQA_0.5.1_val.json"),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl"), ("chartqa", "test_human.json"), ("chartqa", "test_augmented.json"),
    ("llavabench", "questions.jsonl"), ("llavabench", "context.jsonl"), ("llavabench", "answers_gpt4.jsonl"),
    ("mmbench", "mmbench_dev_20230712.tsv"), ("mmvet", "mm-vet.json"), ("mathvista", "annot_testmini.json")])
def test_a_missing_data_file(own, done, fails, name, file):
    (own / name / file).unlink()
    before = files(done)
    with no_model():
        warnings, error = fails(*command(own, name, "dar", done))
    assert file in error and str(own / name) in error and not warnings
    warnings, again = fails("evaluate", "score", name, "--answers", done / f"{name}-base-dar.jsonl", "--data",
                            own / name)  # fmt: skip
    assert again == error and not warnings and files(done) == before


def wrong_answers(fails, world, name, path):
    asked = judged_at(NOBODY) if name in JUDGED else []  # nothing is asked before the answers are checked
    warnings, error = fails("evaluate", "score", name, "--answers", path, "--data", world / name, *asked)
    assert error.startswith(f"{path}: ") and not warnings
    return error.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_answers_file(world, fails, tmp_path, name):
    warnings, error = fails("evaluate", "score", name, "--answers", tmp_path / "none.jsonl", "--data", world / name)
    assert (warnings, error) == ([], f"can't read {tmp_path / 'none.jsonl'}: No such file or directory")


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_question_id(world, done, fails, name):
    path = done / f"{name}-base-direct.jsonl"
    change(path, lambda records: records[1].update(question_id="999"))
    before = files(done)
    error = wrong_answers(fails, world, name, path)
    if name == "textvqa":
        assert error == "TextVQA answers, record 2: 'is it day?' about '999' is not among the questions"
    else:
        assert error == f"{published.BENCHMARKS[name]} answers: '999' is not a question id"
    assert files(done) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_question_answered_twice(world, done, fails, name):
    path = done / f"{name}-base-direct.jsonl"
    change(path, lambda records: records.append(records[1]))
    before, (qid, *_) = files(done), [r["question_id"] for r in lines(path)][1:]
    error = wrong_answers(fails, world, name, path)
    if name == "textvqa":
        assert error == "TextVQA answers, record 4: 'is it day?' about '0a' is answered twice"
    else:
        assert error == f"{published.BENCHMARKS[name]} answers: '{qid}' is repeated"
    assert files(done) == before


def test_answers_to_another_split_of_chartqa(own, done, fails):
    """Its questions have no ids, so theirs are their places: only the recorded prompt can tell."""
    file, answers = own / "chartqa" / "test_human.json", done / "chartqa-base-direct.jsonl"
    file.write_text(file.read_text().replace("Which is tallest?", "Which is lowest?"))
    assert wrong_answers(fails, own, "chartqa", answers).startswith("the text of question 'human-1' has changed")


@pytest.mark.parametrize("name, file, old, new", [
    ("scienceqa", "problems.json", "the house", "the boat"), ("chartqa", "test_human.json", "tallest", "lowest"),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", "HOUSE", "BOAT"), ("mmvet", "mm-vet.json", "What is", "Who is"),
    ("llavabench", "questions.jsonl", "What is", "Who is"), ("mathvista", "annot_testmini.json", "larger", "smaller"),
    ("mmbench", "mmbench_dev_20230712.tsv", "What is", "Who is")])  # fmt: skip
def test_a_run_does_not_go_on_with_answers_to_other_questions(own, done, fails, name, file, old, new):
    """Another split's, or another version's, with the same ids: old answers would be scored as answers to the new."""
    (own / name / file).write_text((own / name / file).read_text().replace(old, new))
    before = files(done)
    _, error = fails(*command(own, name, "direct", done))
    assert str(done / f"{name}-base-direct.jsonl") in error and files(done) == before


@pytest.mark.parametrize("name", ["textvqa", "llavabench", "mmvet"])
def test_scores_that_need_every_answer(world, done, fails, name):
    path = done / f"{name}-base-direct.jsonl"
    change(path, lambda records: records.__delitem__(1))
    first = {"textvqa": "'is it day?' about '0a'", "llavabench": 1, "mmvet": 1}[name]
    assert wrong_answers(fails, world, name, path) == (
        f"{published.BENCHMARKS[name]}: 1 of 3 questions have no answer, the first is {first}")  # fmt: skip


@pytest.mark.parametrize("name", ["scienceqa", "chartqa", "mmbench", "mathvista"])
def test_scores_that_count_a_missing_answer_as_wrong(world, done, name):
    path = done / f"{name}-base-direct.jsonl"
    change(path, lambda records: records.__delitem__(1))
    numbers = json.loads(score(world, done, name, "direct", "--json"))
    assert numbers["missing"] == 1 and numbers["n"] == scores(done, f"{name}-base-dar")["n"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mmbench"])
def test_a_missing_picture_costs_its_own_questions(own, clean, server, tmp_path, capsys, name, mode):
    """Until it is there: then the same command makes what is missing."""
    picture, out, stem = own / name / PICTURES[name][0], tmp_path / "out", f"{name}-base-{mode}"
    picture.rename(own / "away")
    lost = [q["question_id"] for q in harness.get_benchmark(name).load(own / name) if q["image"] == PICTURES[name][0]]
    again = command(own, name, mode, out, server.url if name in JUDGED else None)
    stop = name in ("textvqa", "llavabench", "mmvet")
    with pytest.raises(SystemExit) if stop else contextlib.nullcontext():
        with mock.patch.object(sys, "argv", [*map(str, again)]):
            process.run(evaluate.main)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning: ", "error: "))]
    assert len(said) == len(lost) + stop
    assert all(f" is skipped: no such image: '{picture}'" in line for line in said[: len(lost)])
    assert not stop or f"{len(lost)} of 3 questions have no answer, the first is " in said[-1]
    kept, whole = lines(out / f"{stem}.jsonl"), lines(clean.out / f"{stem}.jsonl")
    assert kept == [r for r in whole if r["question_id"] not in lost] and 0 < len(kept) < len(whole)
    assert (out / f"{stem}.scores.json").exists() is not stop
    assert stop or scores(out, stem)["missing"] == len(lost)
    (own / "away").rename(picture)
    call(*again)
    assert files(out) == files(clean.out, f"{stem}.")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("picture, reason", [
    ("/9j/!!!!", "mmbench_dev_20230712.tsv, row 260: its image is not base64"),
    ("AAAA", "can't read image of question 260: "), ("", "mmbench_dev_20230712.tsv, row 260: has no image")])
def test_a_broken_picture_in_mmbench(own, clean, tmp_path, capsys, mode, picture, reason):
    file, out, stem = own / "mmbench" / "mmbench_dev_20230712.tsv", tmp_path / "out", f"mmbench-base-{mode}"
    whole = file.read_text()
    *rows, last = whole.splitlines(keepends=True)
    cells = last.split("\t")
    cells[9] = picture
    file.write_text("".join([*rows, "\t".join(cells)]))
    said = call(*command(own, "mmbench", mode, out))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: question 260 is skipped: {reason}")
    assert "3 questions in 6 rows, 1 without an answer" in said
    assert lines(out / f"{stem}.jsonl") == lines(clean.out / f"{stem}.jsonl")[:-1]
    file.write_text(whole)
    call(*command(own, "mmbench", mode, out))
    assert files(out, f"{stem}.jsonl") == files(clean.out, f"{stem}.jsonl")


@pytest.mark.parametrize("name", JUDGED)
def test_a_judge_that_is_not_there(world, done, tmp_path, monkeypatch, fails, name):
    monkeypatch.setattr(judge, "TRIES", 2)
    out = tmp_path / "out"
    warnings, error = fails(*command(world, name, "dar", out, NOBODY))
    assert re.match(rf"judge {NOBODY}/chat/completions: no usable reply for .+ in 2 tries \(.*refused.*\); verdicts "
                    "so far are kept; run the same command to resume", error)  # fmt: skip
    assert 0 < len(warnings) <= judge.WORKERS
    kept = files(out)
    assert kept.items() < files(done, f"{name}-base-dar.").items() and f"{name}-base-dar.jsonl" in kept
    warnings, again = fails("evaluate", "score", name, "--answers", out / f"{name}-base-dar.jsonl", "--data",
                            world / name, *judged_at(NOBODY))  # fmt: skip
    assert again.startswith(f"judge {NOBODY}") and files(out) == kept  # the answers file has no part in it


@pytest.mark.parametrize("fault, message", [
    (SILENCE, r"no usable reply for v1_\d, run \d, attempt 1 in 2 tries \(timed out\); verdicts so far are kept"),
    (401, r'HTTP 401 {"error": "not now"}$'), (404, r'HTTP 404 {"error": "not now"}$')])
def test_a_judge_that_stops_answering(world, clean, server, tmp_path, monkeypatch, fails, fault, message):
    monkeypatch.setattr(judge, "TRIES", 2)
    monkeypatch.setattr(judge, "WORKERS", 1)
    store = tmp_path / "mmvet-base-dar.judge.jsonl"
    server.plan(*[None] * 5, fault, fault, every=1)
    _, error = fails(*command(world, "mmvet", "dar", tmp_path, server.url))
    assert re.search(message, error) and KEY not in error
    assert len(replies(store)) == 5 and not [*tmp_path.glob("*.scores.json")]
    server.plan()
    call(*command(world, "mmvet", "dar", tmp_path, server.url))
    assert len(server.requests) == 15 - 5 and files(tmp_path) == files(clean.out, "mmvet-base-dar.")


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("prompts, key, message", [
    (None, "", "--judge needs an API key: set OPENAI_API_KEY, or pass --judge-key"),
    (None, "a b", "the judge's key is empty or has invalid characters (set OPENAI_API_KEY)"),
    ("{", KEY, "prompts.json: "), ('{"mm_vet": 1}', KEY, "is missing or not text"), ("", KEY, "prompts.json: ")])
def test_what_a_judge_needs_is_said_before_the_model_is_loaded(world, tmp_path, monkeypatch, fails, name, prompts, key,
                                                               message):  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ["--judge", "--judge-key", key]
    if prompts is not None:
        (tmp_path / "prompts.json").write_text(prompts)
        flags += ["--judge-prompts", tmp_path / "prompts.json"]
    with no_model():
        warnings, error = fails(*command(world, name, "dar", tmp_path / "out"), *flags)
    assert message in error and not warnings and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, flags, message", [
    ("scienceqa", "--judge --judge-key k", "--judge: scienceqa is scored without a judge"),
    ("scienceqa", "--judged x.json", "--judged: there are no published verdicts for scienceqa"),
    ("mmbench", "--judged x.json", "--judged: there are no published verdicts for mmbench"),
    ("mmvet", "--judged x.json --judge", "--judged reads verdicts and --judge requests them: use only one"),
    ("mmvet", "--judge-model gpt-4", "--judge-model requires --judge"),
    ("mmbench", "--judge --judge-runs 2", "--judge-runs: mmbench is judged only once"),
    ("mmvet", "--rule strict_int", "--rule strict_int: mmvet has no second rule"),
    ("mathvista", "--rule llava", "--rule llava: mathvista has lenient_int and strict_int")])
def test_flags_that_do_not_go_together(world, done, fails, name, flags, message):
    before = files(done)
    answers = ["--answers", done / f"{name}-base-dar.jsonl", "--data", world / name]
    assert fails("evaluate", "score", name, *answers, *flags.split()) == ([], message) and files(done) == before


@pytest.mark.parametrize("name", ["mmvet", "scienceqa"])
def test_a_score_of_other_answers_does_not_stay(world, done, name):
    """While new ones are made: a run that is stopped then leaves no score that is not its own."""
    change(done / f"{name}-base-dar.jsonl", lambda records: records.pop())
    with pytest.raises(Killed), killed_writing(1):
        call(*command(world, name, "dar", done))
    assert not (done / f"{name}-base-dar.scores.json").exists()


# ---------------------------------------------------------------- found by an attack


def test_a_subset_keeps_the_whole_benchmarks_score(world, done, capsys):
    whole = (done / "chartqa-base-direct.scores.json").read_bytes()
    assert "a subset: --limit 2" in call(*command(world, "chartqa", "direct", done), "--limit", 2)
    assert (done / "chartqa-base-direct.scores.json").read_bytes() == whole
    kept = "chartqa-base-direct.scores.json already has the score of all questions and is kept"
    assert kept in capsys.readouterr().err


def test_a_mark_in_a_question_costs_that_question(own, tmp_path, capsys):
    questions = own / "llavabench" / "questions.jsonl"
    questions.write_text(questions.read_text().replace("What is this?", "What is <image>?"))
    call(*command(own, "llavabench", "direct", tmp_path / "out"))
    assert [r["question_id"] for r in lines(tmp_path / "out" / "llavabench-base-direct.jsonl")] == [1, 2]
    assert "warning: question 0 is skipped: its text contains <image>" in capsys.readouterr().err


def test_without_any_picture_there_is_no_score(own, tmp_path, fails):
    shutil.rmtree(own / "chartqa" / "png")
    warnings, error = fails(*command(own, "chartqa", "direct", tmp_path / "out"))
    assert len(warnings) == 4 and error == "none of the 4 questions could be asked"
    assert not (tmp_path / "out" / "chartqa-base-direct.scores.json").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "chartqa"])
def test_answers_to_another_benchmark(world, done, fails, name):
    path = done / "chartqa-base-direct.jsonl"
    _, error = fails("evaluate", "score", name, "--answers", path, "--data", world / name)
    assert error == f"{path}: answers to chartqa, not to {name}"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": null}', '{"run": [1]}',
                                     '{"run": {"limit": "2", "seed": 0}}'])
def test_a_broken_scores_file_is_made_anew(world, done, content):
    path = done / "scienceqa-base-direct.scores.json"
    whole = path.read_bytes()
    path.write_text(content)
    call("evaluate", "score", "scienceqa", "--answers", done / "scienceqa-base-direct.jsonl", "--data",
         world / "scienceqa")  # fmt: skip
    assert path.read_bytes() == whole


@pytest.mark.parametrize("table, message", [
    ('index\tprediction\n241\t"A\n252\tA\n', "a quote is never closed"),
    ("index\tprediction\tprediction\n241\tA\tB\n", "has two columns 'prediction'")])
def test_a_broken_sheet(world, tmp_path, fails, table, message):
    path = tmp_path / "a.tsv"
    path.write_text(table)
    _, error = fails("evaluate", "score", "mmbench", "--answers", path, "--data", world / "mmbench")
    assert error.startswith(f"{path}: {message}")


def test_a_broken_description(world, clean, tmp_path, fails):
    kept = clean.out / "chartqa-base-dar.descriptions.jsonl"
    (tmp_path / kept.name).write_text(kept.read_text().replace('"description": "', '"description": 3, "text": "', 1))
    _, error = fails(*command(world, "chartqa", "dar", tmp_path))
    assert error.startswith(f"{tmp_path / kept.name}: 'png/c") and error.endswith(" has no description")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to Linux's /dev/full")
def test_a_full_disk_is_one_line(world, done):
    ends = subprocess.run([sys.executable, "evaluate.py", "table", done], cwd=ROOT, env=ENV, stderr=subprocess.PIPE,
                          stdout=open("/dev/full", "w"), text=True, timeout=120)  # fmt: skip
    assert (ends.returncode, ends.stderr) == (1, "error: writing: No space left on device\n")
