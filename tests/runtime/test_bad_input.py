"""Bad input of every kind, through the commands' own entry points.

Each ends with one line that names the file or the sample and exit status 1, never with a traceback.
Generation skips a bad image; training does not start.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_world import (
    ADAPTER,
    ANSWERS,
    CONFIG,
    DESCRIPTIONS,
    MODEL,
    MODEL16,
    PAIRS,
    RECORDS,
    SHARD,
    A,
    B,
    change,
    commands,
    cut,
    outcome,
    pair,
    printed,
    small_world,
    write,
)

from stic_min import checkpoint as checkpoint_module
from stic_min import lora, mistral, training
from stic_min.clip import ClipConfig
from stic_min.cost import training_cost
from stic_min.formats.tensors import write_tensors
from stic_min.llava import LLaVA, LlavaConfig
from stic_min.runtime import process
from stic_min.samples import TrainingSample

ROOT = Path(__file__).resolve().parents[2]
ADAPTER_CONFIG = "stage1/adapter_config.json"


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    return small_world(tiny, tmp_path_factory.mktemp("good"))


@pytest.fixture
def w(good, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(good, tmp_path / "w")


# ---------------------------------------------------------------- damage: functions of the folder `w`

cuts = lambda name, keep=0.5: lambda w: cut(w / name, keep)
drops = lambda name: lambda w: (w / name).unlink()
puts = lambda name, data: lambda w: (w / name).write_bytes(data)
edits = lambda name, edit: lambda w: change(w / name, edit)
swaps = lambda name, old, new: lambda w: (w / name).write_text((w / name).read_text().replace(old, new))
config = lambda **values: edits(CONFIG, lambda c: c.update(values) or [c.pop(k) for k in values if not c[k]])
each = lambda damage: lambda w: [damage(path) for path in (w / "images").iterdir()]
human, gpt = (lambda text, who=who: {"from": who, "value": text} for who in ("human", "gpt"))
talk = lambda *messages: first(RECORDS, conversations=list(messages))


def first(name, **values):
    """Sets fields of the first record, and removes those that are None."""
    edit = lambda old: {key: value for key, value in {**old, **values}.items() if value is not None}
    return edits(name, lambda records: records.__setitem__(0, edit(records[0])))


def line(name, text):
    """Replaces all lines after the first."""

    def damage(w):
        first_line = (w / name).read_text(encoding="utf-8").splitlines()[0]
        (w / name).write_text(f"{first_line}\n{text}\n")

    return damage


def link(name, target):
    """A link in place of an image or a folder, to one outside --images."""

    def damage(w):
        (w / "elsewhere").mkdir()
        shutil.copy(w / "images" / A, w / "elsewhere/x.jpg")
        (w / name).unlink(missing_ok=True)
        (w / name).symlink_to(w / target)

    return damage


def linked_folder(w):
    link("images/sub", "elsewhere")(w)
    first(PAIRS, image="sub/x.jpg")(w)


def other_base(w):
    write_tensors(load_file(w / ADAPTER), w / ADAPTER, base_fingerprint="0")


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


def double(tensors):
    for value in tensors.values():
        value.mul_(2)


def wider(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()


def blind(tensors):  # the projector's output no longer depends on the image
    tensors["model.mm_projector.2.weight"].zero_()


def loud(tensors):  # finite in fp32 and bf16, beyond 65,504 in fp16
    for name in ("up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"].mul_(3000)


def damaged(tensors):
    tensors["model.norm.weight"][0] = float("nan")


def checkpoint(w):
    (w / "out/checkpoint-1").mkdir(parents=True)
    (w / "out/checkpoint-1/run.json").write_text('{"step": 1, "lr": 5.0}')


# ---------------------------------------------------------------- one line, status 1

CASES = {  # what is wrong: the command, the damage, more flags, the message
    "no model": ("pairs", None, "--model {w}/nowhere", r"no such checkpoint folder: {w}/nowhere"),
    "a file as model": ("pairs", None, f"--model {{w}}/{MODEL}",
                        rf"{{w}}/{MODEL} is a file; --model must be"),
    "a file as adapter": ("stage2", None, f"--adapter {{w}}/{ADAPTER}",
                          rf"{{w}}/{ADAPTER} is a file; --adapter must"),
    "no shard": ("pairs", drops(SHARD), MODEL16, rf"missing shard {{w}}/{SHARD}"),
    "truncated weights": ("pairs", cuts(MODEL), "", rf"can't read {{w}}/{MODEL}"),
    "no weights": ("stage1", drops(MODEL), "", r"no weights in {w}/model: "),
    "wrong shape": ("stage1", config(intermediate_size=48), "", rf"{MODEL}: \S+ is \(\d+, \d+\), but the config"),
    "unknown tensor": ("ask", weights(MODEL, lambda t: t.update(odd=torch.ones(1))), "",
                       rf"{MODEL}: unknown key odd"),
    "no norm": ("merge", weights(MODEL, lambda t: t.pop("model.norm.weight")), "",
                r"{w}/model: no tensor for \S+norm"),
    "no config": ("pairs", drops(CONFIG), "", r"{w}/model/config.json"),
    "broken config": ("pairs", cuts(CONFIG), "", r"{w}/model/config.json: not JSON"),
    "not LLaVA": ("pairs", config(mm_vision_tower=None), "", r"{w}/model/config.json: no mm_vision_tower"),
    "no hidden size": ("pairs", config(hidden_size=None), "", r"{w}/model/config.json: no hidden_size"),
    "hidden size a word": ("pairs", config(hidden_size="big"), "", r"{w}/model/config.json: "),
    "unknown option": ("pairs", config(rope_rotation=2), "",
                       r"{w}/model/config.json: rope_rotation 2 is an unknown"),
    "quantized": ("ask", config(quantization_config={"bits": 4}), "",
                  r"json: quantization_config .*can't be read"),
    "another template": ("ask", config(_name_or_path="Llama-2-7b-chat"), "",
                         r"{w}/model: Llama-2-7b-chat has .*--t"),
    "broken index": ("pairs", cuts("model16/model.safetensors.index.json"), MODEL16, r"index.json: not JSON"),
    "no tokenizer": ("stage2", drops("model/tokenizer.model"), "",
                     r"no tokenizer: {w}/model/tokenizer.model"),
    "not a tokenizer": ("stage2", None, "--tokenizer {w}/pairs.jsonl",
                        r"not a sentencepiece model: {w}/pairs.jsonl"),
    "no tower": ("pairs", lambda w: shutil.rmtree(w / "clip-tiny"), "",
                 r"{w}/model has no vision weights.*--vision"),
    "not a tower": ("pairs", None, "--vision {w}/images", r"no vision tower .*{w}/images"),
    "no anyres": ("pairs", None, "--image-mode anyres", r"{w}/model can't do anyres"),
    "no such device": ("pairs", None, "--device nonsense", r"--device nonsense: "),
    # adapters
    "mixed presets": ("stage2", None, "--preset released",
                      r"{w}/stage1 is from a run with no --preset, but this run has --preset released: use one in"),
    "no adapter": ("stage2", None, "--adapter {w}/images", r"no adapter in {w}/images"),
    "another model's": ("ask", None, MODEL16, rf"{ADAPTER}: \S+ is \(.*this model needs"),
    "all zero": ("ask", weights(ADAPTER, zero), "", rf"{ADAPTER}: the adapter changes nothing"),
    "truncated adapter": ("merge", cuts(ADAPTER), "", rf"can't read {{w}}/{ADAPTER}"),
    "no LoRA settings": ("ask", puts(ADAPTER_CONFIG, b"[]"), "",
                         r"{w}/stage1/adapter_config.json: "),
    "other weights": ("ask", other_base, "",
                      r"{w}/stage1 was trained on weights .* other than those of {w}/model; .*--other-base"),
    "made of the base": ("ask", edits(ADAPTER_CONFIG, lambda c: c.update(init_lora_weights="pissa")), "",
                         r"{w}/stage1/adapter_config.json: init_lora_weights 'pissa' changes the base"),
    "another rank": ("stage2", None, "--lora-r 8", r"--lora-r 8: {w}/stage1 has 2"),
    # images
    "empty folder": ("pairs", each(Path.unlink), "", r"no images .*in {w}/images"),
    "a file as images": ("pairs", None, f"--images {{w}}/images/{A}", r"--images {w}/images/\S+ is a file"),
    "a file for training": ("stage2", None, f"--images {{w}}/images/{A}",
                            r"--images {w}/images/\S+ is a file"),
    "subfolders": ("pairs", lambda w: [shutil.move(w / "images", w / "train"), (w / "images").mkdir(),
                                       shutil.move(w / "train", w / "images")], "",
                   r"no images directly in {w}/images, but 2 in its subfolders such as train/: pass one"),
    "from a phone": ("pairs", each(lambda path: path.rename(path.with_suffix(".HEIC"))), "",
                   r"no images in {w}/images, only 2 \.heic files: convert them"),
    "float pixels": ("stage1", lambda w: Image.new("F", (9, 9)).save(w / "images" / B, "TIFF"), "",
                     rf"can't read image {{w}}/images/{B}: its pixels are 32-bit floats"),
    "no such folder": ("pairs", None, "--images {w}/nowhere", r"no such image folder: {w}/nowhere"),
    "no names": ("pairs", puts("names", b""), "--names {w}/names", r"{w}/names: "),
    "only broken": ("pairs", each(cut), "", r"no pairs: every image was skipped"),
    "truncated JPEG": ("stage1", cuts(f"images/{A}"), "", rf"can't read image {{w}}/images/{A}: "),
    "text as image": ("stage2", puts(f"images/{B}", b"hi"), "", rf"can't read image {{w}}/images/{B}: "),
    "missing image": ("stage1", drops(f"images/{A}"), "", rf"no such image: '?{{w}}/images/{A}"),
    "climbing": ("stage1", first(PAIRS, image="../x.png"), "", r"'../x.png' points outside .*{w}/images"),
    "absolute": ("stage1", first(PAIRS, image="/x.png"), "", r"'/x.png' points outside .*{w}/images"),
    "a link": ("stage1", link(f"images/{A}", "elsewhere/x.jpg"), "",
               rf"'{A}' is a link that leads outside .*{{w}}"),
    "a linked folder": ("stage1", linked_folder, "",
                        r"'sub/x.jpg' is a link that leads outside .*{w}/images"),
    "a bomb": ("stage1", lambda w: Image.new("1", (10000, 10000)).save(w / "images" / B), "",
               rf"can't read image {{w}}/images/{B}: 10000x10000 is too many pixels"),
    "no image to ask about": ("ask", None, "--image {w}/none.png", r"can't read image {w}/none.png"),
    # pairs
    "no file": ("stage1", None, "--pairs {w}/none.jsonl", r"can't read {w}/none.jsonl: No such file"),
    "a folder": ("stage1", None, "--pairs {w}/images", r"can't read {w}/images: Is a directory"),
    "empty": ("stage1", puts(PAIRS, b"\n"), "", r"{w}/pairs.jsonl: empty"),
    "not UTF-8": ("stage1", puts(PAIRS, b'{"image": "\xff"}'), "", r"{w}/pairs.jsonl: not UTF-8 text"),
    "not JSON": ("stage1", line(PAIRS, '{"image": '), "", r"{w}/pairs.jsonl, line 2: not JSON"),
    "not an object": ("stage1", line(PAIRS, "5"), "", r"{w}/pairs.jsonl, line 2: not a JSON object"),
    "no image": ("stage1", first(PAIRS, image=None), "", r"{w}/pairs.jsonl, line 1: no image"),
    "no rejected": ("stage1", first(PAIRS, rejected=None), "",
                    rf"line 1 \({A}\): rejected is \[\] instead of one user and"),
    "rejected a number": ("stage1", first(PAIRS, rejected=5), "",
                          rf"line 1 \({A}\): rejected is \[\] instead of one user and"),
    "no response": ("stage1", says("What?", " "), "", rf"line 1 \({A}\): chosen, assistant: no content"),
    "half a letter": ("stage1", says("What?", "\ud83d"), "",
                      r"chosen, assistant: content .* is not valid Unicode"),
    "other roles": ("stage1", says("What?", "So.", "bot"), "",
                    rf"line 1 \({A}\): chosen is \['user', 'bot'\] instead of one"),
    "other prompt": ("stage1", says("Why?", "So."), "",
                     rf"line 1 \({A}\): chosen and rejected answer different"),
    "two marks": ("stage1", says("<image><image>", "So."), "",
                  rf"line 1 \({A}\): 2 <image> in the text but 1 image"),
    "no effect": ("stage1", weights(MODEL, blind), "", rf"line 1 \({A}\): log p is the same with a blank"),
    "fp16 overflows": ("pairs", weights(MODEL, loud), "--dtype float16",
                       rf"{A}: the model's logits in float16 are NaN or infinite; try --dtype bfloat16"),
    "NaN weights": ("scienceqa", weights(MODEL, damaged), "",
                    r"4: the model's logits in float32 are NaN or infinite; the checkpoint .* damaged"),
    "NaN in training": ("stage1", weights(MODEL, damaged), "",
                        r"before step 1, the DPO term is nan, not ln 2"),
    "too fast": ("stage1", None, "--lr 1e30 --batch-size 1",
                 r"step 2: the loss is .* the gradient .*, line 2"),
    "long question": ("ask", config(tokenizer_model_max_length=20), "",
                      r"the question is \d+ tokens longer than the"),
    "long prompt": ("stage1", None, "--max-length 20", rf"line 1 \({A}\): the prompt takes \d+ tokens"),
    "two of them": ("stage1", first(PAIRS, image=[A, B]), "",
                    r"{w}/pairs.jsonl, line 1: 2 images, but a sample"),
    "a number as image": ("stage1", first(PAIRS, image=5), "",
                          r"{w}/pairs.jsonl, line 1: image is not a file name"),
    "unknown form": ("stage1", line(PAIRS, '{"image": "a.jpg", "win": "A", "lose": "B"}'), "",
                     r'line 2: not a preference pair; expected: {"image": ..., "prompt": ..., "chosen": ...'),
    "all equal": ("stage1", edits(PAIRS, lambda pairs: [p.update(rejected=p["chosen"]) for p in pairs]), "",
                  r"{w}/pairs.jsonl: chosen and rejected are identical in all 2 pairs"),
    "cut to equals": ("stage1", None, "--max-length 95",
                      r"{w}/pairs.jsonl: chosen and rejected are identical in all"),
    "a parquet file": ("stage1", puts("x.parquet", b"PAR1\xff"), "--pairs {w}/x.parquet",
                       r"x.parquet: .* a parquet"),
    # files given in another's place
    "pairs as instructions": ("describe", None, "--describe {w}/pairs.jsonl",
                              r"{w}/pairs.jsonl contains preference pairs \(--pairs\), not instructions"),
    "instructions as pairs": ("stage1", None, "--pairs {w}/instructions.json",
                              r"contains instructions .*, not pref"),
    "descriptions as pairs": ("stage1", None, "--pairs {w}/descriptions.jsonl",
                              r"contains descriptions .*, not pref"),
    "instructions as descriptions": ("stage2", None, "--descriptions {w}/instructions.json",
                                     r"contains instructions"),
    "descriptions as instructions": ("stage2", None, "--instructions {w}/descriptions.jsonl",
                                     r"contains descriptions"),
    "pairs as names": ("pairs", None, "--names {w}/pairs.jsonl", r"contains preference pairs .*, not image names"),
    # instructions and descriptions
    "broken list": ("stage2", cuts(RECORDS), "", r"{w}/instructions.json: not JSON"),
    "texts only": ("describe", edits(RECORDS, lambda r: r.__delitem__(slice(2))), "",
                   r"none of its 1 records has an"),
    "two images": ("stage2", first(RECORDS, image=[A, B]), "", r"{w}/instructions.json, record 0.*image"),
    "wrong roles": ("stage2", talk(human("a"), human("b")), "",
                    r"{w}/instructions.json, record 0 \(a\): turns are"),
    "mark in two turns": ("stage2", talk(*[human("<image>"), gpt("b")] * 2), "",
                          r"record 0 \(a\): 2 <image>"),
    "no answer": ("stage2", talk(human("a"), gpt("")), "", r"record 0 \(a\): a gpt turn: no value"),
    "long turn": ("stage2", None, "--max-length 20",
                  r"record 0 \(a\): the first prompt alone is longer than 20"),
    "unknown id": ("stage2", first(DESCRIPTIONS, id="zz"), "",
                   r"{w}/descriptions.jsonl, line 1: describes 'zz', which"),
    "id without image": ("stage2", first(DESCRIPTIONS, id="text"), "",
                         r"{w}/descriptions.jsonl, line 1: describes 'text', "),
    "described twice": ("stage2", edits(DESCRIPTIONS, lambda d: d.append(d[0])), "",
                        r"line 3: a is described twice"),
    "another image": ("stage2", first(DESCRIPTIONS, image=B), "",
                      rf"line 1: describes {B}, but .* has the image {A}"),
    "no description": ("stage2", first(DESCRIPTIONS, description=""), "",
                       r"{w}/descriptions.jsonl, line 1: no description"),
    # where output goes
    "finished run": ("stage1", None, "--out {w}/stage1", r"{w}/stage1 holds a finished run"),
    "another run": ("stage1", checkpoint, "",
                    r"{w}/out/checkpoint-1 belongs to a run with \w+ \S+, but this run has"),
    "a file as folder": ("stage1", None, "--out {w}/pairs.jsonl", r"{w}/pairs.jsonl"),
    "a folder as file": ("pairs", None, "--out {w}/images", r"{w}/images"),
    "another's file": ("pairs", None, "--out {w}/answers.jsonl",
                       r"{w}/answers.jsonl, line 1: not a line written"),
    "merged before": ("merge", None, "--out {w}/model", r"{w}/model already exists"),
    # benchmarks
    "no benchmark": ("scienceqa", None, "--data {w}/nowhere", r"no such file: {w}/nowhere/problems.json"),
    "broken problems": ("scienceqa", cuts("scienceqa/problems.json"), "",
                        r"{w}/scienceqa/problems.json: not JSON"),
    "broken splits": ("score", cuts("scienceqa/pid_splits.json"), "",
                      r"{w}/scienceqa/pid_splits.json: not JSON"),
    "unknown answer": ("score", first(ANSWERS, question_id="999"), "",
                       r"answers: '999' is not a question id"),
    "answered twice": ("score", edits(ANSWERS, lambda a: a.append(a[0])), "",
                       r"ScienceQA answers: '4' is repeated"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_it(case, w, capsys):
    name, damage, flags, message = CASES[case]
    if damage:
        damage(w)
    assert outcome(w, name, *flags.format(w=w).split()) == 1
    _, lines = printed(capsys)
    assert len(lines) == 1 or case == "only broken"  # there, a warning per image comes first
    assert lines[-1].startswith("error: ")
    assert re.search(message.replace("{w}", re.escape(str(w))), lines[-1]), lines[-1]
    assert not (w / "new.jsonl").exists() and not (w / "out/adapter_config.json").exists()


def test_the_table_is_up_to_date():
    """bad_input.md lists each case with its message."""
    lines = Path(__file__).with_name("bad_input.md").read_text(encoding="utf-8").splitlines()
    rows = dict(re.fullmatch(r"\| (.+?) \| `.+?` \| (.+) \|", line).groups() for line in lines[5:])
    assert len(CASES) > 60
    for case, (_, _, _, message) in CASES.items():
        assert re.search(message.replace("{w}", "W"), rows[case]), case


# --check reads neither the weights nor the device.
NEEDS_MORE = "no effect", "too fast", "only broken", "no such device", "fp16 overflows", "NaN in training"
CHECKED = [case for case, (name, *_) in CASES.items() if name in ("pairs", "describe", "stage1", "stage2")]


@pytest.mark.parametrize("case", [case for case in CHECKED if case not in NEEDS_MORE])
def test_check_fails_where_the_run_would(case, w, capsys):
    """--check reports the same problem, and writes nothing."""
    name, damage, flags, message = CASES[case]
    if damage:
        damage(w)
    before = sorted(w.rglob("*"))
    assert outcome(w, name, *flags.format(w=w).split(), "--check") == 1
    out, lines = printed(capsys)
    assert len(lines) == 1 and lines[0].startswith("error: ")
    problems = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  problem ")]
    message = message.replace("{w}", re.escape(str(w)))
    assert any(re.search(message, text) for text in (lines if not problems else problems))
    assert sorted(w.rglob("*")) == before


def test_a_linked_folder_is_not_reported_as_missing(w, capsys):
    """LLaVA's image folders are often links. The message must say that these are refused."""
    link("images/coco", "elsewhere")(w)
    edits(RECORDS, lambda records: [r.update(image="coco/x.jpg") for r in records if r["id"] == "a"])(w)
    for flags in ((), ("--check",)):
        capsys.readouterr()
        assert outcome(w, "describe", *flags) == 0
        out, err = capsys.readouterr()
        assert "image 'coco/x.jpg' is a link that leads outside the image folder" in (out if flags else err)


def test_check_reports_an_out_that_can_not_be_written(w, capsys):
    for name, out in (("stage1", w / PAIRS / "out"), ("pairs", w / PAIRS / "new.jsonl")):
        for flags in ((), ("--check",)):
            assert outcome(w, name, "--out", out, *flags) == 1
            assert printed(capsys)[1] == [f"error: can't write to {out}: {w / PAIRS} is a file"]


def test_check_reads_the_checkpoint_that_the_run_would_resume_from(w, capsys):
    stopped(w, "stage1", "--batch-size", 1)
    assert outcome(w, "stage1", "--batch-size", 1, "--check") == 0
    cut(w / "out/checkpoint-1/optimizer.safetensors")
    capsys.readouterr()
    assert outcome(w, "stage1", "--batch-size", 1, "--check") == 1
    assert f"  problem      can't read {w}/out/checkpoint-1/optimizer.safetensors: " in printed(capsys)[0]


def test_check_lists_all_problems(w, capsys):
    records = [pair(A), pair("none.png"), pair(B), pair(A), {"image": B}]
    write(w / PAIRS, records)
    cut(w / "images" / B)
    assert outcome(w, "stage1", "--check", "--max-length", 300) == 1
    out, lines = printed(capsys)
    problems = [line for line in out.splitlines() if line.startswith("  problem ")]
    names = [re.search(r"none.png|line 5|scene_02.png: ", problem)[0] for problem in problems]
    assert names == ["line 5", "none.png", "scene_02.png: "]
    assert "3 usable, 2 images" in out and f"1 images appear more than once: {w}/images/{A}" in out
    assert lines == ["error: the run would fail for 3 reasons"]


@pytest.mark.parametrize("name", ["stage1", "stage2", "pairs", "describe"])
def test_check_passes_good_input(w, capsys, name):
    before = sorted(w.rglob("*"))
    assert outcome(w, name, "--check") == 0
    out, lines = printed(capsys)
    for word in ("tokens", "memory", "time"):
        assert re.search(rf"^  {word} +\S", out, re.MULTILINE)
    assert out.endswith("check passed: no problems found\n") and not lines
    assert sorted(w.rglob("*")) == before


def test_check_counts_what_would_be_cut_or_skipped(w, capsys):
    assert outcome(w, "stage1", "--check", "--max-length", 97) == 0
    out = printed(capsys)[0]
    assert re.search(rf"^  truncated +2 to 97 tokens: \S+/pairs.jsonl, line 1 \({A}\), ", out, re.MULTILINE), out
    cut(w / "images" / A)
    (w / "names").write_text(f"{A}\n{B}\n{B}\nnone.png\n")
    assert outcome(w, "pairs", "--check", "--names", w / "names") == 0  # a run would only warn
    out = printed(capsys)[0]
    assert "  skipped      2, each with a warning" in out
    assert f"1 names appear more than once and are used once: {B}" in out


def test_the_estimates_of_check():
    """Memory and time of a 7B training run, from shapes alone."""
    decoder = mistral.DecoderConfig(4096, 14336, 32, 32, 8, 32000, 1e-5, 1e6, 32768)
    with torch.device("meta"):
        llava = LLaVA(LlavaConfig(decoder, ClipConfig(), "pad", None, "mistral_instruct", 4096)).bfloat16()
        llava.requires_grad_(False)
    names = [name for name, _ in llava.model.named_modules(prefix="model")]
    modules = [name for name in names if name.rpartition(".")[2] in lora.TARGETS]
    lora.attach(llava, adapter := lora.Adapter(128, 256, 0.0, modules, {}))
    llava.mm_projector.requires_grad_(True)
    sample = TrainingSample("", [([1] * 630, False)], [[1] * 250] * 2, Path("x"), 1130, False)
    args = SimpleNamespace(dtype=None, micro_batch=1, batch_size=4, checkpoint_activations=False, epochs=1)
    (_, memory), (_, time) = training_cost(args, llava, adapter, [sample] * 6000, reference=True)
    assert memory.startswith("about 28.4 GB per GPU with --micro-batch 1 --shard none: weights 15.1, LoRA")
    assert time.startswith("1500 steps, 307 PFLOP: about 13:0")
    args.epochs = 3  # of 6001 samples: the last batch of each has one
    (_, again), (_, time) = training_cost(args, llava, adapter, [sample] * 6001, reference=True)
    assert again == memory and time.startswith("4503 steps, 922 PFLOP: about 39:2")


# ---------------------------------------------------------------- what is skipped, what is counted


@pytest.mark.parametrize("name", ["pairs", "describe"])
@pytest.mark.parametrize("damage, reason", [(cut, "can't read image"), (Path.unlink, "no such image")])
def test_generation_skips_a_bad_image(w, capsys, name, damage, reason):
    damage(w / "images" / A)
    (w / "names").write_text(f"{A}\n{B}\n../pairs.jsonl\n")
    climbing = ["--names", w / "names"] if name == "pairs" else []
    assert outcome(w, name, *climbing) == 0
    out, lines = printed(capsys)
    if name == "describe" and damage is Path.unlink:
        # Missing images are counted before --limit samples from the rest.
        assert not lines and f"1 of 2 records have no image in {w / 'images'}: skipped" in out
        assert f"1 descriptions in {w / 'new.jsonl'}, 0 skipped" in out
        return
    assert len(lines) == (2 if climbing else 1)
    assert lines[0].startswith(f"warning: skipped: {reason}") and A in lines[0]
    assert f"1 {'pairs' if climbing else 'descriptions'} in {w / 'new.jsonl'}, {len(lines)} skipped" in out
    assert [json.loads(line)["image"] for line in (w / "new.jsonl").read_text().splitlines()] == [B]


def test_generation_skips_long_prompts_and_empty_responses(w, capsys):
    with mock.patch("stic_min.text.Tokenizer.decode", return_value=""):
        assert outcome(w, "pairs") == 1
    *warnings, error = printed(capsys)[1]
    assert warnings == [f"warning: skipped: {name}: the model returned an empty response" for name in (A, B)]
    assert error == "error: no pairs: every image was skipped"
    config(tokenizer_model_max_length=20)(w)
    assert outcome(w, "pairs", "--out", w / "other.jsonl") == 1
    *warnings, _ = printed(capsys)[1]
    too_long = r"the prompt has \d+ tokens, but the model's limit is 20$"
    assert len(warnings) == 2 and all(re.search(too_long, warning) for warning in warnings)


def test_a_pair_needs_both_responses(w, capsys):
    with mock.patch("stic_min.text.Tokenizer.decode", side_effect=["A house.", "", "A boat.", "A bird."]):
        assert outcome(w, "pairs", "--out", w / "new.jsonl") == 0
    [warning] = printed(capsys)[1]
    assert warning.endswith(": the model returned an empty response")
    [record] = map(json.loads, (w / "new.jsonl").read_text().splitlines())
    assert [record[side][1]["content"] for side in ("chosen", "rejected")] == ["A boat.", "A bird."]


def test_a_long_question_counts_as_wrong(w, capsys):
    config(tokenizer_model_max_length=150)(w)
    assert outcome(w, "scienceqa") == 0
    out, warnings = printed(capsys)
    assert 0 < len(warnings) < 6 and f"6 questions, {len(warnings)} without a prediction" in out
    too_long = r"question \d+ is skipped: it is \d+ tokens longer than the model"
    assert all(re.search(too_long, warning) for warning in warnings)


def test_instructions_are_checked_before_they_are_described(w, capsys):
    talk(human("a"), human("b"))(w)
    assert outcome(w, "describe") == 1
    assert "record 0 (a): turns are" in printed(capsys)[1][-1]


def test_the_reference_is_checked_before_the_first_step(w, capsys):
    def not_zero(*args, new_adapter=training.lora.new_adapter):
        adapter = new_adapter(*args)
        double(adapter.tensors)
        for name, value in adapter.tensors.items():
            value.add_(0.1 * name.endswith("lora_B"))
        return adapter

    with mock.patch.object(training.lora, "new_adapter", not_zero):
        assert outcome(w, "stage1") == 1
    assert "not ln 2: policy and reference differ" in printed(capsys)[1][-1]


@pytest.mark.parametrize("name, damage, flags, limit", [
    ("stage1", None, "", 1024), ("stage2", None, "", 2048),
    ("stage1", None, f"{MODEL16} --image-mode anyres", 4096),
    ("stage1", None, "--max-length 9999", 4096), ("stage1", config(max_position_embeddings=300), "", 300)])
def test_the_longest_sequence(w, capsys, name, damage, flags, limit):
    if damage:
        damage(w)
    assert outcome(w, name, *flags.format(w=w).split()) == 0
    assert f"0 truncated to {limit} tokens" in printed(capsys)[0]


@pytest.mark.parametrize("name, counts", [
    ("stage1", "1 pairs, 0 truncated"), ("stage2", "1 used for training, 0 truncated")])
def test_limit(w, capsys, name, counts):
    assert outcome(w, name, "--limit", 1) == 0
    assert counts in printed(capsys)[0]


def test_the_default_rank_is_the_papers(w):
    module, *args = commands(w)["stage1"]
    at = args.index("--lora-r")
    with mock.patch.object(sys, "argv", [module, *map(str, args[:at] + args[at + 2 :])]):
        importlib.import_module(module).main()
    settings = json.loads((w / "out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (128, 256)


def test_activations_are_checkpointed_on_request_only(w):
    with mock.patch("stic_min.mistral.checkpoint", wraps=mistral.checkpoint) as used:
        assert outcome(w, "stage1", "--out", w / "plain") == 0 and not used.called
        assert outcome(w, "stage1", "--checkpoint-activations") == 0 and used.called


def test_a_float32_checkpoint_trains_the_same(w):
    """Its tensors need no conversion: trained weights must not share their memory with the reference."""
    for out in ("half", "single"):
        assert outcome(w, "stage1", "--batch-size", 1, "--projector-lr", 0.01, "--out", w / out) == 0
        weights(MODEL, lambda tensors: tensors.update({key: t.float() for key, t in tensors.items()}))(w)
    for file in ("adapter_model.safetensors", "projector.safetensors"):
        half, single = (load_file(w / out / file) for out in ("half", "single"))
        assert all(torch.equal(half[key], single[key]) for key in half)


def test_a_benchmark_question_with_a_bad_image_counts_as_wrong(w, capsys):
    cut(w / "scienceqa/images/test/4/image.png")
    assert outcome(w, "scienceqa") == 0
    out, [warning] = printed(capsys)
    assert warning.startswith("warning: question 4 is skipped: can't read image ")
    assert "6 questions, 1 without a prediction" in out


@pytest.mark.parametrize("length, cuts", [(1024, 0), (100, 1)])
def test_cut_responses_are_counted(w, capsys, length, cuts):
    write(w / PAIRS, [pair(A, "A", "B"), pair(B)])
    assert outcome(w, "stage1", "--max-length", length) == 0
    assert f"2 pairs, {cuts} truncated to {length} tokens" in printed(capsys)[0]


@pytest.mark.parametrize("name, flags", [
    ("stage1", "--lr -1"), ("stage1", "--lr nan"), ("stage1", "--projector-lr -1"),
    ("stage1", "--beta -0.1"), ("stage1", "--alpha inf"), ("stage1", "--lora-r 0"),
    ("stage1", "--batch-size 0"), ("stage1", "--micro-batch -1"), ("stage1", "--max-length 0"),
    ("stage1", "--save-every 0"), ("stage1", "--lora-dropout -0.5"), ("stage2", "--lora-dropout 2"),
    ("stage2", "--limit 0"), ("stage2", "--shard some"), ("pairs", "--temperature -1"),
    ("stage1", "--rejected-score top"), ("stage2", "--preset paper"), ("pairs", "--top-k 0"),
    ("pairs", "--top-p 0"), ("pairs", "--top-p 1.5"), ("pairs", "--max-new-tokens 0"),
    ("pairs", "--seed one"), ("pairs", "--template chatml"), ("ask", "--dtype int8"),
    ("ask", "--image-mode crop")])
def test_impossible_flags_end_with_the_usage(w, capsys, name, flags):
    assert outcome(w, name, *flags.split()) == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: ") and f"error: argument {flags.split()[0]}: " in last


# ---------------------------------------------------------------- a run that was stopped


def stopped(w, name, *flags):
    """A run that stops before its end, and loses its last checkpoint."""
    every_step = mock.patch.object(training, "SAVE_SECONDS", 0)
    with mock.patch.object(checkpoint_module.Checkpoints, "finish"), every_step:
        assert outcome(w, name, *flags) == 0
    *_, last = checkpoint_module.folders(w / "out")
    shutil.rmtree(last)


@pytest.mark.parametrize("setting, name, damage, flags", [
    ("lr", "stage1", None, "--lr 0.002"), ("projector_lr", "stage1", None, "--projector-lr 0.1"),
    ("batch_size", "stage1", None, "--batch-size 2"), ("limit", "stage1", None, "--limit 1"),
    ("seed", "stage1", None, "--seed 1"), ("beta", "stage1", None, "--beta 1"),
    ("alpha", "stage1", None, "--alpha 0"), ("rejected_score", "stage1", None, "--rejected-score argmax"),
    ("lora_r", "stage1", None, "--lora-r 4"), ("lora_alpha", "stage1", None, "--lora-alpha 3"),
    ("max_length", "stage1", None, "--max-length 1000"), ("dtype", "stage1", None, "--dtype bfloat16"),
    ("template", "stage1", None, "--template mistral_instruct"),
    ("image_mode", "stage1", None, "--image-mode anyres --max-length 1024"),
    ("pairs", "stage1", says("What?", "Another answer."), ""),
    ("fingerprint", "stage1", swaps(CONFIG, "1e-05", "1e-06"), ""),
    ("fingerprint", "stage1", weights(MODEL, wider), ""),
    ("fingerprint", "stage2", weights(ADAPTER, double), ""),
    ("lora_dropout", "stage2", None, "--lora-dropout 0.1"), ("one_line", "stage2", None, "--one-line"),
    ("plain", "stage2", None, "--plain"),
    ("instructions", "stage2", talk(human("a"), gpt("b")), ""),
    ("descriptions", "stage2", first(DESCRIPTIONS, description="Blue."), "")])
def test_a_run_with_other_settings_does_not_resume(w, capsys, setting, name, damage, flags):
    model = MODEL16.format(w=w).split() if setting == "image_mode" else []
    stopped(w, name, "--batch-size", 1, *model)
    if damage:
        damage(w)
    assert outcome(w, name, "--batch-size", 1, *model, *flags.split()) == 1
    assert f"{w}/out/checkpoint-1 belongs to a run with {setting} " in printed(capsys)[1][-1]


def test_a_run_does_not_resume_from_one_that_had_more_settings(w, capsys):
    stopped(w, "stage1", "--batch-size", 1)
    change(w / "out/checkpoint-1/run.json", lambda run: run.update(label_smoothing=0.1))
    assert outcome(w, "stage1", "--batch-size", 1) == 1
    message = f"{w}/out/checkpoint-1 belongs to a run with label_smoothing 0.1, but this run has None"
    assert message in printed(capsys)[1][-1]


@pytest.mark.parametrize("name, flags", [
    ("stage1", "--micro-batch 2"), ("stage1", "--checkpoint-activations"), ("stage2", "--save-every 5")])
def test_a_run_with_the_same_settings_resumes(w, capsys, name, flags):
    stopped(w, name, "--batch-size", 1)
    assert outcome(w, name, "--batch-size", 1, *flags.split()) == 0
    out, _ = printed(capsys)
    assert "resuming after step 1" in out and "dropout masks differ" not in out
    assert len((w / "out/log.jsonl").read_text().splitlines()) == 2


def test_resuming_with_another_micro_batch_prints_what_that_changes(w, capsys):
    stopped(w, "stage2", "--batch-size", 1)
    capsys.readouterr()
    assert outcome(w, "stage2", "--batch-size", 1, "--micro-batch", 2) == 0
    assert "changed since the checkpoint: micro_batch (was 1); dropout masks differ from here on" in printed(capsys)[0]


def test_checkpoints_in_a_run_and_the_newest_are_kept(w, capsys):
    write(w / PAIRS, [pair(A)] * 25)
    steps = []
    save = lambda run, step, save=training.Run.save_checkpoint: steps.append(step) or save(run, step)
    with mock.patch.object(training.Run, "save_checkpoint", save):
        stopped(w, "stage1", "--batch-size", 1, "--save-every", 3)
    assert steps == [*range(3, 25, 3), 25]
    assert sorted(path.name for path in (w / "out").glob("checkpoint*")) == ["checkpoint-24"]  # and 25
    for path in (w / "out").glob("checkpoint*"):
        shutil.rmtree(path)  # as if killed before the first: the log starts over
    assert outcome(w, "stage1", "--batch-size", 1) == 0
    assert len((w / "out/log.jsonl").read_text().splitlines()) == 25


# ---------------------------------------------------------------- exit status


def test_the_status_survives_torchrun(w):
    """Under torchrun `process.run` ends by os._exit."""
    drops(PAIRS)(w)
    with (mock.patch.object(torch.distributed, "is_initialized", return_value=True),
          mock.patch.object(torch.distributed, "destroy_process_group"),
          mock.patch.object(os, "_exit", side_effect=sys.exit)):
        assert outcome(w, "stage1") == 1
        assert outcome(w, "score") == 0


def test_a_bug_keeps_its_traceback():
    def fail():
        raise OSError("about no file")

    with pytest.raises(OSError, match="about no file"):
        process.run(fail)


def test_ctrl_c_gives_status_130(w, capsys):
    with mock.patch("train_stage1.parse_pair", side_effect=KeyboardInterrupt):
        assert outcome(w, "stage1") == 130
    assert printed(capsys)[1] == ["stopped; completed output is kept"]


@pytest.mark.parametrize("name, damage, message", [
    ("stage1", line(PAIRS, "{"), "pairs.jsonl, line 2: not JSON"),
    ("pairs", cuts(MODEL), "can't read ")])
def test_the_shell_sees_status_1_and_no_traceback(w, name, damage, message):
    damage(w)
    module, *args = commands(w)[name]
    command = [sys.executable, ROOT / f"{module}.py", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=w.parent)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last


# ---------------------------------------------------------------- the table


@contextlib.contextmanager
def caught():
    """stderr as a file in memory; stdout is dropped."""
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = err.reconfigure = lambda **options: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield err


def print_table():
    """Prints bad_input.md: each case with its command and message; W is the folder of the world."""
    from tiny import write_all

    print("Bad input, and the line it ends with (exit status 1). W is the folder of models and data.")
    print("Written by `PYTHONPATH=.:tests/support python tests/runtime/test_bad_input.py`.")
    print("\n| what | command | message |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "tiny").mkdir()
        write_all(folder / "tiny")
        with caught():
            small_world(folder / "tiny", folder / "good")
        for case, (name, damage, flags, _) in CASES.items():
            w = shutil.copytree(folder / "good", folder / "w")
            with caught() as err:
                if damage:
                    damage(w)
                assert outcome(w, name, *flags.format(w=w).split()) == 1
            message = err.getvalue().splitlines()[-1].replace(str(w), "W").replace("|", "\\|")
            print(f"| {case} | `{commands(w)[name][0]}` | {message} |")
            shutil.rmtree(w)


if __name__ == "__main__":
    print_table()
