"""Commands that were killed resume from what is on disk, and end with what an undisturbed run gives."""

import json
import math
import signal

import pytest
from chain import STEPS, distance, identical, log, stop_after, with_images
from commands import call, call_two_ranks, lines, start, wait_for

from stic_min import InputError


@pytest.mark.parametrize("step, file", [("pairs", "pairs.jsonl"), ("describe", "descriptions.jsonl")])
def test_a_restart_generates_only_what_is_missing(runs, step, file, tmp_path):
    command = [*runs.commands[step], "--out", tmp_path / file]
    whole = (runs.out / file).read_bytes()
    first, _, third, fourth, fifth, *_ = whole.splitlines(keepends=True)
    (tmp_path / file).write_bytes(first + third + fourth[:40])  # the second is lost, the last cut in two
    (tmp_path / f"{file}.part1").write_bytes(fifth + b"{")  # another rank's
    for count in (3, 8):
        assert f"{count} of them already in" in call(*command)
        assert (tmp_path / file).read_bytes() == whole
        assert {f.name for f in tmp_path.iterdir()} == {file, file.replace(".jsonl", ".run.json")}
    with pytest.raises(InputError, match=f"{file} was written with seed 0, but this run has 1"):
        call(*command, "--seed", 1)
    assert (tmp_path / file).read_bytes() == whole


@pytest.mark.parametrize("runs", ["llava-v1.5-tiny"], indirect=True)
def test_stage1_on_two_ranks_survives_a_kill(runs, tmp_path):
    command = [*runs.commands["stage1"], "--batch-size", 1, "--save-every", 2]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    success, _ = call_two_ranks(("kill", 5), [*command, "--out", killed], check=False)
    assert not success
    assert len(log(killed)) == 5 and (killed / "checkpoint-4").is_dir()  # step 5 is logged and lost
    _, printed = call_two_ranks([*command, "--out", killed], [*command, "--out", whole])
    assert "resuming after step 4" in printed and len(log(whole)) == 8
    assert identical(killed, whole) and not list(killed.glob("checkpoint*"))


@pytest.mark.parametrize("runs", ["llava-v1.5-tiny"], indirect=True)
def test_a_run_resumes_in_its_second_epoch(runs, tmp_path):
    command = [*runs.commands["stage1"], "--epochs", 2, "--save-every", 1]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert "6 steps" in call(*command, "--check", "--out", whole)
    call(*command, "--out", whole)
    with stop_after(4), pytest.raises(SystemExit):
        call(*command, "--out", stopped)
    with pytest.raises(InputError, match="belongs to a run with epochs 2, but this run has None"):
        call(*runs.commands["stage1"], "--out", stopped)
    assert "resuming after step 4" in call(*command, "--out", stopped)
    assert identical(stopped, whole) and len(log(whole)) == 2 * STEPS
    rates = [1, *(0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5))]  # one schedule over all steps
    assert [record["lr"] for record in log(whole)] == pytest.approx([1e-3 * rate for rate in rates])
    recorded = [json.loads((folder / "run.json").read_text()) for folder in (whole, runs.out / "stage1")]
    assert recorded[0]["epochs"] == 2 and "epochs" not in recorded[1]  # as in runs from before the flag


@pytest.mark.parametrize("runs", ["llava-v1.6-tiny"], indirect=True)
def test_stage2_survives_a_kill_at_any_moment(runs, tmp_path):
    described = lines(runs.out / "descriptions.jsonl")
    instructions, descriptions = tmp_path / "instructions.json", tmp_path / "descriptions.jsonl"
    copies = lambda records: [r | {"id": f"{r['id']}-{copy}"} for r in records for copy in range(5)]
    instructions.write_text(json.dumps(copies(with_images(runs.tiny))))
    descriptions.write_text("\n".join(map(json.dumps, copies(described))))
    script, *args = [*runs.commands["stage2"], "--instructions", instructions, "--descriptions", descriptions,
                     "--lora-dropout", 0.05, "--batch-size", 1, "--save-every", 1]  # fmt: skip
    killed, whole, plain = tmp_path / "killed", tmp_path / "whole", tmp_path / "plain"
    process = start(script, *args, "--out", killed)
    wait_for(lambda: process.poll() is not None or list(killed.glob("checkpoint-[0-9]*")))
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "adapter_config.json").exists()
    assert "resuming after step" in call(script, *args, "--out", killed)
    call(script, *args, "--out", whole)
    assert identical(killed, whole) and len(log(whole)) == 40
    call(script, *args, "--lora-dropout", 0, "--out", plain)
    assert distance(plain, whole) > 1e-6  # dropout was on


def test_leftovers_of_a_killed_run_are_not_taken_for_results(runs, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("projector.safetensors", "log.jsonl"):
        (tmp_path / "out" / name).write_bytes((runs.out / "stage1" / name).read_bytes())
    call(*runs.commands["stage1"], "--projector-lr", 0, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "projector.safetensors").exists() and len(log(tmp_path / "out")) == STEPS


@pytest.mark.parametrize("runs", ["llava-v1.6-tiny"], indirect=True)
def test_dropout_keeps_the_micro_batch_of_the_checkpoint(runs, tmp_path):
    """The default depends on the GPU's memory, and the masks on the micro-batch."""
    command = [*runs.commands["stage2"], "--lora-dropout", 0.05, "--batch-size", 4, "--save-every", 1]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    call(*command, "--micro-batch", 2, "--out", whole)
    with stop_after(1), pytest.raises(SystemExit):
        call(*command, "--micro-batch", 2, "--out", stopped)
    printed = call(*command, "--out", stopped)
    assert "--micro-batch 2, as before: dropout masks depend on it" in printed and "changed" not in printed
    assert identical(stopped, whole)
