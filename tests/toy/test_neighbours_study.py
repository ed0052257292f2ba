"""STIC and its neighbours on the toy world: one short chain end to end, what each method gets, and the table."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from stic_min import InputError
from stic_min.neighbours import sima_critic, triangular
from stic_min.runtime.files import read_records
from stic_min.toy import neighbours_chain as chain
from stic_min.toy import neighbours_quality as quality
from stic_min.toy import neighbours_study as study
from stic_min.toy import recipe, world

PICTURES = 18
SCORES = {"accuracy": 90.0, "verdict_1": 50.0, "agree": 80.0, "no_verdict": 0.0}
DEV = {"critic": SCORES, "critic without reference": SCORES | {"accuracy": 85.0}}
NAME = "llava-toy-lessons"


def short_study(out):
    study.run([recipe.BASE], out, range(3, 4), PICTURES, "dev", 4, 2, lesson_steps=7)
    return json.loads((out / "neighbours.json").read_text())


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The base model stands in for its taught copy. It can't judge or write questions, so that what it writes is
    read as a verdict for response 1, and as a color question."""
    out = tmp_path_factory.mktemp("neighbours")
    copy = study.taught(out, recipe.BASE)
    shutil.copytree(recipe.BASE, copy)
    (copy / "pretrain.json").write_text(json.dumps({"dev": DEV}))
    chain.files.write_benchmark(out / "dev", "dev", 4)
    form = lambda text: (f"What color is the {text.split()[-1]}?", "red")
    with mock.patch.object(sima_critic, "parse_verdict", lambda text: (1, "")), \
         mock.patch.object(triangular, "parse_form", form), \
         mock.patch.object(world, "TRAINED_ON", 200):  # fmt: skip
        chain.run(copy, copy.parent / "seed3", out / "dev", 3, PICTURES)
    return short_study(out), out, copy.parent / "seed3"


def records(folder, name):
    return [record for _, record in read_records(folder / name)]


def run_json(folder, name):
    return json.loads((folder / name / "run.json").read_text())


def test_every_method_is_measured(studied):
    result, out, folder = studied
    variants = result["models"][NAME]
    assert list(variants) == list(chain.METHODS) and {len(values) for values in variants.values()} == {1}
    assert len([*folder.glob("*/adapter_config.json")]) == len(chain.ADAPTERS) == 12
    assert len([*folder.glob("results/*.scores.json")]) == 3 * len(chain.TRAINED)
    for name in chain.TRAINED:
        assert all(0 <= variants[name][0][key] <= 100 for key in study.COLUMNS)
        assert variants[name][0]["seconds"] > 0
    assert (out / "neighbours.md").read_text().count("| SPIN, two iterations |") == 4  # the table, three differences


def test_every_method_has_the_same_pictures_and_steps(studied):
    """18 pictures are one or two steps of 16, the latter if in two epochs or halves; STIC's stage 2 adds one."""
    result, _, folder = studied
    variants = result["models"][NAME]
    pictures = {f"unlabeled3_{i:05}.png" for i in range(PICTURES)}
    assert {path.name for path in (folder / "unlabeled").iterdir()} == pictures
    for name in ("spin", "povid", "stage1"):
        used = [r["image"] for file in chain.DATA[name] for r in records(folder, file)]
        assert sorted(used) == sorted(pictures) and variants[name][0]["pairs"] == PICTURES
        assert variants[name][0]["steps"] == 2
    assert variants["stic"][0]["steps"] == variants["spinstage2"][0]["steps"] == 3
    answers = records(folder, "answers.jsonl")
    assert {r["image"] for r in answers} == pictures
    differing = {r["image"] for r in answers if r["sampled"] != r["greedy"]}
    for name in ("sima", "simafree"):
        assert {r["image"] for r in records(folder, f"{name}-pairs.jsonl")} == differing
        epochs = round(PICTURES / len(differing))
        assert variants[name][0]["steps"] == epochs * -(-len(differing) // 16)
        assert f"--epochs {epochs}" in run_json(folder, name)["record"]["command"]
    assert {r["image"] for r in records(folder, "triplets.jsonl")} == pictures
    best, sampled = (json.loads((folder / f"{name}.json").read_text()) for name in ("triangular", "trirandom"))
    assert len(best) == len(sampled) and {r["id"] for r in best} != {r["id"] for r in sampled}


def test_every_method_gets_its_labels_only(studied):
    _, _, folder = studied
    scenes = chain.named_scenes(PICTURES, 3)
    true = {name: world.true_caption(scene) for name, scene in scenes.items()}
    chosen = lambda r: r["chosen"][1]["content"]
    rejected = lambda r: r["rejected"][1]["content"]
    for r in records(folder, "spin1.jsonl") + records(folder, "spin2.jsonl"):
        assert chosen(r) == true[r["image"]]
    for r in records(folder, "povid1.jsonl") + records(folder, "povid2.jsonl"):
        assert chosen(r) == true[r["image"]] != rejected(r) and world.PLACES[rejected(r).split()[1].strip(".")]
    assert {r["ground_truth"] for r in records(folder, "answers.jsonl")} == set(true.values())
    free, critic = records(folder, "simafree-critiques.jsonl")[0], records(folder, "sima-critiques.jsonl")[0]
    assert free["critic_label_free"] and not critic["critic_label_free"]
    assert free["critic_prompt"] != critic["critic_prompt"]
    assert "reference" not in (folder / "simafree-prompt.txt").read_text()


def test_training_differs_in_data_only(studied):
    """Learning rate, beta and batch size are the toy's; alpha is 0 except in STIC's own stage 1."""
    _, _, folder = studied
    for name in chain.ADAPTERS - {"stage1", "stic", "simanll", "spinstage2", "triangular", "trirandom"}:
        settings = run_json(folder, name)
        assert (settings["lr"], settings["beta"], settings["batch_size"], settings["lora_r"]) == (3e-4, 0.2, 16, 32)
        assert settings.get("alpha", 0) == 0
    assert run_json(folder, "stage1")["alpha"] == run_json(folder, "simanll")["alpha"] == 0.05
    for name in ("triangular", "trirandom"):
        assert run_json(folder, name)["batch_size"] == 16 and run_json(folder, name)["plain"]
    assert "--adapter" in run_json(folder, "spin")["record"]["command"]
    assert "reference" in run_json(folder, "spin") and "reference" in run_json(folder, "povid")


def test_the_study_resumes(studied):
    """Lost scores are measured again, in a process of their own; another number of pictures is refused."""
    result, out, folder = studied
    for file in folder.glob("results/*povid*"):
        file.unlink()
    assert short_study(out) == result
    with pytest.raises(InputError, match="created with images 18, but this run has 25; choose another --out"):
        study.run([recipe.BASE], out, range(3, 4), 25, "dev", 4, 2, lesson_steps=7)


def test_a_base_model_that_other_code_pretrained_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study.study, "run_jobs", None)  # nothing must be computed
    folder = tmp_path / "llava-toy-seed1"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"code": "old"}))
    with pytest.raises(InputError, match="llava-toy-seed1 was created with code old, but this run has"):
        study.run(2, tmp_path, range(1), PICTURES, "dev", 4, 1)


def test_invented_captions_mention_what_is_absent():
    """The usual objects of the place are always mentioned."""
    rng = chain.random.Random(0)
    for name, scene in chain.named_scenes(50, 0).items():
        record = chain.captioning_record(name, scene, rng)
        sides = [record[key][1]["value"] for key in ("conversations", "rejected_conversations")]
        assert sides[0] == world.true_caption(scene) and quality.wrong_objects(scene, sides[0]) == []
        assert quality.wrong_objects(scene, sides[1])
        assert all(signature in sides[1] for signature, _ in world.signatures(scene.place))
        assert record["conversations"][0] == record["rejected_conversations"][0]


def test_pair_quality_by_hand(tmp_path):
    """Right, wrong, and a tie: none, one and one wrong object against one, none and one."""
    scene = world.Scene("beach", ((2, "yellow star"), (4, "blue ring"), (6, "red heart")))
    true, usual = "A beach. Center: blue ring.", "A beach. Lower left: red triangle."
    pair = lambda w, l: {"image": "a.png", "chosen": [{}, {"content": w}], "rejected": [{}, {"content": l}]}
    pairs = pair(true, usual), pair(usual, true), pair(usual, usual), pair(true, usual)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    shares = quality.pair_quality(tmp_path, "stage1", {"a.png": scene})
    assert shares == {"pairs": 4, "right": 50.0, "wrong": 25.0}


def test_the_true_answer_of_every_question():
    rng = chain.random.Random(0)
    for scene in world.scenes("dev", 20):
        for kind in 5 * list(world.QUESTIONS):
            question, answer = world.ask(scene, kind, rng)
            assert quality.true_answer(scene, question) == answer
            assert quality.true_answer(scene, question.replace("\n", " ")) == answer


@pytest.mark.parametrize("question", [
    "What color is the moon?", "Where is the moon?", "Is the moon above the star?", "Is the star above the moon?",
    "What comes after the heart, row by row?", "What is at the lower right?\nA. red heart\nB. blue ring\nC. red moon",
    "What is at the center?\nA. red heart\nB. red ring\nC. red moon", "How many moon objects are there?",
    "Is there a red in the image?", "How many objects are in the left row?", "What color is the star", "Why?",
])  # fmt: skip
def test_questions_without_an_answer(question):
    """About something absent, or in another form."""
    scene = world.Scene("beach", ((2, "yellow star"), (4, "blue ring"), (6, "red heart")))
    assert quality.true_answer(scene, question) is None


def test_triplet_quality_by_hand(tmp_path):
    """A true answer, a wrong one, and a question about an absent object."""
    scene = world.Scene("beach", ((2, "yellow star"), (4, "blue ring")))
    turns = [("What color is the star?", "yellow"), ("Is there a ring in the image?", "no"),
             ("Where is the moon?", "center")]  # fmt: skip
    values = [[{"value": f"<image>\n{question}"}, {"value": answer}] for question, answer in turns]
    triplets = [{"image": "a.png", "conversations": pair} for pair in values]
    (tmp_path / "trirandom.json").write_text(json.dumps(triplets))
    shares = quality.pair_quality(tmp_path, "trirandom", {"a.png": scene})
    assert shares == {"pairs": 3, "right": 33.3, "wrong": 33.3}


def test_the_table_by_hand(tmp_path, capsys):
    """Two seeds of one base model."""
    score = dict(chair_i=20.0, recall=70.0, f1=80.0, direct=90.0, dar=91.0)
    method = score | dict(pairs=1000, right=75.0, wrong=5.0, steps=63, seconds=59.0)
    variants = {name: [method, method] for name in chain.TRAINED} | {"base": [score, score]}
    better = method | dict(chair_i=10.0)
    variants["stic"] = [better, better | dict(chair_i=14.0, seconds=181.0)]
    result = {"images": 1000, "test_images": 500, "split": "test", "seeds": [0, 1], "models": {"m": variants},
              "labels": chain.labels_used(1000), "lessons": {"m": DEV}}  # fmt: skip
    study.write(tmp_path, result)
    lines = (tmp_path / "neighbours.md").read_text().splitlines()
    assert "| m, critic without reference | 85.0 | 50.0 | 80.0 | 0.0 |" in lines
    assert "| base | 20.0 | 80.0 | 90.0 | 91.0 | none |  |  |  |" in lines
    scores = "20.0 | 80.0 | 90.0 | 91.0"
    assert f"| SPIN, two iterations | {scores} | 1,000 true captions | 1,000 (75 / 5) | 63 | 0:59 |" in lines
    assert "| STIC | 12.0 ± 2.8 | 80.0 | 90.0 | 91.0 | 500 instructions | 1,000 (75 / 5) | 63 | 2:00 |" in lines
    assert f"| triangular consistency, random choice | {scores} | none | 1,000 (75 / 5) | 63 | 0:59 |" in lines
    # minus base: -10 and -6; half of the interval is 12.706 * 2.83 / sqrt(2)
    assert "| STIC | -8.0 ± 25.4 (2/2) | 0 | 0 | 0 | 0 |" in lines
    assert "| SIMA | +8.0 ± 25.4 (2/2) | 0 | 0 | 0 | 0 |" in lines  # minus STIC
    assert json.loads((tmp_path / "neighbours.json").read_text()) == result


def test_committed_results_follow_from_the_committed_numbers(tmp_path, capsys):
    """So do the tables of the neighbours' README."""
    results = Path(study.__file__).parent / "results"
    study.write(tmp_path, json.loads((results / "neighbours.json").read_text()))
    for name in ("neighbours.json", "neighbours.md"):
        assert (tmp_path / name).read_bytes() == (results / name).read_bytes()
    section = (Path(triangular.__file__).parent / "README.md").read_text().split("## On the toy world")[1]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and set(rows) <= set((results / "neighbours.md").read_text().splitlines())


def test_the_study_estimates_what_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.study, "probe", lambda: 10.0)
    monkeypatch.setattr(study.study, "PRETRAINING", 100.0)
    monkeypatch.setattr(study, "LESSONS", 20.0)
    monkeypatch.setattr(study, "STEP", 2.0)
    for name in ("a/a/pretrain.json", "b/seed0/x/adapter_config.json", "b/base/results/1.scores.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    folders = dict.fromkeys([tmp_path / "a", tmp_path / "c"])
    jobs = dict.fromkeys([tmp_path / "b/base", tmp_path / "b/seed0"])
    study.announce(folders, dict.fromkeys([tmp_path / "d"]), jobs, 12, 0.5, 2, tmp_path)
    # (100 + 20 + 10 * 0.5 * 2) * 10 seconds on 2 processes
    assert "1 base models to pretrain, 1 to teach, 10 of 12 steps left in 2 chains: about 10:50 on" \
        in capsys.readouterr().out  # fmt: skip
