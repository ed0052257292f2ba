"""Runs stopped by a signal, a full disk, a bad sample or a dead rank.

No completed output is lost, one line says what happened, and the same command ends with what an undisturbed run
gives. drill.py does this at random moments.
"""

import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from chain import identical, log, stop_after
from commands import ENV, ROOT, call, call_ranks, call_two_ranks, ended, start, torchrun, wait_for
from forked import Forked

from stic_min import InputError, check, checkpoint, training
from stic_min.loader import load_llava
from stic_min.runtime import process

STOPPED = "stopped after step {}; run the same command to resume"


def after_steps(n, folder):
    file = folder / "log.jsonl"
    return lambda: file.is_file() and len(file.read_text().splitlines()) >= n


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_a_checkpoint_first(stage1, tmp_path, number):
    command = [*stage1.command, "--batch-size", 1, "--out", tmp_path]
    process = start(*command)
    wait_for(after_steps(3, tmp_path))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    step = len(log(tmp_path))
    assert process.returncode == 130 and err.splitlines()[-1] == STOPPED.format(step)
    assert checkpoint.name == f"checkpoint-{step}"
    assert f"resuming after step {step} from {checkpoint}" in call(*command)
    assert identical(tmp_path, stage1.ones)


def test_a_signal_to_torchrun_saves_a_checkpoint_too(stage1, tmp_path):
    command = [*stage1.command, "--batch-size", 4, "--out", tmp_path]
    process = start(*command, ranks=2)
    wait_for(after_steps(2, tmp_path))
    process.terminate()
    _, err = process.communicate(timeout=60)
    step = len(log(tmp_path))
    assert process.returncode != 0 and (tmp_path / f"checkpoint-{step}").is_dir()
    assert STOPPED.format(step) in err and err.count("stopped after") == 1  # one rank prints it
    call(*command)  # on one rank: the same up to the order of summation
    for ours, theirs in zip(log(tmp_path), log(stage1.fours), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_signal_within_a_step_saves_the_step_before(stage1, tmp_path):
    """A global batch may take a minute: ranks stop before the next micro-batch and repeat the step later."""
    command = [*stage1.command, "--batch-size", 4, "--out", tmp_path]
    backward, calls = training.Run.backward, []

    def stopping(run, loss):
        backward(run, loss)
        calls.append(loss)
        if len(calls) == 4 * 3 + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(training.Run, "backward", stopping):
        assert ended(*command) == (130, STOPPED.format(3))
    assert len(calls) == 14 and len(log(tmp_path)) == 3
    call(*command)
    assert identical(tmp_path, stage1.fours)


IMPORTS = ["import os, signal, time", "from stic_min import checkpoint, training",
           "from stic_min.runtime.process import Stop"]  # fmt: skip


def test_a_run_that_hangs_is_ended(stage1, tmp_path):
    """Such as a rank that waits on a GPU for one that has died: it never gets to check for the signal."""
    hang = ["Stop.patience = 1", "training.collate = lambda *_: time.sleep(60)"]
    process = start(*stage1.command, "--out", tmp_path, code=[*IMPORTS, *hang])
    wait_for((tmp_path / ".lock").exists)
    time.sleep(0.5)
    process.terminate()
    _, err = process.communicate(timeout=20)
    last = err.splitlines()[-1]
    assert last == "stopped immediately; run the same command to resume from the last checkpoint"
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_that_also_ended_tee(stage1, tmp_path):
    """`train_stage1.py ... | tee log`: tee is gone while the run still prints."""
    slow = ["backward = training.Run.backward",
            "training.Run.backward = lambda *args: [time.sleep(0.1), backward(*args)]"]  # fmt: skip
    command, pipe = [*stage1.command, "--batch-size", 1, "--out", tmp_path / "out"], tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(*command, code=[*IMPORTS, *slow], stdout=pipe)
    with open(pipe):
        wait_for(after_steps(1, tmp_path / "out"))
    wait_for(after_steps(12, tmp_path / "out"))  # it has printed since
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    step = len(log(tmp_path / "out"))
    assert process.returncode == 130 and STOPPED.format(step) in err and "Traceback" not in err
    call(*command)
    assert identical(tmp_path / "out", stage1.ones)


@pytest.mark.parametrize("when", ["save", "finish"])
def test_a_signal_during_a_write_waits(stage1, tmp_path, when):
    """Saving may take minutes. Neither the end of `patience` nor a second signal interrupts it."""
    name = "checkpoint.save" if when == "save" else "checkpoint.shutil.copyfile"
    slow = ["Stop.patience = 0.1", f"write = {name}", "def slowly(*args):",
            *["    os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.3)"] * 2, f"    {name} = write",
            "    return write(*args)", f"{name} = slowly"]  # fmt: skip
    command = [*stage1.command[:-1], 4, "--batch-size", 4, "--out", tmp_path]  # --save-every 4
    _, err = start(*command, code=[*IMPORTS, *slow]).communicate(timeout=100)
    if when == "save":
        assert err.splitlines()[-1] == STOPPED.format(4) and (tmp_path / "checkpoint-4").is_dir()
        call(*command)
    assert "Traceback" not in err and identical(tmp_path, stage1.fours)


def test_a_closed_pipe_ends_a_command_quietly():
    """`... | head -1`."""
    code = "from stic_min.runtime import process; process.run(lambda: [print(i) for i in range(100000)])"
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, **pipes)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 1


def test_other_signals_are_left_alone():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    with mock.patch.object(process.Stop, "patience", 0), process.Stop() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
    signal.signal(signal.SIGUSR1, before)
    assert len(received) == 3 and stop.signal is None


def test_generation_ends_on_sigterm_as_on_ctrl_c(stage1, tiny, tmp_path):
    model = ["--model", tiny / "llava-v1.5-tiny", "--device", "cpu"]
    sizes = ["--batch-size", 2, "--max-new-tokens", 48]
    command = ["generate_pairs", *model, "--images", tiny / "images", *sizes, "--out"]
    process = start(*command, tmp_path / "out.jsonl")
    wait_for(lambda: (tmp_path / "out.jsonl").is_file())
    for _ in range(5):
        process.terminate()
        time.sleep(0.005)
    err = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130 and err[-1] == "stopped; completed output is kept" and len(err) < 4
    call(*command, tmp_path / "out.jsonl")
    call(*command, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---------------------------------------------------------------- checkpoints


def stopped(stage1, out, step, *flags):
    """A run of 40 steps that saves every second one, killed after `step` -> its command."""
    command = [*stage1.command[:-1], 2, "--batch-size", 1, *flags, "--out", out]  # --save-every 2
    with stop_after(step), pytest.raises(SystemExit):
        call(*command)
    return command


def test_a_checkpoint_is_an_adapter(stage1, tiny, tmp_path):
    stopped(stage1, tmp_path, 7)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    llava = load_llava(tiny / "llava-v1.5-tiny", adapter=tmp_path / "checkpoint-4")
    assert any(p.any() for n, p in llava.named_parameters() if n.endswith("lora_B"))


@pytest.mark.parametrize("keep, steps", [(1, [6]), (3, [2, 4, 6])])
def test_the_newest_checkpoints_are_kept(stage1, tmp_path, keep, steps):
    stopped(stage1, tmp_path, 7, "--keep", keep)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in steps]


@pytest.mark.parametrize("seconds, saved", [(300, []), (0, ["checkpoint-5", "checkpoint-6"])])
def test_checkpoints_are_saved_by_time(stage1, tmp_path, seconds, saved):
    command = [*stage1.command[:-2], "--batch-size", 1, "--out", tmp_path]  # without --save-every
    with mock.patch.object(training, "SAVE_SECONDS", seconds), stop_after(6), pytest.raises(SystemExit):
        call(*command)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved
    call(*command)
    assert identical(tmp_path, stage1.ones)


def test_training_goes_on_while_a_checkpoint_is_written(stage1, tmp_path):
    command = [*stage1.command[:-1], 7, "--batch-size", 1, "--out", tmp_path]  # --save-every 7
    save = checkpoint.save

    def slowly(*args):
        wait_for(after_steps(13, tmp_path))
        save(*args)

    with mock.patch.object(checkpoint, "save", slowly), stop_after(13), pytest.raises(SystemExit):
        call(*command)
    assert "resuming after step 7" in call(*command)  # with the parameters of step 7, not of step 13
    assert identical(tmp_path, stage1.ones)


def test_an_error_in_writing_the_last_checkpoint_ends_the_run(stage1, tmp_path):
    with mock.patch.object(checkpoint, "write_adapter", side_effect=OSError(28, "No space left on device")):
        status, message = ended(*stage1.command, "--batch-size", 20, "--out", tmp_path)
    assert status == 1 and not (tmp_path / "adapter_config.json").exists()
    assert message == (f"error: can't write a checkpoint of step 2 to {tmp_path} ([Errno 28] No space left on "
                       "device); there is no earlier checkpoint")


@pytest.mark.parametrize("n", [1, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_any_number(stage1, tmp_path, n, killed_on_two_ranks):
    shutil.copytree(killed_on_two_ranks, tmp_path / "out")
    call_ranks(n, [*stage1.command, "--batch-size", 4, "--out", tmp_path / "out"])
    assert len(log(tmp_path / "out")) == 10
    for ours, theirs in zip(log(tmp_path / "out"), log(stage1.fours), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def killed_on_two_ranks(stage1, tmp_path_factory):
    """A sharded run on two ranks, killed after 6 of 10 steps."""
    out = tmp_path_factory.mktemp("two") / "out"
    command = [*stage1.command[:-1], 5, "--batch-size", 4, "--out", out]  # --save-every 5
    success, _ = call_two_ranks(("kill", 6), command, check=False)
    assert not success and (out / "checkpoint-5").is_dir()
    return out


def test_a_damaged_checkpoint_is_named(stage1, tmp_path):
    command = stopped(stage1, tmp_path, 7)
    file = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, message = ended(*command)
    assert status == 1 and message.startswith(f"error: can't read {file}: ")
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert "resuming after step 4" in call(*command)
    assert identical(tmp_path, stage1.ones)


def test_two_runs_do_not_share_a_folder(stage1, tmp_path):
    process = start(*stage1.command, "--batch-size", 1, "--out", tmp_path)
    wait_for(after_steps(1, tmp_path))
    process.send_signal(signal.SIGSTOP)
    status, message = ended(*stage1.command, "--batch-size", 1, "--out", tmp_path)
    process.send_signal(signal.SIGCONT)
    assert status == 1
    assert message == f"error: another run is writing to {tmp_path}; wait for it, or choose another --out"
    assert process.wait(timeout=60) == 0 and identical(tmp_path, stage1.ones)


def test_a_run_that_has_finished_meanwhile_is_not_overwritten(stage1, tmp_path):
    """The second run checks the folder while the first still runs, and starts to write when that is done."""
    command = [*stage1.command, "--batch-size", 4, "--out", tmp_path]
    verify_images = check.verify_images

    def meanwhile(*args):
        check.verify_images = verify_images
        call(*command)

    with mock.patch.object(check, "verify_images", meanwhile):
        status, message = ended(*command)
    assert status == 1
    assert message == f"error: {tmp_path} holds a finished run; choose another --out, or delete the folder"
    assert identical(tmp_path, stage1.fours) and not (tmp_path / ".lock").exists()


def test_a_finished_run_leaves_no_checkpoints(stage1, tmp_path):
    stopped(stage1, tmp_path, 7)
    (tmp_path / "checkpoint.new").mkdir()
    call(*stage1.command, "--batch-size", 1, "--out", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in stage1.ones.iterdir())


# ---------------------------------------------------------------- errors during a run


def test_a_nan_loss_lists_the_samples_of_the_batch(stage1, tmp_path):
    import train_stage1

    stic_loss, calls = train_stage1.stic_loss, []

    def nan_in_step_5(*args):
        calls.append(args)
        return stic_loss(*args) * (math.nan if len(calls) == 9 else 1)

    command = [*stage1.command, "--batch-size", 2, "--out", tmp_path]
    with mock.patch.object(train_stage1, "stic_loss", nan_in_step_5):
        status, message = ended(*command)
    assert status == 1
    assert message.startswith("error: step 5: the loss is nan and the gradient norm is nan; --lr may be")
    assert message.count(f"{stage1.folder}/pairs.jsonl, line ") == 2
    assert (tmp_path / "checkpoint-4").is_dir() and len(log(tmp_path)) == 4
    assert "resuming after step 4" in call(*command) and len(log(tmp_path)) == 20


def run_on_a_full_disk(command, size):
    """No file may grow beyond `size` bytes -> (exit status, last line on stderr)."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    process = start(*command, code=["import resource", limit])
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, err.splitlines()[-1]


def test_a_full_disk_leaves_the_last_checkpoint_intact(stage1, tmp_path):
    command = stopped(stage1, tmp_path, 7)
    size = (tmp_path / "checkpoint-6" / "adapter_model.safetensors").stat().st_size + 1000
    status, message = run_on_a_full_disk(command, size)
    assert status == 1 and message.startswith(f"error: can't write a checkpoint of step 8 to {tmp_path} (")
    assert message.endswith(f"{tmp_path}/checkpoint-6 is complete; run the same command to resume from it")
    assert not (tmp_path / "checkpoint.new").exists()  # it would keep the disk full
    assert "resuming after step 6" in call(*command) and identical(tmp_path, stage1.ones)


def test_a_full_disk_while_generating(tiny, tmp_path):
    model = ["--model", tiny / "llava-v1.5-tiny", "--device", "cpu"]
    command = ["generate_pairs", *model, "--images", tiny / "images", "--max-new-tokens", 16, "--out"]
    status, message = run_on_a_full_disk([*command, tmp_path / "out.jsonl"], 5000)
    assert status == 1
    out = tmp_path / "out.jsonl"
    assert message == f"error: can't write to {out}: File too large; its existing content is kept"
    assert (tmp_path / "out.jsonl").read_text().count("\n") >= 1
    call(*command, tmp_path / "out.jsonl")
    call(*command, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 GiB")])
def test_out_of_memory_suggests_what_to_lower(stage1, tmp_path, error):
    with mock.patch.object(training.Run, "backward", side_effect=error):
        status, message = ended(*stage1.command, "--out", tmp_path)
    assert status == 1 and message.startswith("error: out of memory (") and "--micro-batch" in message


def test_an_error_of_all_ranks_is_printed_once(stage1, tmp_path):
    process = start(*stage1.command, "--pairs", tmp_path / "none.jsonl", "--out", tmp_path / "out", ranks=2)
    err = process.communicate(timeout=60)[1].splitlines()
    assert err.count(f"error: can't read {tmp_path}/none.jsonl: No such file or directory") == 1
    ours = "train_stage1.py\", line", "runtime/process.py"
    assert not any(name in line for line in err for name in ours)  # torchrun's own traceback only


@pytest.mark.parametrize("error, message", [
    ("stic_min.InputError('sample 7 is bad')", "error: sample 7 is bad"),
    ("ValueError('a bug')", "ValueError: a bug")])
def test_a_failing_rank_ends_the_others_and_its_message_is_printed(stage1, tmp_path, error, message):
    script, *args = map(str, [*stage1.command, "--batch-size", 4, "--out", tmp_path])
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(f"""
import runpy, sys, stic_min
from stic_min import training
micro_batches = training.Run.micro_batches
def fail(run):
    if run.ranks.rank == 1 and run.step == 1:
        raise {error}
    return micro_batches(run)
training.Run.micro_batches = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    begin = time.monotonic()
    process = Forked([*torchrun(2)[1:], wrapper, ROOT / f"{script}.py", *args], ROOT, ENV)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    # torchrun's own traceback comes after ours; the other rank prints one line at most.
    ours = err[: err.find("Process ForkServerProcess")].splitlines()
    assert any(line.endswith(message) for line in ours), err
    assert sum("Traceback" in line for line in ours) <= (2 if "bug" in message else 1)


# ---------------------------------------------------------------- trust


def test_no_code_of_a_checkpoint_runs(tiny, tmp_path):
    """Neither the code that a config.json names, nor what a pickle would call."""
    folder, evidence = tmp_path / "model", tmp_path / "evidence"
    shutil.copytree(tiny / "llava-v1.5-tiny", folder)
    shutil.copytree(tiny / "clip-tiny", tmp_path / "clip-tiny")
    (folder / "modeling_llava.py").write_text(f"open({str(evidence)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llava.LlavaLlamaForCausalLM"}
    config["trust_remote_code"] = True
    (folder / "config.json").write_text(json.dumps(config))
    load_llava(folder)

    class Evil:
        def __reduce__(self):
            return open, (str(evidence), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="can't read .*pytorch_model.bin"):
        load_llava(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    torch.save({"a": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="can't read .*adapter_model.bin"):
        load_llava(tiny / "llava-v1.5-tiny", adapter=adapter)
    assert not evidence.exists()


@pytest.mark.parametrize("name", ["batch", "cache", "clip", "llava", "loss", "mistral", "sampler", "slots"])
def test_model_loss_and_sampler_catch_no_exceptions(name):
    """Only readers validate. What gets past them and fails is a bug, and must be seen."""
    tree = ast.parse((ROOT / "stic_min" / f"{name}.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
