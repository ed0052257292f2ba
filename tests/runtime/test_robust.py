"""Runs that are stopped, by a signal, a full disk, a sample that is off or a rank that dies: nothing finished is lost,
one line says what happened, and the same command gives what it would have given. `drill.py` does it at random."""

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

from stic_min import InputError, check, training
from stic_min.loader import load_llava
from stic_min.runtime import process

SAID = "stopped after step {}; the same command goes on from there"


def after_steps(n, folder):
    file = folder / "log.jsonl"
    return lambda: file.is_file() and len(file.read_text().splitlines()) >= n


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_a_checkpoint_first(made, tmp_path, number):
    command = [*made.command, "--batch-size", 1, "--out", tmp_path]
    process = start(*command)
    wait_for(after_steps(3, tmp_path))
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()
    [checkpoint] = tmp_path.glob("checkpoint-*")
    step = len(log(tmp_path))
    assert process.returncode == 130 and said[-1] == SAID.format(step) and checkpoint.name == f"checkpoint-{step}"
    assert f"resuming after step {step} from {checkpoint}" in call(*command)
    assert identical(tmp_path, made.whole)


def test_a_signal_to_torchrun_does_too(made, tmp_path):
    command = [*made.command, "--batch-size", 4, "--out", tmp_path]
    process = start(*command, ranks=2)
    wait_for(after_steps(2, tmp_path))
    process.terminate()
    said = process.communicate(timeout=60)[1]
    step = len(log(tmp_path))
    assert process.returncode != 0 and SAID.format(step) in said and (tmp_path / f"checkpoint-{step}").is_dir()
    assert said.count("stopped after") == 1  # one rank speaks for all
    call(*command)  # on one rank: the same but for the order of sums
    for ours, theirs in zip(log(tmp_path), log(made.fours), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_within_a_step_the_last_one_is_saved(made, tmp_path):
    """A global batch may take a minute: all leave before the next micro-batch, and the step is done again later."""
    command = [*made.command, "--batch-size", 4, "--out", tmp_path]
    backward, calls = training.Run.backward, []

    def stopping(run, loss):
        backward(run, loss)
        calls.append(loss)
        if len(calls) == 4 * 3 + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(training.Run, "backward", stopping):
        assert ended(*command) == (130, SAID.format(3))
    assert len(calls) == 14 and len(log(tmp_path)) == 3
    call(*command)
    assert identical(tmp_path, made.fours)


IMPORTS = ["import os, signal, sys, time", "from stic_min import checkpoint, training",
           "from stic_min.runtime.process import Stop"]  # fmt: skip


def test_a_run_that_hangs_is_ended(made, tmp_path):
    """As one whose other rank has died on a GPU: it never comes to look at the signal."""
    hang = ["Stop.patience = 1", "training.Run.collate = lambda *_: time.sleep(60)"]
    process = start(*made.command, "--out", tmp_path, code=[*IMPORTS, *hang])
    wait_for((tmp_path / ".lock").exists)
    time.sleep(0.5)
    process.terminate()
    said = process.communicate(timeout=20)[1].splitlines()[-1]
    assert said == "stopped immediately; run the same command to resume from the last checkpoint"
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_also_ends_the_tee_behind_a_pipe(made, tmp_path):
    """`train_stage1.py ... | tee log`: nobody reads any more when the run says what it does."""
    slow = ["backward = training.Run.backward",
            "training.Run.backward = lambda *args: [time.sleep(0.1), backward(*args)]"]  # fmt: skip
    command, pipe = [*made.command, "--batch-size", 1, "--out", tmp_path / "out"], tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(*command, code=[*IMPORTS, *slow], stdout=pipe)
    with open(pipe):
        wait_for(after_steps(1, tmp_path / "out"))
    wait_for(after_steps(12, tmp_path / "out"))  # a line was due
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    step = len(log(tmp_path / "out"))
    assert process.returncode == 130 and SAID.format(step) in said and "Traceback" not in said
    call(*command)
    assert identical(tmp_path / "out", made.whole)


@pytest.mark.parametrize("when", ["save", "finish"])
def test_a_signal_while_it_writes_waits(made, tmp_path, when):
    """Saving may take minutes: neither patience nor a second signal end it."""
    name = "checkpoint.save" if when == "save" else "training.shutil.copyfile"
    slow = ["Stop.patience = 0.1", f"write = {name}", "def slowly(*args):",
            *["    os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.3)"] * 2, f"    {name} = write",
            "    return write(*args)", f"{name} = slowly"]  # fmt: skip
    command = [*made.command[:-1], 4, "--batch-size", 4, "--out", tmp_path]  # --save-every 4
    _, said = start(*command, code=[*IMPORTS, *slow]).communicate(timeout=100)
    if when == "save":
        assert said.splitlines()[-1] == SAID.format(4) and (tmp_path / "checkpoint-4").is_dir()
        call(*command)
    assert "Traceback" not in said and identical(tmp_path, made.fours)


def test_a_reader_that_has_seen_enough(tmp_path):
    """`... | head -1`."""
    code = "from stic_min.runtime import process; process.run(lambda: [print(i) for i in range(100000)])"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 1


def test_other_signals_are_none_of_its_business():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    with mock.patch.object(process.Stop, "patience", 0), process.Stop() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
    signal.signal(signal.SIGUSR1, before)
    assert len(heard) == 3 and stop.signal is None


def test_generation_ends_on_sigterm_as_on_ctrl_c(made, tiny, tmp_path):
    command = ["generate_pairs", "--model", tiny / "llava-v1.5-tiny", "--images", tiny / "images", "--device", "cpu",
               "--batch-size", 2, "--max-new-tokens", 48, "--out"]  # fmt: skip
    process = start(*command, tmp_path / "out.jsonl")
    wait_for(lambda: (tmp_path / "out.jsonl").is_file())
    for _ in range(5):  # an impatient one
        process.terminate()
        time.sleep(0.005)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130 and said[-1] == "stopped; completed output is kept" and len(said) < 4
    call(*command, tmp_path / "out.jsonl")
    call(*command, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---------------------------------------------------------------- checkpoints


def stopped(made, out, step, *flags):
    command = [*made.command[:-1], 2, "--batch-size", 1, *flags, "--out", out]  # --save-every 2
    with stop_after(step), pytest.raises(SystemExit):
        call(*command)
    return command


def test_a_checkpoint_is_an_adapter(made, tiny, tmp_path):
    stopped(made, tmp_path, 7)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    llava = load_llava(tiny / "llava-v1.5-tiny", adapter=tmp_path / "checkpoint-4")
    assert any(p.any() for n, p in llava.named_parameters() if n.endswith("lora_B"))


@pytest.mark.parametrize("keep, left", [(1, [6]), (3, [2, 4, 6])])
def test_how_many_checkpoints_are_kept(made, tmp_path, keep, left):
    stopped(made, tmp_path, 7, "--keep", keep)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in left]


@pytest.mark.parametrize("n", [1, 4])
def test_a_checkpoint_of_two_ranks_goes_on_with_any_number(made, tmp_path, n, of_two_ranks):
    shutil.copytree(of_two_ranks, tmp_path / "out")
    call_ranks(n, [*made.command, "--batch-size", 4, "--out", tmp_path / "out"])
    assert len(log(tmp_path / "out")) == 10
    for ours, theirs in zip(log(tmp_path / "out"), log(made.fours), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def of_two_ranks(made, tmp_path_factory):
    """Killed in the middle of stage 1, on two ranks, sharded."""
    out = tmp_path_factory.mktemp("two") / "out"
    success, _ = call_two_ranks(("kill", 6), [*made.command[:-1], 5, "--batch-size", 4, "--out", out], check=False)
    assert not success and (out / "checkpoint-5").is_dir()
    return out


def test_a_damaged_checkpoint_is_named(made, tmp_path):
    command = stopped(made, tmp_path, 7)
    file = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, said = ended(*command)
    assert status == 1 and said.startswith(f"error: can't read {file}: ")
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert "resuming after step 4" in call(*command)
    assert identical(tmp_path, made.whole)


def test_two_runs_do_not_share_a_folder(made, tmp_path):
    process = start(*made.command, "--batch-size", 1, "--out", tmp_path)
    wait_for(after_steps(1, tmp_path))
    process.send_signal(signal.SIGSTOP)
    status, said = ended(*made.command, "--batch-size", 1, "--out", tmp_path)
    process.send_signal(signal.SIGCONT)
    assert (status, said) == (1, f"error: another run is writing to {tmp_path}; wait for it, or choose another --out")
    assert process.communicate(timeout=60) and process.returncode == 0 and identical(tmp_path, made.whole)


def test_a_run_that_ended_meanwhile_is_not_touched(made, tmp_path):
    """The second looked at the folder when the first was under way, and comes to write when it is done."""
    command = [*made.command, "--batch-size", 4, "--out", tmp_path]
    pictures = check.pictures

    def meanwhile(*args):
        check.pictures = pictures
        call(*command)

    with mock.patch.object(check, "pictures", meanwhile):
        status, said = ended(*command)
    assert (status, said) == (1, f"error: {tmp_path} holds a finished run; name another --out, or delete it")
    assert identical(tmp_path, made.fours) and not (tmp_path / ".lock").exists()


def test_nothing_of_a_stopped_run_stays_in_a_finished_one(made, tmp_path):
    stopped(made, tmp_path, 7)
    (tmp_path / "checkpoint.new").mkdir()
    call(*made.command, "--batch-size", 1, "--out", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in made.whole.iterdir())


# ---------------------------------------------------------------- what goes wrong meanwhile


def test_a_loss_that_is_no_number_names_the_batch(made, tmp_path):
    import train_stage1

    losses, calls = train_stage1.stic_loss, []

    def off(*args):
        calls.append(args)
        return losses(*args) * (math.nan if len(calls) == 9 else 1)

    command = [*made.command, "--batch-size", 2, "--out", tmp_path]
    with mock.patch.object(train_stage1, "stic_loss", off):
        status, said = ended(*command)
    assert status == 1 and said.startswith("error: step 5: the loss is nan and the gradient nan; --lr may be too high")
    assert said.count(f"{made.folder}/pairs.jsonl, line ") == 2  # the samples of that batch
    assert (tmp_path / "checkpoint-4").is_dir() and len(log(tmp_path)) == 4
    assert "resuming after step 4" in call(*command) and len(log(tmp_path)) == 20


def limited(command, size):
    """Runs it where no file may grow beyond `size` bytes, as on a full disk."""
    process = start(*command, code=["import resource", f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"])
    said = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, said[-1], [line for line in said if "Traceback" in line]


def test_a_full_disk_leaves_the_last_checkpoint_whole(made, tmp_path):
    command = stopped(made, tmp_path, 7)
    size = (tmp_path / "checkpoint-6" / "adapter_model.safetensors").stat().st_size + 1000
    status, said, traces = limited(command, size)
    assert status == 1 and said.startswith(f"error: can't write a checkpoint of step 8 to {tmp_path} (") and not traces
    assert said.endswith(f"{tmp_path}/checkpoint-6 is whole, and the same command goes on from there")
    assert not (tmp_path / "checkpoint.new").exists()  # it would keep the disk full
    assert "resuming after step 6" in call(*command) and identical(tmp_path, made.whole)


def test_a_full_disk_while_generating(tiny, tmp_path):
    command = ["generate_pairs", "--model", tiny / "llava-v1.5-tiny", "--images", tiny / "images", "--device", "cpu",
               "--max-new-tokens", 16, "--out"]  # fmt: skip
    status, said, traces = limited([*command, tmp_path / "out.jsonl"], 5000)
    assert said == f"error: can't write to {tmp_path}/out.jsonl: File too large; its existing content is kept"
    assert status == 1 and not traces
    assert (tmp_path / "out.jsonl").read_text().count("\n") >= 1
    call(*command, tmp_path / "out.jsonl")
    call(*command, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 GiB")])
def test_out_of_memory_says_what_to_lower(made, tmp_path, error):
    with mock.patch.object(training.Run, "backward", side_effect=error):
        status, said = ended(*made.command, "--out", tmp_path)
    assert status == 1 and said.startswith("error: out of memory (") and "--micro-batch" in said and "\n" not in said


def test_what_all_ranks_find_wrong_is_said_once(made, tmp_path):
    process = start(*made.command, "--pairs", tmp_path / "none.jsonl", "--out", tmp_path / "out", ranks=2)
    said = process.communicate(timeout=60)[1].splitlines()
    assert sum(line == f"error: can't read {tmp_path}/none.jsonl: No such file or directory" for line in said) == 1
    assert not any("train_stage1.py\", line" in line or "runtime/process.py" in line for line in said)  # of no trace of ours


@pytest.mark.parametrize("fails, says", [
    ("stic_min.InputError('sample 7 is off')", "error: sample 7 is off"), ("ValueError('a bug')", "ValueError: a bug")])
def test_a_rank_that_fails_takes_the_others_down_with_its_own_message(made, tmp_path, fails, says):
    script, *args = map(str, [*made.command, "--batch-size", 4, "--out", tmp_path])
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(f"""
import runpy, sys, stic_min
from stic_min import training
collate = training.Run.collate
def fail(run, indices):
    if run.ranks.rank == 1 and run.tokens == 0 and run.sums == {{}} and (run.out / "log.jsonl").is_file():
        raise {fails}
    return collate(run, indices)
training.Run.collate = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    begin = time.monotonic()
    command = [sys.executable, *torchrun(2), wrapper, ROOT / f"{script}.py", *args]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and time.monotonic() - begin < 60
    # torchrun's own report begins behind ours; of the other rank there is one line at most.
    ours = done.stderr[: done.stderr.find("torch/distributed/elastic")].splitlines()
    assert any(line.endswith(says) for line in ours), done.stderr
    assert sum("Traceback" in line for line in ours) <= (2 if "bug" in says else 1)


# ---------------------------------------------------------------- trust


def test_no_code_of_a_checkpoint_runs(tiny, tmp_path):
    """Neither what a config.json names, nor what a pickle asks for."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny / "llava-v1.5-tiny", folder)
    shutil.copytree(tiny / "clip-tiny", tmp_path / "clip-tiny")
    (folder / "modeling_llava.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_llava.LlavaLlamaForCausalLM"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config))
    load_llava(folder)

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

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
    assert not ran.exists()


@pytest.mark.parametrize("name", ["clip", "mistral", "llava", "loss", "sampler"])
def test_model_loss_and_sampler_catch_nothing(name):
    """Only readers validate; what gets past them and fails is a bug, to be seen."""
    tree = ast.parse((ROOT / "stic_min" / f"{name}.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
