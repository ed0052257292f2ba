"""train_stage2.py: the whole stage against its loss and AdamW worked out by hand, then its details."""

import pytest
from by_hand import assert_trained_like, logps_by_hand, train_by_hand
from chain import distance, log, with_images
from commands import call

from stic_min import data
from stic_min.formats.records import read_kind
from stic_min.loader import load_llava
from stic_min.samples import global_batches, instruction_sample


@pytest.mark.parametrize("form", ["", "one_line", "plain"])
def test_stage2_by_hand(runs, tmp_path, form):
    """-log p of all answers of a global batch, divided by their number of tokens."""
    out = tmp_path / "out" if form else runs.out / "stage2"
    if form:
        call(*runs.commands["stage2"], f"--{form.replace('_', '-')}", "--out", out)
    llava = load_llava(runs.model, adapter=runs.out / "stage1", image_mode="pad")
    infusion = data.Infusion(runs.tiny / "instructions.json", **{form: True} if form else {})
    instructions = [infusion(*record) for record in read_kind(runs.out / "descriptions.jsonl", "descriptions")]
    samples = [instruction_sample(i, llava, runs.tiny / "images", 2048) for i in instructions]
    expected = []

    def loss(indices):
        logp = sum(logps_by_hand(llava, samples[i]).sum() for i in indices)
        nll = -logp / sum(samples[i].scored for i in indices)
        expected.append(nll.item())
        return nll

    batches = global_batches([sample.length for sample in samples], 3, seed=0)
    losses = [lambda batch=batch: loss(batch) for batch in batches]
    norms = train_by_hand(llava, losses, lr=1e-3, projector_lr=2e-5)
    records = log(out)
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-4)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    assert_trained_like(llava, out)


def test_stage2_trains_on_every_answer_of_the_described_records_only(runs):
    encode = load_llava(runs.model).tokenizer.encode_response
    answers = [t["value"] for r in with_images(runs.tiny) for t in r["conversations"] if t["from"] == "gpt"]
    records = log(runs.out / "stage2")
    assert sum(r["answer_tokens"] for r in records) == sum(len(encode(answer)) for answer in answers)
    assert all(set(r) == {"step", "loss", "answer_tokens", "grad_norm", "lr"} for r in records)
    counts = "8 described of 8 records with an image, 10 in all; 8 used for training, 0 truncated to 2048 tokens"
    assert counts in runs.printed["stage2"]


def test_stage2_continues_from_stage1(runs, tmp_path):
    first = log(runs.out / "stage2")[0]["loss"]
    assert distance(runs.out / "stage1", runs.out / "stage2") > 1e-4
    call(*runs.commands["stage2"], "--lr", 0, "--projector-lr", 0, "--out", tmp_path / "still")
    assert log(tmp_path / "still")[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert distance(tmp_path / "still", runs.out / "stage1") == 0  # the projector is copied, too
    script, *args = runs.commands["stage2"]  # the control that skips stage 1
    at = args.index("--adapter")
    call(script, *args[:at], *args[at + 2 :], "--lora-r", 4, "--out", tmp_path / "control")
    assert log(tmp_path / "control")[0]["loss"] != pytest.approx(first, rel=1e-4)
    assert distance(tmp_path / "control", runs.out / "stage2") > 1e-4


def test_plain_without_descriptions_trains_on_all_records_with_an_image(runs, tmp_path):
    """All eight are described here, so the records and their order are the same."""
    script, *args = [*runs.commands["stage2"], "--plain"]
    at = args.index("--descriptions")
    call(script, *args, "--out", tmp_path / "described")
    printed = call(script, *args[:at], *args[at + 2 :], "--out", tmp_path / "all")
    assert printed.startswith("8 records with an image, 10 in all; 8 used for training")
    assert log(tmp_path / "all") == log(tmp_path / "described")
    assert distance(tmp_path / "all", tmp_path / "described") == 0


def test_descriptions_are_required_without_plain(runs, capsys):
    script, *args = runs.commands["stage2"]
    at = args.index("--descriptions")
    with pytest.raises(SystemExit):
        call(script, *args[:at], *args[at + 2 :])
    assert "the following arguments are required: --descriptions" in capsys.readouterr().err
