"""The gallery of preference pairs: what it counts, shows, marks, replays and escapes; log p against stage 1's."""

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from by_hand import logps_by_hand
from chain import log, stop_after
from commands import call, lines
from pages import Elements, blocks, images_of, index, sources
from PIL import Image
from tiny import PICTURES

from stic_min import InputError, data
from stic_min.images import BACKGROUND, corrupt, open_image
from stic_min.loader import load_llava
from stic_min.report import gallery, logps, pair_cards, pairs, svg
from stic_min.report.options import Options
from stic_min.samples import global_batches, pair_sample

A, B = "scene_01.jpg", "scene_02.png"
X, X_G, X_B = "What is it?", "Describe it step by step.", "Invent <things> & more."


def record(image=A, chosen="A red house.", rejected="A red boat.", **fields):
    user = {"role": "user", "content": f"<image>\n{X}"}
    turns = lambda response: [user, {"role": "assistant", "content": response}]
    return {"image": image, "chosen": turns(chosen), "rejected": turns(rejected)} | fields


def misled(image=A, **fields):
    prompts = {"chosen_prompt": X_G, "rejected_prompt": X_B, "hallu_prompt": X_B, "corruption": None}
    finishes = {"chosen_finish": "stop", "rejected_finish": "stop"}
    return record(image, **({"image_corruption": False, "image_mode": "pad"} | prompts | finishes | fields))


def corrupted(image=A, seed=0, **fields):
    _, corruption = corrupt(Image.new("RGB", (40, 30)), seed)  # the parameters follow from the seed alone
    corruption["seed"] = seed
    options = {"hallu_prompt": "", "rejected_prompt": X, "corruption": corruption, "image_corruption": True}
    return misled(image, **(options | fields))


def seed_of(kind):
    return next(seed for seed in range(99) if corrupted(seed=seed)["corruption"]["kind"] == kind)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def render(tiny, tmp_path):
    def render(records, images=None, **options):
        path = write(tmp_path / "pairs.jsonl", records)
        return pairs.section(path, Options([images or tiny / "images"], **options))

    return render


# ---------------------------------------------------------------- what it says


def test_counts_by_kind(render):
    low, jitter = seed_of("low_resolution"), seed_of("color_jitter")
    html = render([
        misled(),
        misled(rejected="A red house.", rejected_finish="length"),
        corrupted(seed=low, chosen="A b c d e."),
        corrupted(seed=jitter, chosen_finish="length", rejected_finish="length"),
        corrupted(seed=jitter, rejected="A red house."),
        record(B),
    ])  # fmt: skip
    page = Elements(html)
    names = ["misleading prompt", "low resolution", "color jitter", "unknown"]
    assert page.texts("th") == ["kind of pair", *names, "all"]
    assert page.rows() == {
        "pairs": ["2 (33.3%)", "1 (16.7%)", "2 (33.3%)", "1 (16.7%)", "6 (100.0%)"],
        "equal responses": ["1 (50.0%)", "0 (0.0%)", "1 (50.0%)", "0 (0.0%)", "2 (33.3%)"],
        "preferred cut off": ["0 (0.0%)", "0 (0.0%)", "1 (50.0%)", "0 (0.0%)", "1 (16.7%)"],
        "dispreferred cut off": ["1 (50.0%)", "0 (0.0%)", "1 (50.0%)", "0 (0.0%)", "2 (33.3%)"],
        "words, preferred": ["3.0", "5.0", "3.0", "3.0", "3.3"],
        "words, dispreferred": ["3.0"] * 5,
    }
    content = index(html)
    assert content["filters"] == [[0, 0, 1, 2, 2, 4], [0, 1, 0, 0, 1, 0]] and content["count"] == 6
    assert content["orders"] == [[[0, 0, 2, 0, 0, 0], -1], [[0, 0, 2, 0, 0, 0], 1]]
    options = [element[1]["value"] for element in page.all("option")]
    assert options == ["", "0", "1", "2", "4", "", "0", "1", "", "0", "1"]
    assert "missing" not in html.split("<article")[0]


def test_prompts_with_the_papers_letters(render):
    low = seed_of("low_resolution")
    misleading, corruption = Elements(render([misled()])), Elements(render([corrupted(seed=low)]))
    titles = ["Preferred: yw ~ p( · | v, xg)", "Dispreferred: yl ~ p( · | v, xb)"]
    assert misleading.texts("p", **{"class": "origin"}) == titles
    assert corruption.texts("p", **{"class": "origin"}) == [titles[0], "Dispreferred: yl ~ p( · | h(v), x)"]
    for page, prompt in ((misleading, f"misleading prompt xb: “{X_B}”"), (corruption, f"captioning prompt x: “{X}”")):
        [chosen], [rejected] = (page.texts("section", **{"class": side}) for side in ("chosen", "rejected"))
        assert f"step-by-step prompt xg: “{X_G}”" in chosen and prompt in rejected
        assert page.texts("p", **{"class": "x"}) == [f"Trained as responses to x: “{X}”"]
    assert corruption.texts("figcaption")[1] == "h(v), low resolution: short side 20"
    long = "word " * 60
    [details] = Elements(render([misled(chosen_prompt=long)])).texts("details")
    assert long.strip() in details


def test_lengths_and_endings(render):
    page = Elements(render([misled(chosen="One two.", rejected="One two three", rejected_finish="length"), record()]))
    notes = [text for text in page.texts("p", **{"class": "note"}) if "characters" in text]
    assert notes == ["2 words, 8 characters; ended by itself",
                     "3 words, 13 characters; cut off at the maximum length",
                     "3 words, 12 characters", "3 words, 11 characters"]  # fmt: skip


def test_settings_of_the_run(render):
    settings = {"model": "llava", "adapter": None, "temperature": 0.2, "seed": 0, "top_p": None}
    page = Elements(render([misled(**settings), misled(**settings | {"seed": 1})]))
    shown = dict(zip(page.texts("dt"), page.texts("dd")))
    assert shown == {"model": "llava", "image mode": "pad", "temperature": "0.2", "seed": "0, 1"}


def test_pairs_that_are_recorded_as_corrupted_but_were_not(render):
    """--no-corruption: the page shows what the model saw."""
    page = Elements(render([misled(), corrupted(corruption=None, no_corruption=True, preset="released", top_k=50)]))
    assert page.texts("th") == ["kind of pair", "misleading prompt", "captioning prompt alone", "all"]
    _, article = page.texts("article")
    assert "Dispreferred: yl ~ p( · | v, x)" in article and f"captioning prompt x: “{X}”" in article
    assert page.texts("figcaption")[-1] == "v, the same image, not corrupted" and "h(v)" not in article
    assert "can't be shown" not in "".join(page.texts("p"))
    shown = dict(zip(page.texts("dt"), page.texts("dd")))
    assert (shown["preset"], shown["top k"], shown["no corruption"]) == ("released", "50", "True")


def test_published_pairs_have_no_prompts_or_seeds(render):
    rlaif = {"image_path": A, "question": X, "chosen": "A red house.", "rejected": "A blue boat."}
    stic = record(B, hallu_prompt=X_B, image_corruption=False), record(B, hallu_prompt="", image_corruption=True)
    html = render([rlaif, *stic])
    page = Elements(html)
    assert page.texts("th") == ["kind of pair", "misleading prompt", "other corruption", "unknown", "all"]
    assert page.texts("p", **{"class": "origin"})[:2] == ["Preferred: yw", "Dispreferred: yl"]
    first, second, third = page.texts("article")
    assert "prompt x" not in first and f"misleading prompt xb: “{X_B}”" in second and "step-by-step" not in second
    assert "no image h(v): scene_02.png" in third and not page.all("dt")
    assert "The corrupted images of 1 pair can't be shown: no seed is recorded." in page.texts("p")[0]
    assert len(images_of(html)[0]) == 1


# ---------------------------------------------------------------- words that differ


def test_words_that_differ_are_marked():
    chosen, rejected = pair_cards.marked("A red house,\n and a <dog>.", "A blue house and a <cat>.")
    assert chosen == "A <mark>red</mark> house<mark>,</mark>\n and a &lt;<mark>dog</mark>&gt;."
    assert rejected == "A <mark>blue</mark> house and a &lt;<mark>cat</mark>&gt;."
    assert pair_cards.marked("The dog's ball", "The dog's ball") == ("The dog&#x27;s ball",) * 2
    assert pair_cards.marked("One.", "Two three") == ("<mark>One.</mark>", "<mark>Two three</mark>")
    common = "the " * 300  # difflib would ignore frequent words of long texts
    assert "<mark>" not in "".join(pair_cards.marked(common, common))
    assert pair_cards.marked(f"{common}end", f"{common}stop")[0].count("<mark>") == 1


def test_text_is_escaped(render):
    attack = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    fields = {"chosen": f"{attack} a", "rejected": f"{attack} b", "chosen_prompt": attack, "hallu_prompt": attack,
              "rejected_prompt": attack, "model": attack, "chosen_finish": attack}  # fmt: skip
    names = ["a.jpg", attack.replace("/", "")]
    corruption = {"kind": attack, attack: attack}
    html = render([misled(name, **fields | {"corruption": c}) for c in (None, corruption) for name in names * 15])
    page = Elements(html)
    assert len(blocks(html)) == 3 and len(page.all("article")) == 24
    scripts = page.all("script")
    assert [s[1].get("type") for s in scripts].count("application/json") == len(scripts) - 1 == 3
    assert not [e for e in page.elements if "onerror" in e[1]] and not page.all("img")
    assert attack in page.texts("p", **{"class": "text"})[0] and attack in page.texts("dd")
    for block in blocks(html)[1:]:
        for item in map(Elements, block):
            assert not item.all("script") and not item.all("img")
            assert attack in item.texts("p", **{"class": "text"})[0]


# ---------------------------------------------------------------- images


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def assert_looks_like(uri, image):
    shown = decoded(uri)
    assert shown.size == image.size
    difference = np.asarray(shown, dtype=float) - np.asarray(image, dtype=float)
    assert np.abs(difference).mean() < 6  # JPEG


@pytest.mark.parametrize("kind", ["low_resolution", "color_jitter"])
def test_corruptions_are_replayed(render, tiny, kind):
    seed = seed_of(kind)
    html = render([corrupted(A, seed), corrupted(A, seed, image_mode="anyres"), misled(A)])
    padded, whole, same = images_of(html)
    clean = open_image(tiny / "images" / A)
    for image, uri in zip((clean, corrupt(clean, seed)[0]), padded, strict=True):
        square = Image.new("RGB", (max(image.size),) * 2, BACKGROUND)
        square.paste(image, (0, (image.width - image.height) // 2))
        assert_looks_like(uri, square.resize((192, 192), Image.BICUBIC))
    for image, uri in zip((clean, corrupt(clean, seed)[0]), whole, strict=True):
        assert_looks_like(uri, image.resize((192, round(192 * image.height / image.width)), Image.BICUBIC))
    assert padded[0] != padded[1] and same == [padded[0], padded[0]]
    assert "not those that the model saw" not in html


def test_a_corruption_with_other_parameters_is_reported(render):
    pair = corrupted(A, seed_of("color_jitter"))
    pair["corruption"]["hue"] += 0.01
    html = render([pair, corrupted(B)])
    assert "The corrupted images of 1 pair are not those that the model saw" in html
    captions = Elements(html).texts("figcaption")
    assert [text.endswith("replayed with other parameters than recorded") for text in captions] == [
        False, True, False, False]  # fmt: skip


def test_images_are_stored_once(render):
    html = render([misled(name) for name in (A, B) for _ in range(30)])
    assert html.count("data:image/jpeg") == len(sources(html)) == 2
    shown = images_of(html)
    assert shown[0] == shown[29] != shown[30] == shown[59]
    assert all(image[1].get("alt") == f"v: {A}" for image in Elements(html).all("img"))


def test_missing_images_are_counted_and_have_a_placeholder(render, tmp_path, tiny):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    names = ["nowhere.jpg", "broken.jpg", "../pairs.jsonl"]
    html = render([*map(misled, names), corrupted("nowhere.jpg")], tmp_path / "images")
    assert f"The images of 4 of 4 pairs are missing: not found in {tmp_path / 'images'}, or not readable." in html
    expected = [f"no image v: {name}" for name in names for _ in range(2)]
    expected += [f"no image {letter}: nowhere.jpg" for letter in ("v", "h(v)")]
    assert Elements(html).texts("div", **{"class": "missing"}) == expected and "data:image" not in html
    path = write(tmp_path / "p.jsonl", [misled()])
    html = pairs.section(path, Options())
    assert "The images of 1 of 1 pair are missing: pass their folder with --images." in html
    html = pairs.section(path, Options([tmp_path, tiny / "images"]))
    assert "missing:" not in html


def test_images_are_looked_up_where_the_pairs_were_generated(tmp_path, tiny):
    (tmp_path / "photos").symlink_to(tiny / "images")
    path = write(tmp_path / "p.jsonl", [misled(images="photos")])
    assert "missing:" not in pairs.section(path, Options())
    path = write(tmp_path / "q.jsonl", [misled(images="../photos")])
    assert "missing:" in pairs.section(path, Options())
    command = {"record": {"command": f"generate_pairs.py --images {tiny / 'images'} --out q.jsonl"}}
    (tmp_path / "q.run.json").write_text(json.dumps(command))
    html = pairs.section(path, Options())
    assert "missing:" not in html and str(tiny) not in html


def test_bad_records_are_errors(render, tmp_path):
    for bad, message in (
        (record(rejected=""), "pairs.jsonl, line 2 .*no content"),
        (corrupted() | {"corruption": {"kind": "low_resolution", "seed": "1"}}, "line 2 .*seed is not a whole number"),
        (corrupted() | {"corruption": {"kind": "low_resolution", "seed": 2**64}}, "line 2 .*seed is not"),
        (misled(chosen_prompt="\ud800"), "line 2 .*chosen_prompt .* not valid Unicode"),
    ):
        with pytest.raises(InputError, match=message):
            render([misled(), bad])


# ---------------------------------------------------------------- thousands of pairs


def test_6000_pairs_are_paged(tmp_path, monkeypatch):
    """Eight images, and two corrupted copies of each."""
    monkeypatch.setattr(pair_cards, "SIDE", 24)
    names = [name for name, *_ in PICTURES]
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (25 * i, 200 - 25 * i, 90)).save(tmp_path / name)
    low, jitter = seed_of("low_resolution"), seed_of("color_jitter")
    records = []
    for i in range(6000):
        words = [f"w{(i * k) % 97}" for k in range(1, 31)]
        texts = {"chosen": " ".join(words), "rejected": " ".join(["different", *words] if i % 5 else words)}
        name = names[i % len(names)]
        records.append(corrupted(name, (low, jitter)[i % 3 // 2], **texts) if i % 3 else misled(name, **texts))
    path = write(tmp_path / "pairs.jsonl", records)
    out = pairs.write(path, Options([tmp_path]))
    html = out.read_text()
    assert out == tmp_path / "pairs.html" and len(html) < 6000 * 3000
    page = Elements(html)
    assert len(page.all("article")) == gallery.PAGE_SIZE == 24
    pages = blocks(html)
    assert len(pages) == 250 and {len(p) for p in pages} == {24}
    assert len(sources(html)) == html.count("data:image/jpeg") == 3 * len(names)
    assert index(html)["count"] == 6000 and sum(index(html)["filters"][1]) == 1200
    assert page.rows()["pairs"] == ["2,000 (33.3%)", "2,000 (33.3%)", "2,000 (33.3%)", "6,000 (100.0%)"]
    assert all(images_of(html))


def test_a_gallery_has_a_limit(render, monkeypatch):
    monkeypatch.setattr(pairs, "LIMIT", 3)
    html = render([misled() for _ in range(5)])
    assert "The gallery shows the first 3 of 5 pairs." in html and index(html)["count"] == 3
    assert Elements(html).rows()["pairs"] == ["5 (100.0%)"]


# ---------------------------------------------------------------- log p


def test_log_p_against_two_models(runs):
    """Both models loaded on their own: with the adapter and its projector, and without."""
    records = data.read_pairs(runs.out / "pairs.jsonl")
    adapter = runs.out / "stage1"
    results = logps.response_logps(records, [runs.out, runs.tiny / "images"], runs.model, adapter, "cpu")
    theta = load_llava(runs.model, adapter=adapter, image_mode="pad")
    theta_0 = load_llava(runs.model, image_mode="pad")
    assert not theta.mm_projector[0].weight.equal(theta_0.mm_projector[0].weight)
    for pair, values in zip(records, results, strict=True):
        sample = pair_sample(pair, theta_0, runs.tiny / "images", 1024)
        expected = [*logps_by_hand(theta, sample).tolist(), *logps_by_hand(theta_0, sample).tolist()]
        assert values == pytest.approx(expected, abs=2e-4)
        assert max(abs(a - b) for a, b in zip(expected[:2], expected[2:])) > 1e-3


def test_log_p_is_what_stage_1_logs(runs, tmp_path):
    """After a checkpoint, the next step logs the log p of its batch under that checkpoint and theta_0."""
    beta = 0.5
    flags = ["--beta", beta, "--save-every", 1, "--out", tmp_path / "out", "--projector-lr", 1e-2]
    command = [*runs.commands["stage1"], *flags]
    with stop_after(2), pytest.raises(SystemExit):
        call(*command)
    records = data.read_pairs(runs.out / "pairs.jsonl")
    results = logps.response_logps(
        records, [runs.tiny / "images"], runs.model, tmp_path / "out" / "checkpoint-2", "cpu")  # fmt: skip
    call(*command)
    theta_0 = load_llava(runs.model, image_mode="pad")
    lengths = [pair_sample(pair, theta_0, runs.tiny / "images", 1024).length for pair in records]
    batch = [results[i] for i in global_batches(lengths, 3, seed=0)[2]]
    logp_w, logp_l, ref_logp_w, ref_logp_l = np.mean(batch, axis=0)
    expected = {"logp_chosen": logp_w, "logp_rejected": logp_l, "reward_chosen": beta * (logp_w - ref_logp_w),
                "reward_rejected": beta * (logp_l - ref_logp_l)}  # fmt: skip
    record = log(tmp_path / "out")[2]
    assert {name: record[name] for name in expected} == pytest.approx(expected, abs=2e-4)
    assert abs(record["reward_chosen"]) > 1e-2


def test_margins_are_shown_and_sorted_by(runs, tmp_path):
    records = lines(runs.out / "pairs.jsonl")
    records[1]["rejected"] = records[1]["chosen"]
    records[2]["image"] = "nowhere.jpg"
    path = write(tmp_path / "pairs.jsonl", records)
    folders = [runs.tiny / "images"]
    html = pairs.section(path, Options(folders, adapter=runs.out / "stage1", model=runs.model))
    results = logps.response_logps(data.read_pairs(path), folders, runs.model, runs.out / "stage1")
    assert results[2] is None and None not in results[:2]
    margins = [value and round((value[0] - value[2]) - (value[1] - value[3]), 4) for value in results]
    content = index(html)
    assert content["orders"][2:] == [[margins, 1], [margins, -1]]
    assert "No log p for 1 pair:" in html
    differing = [margin for i, margin in enumerate(margins) if i not in (1, 2)]
    positive = 100 * sum(margin > 0 for margin in differing) / len(differing)
    rows = Elements(html).rows()
    assert rows["margin > 0"][-1] == f"{positive:.1f}%"
    assert rows["margin, mean"][-1] == f"{sum(differing) / len(differing):+.2f}".replace("-", "−")
    tag = f"margin {margins[0]:+.2f}".replace("-", "−")
    first, _, third, *_ = Elements(html).texts("article")
    assert tag in first and "before training" in first and "margin" not in third
    bars = re.findall(r'<rect class="c[01]"', html)
    assert bars and "aria-label" in html


def test_a_damaged_record_of_training_is_an_error(runs, tmp_path):
    for name, value in (("dtype", "int3"), ("image_mode", None), ("max_length", "long"), ("template", ["x"])):
        (tmp_path / "run.json").write_text(json.dumps({name: value}))
        with pytest.raises(InputError, match=f"run.json: {name} is "):
            logps.training_settings(tmp_path)


def test_histogram():
    values = [-1.5, -0.1, 0.1, 0.2, 2.9]
    html = svg.histogram("Title", values, "margin", "pairs")
    bars = re.findall(r'<rect class="(c[01])"[^>]* height="([0-9.]+)"', html)
    heights = {color: sum(float(height) for kind, height in bars if kind == color) for color in ("c0", "c1")}
    assert heights["c0"] == pytest.approx(heights["c1"] * 3 / 2)
    for values in ([1.0], [0.0, 0.0], [-1e-9, 1e9]):
        assert "<rect" in svg.histogram("Title", values, "margin", "pairs")


def test_importing_the_page_does_not_import_torch():
    code = "import sys, stic_min.report.pairs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
