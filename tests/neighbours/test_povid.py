"""POVID: its data, its noise and its loss by hand, then all of stage 2 by hand; ranks, micro-batches, resuming."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import assert_trained_like, logps_by_hand, train_by_hand
from chain import STEPS, assert_same_training, identical, log, stop_after, with_images
from commands import call, call_two_ranks, ended, lines
from PIL import Image
from torch.nn import functional as F

from stic_min import InputError, cost, data
from stic_min.batch import Example, collate
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.mistral import DecoderConfig
from stic_min.neighbours import povid
from stic_min.runtime.files import fingerprint
from stic_min.runtime.work import row_seed
from stic_min.samples import global_batches, load_tiles, pair_sample

POVID = "stic_min.neighbours.povid"
WRONG = ["A blue whale, and a boat.", "It is green.", "Three dogs run over the grass.", "Two red cars."]


def published(tiny):
    """The tiny instructions as POVID publishes its data: the first turn, with a wrong answer next to the right one."""
    records = []
    for i, record in enumerate(with_images(tiny)):
        human, gpt, *_ = record["conversations"]
        rejected = [human, {"from": "gpt", "value": WRONG[i % len(WRONG)]}]
        records.append({"id": record["id"], "image": record["image"], "conversations": [human, gpt],
                        "rejected_conversations": rejected})  # fmt: skip
    return records


@pytest.fixture(scope="module", params=["llava-v1.5-tiny"])
def world(request, tiny, tmp_path_factory):
    """Pairs and stage 1 in a folder, and the command of stage 2."""
    out = tmp_path_factory.mktemp("povid")
    (out / "povid.json").write_text(json.dumps(published(tiny)))
    at = ["--model", tiny / request.param, "--device", "cpu", "--images", tiny / "images"]
    data_flags = ["--pairs", out / "pairs.jsonl", "--lr", 1e-3, "--batch-size", 3]
    printed = call(POVID, "pairs", "--data", out / "povid.json", "--out", out / "pairs.jsonl")
    call(POVID, "stage1", *at, *data_flags, "--epochs", 1, "--lora-r", 4, "--out", out / "stage1")
    stage2 = [POVID, "stage2", *at, *data_flags, "--adapter", out / "stage1"]
    call(*stage2, "--out", out / "stage2")
    return SimpleNamespace(out=out, tiny=tiny, model=tiny / request.param, printed=printed, stage2=stage2, at=at)


# ---------------------------------------------------------------- noise


def test_the_schedule_at_step_500():
    """The product of 1 - beta over the steps 0 to 500, in double precision."""
    product = 1.0
    for i in range(501):
        beta = (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)) + 1e-5
        product *= 1 - beta
    assert povid.remaining_signal(500).item() == pytest.approx(product, rel=1e-4)
    assert product == pytest.approx(0.7448, abs=1e-4)  # a share of 0.863 of the image, and noise of 0.505
    first, second = (povid.remaining_signal(step).item() for step in (0, 1))
    assert first == pytest.approx(1 - 1e-5 - 4.99e-3 / (1 + math.exp(6)), abs=1e-6) and second < first


@pytest.mark.parametrize("gray", [0, 128, 255])
def test_the_moments_of_the_noise(gray):
    """Of a clamped normal distribution: what is below 0 and above 1 ends at 0 and 1, and is not wrapped around."""
    noisy = povid.add_noise(Image.new("RGB", (200, 150), (gray,) * 3), seed=7)
    values = torch.tensor(np.asarray(noisy)).double() / 255
    assert noisy.size == (200, 150) and values.shape == (150, 200, 3)
    mean, std = math.sqrt(0.7448) * gray / 255, math.sqrt(1 - 0.7448)
    below = lambda x: 0.5 * (1 + math.erf((x - mean) / std / math.sqrt(2)))
    density = lambda x: math.exp(-(((x - mean) / std) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = mean * (below(1) - below(0)) + std * (density(0) - density(1)) + 1 - below(1)
    assert values.mean().item() == pytest.approx(expected, abs=0.006)  # 4 standard deviations are 0.005
    assert (values == 0).double().mean().item() == pytest.approx(below(0.5 / 255), abs=0.008)
    assert (values == 1).double().mean().item() == pytest.approx(1 - below(254.5 / 255), abs=0.008)
    red, green, _ = (values - values.mean()).unbind(-1)
    assert abs((red * green).mean().item()) < 0.01  # independent


def test_noise_follows_from_its_seed():
    image = Image.new("RGB", (20, 10), "red")
    pixels = lambda seed: povid.add_noise(image, seed).tobytes()
    torch.manual_seed(0)
    first = pixels(1)
    torch.manual_seed(1)
    assert pixels(1) == first != pixels(2)


# ---------------------------------------------------------------- the loss


def test_argmax_noisy_tokens_are_scored_with_the_clean_image():
    """One pair, three tokens. The chosen text is [2, 0]; with the noisy image, the model expects [1, 0].

    R = 4: the chosen text is shorter than the longest of the batch, so its row ends in padding.
    """
    clean = torch.tensor([[[1.0, 2, 3], [4, 1, 0], [9, 9, 0], [0, 0, 9]]] * 2)  # (2, 4, 3): chosen, rejected
    noisy = torch.tensor([[[0.0, 5, 1], [7, 6, 0], [0, 0, 9], [9, 0, 0]]])  # argmax 1, 0, then ignored
    labels = torch.tensor([[-100, 2, 0, -100], [-100, 1, 1, 1]])
    batch = SimpleNamespace(logits=clean, labels=labels)
    batch.noisy = SimpleNamespace(logits=noisy, labels=labels[:1])
    llava = lambda batch: batch.logits
    assert povid.noisy_labels(llava, batch.noisy).tolist() == [[-100, 1, 0, -100]]
    logp_w, logp_l, logp_noisy = (value.item() for value in povid.scores(llava, batch))
    log_p = lambda row, token: row[token] - math.log(sum(map(math.exp, row)))
    first, second, third = [1, 2, 3], [4, 1, 0], [9, 9, 0]
    assert logp_w == pytest.approx(log_p(first, 2) + log_p(second, 0), abs=1e-5)
    assert logp_l == pytest.approx(log_p(first, 1) + log_p(second, 1) + log_p(third, 1), abs=1e-5)
    assert logp_noisy == pytest.approx(log_p(first, 1) + log_p(second, 0), abs=1e-5)
    assert logp_noisy != pytest.approx(log_p([0, 5, 1], 1) + log_p([7, 6, 0], 0), abs=0.1)  # under the noisy logits


def test_the_mixed_loss():
    """beta 0.5. Log-ratios: y_w 2, y_l -1, argmax-noisy 3. So 0.5 (2 + 1) = 1.5, and 0.5 (2 - 3) = -0.5."""
    theta = [torch.tensor([value]) for value in (-10.0, -9.0, -4.0)]
    reference = [torch.tensor([value]) for value in (-12.0, -8.0, -7.0)]
    dpo, dpo_noisy = povid.povid_terms(theta, reference, beta=0.5)
    assert dpo.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)
    assert dpo_noisy.item() == pytest.approx(math.log(1 + math.exp(0.5)), rel=1e-6)


def argmax_noisy_by_hand(llava, sample, noise_seed):
    """log p with the clean image of the tokens that are most probable with the noisy one, token by token."""
    chosen = sample.branches[0]
    example = Example("", sample.trunk, [chosen])
    noisy_image = povid.add_noise(open_image(sample.image), noise_seed)
    tiles = {"clean": load_tiles(sample, llava), "noisy": [llava.tiles(noisy_image)]}
    logits = {name: llava(collate([example], [t], llava.config))[0] for name, t in tiles.items()}  # (R + 1, V)
    total = 0.0
    for position in range(len(chosen)):
        token = logits["noisy"][position].argmax().item()
        total = total + F.log_softmax(logits["clean"][position], -1)[token]
    return total


def test_stage2_by_hand(world):
    """Pair by pair, with a second model as reference, and AdamW by hand."""
    policy, reference = (load_llava(world.model, adapter=world.out / "stage1", image_mode="pad") for _ in range(2))
    pairs = data.read_pairs(world.out / "pairs.jsonl")
    samples = [pair_sample(pair, policy, world.tiny / "images", 1024) for pair in pairs]
    expected = []  # log.jsonl, step by step

    def loss(step, indices):
        terms = []
        for place, i in enumerate(indices):
            seed = row_seed(0, "noise", step, place)
            logp_w, logp_l = logps_by_hand(policy, samples[i])
            ref_logp_w, ref_logp_l = logps_by_hand(reference, samples[i]).detach()
            noisy, ref_noisy = (argmax_noisy_by_hand(llava, samples[i], seed) for llava in (policy, reference))
            dpo = -F.logsigmoid(0.1 * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l)))
            dpo_noisy = -F.logsigmoid(0.1 * ((logp_w - ref_logp_w) - (noisy - ref_noisy.detach())))
            terms.append({"loss": (dpo + dpo_noisy) / 2, "dpo": dpo, "dpo_noisy": dpo_noisy, "logp_noisy": noisy,
                          "reward_noisy": 0.1 * (noisy - ref_noisy), "logp_chosen": logp_w})  # fmt: skip
        means = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
        expected.append({name: mean.item() for name, mean in means.items()})
        return means["loss"]

    batches = global_batches([sample.length for sample in samples], 3, seed=0)
    losses = [lambda step=step, batch=batch: loss(step, batch) for step, batch in enumerate(batches)]
    norms = train_by_hand(policy, losses, lr=1e-3, projector_lr=2e-5)
    for record, values, norm in zip(log(world.out / "stage2"), expected, norms, strict=True):
        assert record == pytest.approx(record | values | {"grad_norm": norm}, rel=1e-3, abs=1e-4)
    assert_trained_like(policy, world.out / "stage2", projector_lr=2e-5)


def test_stage2_starts_at_stage1(world):
    first, *later = log(world.out / "stage2")
    assert first["dpo"] == first["dpo_noisy"] == first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_noisy"] == first["margin"] == first["equal"] == 0
    assert all(abs(record["reward_noisy"]) > 1e-4 for record in later)
    assert first["logp_noisy"] != pytest.approx(first["logp_chosen"], abs=1)  # the noise changes what is expected
    run_json = json.loads((world.out / "stage2/run.json").read_text())
    assert run_json["noise_step"] == 500 and run_json["reference"] == fingerprint(world.out / "stage1")
    assert (world.out / "stage2/report.html").is_file()


def test_stage2_of_a_merged_model(world, tmp_path):
    """As the authors have it: without an adapter, the reference is the model itself."""
    script, step, *rest = world.stage2
    at = rest.index("--adapter")
    call(script, step, *rest[:at], *rest[at + 2 :], "--lora-r", 4, "--out", tmp_path)
    assert log(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "reference" not in json.loads((tmp_path / "run.json").read_text())


# ---------------------------------------------------------------- ranks, micro-batches, resuming


@pytest.mark.parametrize("world", ["llava-v1.6-tiny"], indirect=True)
def test_anyres(world, tmp_path):
    """Whose images differ in their number of tiles."""
    call(*world.stage2, "--image-mode", "anyres", "--micro-batch", 3, "--out", tmp_path / "three")
    call(*world.stage2, "--image-mode", "anyres", "--micro-batch", 1, "--out", tmp_path / "one")
    assert_same_training(tmp_path / "one", tmp_path / "three")


def test_neither_micro_batches_nor_ranks_change_the_result(world, tmp_path):
    call(*world.stage2, "--micro-batch", 3, "--out", tmp_path / "three")
    assert_same_training(tmp_path / "three", world.out / "stage2")  # one at a time
    killed = [*world.stage2, "--save-every", 1, "--out", tmp_path / "killed"]
    success, _ = call_two_ranks(("kill", 2), killed, check=False)
    assert not success and len(log(tmp_path / "killed")) == 2
    full, none = ([*world.stage2, "--shard", shard, "--out", tmp_path / shard] for shard in ("full", "none"))
    _, printed = call_two_ranks(full, none, killed)
    assert "resuming after step 2" in printed
    assert identical(tmp_path / "killed", tmp_path / "full")  # noise included
    for shard in ("full", "none"):
        assert_same_training(tmp_path / shard, world.out / "stage2")


def test_the_noise_of_a_sample_changes_from_epoch_to_epoch(world, tmp_path):
    flags = ["--lr", 0, "--projector-lr", 0, "--batch-size", 8, "--epochs", 2, "--save-every", 1]
    call(*world.stage2, *flags, "--out", tmp_path / "whole")
    first, second = log(tmp_path / "whole")
    assert first["logp_chosen"] == pytest.approx(second["logp_chosen"], abs=1e-4)
    assert abs(first["logp_noisy"] - second["logp_noisy"]) > 1e-2
    with stop_after(1), pytest.raises(SystemExit):
        call(*world.stage2, *flags, "--out", tmp_path / "stopped")
    call(*world.stage2, *flags, "--out", tmp_path / "stopped")
    assert identical(tmp_path / "stopped", tmp_path / "whole")


# ---------------------------------------------------------------- pairs and stage 1


def test_pairs_are_those_published(world):
    pairs = lines(world.out / "pairs.jsonl")
    records = published(world.tiny)
    assert [pair["id"] for pair in pairs] == [record["id"] for record in records]
    for pair, record in zip(pairs, records):
        x = record["conversations"][0]["value"].replace("<image>", "").strip()
        assert pair["image"] == record["image"] and pair["chosen"][0] == pair["rejected"][0]
        assert pair["chosen"][0] == {"role": "user", "content": f"<image>\n{x}"}
        assert pair["chosen"][1]["content"] == record["conversations"][1]["value"]
        assert pair["rejected"][1]["content"] == record["rejected_conversations"][1]["value"]
    assert f"8 pairs in {world.out / 'pairs.jsonl'}" in world.printed


def test_what_is_no_pair_is_skipped(world, tmp_path):
    first, second, *_ = published(world.tiny)
    again = first | {"rejected_conversations": second["rejected_conversations"]}  # another prompt
    long = first | {"id": "long", "conversations": first["conversations"] * 2}
    same_id = second | {"id": first["id"]}
    (tmp_path / "povid.json").write_text(json.dumps([first, long, same_id, again]))
    command = [POVID, "pairs", "--data", tmp_path / "povid.json", "--out", tmp_path / "pairs.jsonl"]
    printed = call(*command)
    assert [pair["id"] for pair in lines(tmp_path / "pairs.jsonl")] == [first["id"], f"{first['id']}#2"]
    assert f"2 records skipped, the first: {tmp_path}/povid.json, record 1 ({first['image']}): chosen is" in printed
    whole = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl").write_bytes(whole[:-20])  # killed
    call(*command)
    assert (tmp_path / "pairs.jsonl").read_bytes() == whole
    call_two_ranks(command[:-1] + [tmp_path / "two.jsonl"])
    assert (tmp_path / "two.jsonl").read_bytes() == whole
    (tmp_path / "povid.json").write_text(json.dumps([second]))
    with pytest.raises(InputError, match="pairs.jsonl was written with data '.*', but this run has '"):
        call(*command)


def test_ids_and_finishes_are_kept(world, tmp_path):
    first, second, third, *_ = published(world.tiny)
    no_id = {name: value for name, value in third.items() if name != "id"}
    records = [first | {"id": 0}, second | {"id": "0", "rejected_finish": "length"}, no_id]
    (tmp_path / "povid.json").write_text(json.dumps(records))
    command = [POVID, "pairs", "--data", tmp_path / "povid.json", "--out", tmp_path / "pairs.jsonl"]
    call(*command)
    pairs = lines(tmp_path / "pairs.jsonl")
    assert [pair["id"] for pair in pairs] == ["0", "0#2", third["image"]]
    assert [(pair["chosen_finish"], pair["rejected_finish"]) for pair in pairs] == [
        ("stop", "stop"), ("stop", "length"), ("stop", "stop"),
    ]  # fmt: skip
    (tmp_path / "povid.json").write_text(json.dumps([first | {"id": "\ud800"}]))
    status, line = ended(*command)
    assert status == 1 and line == f"error: {tmp_path}/povid.json, record 0: id '\\ud800' is not valid Unicode"


def test_stage1_has_the_authors_settings(world, tmp_path):
    call(POVID, "stage1", *world.at, "--pairs", world.out / "povid.json", "--out", tmp_path / "stage1")  # as published
    settings = json.loads((tmp_path / "stage1/run.json").read_text())
    expected = {"alpha": 0, "beta": 0.1, "lr": 1e-7, "epochs": 3, "batch_size": 4, "lora_r": 128, "lora_alpha": 256}
    assert expected.items() <= settings.items() and settings["record"]["steps"] == 6
    assert json.loads((world.out / "stage1/run.json").read_text())["lr"] == 1e-3  # what is given takes precedence
    assert len(log(world.out / "stage1")) == STEPS


# ---------------------------------------------------------------- --check and bad input


def test_check_counts_the_forward_passes():
    """With the noisy image: one more of the policy and one more of the reference, neither with a gradient."""
    config = DecoderConfig(4096, 14336, 32, 32, 8, 32000, 1e-5, 1e6, 32768)
    none, one, three = (cost.decoder_flops(config, [(1000, 0)], 100, 128, n) for n in (False, True, 3))
    assert three - none == pytest.approx(3 * (one - none))


def test_check(world, tmp_path):
    printed = call(*world.stage2, "--check", "--out", tmp_path / "new")
    assert "8 usable, 8 images" in printed and "3 steps" in printed and "check passed" in printed
    assert not (tmp_path / "new").exists()


def test_bad_input(world, tmp_path):
    def refused(*command):
        status, line = ended(*command)
        assert status == 1 and line.startswith("error: ")
        return line

    out = ["--out", tmp_path / "out"]
    instructions = world.tiny / "instructions.json"
    line = refused(POVID, "pairs", "--data", instructions, *out)
    assert line.startswith(f"error: {instructions} contains instructions (--describe, --instructions), not")
    first = published(world.tiny)[0]
    (tmp_path / "long.json").write_text(json.dumps([first | {"conversations": first["conversations"] * 2}]))
    assert "long.json: no pairs" in refused(POVID, "pairs", "--data", tmp_path / "long.json", *out)
    assert "none.json" in refused(POVID, "pairs", "--data", tmp_path / "none.json", *out)
    (tmp_path / "gone.json").write_text(json.dumps([first | {"image": "gone.jpg"}]))
    assert "no such image: '" in refused(*world.stage2, "--pairs", tmp_path / "gone.json", *out)
    assert "holds a finished run" in refused(*world.stage2, "--out", world.out / "stage2")
    assert not (tmp_path / "out").exists()
