"""The toy world end to end: the base that comes with the project, demo and study in short forms, pretraining."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from stic_min import InputError
from stic_min.loader import load_llava
from stic_min.runtime.files import read_records
from stic_min.toy import pretrain, recipe, study, tables, world

ROOT = Path(__file__).resolve().parents[2]


def toy(*args, check=True):
    """`python -m stic_min.toy args...` -> the finished process."""
    command = [sys.executable, "-m", "stic_min.toy", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def snapshot(folder):
    """{file: bytes} of what a run is about: no logs, and of run.json all but the record of when, where and how long."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("log.txt", "log.jsonl")]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    for name in [name for name in found if name.endswith("run.json")]:
        found[name] = json.loads(found[name])
        del found[name]["record"]
    return found


# ---------------------------------------------------------------- the base model


def test_base_is_small_and_says_where_it_is_from():
    files = [p for p in recipe.BASE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 3e6
    made = json.loads((recipe.BASE / "pretrain.json").read_text())
    assert made["command"].startswith("python -m stic_min.toy.pretrain ") and made["minutes"] <= 45


def test_base_hallucinates_from_its_prior_alone():
    """Under a short prompt it says what is usual, under the detailed one mostly what is there: it does see."""
    scores = pretrain.dev_scores(load_llava(recipe.BASE), count=100)
    short, good = scores["captions, short prompts"], scores["captions, good prompts"]
    assert short["chair_i"] > good["chair_i"] + 8
    assert short["signature"] > 70
    assert good["recall"] > 80
    assert abs(short["mentioned"] - good["mentioned"]) < 0.1  # length says nothing about quality
    assert scores["questions"]["accuracy"] > 60


def test_every_word_is_one_piece():
    pieces = load_llava(recipe.BASE).tokenizer.pieces
    words = {w for name in (*world.all_objects(), *world.CELLS, *world.NUMBERS, *world.PLACES) for w in name.split()}
    assert [w for w in sorted(words | {"Upper", "Middle", "Lower", "Center"}) if len(pieces.encode(w)) != 1] == []


# ---------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    return toy("--images", 300, "--test-images", 60, "--out", out), out


def test_demo_lowers_hallucination(demo):
    """300 pairs already do: a change to the loss or to the pairs that breaks this is felt here.

    Three seeds lowered CHAIR_i by 14 to 15 points; by 7 where the rejected answer was one more good one, and the other
    way with the loss's sign turned.
    """
    _, out = demo
    base, stage1, stic = json.loads((out / "table.json").read_text())
    key = next(k for k in base if "CHAIR_i" in k)
    assert stage1[key] < base[key] - 11
    assert stic[key] < base[key] - 11


def test_demo_prints_commands_that_run(demo):
    """Every command it prints is one that gives the same files when it is typed."""
    done, out = demo
    commands = re.findall(r"^\$ python (.+)$", done.stdout, flags=re.MULTILINE)
    scripts = [c.split()[0] for c in commands]
    assert scripts[:4] == ["generate_pairs.py", "train_stage1.py", "generate_pairs.py", "train_stage2.py"]
    assert scripts[4:] == ["evaluate.py"] * 9
    before = (out / "pairs.jsonl").read_bytes()
    (out / "pairs.jsonl").unlink()
    subprocess.run(f"{sys.executable} {commands[0]}", shell=True, cwd=ROOT, check=True, capture_output=True)
    assert (out / "pairs.jsonl").read_bytes() == before


def test_demo_sheet(demo):
    _, out = demo
    page = (out / "sheet.html").read_text()
    assert page.count("data:image/png;base64,") >= 12
    assert 'class="wrong"' in page and 'class="right"' in page
    assert "http" not in page  # self-contained


def test_demo_again_makes_nothing_anew(demo):
    _, out = demo
    before = snapshot(out)
    done = toy("--images", 300, "--test-images", 60, "--out", out)
    assert snapshot(out) == before
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$")] == ["generate_pairs.py"]


def test_self_training_sees_no_label(demo):
    """The folder of unlabeled pictures holds pictures alone, and none that instructions or questions are about."""
    _, out = demo
    unlabeled = [*(out / "unlabeled").iterdir()]
    assert len(unlabeled) == 300 and {p.suffix for p in unlabeled} == {".png"}
    others = [*(out / "instruct/images").iterdir(), *(out / "dev/images").iterdir()]
    assert len(others) == 150 + 60 and not {p.read_bytes() for p in unlabeled} & {p.read_bytes() for p in others}
    drawn = world.scenes("unlabeled", 300, seed=0)
    assert {scene.split for scene in drawn} == {"unlabeled"}
    assert (out / "unlabeled/unlabeled0_00299.png").read_bytes() in {p.read_bytes() for p in unlabeled}
    painted = world.paint(drawn[299], "unlabeled0_00299.png")
    with Image.open(out / "unlabeled/unlabeled0_00299.png") as picture:
        assert picture.tobytes() == painted.tobytes()


@pytest.mark.parametrize("flags, message", [
    (("--seed", 1), "created with seed 0"),
    (("--images", 400), "created with images 300"),
    (("--model", "nowhere"), "no such"),
    (("--model", "a", "--model", "b"), "several --model"),
    (("--seeds", 2), "are for the study"),
    (("--images", 40002), "at most 40000"),
])
def test_demo_refuses(demo, flags, message):
    _, out = demo
    done = toy("--images", 300, "--test-images", 60, "--out", out, *flags, check=False)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- the study


def short_study(out, **changed):
    settings = dict(models=[recipe.BASE], seeds=range(2), pairs=24, split="dev", pictures=24, processes=2)
    study.run(out=out, **settings | changed)
    return json.loads((out / "study.json").read_text())


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return short_study(out), out


def test_study_measures_every_variant_on_every_seed(studied):
    result, out = studied
    variants = result["models"][recipe.BASE.name]
    assert set(variants) == {"base", *study.MEASURED, *result["scales"]}
    assert {len(values) for values in variants.values()} == {2}
    assert study.count_finished([out / recipe.BASE.name / f"seed{seed}" for seed in range(2)]) == 2 * study.STEPS
    for name, value in variants["stic"][1].items():
        assert 0 <= value <= 100 or name == "gain"


def test_study_variants_are_what_they_say(studied):
    """Flags of each run, as the training scripts recorded them, and the pairs each was given."""
    _, out = studied
    folder = out / recipe.BASE.name / "seed1"
    run = lambda name: json.loads((folder / name / "run.json").read_text())
    assert run("positives1")["beta"] == 0 and run("positives1")["alpha"] == run("stage1")["alpha"] > 0
    assert run("alpha0_1")["alpha"] == 0 and run("alpha0_1")["beta"] == run("stage1")["beta"] > 0
    assert run("plain")["plain"] and not run("stage2only")["plain"]
    assert {run(name)["limit"] for name in study.STAGE1} == {24}
    assert {run(name)["seed"] for name in (*study.STAGE1, *study.STAGE2)} == {1}
    kinds = ("pairs", "prompts", "corruptions")
    pairs = {kind: [record for _, record in read_records(folder / f"{kind}.jsonl")] for kind in kinds}
    assert not any(p["image_corruption"] for p in pairs["prompts"])
    assert all(p["image_corruption"] for p in pairs["corruptions"])
    assert len(pairs["prompts"]) + len(pairs["corruptions"]) == len(pairs["pairs"]) == 2 * 24 + 200
    assert min(len(pairs["prompts"]), len(pairs["corruptions"])) >= 24


def test_study_resumes(studied):
    """A chain that lost its tail is completed to the same files; nothing else is touched."""
    result, out = studied
    folder = out / recipe.BASE.name / "seed0"
    before = snapshot(folder)
    for file in [*folder.glob("results/*stic*"), *(folder / "scale2").iterdir()]:
        file.unlink()
    assert short_study(out) == result
    assert snapshot(folder) == before


def test_study_seeds_differ(studied):
    _, out = studied
    said = []
    for seed in range(2):
        records = [record for _, record in read_records(out / recipe.BASE.name / f"seed{seed}" / "pairs.jsonl")]
        said.append([record["chosen"][1]["content"] for record in records])
    assert len(set(said[0]) & set(said[1])) < 0.1 * len(said[0])


def test_study_names_a_chain_that_fails(tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(recipe.BASE, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="2 of 2 chains failed"):
        short_study(tmp_path / "out", models=[broken], seeds=range(1))
    assert "log.txt" in capsys.readouterr().err


def test_tables_by_hand():
    """Means, sample standard deviations, and signs counted seed by seed."""
    assert tables.spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert tables.spread([-2.0, -2.0], signed=True) == "-2.0"
    value = dict(chair_i=20.0, f1=80.0, direct=70.0, dar=60.0)
    less = value | dict(chair_i=10.0, dar=75.0)
    mixed = [less, less | dict(chair_i=30.0)]
    names = {name for _, _, (a, _), (b, _), _ in tables.CLAIMS for name in (a, b)}
    variants = {name: [value, value] for name in names} | {"stic": mixed}
    rows = [line.split(" | ") for line in tables.claims_table({"m": variants}).splitlines()]
    row = next(r for r in rows if "less than the base" in r[1])
    assert row[3:] == ["+0.0 ± 14.1", "1 of 2 |"]
    row = next(r for r in rows if "Table 2" in r[1])
    assert row[3:] == ["+5.0", "2 of 2 |"]
    row = next(r for r in rows if "DaR on the base" in r[1])
    assert row[3:] == ["-10.0", "one base |"]  # one measurement, however many seeds


def test_plots_are_pictures(studied):
    """Well-formed, nothing outside the frame, whatever the models are called and however alike they are."""
    result, _ = studied
    variants = result["models"][recipe.BASE.name]
    alike = {name: [v | {"f1": 100.0, "direct": 100.0, "dar": 100.0} for v in own] for name, own in variants.items()}
    for models in ({"a&b <c>": variants}, {str(i): alike for i in range(6)}):
        for plot in (tables.scale_plot, tables.stages_plot):
            root = ElementTree.fromstring(plot(result | {"models": models}))
            width, height = float(root.get("width")), float(root.get("height"))
            for element in root.iter():
                for name, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height),
                                    ("y1", height), ("y2", height), ("cy", height)):  # fmt: skip
                    assert 0 <= float(element.get(name, 0)) <= limit, ElementTree.tostring(element)


# ---------------------------------------------------------------- pretraining


def test_pretraining_writes_an_ordinary_checkpoint(tmp_path, monkeypatch):
    """A few steps from nothing: the folder loads, the same seed gives the same weights, another other ones."""
    scores = pretrain.dev_scores
    monkeypatch.setattr(pretrain, "dev_scores", lambda llava: scores(llava, count=5))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = "--out", tmp_path / name, "--seed", seed, "--scenes", 200, "--steps", 3
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, flags)])
        pretrain.main()
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    made = json.loads((tmp_path / "c/pretrain.json").read_text())
    assert "--seed 1" in made["command"] and made["dev"]["questions"]["n"] == 5 * len(world.QUESTIONS)
    llava = load_llava(tmp_path / "a")
    assert sum(p.numel() for p in llava.parameters()) < 1.4e6
    assert (tmp_path / "a/config.json").read_bytes() == (recipe.BASE / "config.json").read_bytes()
    with pytest.raises(InputError, match="holds a model"):
        pretrain.main()


def test_pretraining_scores_answers_only():
    """The loss sees answers and their end tokens: decoding what `encode` marks gives the turns back."""
    tokenizer = load_llava(recipe.BASE).tokenizer
    turns = [("Where is the red ring?", "upper left"), ("Is there a blue star in the image?", "no")]
    ids, scored, shown = pretrain.encode((True, turns), 7, tokenizer)
    assert shown == 7 and ids.count(pretrain.IMAGE) == 9
    answers = [i for i, s in zip(ids, scored) if s]
    assert answers == tokenizer.encode_response("upper left") + tokenizer.encode_response("no")
    assert pretrain.encode((False, turns), 7, tokenizer)[2] is None


def test_padded_attention_is_each_sequence_alone():
    llava = load_llava(recipe.BASE)
    ids, lengths = torch.randint(5, 800, (2, 12), generator=torch.Generator().manual_seed(0)), (12, 7)
    x = llava.model.embed_tokens(ids)
    with torch.no_grad():
        both = llava.model(x.flatten(0, 1), torch.arange(12).repeat(2), pretrain.Padded(2)).view(2, 12, -1)
        for row, length in enumerate(lengths):
            alone = llava.model(x[row, :length], torch.arange(length), pretrain.Padded(1))
            torch.testing.assert_close(both[row, :length], alone)
