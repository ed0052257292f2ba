"""The page of a training run: finished, stopped, running, damaged; and that it never fails the run."""

import json
import math
import os
import shutil
import signal
import time
from unittest import mock

import pytest
from chain import STEPS, stop_after
from commands import call, lines, run
from pages import Page

from stic_min import InputError
from stic_min import training as core
from stic_min.report import curves, record, svg, training
from stic_min.report.options import Options, recorded_folder
from stic_min.report.page import page_of
from stic_min.runtime import provenance

CHARTS = {1: 9, 2: 5}


@pytest.fixture(scope="module")
def chain15(chains):
    return chains("llava-v1.5-tiny")


@pytest.fixture
def stage1(chain15, tmp_path):
    """A command that trains for eight steps and saves every third, and its folder."""
    script, *args = chain15.commands["stage1"]
    return [script, *args, "--batch-size", 1, "--save-every", 3, "--out", tmp_path / "run"], tmp_path / "run"


def copy(chain15, tmp_path, stage="stage1"):
    """A finished run to damage."""
    return shutil.copytree(chain15.out / stage, tmp_path / "copy")


def change(folder, edit, name="run.json"):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def write_log(folder, records):
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


# ---------------------------------------------------------------- finished


@pytest.mark.parametrize("stage", [1, 2])
def test_training_ends_with_its_page(chain15, stage):
    folder = chain15.out / f"stage{stage}"
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert f"Stage {stage}, " in page.text and f"Finished: {STEPS} steps." in page.text
    assert len(page.all("svg")) == CHARTS[stage] and all(chart["aria-label"] for chart in page.all("svg"))
    assert not page.all("script") and not page.all("link") and not page.all("img")  # nothing to fetch or to run
    what = {1: "8 pairs; 0 truncated to 1024 tokens; 0 with identical responses",
            2: "8 conversations; 0 truncated to 2048 tokens."}  # fmt: skip
    assert what[stage] in page.text
    assert "report.html" in chain15.printed[f"stage{stage}"].splitlines()[-1]
    page = page_of(training.section(folder, Options()), training.STYLE)
    assert page == (folder / "report.html").read_text(encoding="utf-8")


def test_values_settings_and_provenance_are_in_the_page(chain15):
    text = Page(training.section(chain15.out / "stage1")).text
    log = lines(chain15.out / "stage1" / "log.jsonl")
    for name in ("loss", "margin", "logp_chosen"):
        assert f" {training.short(log[0][name])} {training.short(log[-1][name])} " in text
    assert "DPO term 0.6931 " in text  # ln 2
    saved = json.loads((chain15.out / "stage1" / "run.json").read_text())
    assert "samples per step 3" in text and "α 1/1024" in text and "LoRA rank 4" in text
    assert f"SHA-256 of the pairs {saved['pairs'][:12]}…" in text and saved["pairs"] not in text
    assert saved["record"]["hardware"] in text and f"torch {saved['record']['versions']['torch']}" in text
    assert "python train_stage1 --model " in text


def test_the_script_is_named_without_its_folder_and_text_is_escaped(chain15, tmp_path):
    folder = copy(chain15, tmp_path)

    def edit(run):
        run["record"]["command"] = "/home/someone/code/train_stage1.py --pairs '<script>alert(1)</script>'"
        run["record"]["ranks"] = 4
        run["template"] = run["record"]["hardware"] = "<script>alert(2)</script>"

    change(folder, edit)
    page = Page(training.section(folder))
    assert not page.all("script") and "someone" not in page.text and str(tmp_path) not in page.text
    assert "torchrun --nproc_per_node=4 train_stage1.py --pairs '<script>alert(1)</script>'" in page.text


def test_what_the_texts_say_is_what_training_does():
    assert curves.CLIP_NORM == core.CLIP_NORM and core.WARMUP == 0.03


def test_equal_pairs_bound_the_dpo_term(chain15, tmp_path):
    folder = copy(chain15, tmp_path)
    change(folder, lambda run: run["record"].update(samples=8, equal=4))
    assert f"can't fall below {math.log(2) / 2:.2f}" in training.section(folder)
    assert "can't fall" not in training.section(chain15.out / "stage1")


# ---------------------------------------------------------------- stopped, running


def test_a_stopped_run(stage1):
    command, folder = stage1

    def end_and_stop(run, norm, end_step=core.Run.end_step):
        end_step(run, norm)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # Stop handles it: a checkpoint within the next step

    with mock.patch.object(core.Run, "end_step", end_and_stop), pytest.raises(KeyboardInterrupt):
        call(*command)
    text = Page(training.section(folder)).text
    assert "Stopped after step 4 of 8. Last step logged: 20" in text
    assert "The same command resumes from checkpoint-4." in text and "samples per step 1" in text
    assert "resuming after step 4" in call(*command)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "Finished: 8 steps." in text and " in 2 parts" in text


def test_a_killed_run_and_its_last_line(stage1):
    command, folder = stage1
    with stop_after(2), pytest.raises(SystemExit):
        call(*command)
    (folder / ".lock").touch()  # a kill leaves it there
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0.')
    page = Page(training.section(folder))
    assert "Stopped after step 2." in page.text and "There is no checkpoint to resume from." in page.text
    assert "Settings are recorded with the first checkpoint" in page.text
    assert "Command, commit, versions and hardware were not recorded." in page.text
    assert "How many samples were truncated was not recorded." in page.text
    assert len(page.all("svg")) == CHARTS[1]


def test_a_running_run(stage1):
    command, folder = stage1
    texts = []

    def end_and_look(run, norm, end_step=core.Run.end_step):
        end_step(run, norm)
        texts.append(Page(training.write(folder, Options()).read_text(encoding="utf-8")).text)

    with mock.patch.object(core.Run, "end_step", end_and_look):
        call(*command)
    assert "Running: step 1, about " in texts[0] and "Settings are recorded with the first" in texts[0]
    assert "Running: step 7 of 8, about " in texts[6] and " at least " not in texts[6]
    assert "Finished: 8 steps." in (folder / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- damaged


def test_nan_and_infinity_are_left_out_of_the_curves(chain15, tmp_path):
    folder = copy(chain15, tmp_path)
    log = lines(folder / "log.jsonl")
    log[1] |= {"loss": math.nan, "margin": math.inf}
    for step in log:
        step["accuracy"] = -math.inf
    write_log(folder, log)
    section = training.section(folder)
    assert "1 values are NaN or infinite and left out." in section and "-inf" in section
    assert len(Page(section).all("svg")) == CHARTS[1] - 1
    charts = section[section.index("<svg") : section.rindex("</svg>")]
    assert "nan" not in charts and "inf" not in charts.replace("infinite", "")


def test_huge_numbers_are_left_out_of_the_curves(chain15, tmp_path):
    folder = copy(chain15, tmp_path)
    log = lines(folder / "log.jsonl")
    log[0] |= {"loss": 1.7e308, "margin": -1.7e308}
    log[1] |= {"loss": -1.7e308}
    write_log(folder, log)
    assert "2 values are NaN or infinite and left out." in training.section(folder)


@pytest.mark.parametrize("line", [
    "[1]", '{"loss": 1.0}', '{"step": 1, "loss": "low"}', "{", '{"step": 1.5}',
    f'{{"step": {10**400}}}', f'{{"step": 1, "loss": {10**400}}}',
])  # fmt: skip
def test_a_damaged_line_is_an_error(chain15, tmp_path, line):
    folder = copy(chain15, tmp_path)
    with open(folder / "log.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=f"log.jsonl, line {STEPS + 1}: not a line written by this command"):
        training.section(folder)


def test_what_is_missing_is_said(chain15, tmp_path):
    folder = copy(chain15, tmp_path)
    log = [{"step": step["step"], "loss": step["loss"], "dpo": step["dpo"]} for step in lines(folder / "log.jsonl")]
    write_log(folder, log)
    change(folder, lambda run: run.pop("record"))
    page = Page(training.section(folder))
    assert len(page.all("svg")) == 1 and "No data in log.jsonl." in page.text
    assert "Not in log.jsonl: α·NLL term." in page.text
    (folder / "log.jsonl").unlink()
    assert "No curves: log.jsonl is missing" in training.section(folder)
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match="copy: no training run"):
        training.section(folder)


@pytest.mark.parametrize("damage", [{"record": [1]}, {"record": {"command": 3, "versions": [], "wall_seconds": "long"}},
                                    {"record": {"command": "'", "ranks": None}}, {"lr": {"a": [None]}}])  # fmt: skip
def test_a_strange_record_is_shown_as_far_as_it_goes(chain15, tmp_path, damage):
    folder = copy(chain15, tmp_path)
    change(folder, lambda run: run.update(damage))
    assert "Command and machine" in Page(training.section(folder)).text


def test_a_page_that_can_not_be_written_does_not_fail_the_run(stage1, capsys, monkeypatch):
    command, folder = stage1

    def fail(path):
        raise ZeroDivisionError("no page\ntoday")

    monkeypatch.setattr(training, "write", fail)
    call(*command)
    assert "warning: no report.html: no page\n" in capsys.readouterr().err
    assert (folder / "adapter_config.json").is_file() and not (folder / "report.html").exists()


# ---------------------------------------------------------------- long runs, small parts


def test_a_long_run_is_quick_and_small(chain15, tmp_path):
    folder = copy(chain15, tmp_path)
    step = lines(folder / "log.jsonl")[-1]
    write_log(folder, [step | {"step": i + 1, "loss": math.sin(i) + (5 if i == 7777 else 0)} for i in range(20000)])
    begin = time.monotonic()
    page = training.write(folder)
    assert time.monotonic() - begin < 3 and page.stat().st_size < 2e6
    kept = curves.thin([(i, math.sin(i) + (5 if i == 7777 else 0)) for i in range(20000)])
    assert len(kept) <= curves.MOST_POINTS and 7777 in dict(kept)  # the peak is not lost
    assert kept == sorted(kept) and curves.thin([(1, 2.0)] * 2000) == [(1, 2.0)] * 2000


def test_the_running_mean():
    assert svg.running_mean([1.0, 4.0, 1.0, 0.0], 3) == [2.5, 2.0, 5 / 3, 0.5]
    assert svg.running_mean([1.0, 2.0], 1) == [1.0, 2.0]
    chart = svg.line_chart("t", {"a": [(1, 0.0), (2, 1.0)], "b": [(1, 3.0)]}, smooth=3, levels={"limit": 2.0})
    page = Page(chart)
    assert [c["class"] for c in page.all("polyline")][-3:] == ["line level dashed", "line c0 faint", "line c0"]
    assert "a from 0 to 1; b from 3 to 3" in page.text and "limit" in page.text


def test_durations():
    assert [record.duration(s) for s in (0.04, 59.9, 60, 100.4, 3599.6, 10000)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "1 min 40 s", "1 h 0 min", "2 h 46 min"]  # fmt: skip


def test_recorded_folders():
    run = {"record": {"command": "generate_pairs.py --images 'my photos' --data=a --data b --out"}}
    assert str(recorded_folder(run, "--images")) == "my photos"
    assert str(recorded_folder(run["record"], "--data")) == "b"
    assert all(recorded_folder(run, flag) is None for flag in ("--out", "--adapter"))
    for command in (None, 3, "'", ""):
        assert recorded_folder({"record": {"command": command}}, "--images") is None
    assert recorded_folder({"record": [1]}, "--images") is None and recorded_folder({}, "--images") is None


def test_pages_do_without_torch():
    names = "__main__, options, page, record, recipe, steps, svg, training"
    run("-c", f"import sys; from stic_min.report import {names}; assert 'torch' not in sys.modules")
    assert "torch" in provenance.PACKAGES  # its version is recorded all the same
