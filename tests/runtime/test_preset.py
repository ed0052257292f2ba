"""--preset released, end to end: what it switches, records and prints, which flags win, and which mixtures are
errors. README's table of differences against the comments in the code."""

import importlib
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from chain import chain, log, stop_after
from commands import ROOT, call, call_two_ranks, ended, lines

from stic_min import data
from stic_min.loader import load_llava
from stic_min.runtime import preset
from stic_min.samples import pair_sample
from stic_min.text import CAPTION_PROMPTS

PRESET = ["--preset", "released"]
STEPS = ["pairs", "stage1", "describe", "stage2", "direct", "dar"]


@pytest.fixture(scope="module")
def released(tiny, tmp_path_factory):
    """The chain of v1.6's tiny checkpoint with the preset: `out`, `printed`, and `commands` with the preset."""
    out = tmp_path_factory.mktemp("released")
    commands = {step: [*command, *PRESET] for step, command in chain("llava-v1.6-tiny", tiny, out).items()}
    printed = {step: call(*commands[step]) for step in STEPS}
    return SimpleNamespace(out=out, tiny=tiny, printed=printed, commands=commands, model=tiny / "llava-v1.6-tiny")


@pytest.fixture(scope="module")
def plain(chains):
    """The same without the preset."""
    return chains("llava-v1.6-tiny")


def changed(command, **values):
    """The command with other values of some flags."""
    command = [*command]
    for name, value in values.items():
        command[command.index(f"--{name}") + 1] = value
    return command


def without_preset(command):
    return command[: -len(PRESET)]


# ---------------------------------------------------------------- what it does


def test_what_it_switched_is_printed(released):
    switched = {
        "pairs": "--no-corruption (C), --top-k 50 (Q)",
        "stage1": "--rejected-score argmax (A), --template vicuna_v1 (F), --projector-lr 0 (H)",
        "describe": "--top-k 50 (Q)",
        "stage2": "--template vicuna_v1 (F), --projector-lr 0 (H)",
        "direct": "--template vicuna_v1 (F)",
        "dar": "--blind (E), --template vicuna_v1 (F)",
    }
    for step in STEPS:
        assert released.printed[step].splitlines()[0] == f"--preset released: {switched[step]}"
        assert released.printed[step].count("--preset") == 1


def test_it_is_recorded(released):
    out, sampled = released.out, {"preset": "released", "top_k": 50, "template": "mistral_instruct"}
    assert all(record.items() >= (sampled | {"no_corruption": True}).items() for record in lines(out / "pairs.jsonl"))
    for record in lines(out / "descriptions.jsonl"):
        assert record.items() >= sampled.items() and "no_corruption" not in record
    trained = {"preset": "released", "template": "vicuna_v1", "projector_lr": 0}
    stage1, stage2 = (json.loads((out / stage / "run.json").read_text()) for stage in ("stage1", "stage2"))
    assert stage1.items() >= (trained | {"rejected_score": "argmax"}).items()
    assert stage2.items() >= trained.items() and "rejected_score" not in stage2
    for stem in ("direct", "blind-dar"):
        answers = lines(out / "results" / f"scienceqa-stage2-{stem}.jsonl")
        run = json.loads((out / "results" / f"scienceqa-stage2-{stem}.scores.json").read_text())["run"]
        for record in (*answers, run):
            assert (record["preset"], record["template"]) == ("released", "vicuna_v1") and "top_k" not in record
    [description] = lines(out / "results" / "scienceqa-stage2-blind-dar.descriptions.jsonl")
    assert (description["image"], description["preset"]) == ("", "released")
    assert "| released |" in call("evaluate", "table", out / "results")


def test_without_it_nothing_is_recorded(plain):
    files = [plain.out / "pairs.jsonl", plain.out / "descriptions.jsonl", *(plain.out / "results").glob("*.jsonl")]
    records = [record for file in files for record in lines(file)]
    records += [json.loads((plain.out / stage / "run.json").read_text()) for stage in ("stage1", "stage2")]
    assert records and not any(record.keys() & {*preset.RECORDED} for record in records)
    assert not any("preset" in text for text in plain.printed.values())


def test_pairs_are_the_authors_records(released, plain):
    """The shared fields, byte for byte as json.dumps writes the dictionary of their script."""
    for record, ours in zip(lines(released.out / "pairs.jsonl"), lines(plain.out / "pairs.jsonl"), strict=True):
        (user, y_w), (_, y_l) = record["chosen"], record["rejected"]
        x, x_b = user["content"], record["hallu_prompt"]
        assert x in CAPTION_PROMPTS and with_mark(x) == ours["chosen"][0]["content"]
        theirs = {
            "image": record["image"],
            "image_corruption": x_b == "",
            "hallu_prompt": x_b,
            "chosen": [{"role": "user", "content": x}, {"role": "assistant", "content": y_w["content"]}],
            "rejected": [{"role": "user", "content": x}, {"role": "assistant", "content": y_l["content"]}],
        }
        assert json.dumps(record).startswith(json.dumps(theirs).removesuffix("}") + ", ")
        assert record["corruption"] is None and record["rejected_prompt"] == (x_b or x)
        assert {name: ours[name] for name in ("image", "image_corruption", "hallu_prompt")}.items() <= record.items()
    assert {record["image_corruption"] for record in lines(released.out / "pairs.jsonl")} == {True, False}


def with_mark(text):
    return f"<image>\n{text}"


def test_pairs_train_to_the_same_samples_as_with_the_mark(released, tmp_path):
    records = lines(released.out / "pairs.jsonl")
    for record in records:
        for side in ("chosen", "rejected"):
            record[side][0]["content"] = with_mark(record[side][0]["content"])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    llava = load_llava(released.model, template="vicuna_v1", image_mode="pad")
    samples = [
        [pair_sample(pair, llava, released.tiny / "images", 1024) for pair in data.read_pairs(folder / "pairs.jsonl")]
        for folder in (released.out, tmp_path)
    ]
    for a, b in zip(*samples, strict=True):
        assert (a.trunk, a.branches, a.image, a.length) == (b.trunk, b.branches, b.image, b.length)


def test_the_clean_image_in_place_of_a_corrupted_one(plain, tmp_path):
    """--no-corruption alone: only the pairs from corrupted images change."""
    call(*plain.commands["pairs"], "--no-corruption", "--out", tmp_path / "pairs.jsonl")
    changes = 0
    for ours, record in zip(lines(plain.out / "pairs.jsonl"), lines(tmp_path / "pairs.jsonl"), strict=True):
        assert record["no_corruption"] and record["corruption"] is None and "preset" not in record
        if ours["image_corruption"]:
            changes += ours["rejected"] != record["rejected"]
            ours |= {name: record[name] for name in ("rejected", "rejected_finish", "corruption")}
        assert record == ours | {"no_corruption": True}
    assert changes


def test_equal_responses_are_no_problem_for_the_models_own_tokens(released, tmp_path, capsys):
    """The text of y_l is not scored, so they have a gradient: no error, no warning, and the page agrees."""
    records = lines(released.out / "pairs.jsonl")
    for record in records:
        record["rejected"], record["rejected_finish"] = record["chosen"], record["chosen_finish"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = changed(released.commands["stage1"], pairs=tmp_path / "pairs.jsonl", out=tmp_path / "out")
    capsys.readouterr()
    call(*command)
    assert "identical" not in capsys.readouterr().err
    records = log(tmp_path / "out")
    assert records[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6) and records[-1]["dpo"] < math.log(2) - 0.01
    page = (tmp_path / "out/report.html").read_text()
    assert "8 with identical responses." in page and "own top token" in page
    assert "fall below" not in page and "no preference" not in page
    assert "own top token" not in (released.out / "stage2/report.html").read_text()
    status, last = ended(*command, "--rejected-score", "text", "--out", tmp_path / "text")
    assert status == 1 and "identical in all 8 pairs: no preference to learn" in last


def test_stage_1_scores_the_models_own_tokens(released, plain):
    """At step 1 policy and reference agree, so the DPO term is ln 2 under either score; logp_rejected is not."""
    argmax, text = log(released.out / "stage1"), log(plain.out / "stage1")
    assert argmax[0]["dpo"] == pytest.approx(text[0]["dpo"], abs=1e-6)
    assert argmax[0]["logp_rejected"] > text[0]["logp_rejected"]  # the model's own tokens are likelier


# ---------------------------------------------------------------- flags that are given


@pytest.mark.parametrize("step, flags, line", [
    ("pairs", "--corruption --top-k 5", "every flag of it is overridden"),
    ("pairs", "--temperature 0", "--no-corruption (C)"),
    ("stage1", "--rejected-score text --projector-lr 1e-4", "--template vicuna_v1 (F)"),
    ("stage2", "--template mistral_instruct", "--projector-lr 0 (H)"),
    ("dar", "--no-blind", "--template vicuna_v1 (F)"),
    ("dar", "--temperature 1", "--blind (E), --template vicuna_v1 (F), --top-k 50 (Q)"),
    ("direct", "--template mistral_instruct", "every flag of it is overridden"),
])  # fmt: skip
def test_a_flag_that_is_given_wins(released, tmp_path, step, flags, line):
    out = tmp_path / "pairs.jsonl" if step == "pairs" else tmp_path
    printed = call(*changed(released.commands[step], out=out), *flags.split(), "--check")
    assert printed.splitlines()[0] == f"--preset released: {line}"


def test_what_wins_is_recorded(released, tmp_path):
    call(*released.commands["pairs"], "--corruption", "--top-k", 5, "--out", tmp_path / "pairs.jsonl")
    records = lines(tmp_path / "pairs.jsonl")
    assert {(r["preset"], r["top_k"], "no_corruption" in r) for r in records} == {("released", 5, False)}
    assert all((r["corruption"] is not None) is r["image_corruption"] for r in records)


def test_no_corruption_is_for_pairs(released, capsys):
    status, last = ended(*released.commands["describe"], "--no-corruption")
    assert status == 2 and "--no-corruption is for pairs" in last


# ---------------------------------------------------------------- mixtures

ERROR = (
    "error: {} is from a run with {}, but this run has {}: "
    "use one in every step, or accept the mixture with --mixed-presets"
)
NAMES = ["no --preset", "--preset released"]
MIXTURES = [("stage1", "pairs", "pairs.jsonl"), ("stage1", "reference", "stage1"), ("describe", "adapter", "stage1"),
            ("stage2", "adapter", "stage1"), ("stage2", "descriptions", "descriptions.jsonl"),
            ("direct", "adapter", "stage2"), ("dar", "adapter", "stage2")]  # fmt: skip


def mixture(released, plain, step, flag, file, to_released, out):
    """A command whose `flag` has another preset than the command itself; and the error."""
    own, other = (released, plain) if to_released else (plain, released)
    if (step, flag) == ("describe", "adapter"):
        out = out / "new.jsonl"
    command = changed(own.commands[step], **{} if flag == "reference" else {flag: other.out / file}, out=out)
    command += ["--reference", other.out / file] * (flag == "reference")
    presets = NAMES if to_released else NAMES[::-1]
    return command, ERROR.format(other.out / file, *presets)


@pytest.mark.parametrize("to_released", [True, False])
@pytest.mark.parametrize("step, flag, file", MIXTURES)
def test_mixtures_are_errors(released, plain, tmp_path, capsys, step, flag, file, to_released):
    command, error = mixture(released, plain, step, flag, file, to_released, tmp_path / "out")
    assert ended(*command) == (1, error)
    capsys.readouterr()
    status, last = ended(*command, "--check")
    assert status == 1 and error.removeprefix("error: ") in capsys.readouterr().out + last
    assert ended(*command, "--check", "--mixed-presets")[0] == 0


def test_a_mixture_can_be_asked_for(released, plain, tmp_path):
    command, _ = mixture(released, plain, "stage1", "pairs", "pairs.jsonl", True, tmp_path / "out")
    assert ended(*command, "--mixed-presets")[0] == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["preset"] == "released"


def test_files_without_a_record_of_their_origin_pass(released, tmp_path, capsys):
    records = [{name: record[name] for name in ("image", "chosen", "rejected")}
               for record in lines(released.out / "pairs.jsonl")]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = changed(released.commands["stage1"], pairs=tmp_path / "pairs.jsonl", out=tmp_path / "out")
    call(*command, "--check")
    call(*without_preset(command), "--check")
    assert "warning" not in capsys.readouterr().err


def test_all_ranks_end_with_the_error(released, plain, tmp_path):
    command, error = mixture(released, plain, "stage1", "pairs", "pairs.jsonl", True, tmp_path / "out")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / f"{command[0]}.py"]
    done = subprocess.run([sys.executable, *map(str, [*start, *command[1:]])], capture_output=True, text=True, cwd=ROOT,
                          timeout=120)  # fmt: skip
    assert done.returncode == 1 and error in done.stderr
    assert done.stdout.count("--preset released: ") == 1  # the first rank prints it
    assert not (tmp_path / "out/run.json").exists()


def test_the_templates_of_the_preset_are_no_mixture(released, tmp_path, capsys):
    """Generated in [INST] and trained in Vicuna's template, without a warning; another template still warns."""
    capsys.readouterr()
    for step in ("stage1", "stage2"):
        call(*changed(released.commands[step], out=tmp_path / "out"), "--check")
    assert "warning" not in capsys.readouterr().err
    text = (released.out / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(text.replace("mistral_instruct", "vicuna_v1"))
    command = [*changed(released.commands["stage1"], pairs=tmp_path / "pairs.jsonl", out=tmp_path / "out"), "--check"]
    call(*command, "--template", "mistral_instruct")
    assert "with the template vicuna_v1, but training uses mistral_instruct\n" in capsys.readouterr().err


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("step, file", [("pairs", "pairs.jsonl"), ("describe", "descriptions.jsonl")])
def test_generation_resumes_with_the_same_preset_only(released, tmp_path, step, file):
    whole = (released.out / file).read_text()
    (tmp_path / file).write_text("".join(whole.splitlines(keepends=True)[:3]))
    command = changed(released.commands[step], out=tmp_path / file)
    refused = without_preset(command) + ["--mixed-presets"]
    status, last = ended(*refused)
    assert status == 1 and f"{tmp_path / file} was written with " in last
    # every other setting given as a flag: the preset itself makes the difference
    flags = ["--top-k", 50] + ["--no-corruption"] * (step == "pairs")
    status, last = ended(*refused, *flags)
    assert status == 1 and "was written with preset 'released', but this run has None; choose another --out" in last
    assert "3 of them already in" in call(*command)
    assert (tmp_path / file).read_text() == whole


def test_top_k_and_corruption_are_settings_of_a_file(plain, tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text((plain.out / "pairs.jsonl").read_text())
    for flags, name, value in ((["--top-k", 5], "top_k", 5), (["--no-corruption"], "no_corruption", True)):
        status, last = ended(*plain.commands["pairs"], "--out", out, *flags)
        assert status == 1 and f"was written with {name} None, but this run has {value}" in last


def test_training_resumes_with_the_same_preset_only(released, tmp_path):
    command = [*changed(released.commands["stage1"], out=tmp_path / "out"), "--save-every", 1]
    with stop_after(2), pytest.raises(SystemExit):
        call(*command)
    flags = ["--template", "vicuna_v1", "--projector-lr", 0, "--rejected-score", "argmax", "--mixed-presets"]
    status, last = ended(*without_preset(command[:-2]), *flags)
    assert status == 1 and "belongs to a run with preset 'released', but this run has None" in last
    status, last = ended(*command, "--rejected-score", "text")
    assert status == 1 and "belongs to a run with rejected_score 'argmax', but this run has None" in last
    assert "resuming after step" in call(*command)
    assert log(tmp_path / "out") == log(released.out / "stage1")


def test_evaluation_resumes_with_the_same_preset_only(released, tmp_path):
    for step in ("direct", "dar"):
        assert "0 of them" not in call(*released.commands[step])  # everything is there
    command = without_preset(released.commands["direct"])
    status, last = ended(*command, "--mixed-presets", "--template", "vicuna_v1")
    assert status == 1 and "was written with preset 'released', but this run has None" in last


def test_two_ranks_write_the_same_pairs(released, tmp_path):
    call_two_ranks(changed(released.commands["pairs"], out=tmp_path / "pairs.jsonl"))
    assert (tmp_path / "pairs.jsonl").read_text() == (released.out / "pairs.jsonl").read_text()


# ---------------------------------------------------------------- README's table

MARK = "PAPER vs " + "RELEASED"  # in two parts, so that this file is not searched for itself
SWITCHED = set("ACEFHQ")


def rows_of_readme():
    """{letter: cells}"""
    text = (ROOT / "README.md").read_text().split("## The paper and its release")[1].split("\n## ")[0]
    lines_of_table = [line.strip("|") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines_of_table]
    return {letter: row for row in cells for letter in row[0].split(", ") if letter}


def test_readme_and_comments_have_the_same_rows():
    sources = [*ROOT.glob("*.py"), *(ROOT / "stic_min").rglob("*.py")]
    comments = [line for path in sources for line in path.read_text().splitlines() if MARK in line]
    letters = [re.search(rf"# {MARK} \(([A-Z])\): \S", line) for line in comments]
    assert all(letters), [line for line, match in zip(comments, letters) if not match]
    assert {match[1] for match in letters} == set(rows_of_readme()) > SWITCHED
    assert f"switches {', '.join('ACEFH')} and Q" in (ROOT / "README.md").read_text().replace("\n", " ")
    assert set(preset.ROWS.values()) == SWITCHED


def test_help_names_what_the_preset_switches(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    helps = {}
    switched = {"generate_pairs": "CQ", "train_stage1": "AFH", "train_stage2": "FH", "evaluate scienceqa": "EFQ"}
    for command, letters in switched.items():
        script = command.split()[0]
        with pytest.raises(SystemExit):
            monkeypatch.setattr(sys, "argv", command.split() + ["--help"])
            importlib.import_module(script).main()
        helps[command] = capsys.readouterr().out
        assert "--mixed-presets" in helps[command]
        assert set(re.findall(r" \(([A-Z])\)[,;]", helps[command])) == set(letters)
    for letter, row in rows_of_readme().items():
        if letter in SWITCHED:
            [flag] = re.findall(r"^`(--[a-z-]+)", row[-1])
            assert any(re.search(rf"^ .*{flag}\b", text, re.MULTILINE) for text in helps.values())
