"""SPIN: its loss by hand, which pairs each iteration has, and its training as stage 1 with other settings."""

import json
import math

import pytest
import torch
from by_hand import logps_by_hand
from chain import identical, log, with_images
from commands import call, call_two_ranks, ended, lines

from stic_min import InputError, data, sampler
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.loss import dpo_loss, stic_loss
from stic_min.neighbours import spin as spin_module
from stic_min.runtime.files import fingerprint
from stic_min.runtime.work import row_seed
from stic_min.samples import global_batches, pair_sample
from stic_min.text import with_image

SPIN = "stic_min.neighbours.spin"
CONTENT = "image", "chosen", "rejected", "chosen_finish", "rejected_finish"


@pytest.fixture(scope="module")
def spin(tiny, tmp_path_factory):
    """A function that runs a step, in the folder of three iterations of pairs and two of training."""
    folder = tmp_path_factory.mktemp("spin")
    at = ["--model", tiny / "llava-v1.5-tiny", "--device", "cpu", "--images", tiny / "images"]
    data_flags = ["--instructions", tiny / "instructions.json", "--max-new-tokens", 12]
    training_flags = ["--batch-size", 3, "--epochs", 1, "--lr", 1e-3, "--lora-r", 4]

    class Spin:
        out, images, model = folder, tiny / "images", tiny / "llava-v1.5-tiny"
        pairs = [SPIN, "pairs", *at, *data_flags]
        train = [SPIN, "train", *at, *training_flags]

    printed = [call(*Spin.pairs, "--out", folder / "pairs0.jsonl")]
    for t in range(2):
        adapter = ["--adapter", folder / f"spin{t - 1}"] if t else []
        call(*Spin.train, *adapter, "--pairs", folder / f"pairs{t}.jsonl", "--out", folder / f"spin{t}")
        previous = ["--adapter", folder / f"spin{t}", "--previous", folder / f"pairs{t}.jsonl"]
        printed.append(call(*Spin.pairs, *previous, "--out", folder / f"pairs{t + 1}.jsonl"))
    Spin.printed = printed
    return Spin


# ---------------------------------------------------------------- the loss


def test_eq_3_4_is_the_dpo_loss():
    """log p of y: -10 under theta, -12 under theta_t; of y': -9 and -8. The argument of l is 0.1 (2 - (-1))."""
    logps = [torch.tensor([value]) for value in (-10.0, -9.0, -12.0, -8.0)]
    by_hand = math.log(1 + math.exp(-0.3))
    assert dpo_loss(*logps, beta=0.1).item() == pytest.approx(by_hand, rel=1e-6)
    assert stic_loss(*logps, beta=0.1, alpha=0).item() == pytest.approx(by_hand, rel=1e-6)


def test_training_minimizes_eq_3_4(spin, tmp_path):
    """Of iteration 1, one pair per step: theta_t, loaded on its own, gives the log-ratios of the logged loss."""
    theta_t = spin.out / "spin0"
    flags = ["--adapter", theta_t, "--pairs", spin.out / "pairs1.jsonl", "--batch-size", 1]
    call(*spin.train, *flags, "--out", tmp_path / "out")
    reference = load_llava(spin.model, adapter=theta_t, image_mode="pad")
    samples = [pair_sample(p, reference, spin.images, 1024) for p in data.read_pairs(spin.out / "pairs1.jsonl")]
    with torch.no_grad():
        logps = [logps_by_hand(reference, sample).tolist() for sample in samples]
    records = log(tmp_path / "out")
    assert len(records) == len(samples) == 16
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # theta is theta_t
    for record, [i] in zip(records, global_batches([sample.length for sample in samples], 1, seed=0)):
        ref_y, ref_own = logps[i]
        ratios = record["logp_chosen"] - ref_y, record["logp_rejected"] - ref_own
        by_hand = math.log(1 + math.exp(-0.1 * (ratios[0] - ratios[1])))
        assert record["loss"] == pytest.approx(by_hand, abs=1e-4) and record["alpha_nll"] == 0
    assert any(abs(record["margin"]) > 1e-3 for record in records[1:] if "margin" in record)


# ---------------------------------------------------------------- pairs


def test_pairs_prefer_the_data_to_the_models_own_response(spin):
    llava = load_llava(spin.model)
    pairs = lines(spin.out / "pairs0.jsonl")
    records = with_images(spin.images.parent)
    assert [pair["id"] for pair in pairs] == [record["id"] for record in records]
    for pair, record in zip(pairs, records):
        human, gpt, *_ = record["conversations"]
        x = human["value"].replace("<image>", "").strip()
        user = {"role": "user", "content": f"<image>\n{x}"}
        assert pair["image"] == record["image"]
        assert pair["chosen"] == [user, {"role": "assistant", "content": gpt["value"]}]
        prompt = llava.chat_prompt(with_image(x), images=0)
        image = open_image(spin.images / record["image"])
        seed = row_seed(0, record["id"], "response")
        [own] = sampler.sample(llava, [prompt], [[image]], [seed], max_new_tokens=12, temperature=1.0)
        assert pair["rejected"] == [user, {"role": "assistant", "content": llava.tokenizer.decode(own.ids)}]
        assert (pair["chosen_finish"], pair["rejected_finish"]) == ("stop", own.finish)
    assert (pairs[0]["temperature"], pairs[0]["top_p"], pairs[0]["adapter"]) == (1.0, None, None)
    assert "8 pairs to generate, 0 of them already in" in spin.printed[0]
    assert f"8 pairs in {spin.out / 'pairs0.jsonl'}, 0 skipped" in spin.printed[0]


def test_the_help_shows_the_authors_sampling(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["spin", "pairs", "--help"])
    with pytest.raises(SystemExit):
        spin_module.main()
    text = " ".join(capsys.readouterr().out.split())
    assert "0 is greedy (default: 1.0)" in text and "in tokens (default: 256)" in text


def test_the_help_of_train_shows_spins_defaults(monkeypatch, capsys):
    """Those of stage 1, which follow, are others."""
    monkeypatch.setattr("sys.argv", ["spin", "train", "--help"])
    with pytest.raises(SystemExit):
        spin_module.main()
    text = capsys.readouterr().out
    assert text.startswith("train_stage1.py --alpha 0 --beta 0.1 --lr 5e-7 --epochs 3 --batch-size 64: these are the ")
    assert "(default: 1e-07)" in text


def test_each_iteration_has_the_previous_ones_pairs_too(spin):
    """Iteration t: 8 pairs that theta_t generates, and those of iteration t - 1, but not of t - 2."""
    iterations = [lines(spin.out / f"pairs{t}.jsonl") for t in range(3)]
    content = lambda records: [[record[name] for name in CONTENT] for record in records]
    assert [len(records) for records in iterations] == [8, 16, 16]
    for t in (1, 2):
        own, copies, previous = iterations[t][:8], iterations[t][8:], iterations[t - 1][:8]
        assert content(copies) == content(previous)
        assert all("generated_by" not in record and record["adapter"] == f"spin{t - 1}" for record in own)
        assert content(own) != content(previous)
        for copy, original in zip(copies, previous):
            assert copy["id"] == f"{original['id']} (previous iteration)" and copy["adapter"] == f"spin{t - 1}"
            origin = copy["generated_by"]  # so that it can be generated again
            assert origin["adapter"] == (f"spin{t - 2}" if t > 1 else None)
            assert origin["fingerprint"] == fingerprint(spin.model, spin.out / f"spin{t - 2}" if t > 1 else None)
        assert len(data.read_pairs(spin.out / f"pairs{t}.jsonl")) == 16
    assert "8 pairs of the previous iteration are appended" in spin.printed[1]


def test_a_record_whose_image_comes_later_has_it_in_its_first_turn(spin, tmp_path):
    turns = ["Hello!", "Hello.", "<image>\nWhat is this?", "A house."]
    talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    record = {"id": "late", "image": "scene_01.jpg", "conversations": talk}
    (tmp_path / "late.json").write_text(json.dumps([record]))
    call(*spin.pairs, "--instructions", tmp_path / "late.json", "--out", tmp_path / "pairs.jsonl")
    [pair] = lines(tmp_path / "pairs.jsonl")
    assert [message["content"] for message in pair["chosen"]] == ["<image>\nHello!", "Hello."]


def test_pairs_resume(spin, tmp_path):
    """From part of one rank's file and of another's, one of them of the previous iteration."""
    command = [*spin.pairs, "--adapter", spin.out / "spin0", "--previous", spin.out / "pairs0.jsonl"]
    whole = (spin.out / "pairs1.jsonl").read_bytes()
    records = whole.splitlines(keepends=True)
    file = tmp_path / "pairs1.jsonl"
    file.write_bytes(records[0] + records[9] + records[3][:40])
    (tmp_path / "pairs1.jsonl.part1").write_bytes(records[5])
    assert "8 pairs to generate, 2 of them already in" in call(*command, "--out", file)
    assert file.read_bytes() == whole
    (tmp_path / "pairs0.jsonl").write_bytes(b"".join((spin.out / "pairs0.jsonl").read_bytes().splitlines(True)[1:]))
    with pytest.raises(InputError, match="pairs1.jsonl was written with previous '.*', but this run has '"):
        call(*command, "--previous", tmp_path / "pairs0.jsonl", "--out", file)
    with pytest.raises(InputError, match="pairs1.jsonl was written with previous '.*', but this run has None"):
        call(*spin.pairs, "--adapter", spin.out / "spin0", "--out", file)
    assert file.read_bytes() == whole


def test_two_ranks_do_the_same(spin, tmp_path):
    pairs = [*spin.pairs, "--adapter", spin.out / "spin0", "--previous", spin.out / "pairs0.jsonl"]
    train = [*spin.train, "--adapter", spin.out / "spin0", "--pairs", spin.out / "pairs1.jsonl", "--save-every", 2]
    success, _ = call_two_ranks(("kill", 3), [*train, "--out", tmp_path / "killed"], check=False)
    assert not success
    _, printed = call_two_ranks([*pairs, "--out", tmp_path / "pairs1.jsonl"], [*train, "--out", tmp_path / "killed"],
                                [*train, "--out", tmp_path / "whole"])  # fmt: skip
    assert (tmp_path / "pairs1.jsonl").read_bytes() == (spin.out / "pairs1.jsonl").read_bytes()
    assert "resuming after step 2" in printed and identical(tmp_path / "killed", tmp_path / "whole")
    assert log(tmp_path / "whole")[-1] == pytest.approx(log(spin.out / "spin1")[-1], rel=1e-4, abs=1e-4)


# ---------------------------------------------------------------- training


def test_the_authors_settings(spin, tmp_path):
    at = [SPIN, "train", "--model", spin.model, "--device", "cpu", "--images", spin.images]
    call(*at, "--pairs", spin.out / "pairs0.jsonl", "--out", tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs/run.json").read_text())
    expected = {"alpha": 0, "beta": 0.1, "lr": 5e-7, "epochs": 3, "batch_size": 64, "max_length": 1024}
    assert expected.items() <= settings.items() and "reference" not in settings  # theta_0
    assert settings["record"]["steps"] == 3
    late = ["--adapter", tmp_path / "theirs", "--lr", 1e-7, "--beta", 5, "--epochs", 6]  # of iteration 3
    call(*at, "--pairs", spin.out / "pairs0.jsonl", *late, "--out", tmp_path / "late")
    settings = json.loads((tmp_path / "late/run.json").read_text())
    assert {"beta": 5, "lr": 1e-7, "epochs": 6}.items() <= settings.items()
    assert settings["reference"] == fingerprint(tmp_path / "theirs")  # the adapter that it started from


def test_another_reference_can_be_chosen(spin, tmp_path):
    flags = ["--adapter", spin.out / "spin1", "--reference", spin.out / "spin0", "--batch-size", 16]
    call(*spin.train, *flags, "--pairs", spin.out / "pairs1.jsonl", "--out", tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["reference"] == fingerprint(spin.out / "spin0")
    assert abs(log(tmp_path)[0]["reward_chosen"]) > 1e-4


# ---------------------------------------------------------------- --check and bad input


def test_check(spin, tmp_path):
    previous = ["--adapter", spin.out / "spin0", "--previous", spin.out / "pairs0.jsonl"]
    printed = call(*spin.pairs, *previous, "--check", "--out", tmp_path / "new.jsonl")
    assert "check passed" in printed and not list(tmp_path.iterdir())
    printed = call(*spin.pairs, *previous, "--check", "--out", spin.out / "pairs1.jsonl")
    assert "8, 0 of them not yet in" in printed


def test_bad_input(spin, tmp_path):
    def refused(*flags):
        status, line = ended(*spin.pairs, "--out", tmp_path / "new.jsonl", *flags)
        assert status == 1 and line.startswith("error: ") and not (tmp_path / "new.jsonl").exists()
        return line

    previous = ["--previous", spin.out / "pairs0.jsonl"]
    assert "pairs0.jsonl, line 1: generated by the model of this iteration; --adapter must be" in refused(*previous)
    pair = lines(spin.out / "pairs0.jsonl")[0]
    foreign = {name: pair[name] for name in ("image", "chosen", "rejected")}
    (tmp_path / "foreign.jsonl").write_text(json.dumps(foreign))
    line = refused("--previous", tmp_path / "foreign.jsonl")
    assert "foreign.jsonl, line 1: not a pair that this command wrote" in line
    (tmp_path / "half.jsonl").write_text(json.dumps({"image": "a.jpg", "chosen": "A house."}))
    assert "half.jsonl, line 1 (a.jpg): " in refused("--previous", tmp_path / "half.jsonl")
    instructions = spin.images.parent / "instructions.json"
    assert "contains instructions" in refused("--previous", instructions)
    assert "no such image folder" in refused("--images", tmp_path / "none")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " "}]
    record = {"id": "7", "image": "scene_01.jpg", "conversations": talk}
    (tmp_path / "bad.json").write_text(json.dumps([record]))
    assert "bad.json, record 0 (7): a gpt turn: no value" in refused("--instructions", tmp_path / "bad.json")
    talk[1]["value"] = "A house."
    taken = f"{pair['id']} (previous iteration)"
    (tmp_path / "taken.json").write_text(json.dumps([record | {"id": taken}]))
    adapter = ["--adapter", spin.out / "spin0"]
    line = refused("--instructions", tmp_path / "taken.json", *previous, *adapter)
    assert f"taken.json: the id {taken} is the one that a pair of " in line and line.endswith("gets; change it")
