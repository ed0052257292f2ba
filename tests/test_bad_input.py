"""Bad input of every kind, through the commands' own entry points: one line that names the file or the sample and exit
status 1, never a traceback; in generation a bad picture costs itself alone, in training the start of the run."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from stic_min import cli

ROOT = Path(__file__).resolve().parents[1]
A, B = "scene_01.jpg", "scene_02.png"
MODEL, CONFIG, ADAPTER = "model/model.safetensors", "model/config.json", "stage1/adapter_model.safetensors"
MODEL16, SHARD = "--model {w}/model16", "model16/model-00002-of-00002.safetensors"
PAIRS, RECORDS, TOLD, ANSWERS = "pairs.jsonl", "instructions.json", "descriptions.jsonl", "answers.jsonl"


# ---------------------------------------------------------------- a small world that works


def pair(image, chosen="A red house.", rejected="A blue whale, and a boat."):
    turns = lambda answer: [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": answer}]
    return {"image": image, "chosen": turns(chosen), "rejected": turns(rejected)}


def instruction(id, image):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A house."}]
    return {"id": id, "conversations": talk} | ({"image": image} if image else {})


def write(path, records):
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")


def change(path, edit):
    """Reads a JSON or JSON lines file, lets `edit` change the value in place, writes it back."""
    text = path.read_text(encoding="utf-8")
    value = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    edit(value)
    write(path, value)


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def commands(w):
    """{name: module and arguments} that all work in the folder `w`, the adapter in runs/stage1 made by the second."""
    at, pictures = ["--model", w / "model", "--device", "cpu"], ["--images", w / "images"]
    few, tune = ["--max-new-tokens", "4"], [*at, *pictures, "--batch-size", "2", "--lr", "0.001", "--out", w / "out"]
    stage2 = ["--instructions", w / RECORDS, "--descriptions", w / TOLD]
    score = ["--answers", w / ANSWERS, "--data", w / "scienceqa"]
    adapter = ["--adapter", w / "stage1"]
    return {
        "pairs": ["generate_pairs", *at, *pictures, *few, "--out", w / "new.jsonl"],
        "describe": ["generate_pairs", *at, *pictures, *few, "--out", w / "new.jsonl", "--describe", w / RECORDS],
        "stage1": ["train_stage1", *tune, "--lora-r", "2", "--pairs", w / PAIRS],
        "stage2": ["train_stage2", *tune, *stage2, *adapter],
        "scienceqa": ["evaluate", "scienceqa", *at, *few, "--data", w / "scienceqa", "--out", w / "results"],
        "score": ["evaluate", "score", "scienceqa", *score],
        "ask": ["evaluate", "ask", "What?", *at, *adapter, *few, "--image", w / "images" / A],
        "merge": ["stic_min.merge", "--model", w / "model", *adapter, "--out", w / "merged"],
    }


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    w = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny / "llava-v1.5-tiny", w / "model")
    shutil.copytree(tiny / "llava-v1.6-tiny", w / "model16")
    for name in ("clip-tiny", "scienceqa"):
        shutil.copytree(tiny / name, w / name)
    (w / "images").mkdir()
    for name in (A, B):
        shutil.copy(tiny / "images" / name, w / "images")
    write(w / PAIRS, [pair(A), pair(B)])
    write(w / RECORDS, [instruction("a", A), instruction("b", B), instruction("text", None)])
    described = [{"id": id, "image": name, "description": "Red."} for id, name in (("a", A), ("b", B))]
    write(w / TOLD, described)
    write(w / ANSWERS, [{"question_id": "4", "prompt": "", "text": "B"}])
    outcome(w, "stage1", "--out", w / "stage1")
    return w


@pytest.fixture
def w(good, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(good, tmp_path / "w")


def outcome(w, name, *flags):
    """Runs a command as its script does -> its exit status."""
    module, *args = commands(w)[name]
    try:
        with mock.patch.object(sys, "argv", [module, *map(str, [*args, *flags])]):
            cli.run(importlib.import_module(module).main)
    except SystemExit as stop:
        return stop.code
    return 0


def said(capsys):
    """stdout, and stderr without progress."""
    out, err = capsys.readouterr()
    progress = r"(loading|pairs|descriptions|checking|merging|scienceqa) "
    return out, [line for line in err.splitlines() if not re.match(progress, line)]


# ---------------------------------------------------------------- damage: functions of the folder `w`

cuts = lambda name, keep=0.5: lambda w: cut(w / name, keep)
drops = lambda name: lambda w: (w / name).unlink()
puts = lambda name, data: lambda w: (w / name).write_bytes(data)
edits = lambda name, edit: lambda w: change(w / name, edit)
config = lambda **values: edits(CONFIG, lambda c: c.update(values) or [c.pop(k) for k in values if not c[k]])
each = lambda damage: lambda w: [damage(path) for path in (w / "images").iterdir()]
human, gpt = (lambda text, who=who: {"from": who, "value": text} for who in ("human", "gpt"))
talk = lambda *messages: first(RECORDS, conversations=list(messages))


def first(name, **values):
    """New values in the first record, which loses those that are None."""
    edit = lambda old: {key: value for key, value in {**old, **values}.items() if value is not None}
    return edits(name, lambda records: records.__setitem__(0, edit(records[0])))


def line(name, text):
    """Another second line."""
    return lambda w: (w / name).write_text((w / name).read_text(encoding="utf-8").splitlines()[0] + f"\n{text}\n")


def says(question, answer, role="assistant"):
    return first(PAIRS, chosen=[{"role": "user", "content": question}, {"role": role, "content": answer}])


def weights(name, edit):
    def damage(w):
        tensors = load_file(w / name)
        edit(tensors)
        save_file(tensors, w / name, {"format": "pt"})

    return damage


def zero(tensors):
    for name, value in tensors.items():
        value.mul_("lora_B" not in name)


def checkpoint(w):
    (w / "out/checkpoint-1").mkdir(parents=True)
    (w / "out/checkpoint-1/run.json").write_text('{"step": 1, "lr": 5.0}')


# ---------------------------------------------------------------- one line, status 1

CASES = {  # what is wrong: the command, the damage, more flags, the message
    "no model": ("pairs", None, "--model {w}/nowhere", r"no such checkpoint folder: {w}/nowhere"),
    "no shard": ("pairs", drops(SHARD), MODEL16, rf"missing shard {{w}}/{SHARD}"),
    "truncated weights": ("pairs", cuts(MODEL), "", rf"can't read {{w}}/{MODEL}"),
    "no weights": ("stage1", drops(MODEL), "", r"no weights in {w}/model: "),
    "wrong shape": ("stage1", config(intermediate_size=48), "", rf"{MODEL}: \S+ is \(\d+, \d+\), the config"),
    "unknown tensor": ("ask", weights(MODEL, lambda t: t.update(odd=torch.ones(1))), "", rf"{MODEL}: unknown key odd"),
    "no norm": ("merge", weights(MODEL, lambda t: t.pop("model.norm.weight")), "", r"{w}/model: no tensor for \S+norm"),
    "no config": ("pairs", drops(CONFIG), "", r"{w}/model/config.json"),
    "broken config": ("pairs", cuts(CONFIG), "", r"{w}/model/config.json: not JSON"),
    "not LLaVA": ("pairs", config(mm_vision_tower=None), "", r"{w}/model/config.json: no mm_vision_tower"),
    "no hidden size": ("pairs", config(hidden_size=None), "", r"{w}/model/config.json: no hidden_size"),
    "hidden size a word": ("pairs", config(hidden_size="big"), "", r"{w}/model/config.json: "),
    "broken index": ("pairs", cuts("model16/model.safetensors.index.json"), MODEL16, r"index.json: not JSON"),
    "no tokenizer": ("stage2", drops("model/tokenizer.model"), "", r"no tokenizer: {w}/model/tokenizer.model"),
    "not a tokenizer": ("stage2", None, "--tokenizer {w}/pairs.jsonl", r"not a sentencepiece model: {w}/pairs.jsonl"),
    "no tower": ("pairs", lambda w: shutil.rmtree(w / "clip-tiny"), "", r"{w}/model holds no vision weights.*--vision"),
    "not a tower": ("pairs", None, "--vision {w}/images", r"no vision tower .*{w}/images"),
    "no anyres": ("pairs", None, "--image-mode anyres", r"{w}/model can't do anyres"),
    "no such device": ("pairs", None, "--device nonsense", r"--device nonsense: "),
    # adapters
    "no adapter": ("stage2", None, "--adapter {w}/images", r"no adapter in {w}/images"),
    "another model's": ("ask", None, MODEL16, rf"{ADAPTER}: \S+ is \(.*this model needs"),
    "all zero": ("ask", weights(ADAPTER, zero), "", rf"{ADAPTER}: the adapter changes nothing"),
    "truncated adapter": ("merge", cuts(ADAPTER), "", rf"can't read {{w}}/{ADAPTER}"),
    "no LoRA settings": ("ask", puts("stage1/adapter_config.json", b"[]"), "", r"{w}/stage1/adapter_config.json: "),
    "another rank": ("stage2", None, "--lora-r 8", r"--lora-r 8: {w}/stage1 has 2"),
    # pictures
    "empty folder": ("pairs", each(Path.unlink), "", r"no pictures .*in {w}/images"),
    "no such folder": ("pairs", None, "--images {w}/nowhere", r"no such image folder: {w}/nowhere"),
    "no names": ("pairs", puts("names", b""), "--names {w}/names", r"{w}/names: "),
    "only broken": ("pairs", each(cut), "", r"no pairs: every picture was skipped"),
    "truncated JPEG": ("stage1", cuts(f"images/{A}"), "", rf"can't read image {{w}}/images/{A}: "),
    "text as picture": ("stage2", puts(f"images/{B}", b"hi"), "", rf"can't read image {{w}}/images/{B}: "),
    "missing picture": ("stage1", drops(f"images/{A}"), "", rf"no such image: '?{{w}}/images/{A}"),
    "climbing": ("stage1", first(PAIRS, image="../x.png"), "", r"'../x.png' points outside .*{w}/images"),
    "absolute": ("stage1", first(PAIRS, image="/x.png"), "", r"'/x.png' points outside .*{w}/images"),
    "no picture to ask": ("ask", None, "--image {w}/none.png", r"can't read image {w}/none.png"),
    # pairs
    "no file": ("stage1", None, "--pairs {w}/none.jsonl", r"can't read {w}/none.jsonl: No such file"),
    "a folder": ("stage1", None, "--pairs {w}/images", r"can't read {w}/images: Is a directory"),
    "empty": ("stage1", puts(PAIRS, b"\n"), "", r"{w}/pairs.jsonl: empty"),
    "not UTF-8": ("stage1", puts(PAIRS, b'{"image": "\xff"}'), "", r"{w}/pairs.jsonl: not UTF-8 text"),
    "not JSON": ("stage1", line(PAIRS, '{"image": '), "", r"{w}/pairs.jsonl, line 2: not JSON"),
    "not an object": ("stage1", line(PAIRS, "5"), "", r"{w}/pairs.jsonl, line 2: not a JSON object"),
    "no image": ("stage1", first(PAIRS, image=None), "", r"{w}/pairs.jsonl, line 1: no image"),
    "no rejected": ("stage1", first(PAIRS, rejected=None), "", rf"line 1 \({A}\): rejected is not one user and"),
    "rejected a number": ("stage1", first(PAIRS, rejected=5), "", rf"line 1 \({A}\): rejected is not one user and"),
    "no response": ("stage1", says("What?", " "), "", rf"line 1 \({A}\): chosen, assistant: no content"),
    "other roles": ("stage1", says("What?", "So.", "bot"), "", rf"line 1 \({A}\): chosen is not one user and"),
    "other prompt": ("stage1", says("Why?", "So."), "", rf"line 1 \({A}\): chosen and rejected answer different"),
    "two marks": ("stage1", says("<image><image>", "So."), "", rf"line 1 \({A}\): 2 <image> in the text but 1 picture"),
    "long prompt": ("stage1", None, "--max-length 20", rf"line 1 \({A}\): the prompt takes \d+ tokens"),
    # instructions and descriptions
    "broken list": ("stage2", cuts(RECORDS), "", r"{w}/instructions.json: not JSON"),
    "texts only": ("describe", edits(RECORDS, lambda r: r.__delitem__(slice(2))), "", r"none of its 1 records has an"),
    "two pictures": ("stage2", first(RECORDS, image=[A, B]), "", r"{w}/instructions.json, record 0.*image"),
    "wrong roles": ("stage2", talk(human("a"), human("b")), "", r"{w}/instructions.json, record 0 \(a\): turns are"),
    "mark in two turns": ("stage2", talk(*[human("<image>"), gpt("b")] * 2), "", r"record 0 \(a\): 2 <image>"),
    "no answer": ("stage2", talk(human("a"), gpt("")), "", r"record 0 \(a\): a gpt turn: no value"),
    "long turn": ("stage2", None, "--max-length 20", r"record 0 \(a\): the first prompt alone is longer than 20"),
    "unknown id": ("stage2", first(TOLD, id="zz"), "", r"{w}/descriptions.jsonl, line 1: describes 'zz', which"),
    "id without image": ("stage2", first(TOLD, id="text"), "", r"{w}/descriptions.jsonl, line 1: describes 'text', "),
    "described twice": ("stage2", edits(TOLD, lambda d: d.append(d[0])), "", r"line 3: a is described twice"),
    "another picture": ("stage2", first(TOLD, image=B), "", rf"line 1: describes {B}, but .* shows {A}"),
    "no description": ("stage2", first(TOLD, description=""), "", r"{w}/descriptions.jsonl, line 1: no description"),
    # where output goes
    "finished run": ("stage1", None, "--out {w}/stage1", r"{w}/stage1 holds a finished run"),
    "another run": ("stage1", checkpoint, "", r"{w}/out/checkpoint-1 is of a run with \w+ \S+, this one has"),
    "a file as folder": ("stage1", None, "--out {w}/pairs.jsonl", r"{w}/pairs.jsonl"),
    "a folder as file": ("pairs", None, "--out {w}/images", r"{w}/images"),
    "another's file": ("pairs", None, "--out {w}/answers.jsonl", r"{w}/answers.jsonl, line 1: not a line that"),
    "merged before": ("merge", None, "--out {w}/model", r"{w}/model exists already"),
    # benchmarks
    "no benchmark": ("scienceqa", None, "--data {w}/nowhere", r"{w}/nowhere/problems.json: cannot be read"),
    "broken problems": ("scienceqa", cuts("scienceqa/problems.json"), "", r"{w}/scienceqa/problems.json: is not JSON"),
    "broken splits": ("score", cuts("scienceqa/pid_splits.json"), "", r"{w}/scienceqa/pid_splits.json: is not JSON"),
    "unknown answer": ("score", first(ANSWERS, question_id="999"), "", r"ScienceQA answers: '999' is no question's id"),
    "answered twice": ("score", edits(ANSWERS, lambda a: a.append(a[0])), "", r"ScienceQA answers: '4' is repeated"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_it(case, w, capsys):
    name, damage, flags, message = CASES[case]
    if damage:
        damage(w)
    assert outcome(w, name, *flags.format(w=w).split()) == 1
    _, lines = said(capsys)
    assert len(lines) == 1 or case == "only broken"  # a warning for each picture comes first there
    assert lines[-1].startswith("error: ")
    assert re.search(message.replace("{w}", re.escape(str(w))), lines[-1]), lines[-1]
    assert not (w / "new.jsonl").exists() and not (w / "out/adapter_config.json").exists()


# ---------------------------------------------------------------- what goes on, what is counted


@pytest.mark.parametrize("name", ["pairs", "describe"])
@pytest.mark.parametrize("damage, reason", [(cut, "can't read image"), (Path.unlink, "no such image")])
def test_in_generation_a_bad_picture_costs_itself_alone(w, capsys, name, damage, reason):
    damage(w / "images" / A)
    (w / "names").write_text(f"{A}\n{B}\n../pairs.jsonl\n")
    climbing = ["--names", w / "names"] if name == "pairs" else []
    assert outcome(w, name, *climbing) == 0
    out, lines = said(capsys)
    if name == "describe" and damage is Path.unlink:
        # LLaVA's instructions span five image collections: what is not there is counted before --limit is drawn.
        assert not lines and f"1 of 2 records have no picture in {w / 'images'}: left out" in out
        assert f"1 descriptions in {w / 'new.jsonl'}, 0 skipped" in out
        return
    assert len(lines) == (2 if climbing else 1) and lines[0].startswith(f"warning: skipped: {reason}") and A in lines[0]
    assert f"1 {'pairs' if climbing else 'descriptions'} in {w / 'new.jsonl'}, {len(lines)} skipped" in out
    assert [json.loads(line)["image"] for line in (w / "new.jsonl").read_text().splitlines()] == [B]


def test_in_a_benchmark_it_counts_as_wrong(w, capsys):
    cut(w / "scienceqa/images/test/4/image.png")
    assert outcome(w, "scienceqa") == 0
    out, [warning] = said(capsys)
    assert warning.startswith("warning: question 4 counts as wrong: can't read image ")
    assert "6 questions, 1 without a prediction" in out


@pytest.mark.parametrize("length, cuts", [(1024, 0), (100, 1)])
def test_cut_responses_are_counted(w, capsys, length, cuts):
    write(w / PAIRS, [pair(A, "A", "B"), pair(B)])
    assert outcome(w, "stage1", "--max-length", length) == 0
    assert f"2 pairs, {cuts} cut to {length} tokens" in said(capsys)[0]


@pytest.mark.parametrize("name, flags", [
    ("stage1", "--lr -1"), ("stage1", "--lr nan"), ("stage1", "--projector-lr -1"), ("stage1", "--beta -0.1"),
    ("stage1", "--alpha inf"), ("stage1", "--lora-r 0"), ("stage1", "--batch-size 0"), ("stage1", "--micro-batch -1"),
    ("stage1", "--max-length 0"), ("stage1", "--save-every 0"), ("stage1", "--lora-dropout -0.5"),
    ("stage2", "--lora-dropout 2"), ("stage2", "--limit 0"), ("stage2", "--shard some"), ("pairs", "--temperature -1"),
    ("pairs", "--top-p 0"), ("pairs", "--top-p 1.5"), ("pairs", "--max-new-tokens 0"), ("pairs", "--seed one"),
    ("pairs", "--template chatml"), ("ask", "--dtype int8"), ("ask", "--image-mode crop")])
def test_impossible_flags_end_with_the_usage(w, capsys, name, flags):
    assert outcome(w, name, *flags.split()) == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: ") and f"error: argument {flags.split()[0]}: " in last


@pytest.mark.parametrize("name, damage, message", [
    ("stage1", line(PAIRS, "{"), "pairs.jsonl, line 2: not JSON"),
    ("pairs", cuts(MODEL), "can't read ")])
def test_the_shell_sees_status_1_and_no_traceback(w, name, damage, message):
    damage(w)
    module, *args = commands(w)[name]
    done = subprocess.run([sys.executable, ROOT / f"{module}.py", *args], capture_output=True, text=True, cwd=w.parent)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr.splitlines()[-1]
