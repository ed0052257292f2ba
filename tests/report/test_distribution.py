"""evaluate.py embed and tsne: features against the tower itself, the overlap by hand, and the plot."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from commands import ROOT, call, ended
from safetensors.numpy import save_file

from stic_min.images import make_tiles, open_image
from stic_min.loader import load_llava
from stic_min.report import distribution, features, svg
from stic_min.runtime.work import subset

V16, V15 = "llava-v1.6-tiny", "llava-v1.5-tiny"
# Of the 4 x 4 patches of a padded square: the rows and columns that show the image. scene_01 is 300 x 200: its
# 4 * 200 / 300 = 2.67 rows are rounded down to an even margin, as LLaVA-1.6 does in `unpadded`.
SHOWN = {
    "scene_01.jpg": (slice(1, 3), slice(0, 4)),
    "scene_02.png": (slice(0, 4), slice(1, 3)),
    "scene_03.png": (slice(0, 4), slice(0, 4)),
    "scene_04.png": (slice(0, 4), slice(1, 3)),
    "scene_05.jpg": (slice(1, 3), slice(0, 4)),
    "scene_06.png": (slice(0, 4), slice(0, 4)),
    "scene_07.png": (slice(0, 4), slice(0, 4)),
    "scene_08.jpg": (slice(0, 4), slice(1, 3)),
}


def embed(tiny, out, *flags, model=V16, images=None):
    return ended("evaluate", "embed", "--model", tiny / model, "--images", images or tiny / "images",
                 "--device", "cpu", "--out", out, *flags)  # fmt: skip


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("model", [V16, V15])
def test_features_are_means_over_the_patches_that_show_the_image(tiny, tmp_path, model, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 3)
    assert embed(tiny, tmp_path / "f.safetensors", model=model)[0] == 0
    result = features.read_features(tmp_path / "f.safetensors")
    assert result.names == sorted(SHOWN) and result.features.dtype == np.float32
    llava = load_llava(tiny / model, image_mode="pad", dtype=torch.float32)
    for name, values in zip(result.names, result.features):
        tiles = make_tiles(open_image(tiny / "images" / name), "pad", 56)
        with torch.no_grad():
            patches = llava.vision_tower(tiles.pixels)[0].view(4, 4, -1)
        rows, columns = SHOWN[name]
        expected = patches[rows, columns].flatten(0, 1).mean(0)
        assert values == pytest.approx(expected.numpy(), abs=1e-5)
    assert result.settings["model"] == model and result.settings["folder"] == "images"


def test_a_very_thin_image_keeps_a_row(tiny, tmp_path):
    from PIL import Image

    (tmp_path / "thin").mkdir()
    Image.new("RGB", (400, 2), "red").save(tmp_path / "thin" / "line.png")
    assert embed(tiny, tmp_path / "f.safetensors", images=tmp_path / "thin")[0] == 0
    assert np.isfinite(features.read_features(tmp_path / "f.safetensors").features).all()


def test_unreadable_images_are_skipped_and_subfolders_included(tiny, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(tiny / "images", images / "b")
    shutil.copy(tiny / "images" / "scene_01.jpg", images / "a.jpg")
    (images / "broken.png").write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image either")
    status, _ = embed(tiny, tmp_path / "f.safetensors", images=images)
    out = capsys.readouterr().out
    assert status == 0 and "9 images in" in out and "1 skipped" in out
    result = features.read_features(tmp_path / "f.safetensors")
    assert result.names == ["a.jpg", *(f"b/{name}" for name in sorted(SHOWN))]
    assert (result.features[0] == pytest.approx(result.features[1], abs=1e-5))  # the same image


def test_no_readable_image_is_an_error(tiny, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    assert embed(tiny, tmp_path / "f.safetensors", images=images) == (
        1, f"error: no images in {images} or its subfolders")  # fmt: skip
    (images / "broken.png").write_bytes(b"not an image")
    status, message = embed(tiny, tmp_path / "f.safetensors", images=images)
    assert status == 1 and message == f"error: none of the 1 images of {images} could be read"
    assert not (tmp_path / "f.safetensors").exists()


def test_limit_samples_with_the_seed(tiny, tmp_path):
    embed(tiny, tmp_path / "all.safetensors")
    embed(tiny, tmp_path / "some.safetensors", "--limit", 3, "--seed", 5)
    everything, some = (features.read_features(tmp_path / f"{n}.safetensors") for n in ("all", "some"))
    assert some.names == subset(sorted(SHOWN), 3, 5)
    indices = [everything.names.index(name) for name in some.names]
    assert some.features == pytest.approx(everything.features[indices], abs=1e-5)


def test_existing_features_are_kept_and_foreign_files_refused(tiny, tmp_path, capsys):
    out = tmp_path / "f.safetensors"
    embed(tiny, out)
    written = out.read_bytes()
    assert embed(tiny, out)[0] == 0 and "already has these features" in capsys.readouterr().out
    status, message = embed(tiny, out, "--limit", 3)
    assert status == 1 and "was written with limit None, but this run has 3; choose another --out" in message
    status, message = embed(tiny, out, model=V15)
    assert status == 1 and f"was written with model '{V16}'" in message
    assert out.read_bytes() == written
    save_file({"features": np.zeros((3, 2), np.float32)}, out)  # another program's
    status, message = embed(tiny, out)
    assert status == 1 and "exists and is not a file of image features" in message
    status, message = embed(tiny, tmp_path)
    assert status == 1 and "is a folder, not a file" in message


# ---------------------------------------------------------------- overlap


def at(*degrees):
    """Points on the unit circle: cosine similarity is their distance along it."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_overlap_by_hand():
    # k = 1. Nearest neighbors are from the same set; or all four are from the other one, 1 / (2/3).
    assert distribution.overlap(at(0, 1), at(90, 91)) == 0
    assert distribution.overlap(at(0, 90), at(1, 91)) == pytest.approx(1.5)
    # k = 2, and two groups of three points. Neighbors from the other set: of 0 one, of 1 one, of 2 two; of 100
    # two, of 101 one, of 102 one. That is 8 of 12, and 3/5 are expected.
    assert distribution.overlap(at(0, 1, 100), at(2, 101, 102)) == pytest.approx(8 / 12 / (3 / 5))
    # The norm does not count.
    scaled = at(0, 1, 100) * [[100], [1], [7]]
    assert distribution.overlap(scaled, at(2, 101, 102)) == pytest.approx(10 / 9)


def test_overlap_is_one_for_equal_and_zero_for_disjoint_distributions():
    rng = np.random.default_rng(1)
    sample = lambda n, axis: rng.normal(size=(n, 6)) + 20 * np.eye(6)[axis]
    a = sample(1000, 0)
    assert distribution.overlap(a, sample(1000, 0)) == pytest.approx(1, abs=0.04)
    assert distribution.overlap(a, sample(3000, 0)) == pytest.approx(1, abs=0.04)  # whatever the sizes
    assert distribution.overlap(sample(3000, 0), a) == pytest.approx(1, abs=0.04)
    assert distribution.overlap_of_halves(a) == pytest.approx(1, abs=0.06)
    assert distribution.overlap(a, sample(1000, 1)) == 0
    # Half of b is like a, so there f = 2 g: the integral of 2 f g / (f + g) is that of f * 2/3, so 2/3.
    half = np.concatenate([sample(500, 0), sample(500, 1)])
    assert distribution.overlap(a, half) == pytest.approx(2 / 3, abs=0.04)
    assert distribution.overlap(half, a) == pytest.approx(2 / 3, abs=0.04)


# ---------------------------------------------------------------- t-SNE and plot


def write(path, seed=0, axis=0, n=12, **settings):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(n, 6)) + 20 * np.eye(6)[axis]).astype(np.float32)
    settings = {"features": "f", "tower": "t", "model": "m"} | settings
    features.write_features(path, values, [f"{i}.jpg" for i in range(n)], settings, 0)
    return path


def test_tsne_writes_plot_table_and_positions(tmp_path, capsys):
    pytest.importorskip("sklearn")
    files = [write(tmp_path / f"{name}.safetensors", i, axis) for i, (name, axis) in enumerate(
        [("coco", 0), ("twin", 0), ("A & <b>", 1)])]  # fmt: skip
    printed = call("evaluate", "tsne", *files, "--out", tmp_path / "plots" / "tsne.svg")
    header, coco, _, other, wrote = printed.splitlines()
    assert header.split("  ")[-1].strip() == "overlap with coco" and "two random halves" in coco
    assert other.split() == ["A", "&", "<b>", "12", "0.00"] and "tsne.json" in wrote
    assert "only 12 images" in capsys.readouterr().err
    text = (tmp_path / "plots" / "tsne.svg").read_text()
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "A & <b>" in words and "12 images, overlap 0.00" in words and "<b>" not in text
    count = lambda kind: text.count(f'class="{kind}"')
    # In the legend, in the large frame, and in the small ones: c0 is in both of these.
    assert (count("c0"), count("c1"), count("c2")) == (1 + 3 * 12, 1 + 2 * 12, 1 + 2 * 12)
    content = json.loads((tmp_path / "plots" / "tsne.json").read_text())
    assert content["reference"] == "coco" and content["sets"][2]["overlap"] == 0
    assert set(content["sets"][1]["points"]) == {f"{i}.jpg" for i in range(12)}
    call("evaluate", "tsne", *files, "--out", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_tsne_replaces_no_other_file(tmp_path):
    pytest.importorskip("sklearn")
    file = write(tmp_path / "coco.safetensors")
    for content in ("[1]", '{"a": 1}', "text"):
        (tmp_path / "pairs.json").write_text(content)
        status, line = ended("evaluate", "tsne", file, "--out", tmp_path / "pairs.svg")
        assert status == 1 and line.endswith("pairs.json exists and is not from tsne; choose another --out")
        assert (tmp_path / "pairs.json").read_text() == content
    (tmp_path / "folder.svg").mkdir()
    status, line = ended("evaluate", "tsne", file, "--out", tmp_path / "folder.svg")
    assert status == 1 and line.endswith("folder.svg is a folder, not a file")


def test_tsne_of_one_file_has_no_overlap(tmp_path):
    pytest.importorskip("sklearn")
    call("evaluate", "tsne", write(tmp_path / "coco.safetensors"), "--out", tmp_path / "tsne.svg")
    assert ElementTree.parse(tmp_path / "tsne.svg").getroot() is not None


def test_tsne_without_scikit_learn_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    file = write(tmp_path / "coco.safetensors")
    outcome = ended("evaluate", "tsne", file, "--out", tmp_path / "tsne.svg")
    assert outcome == (1, "error: tsne needs scikit-learn: pip install scikit-learn")


def test_bad_features_files_are_one_line(tmp_path):
    good = write(tmp_path / "coco.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"features": np.zeros((3, 2), np.float32)}, foreign)
    (tmp_path / "text.safetensors").write_text("hello")
    bad = write(tmp_path / "bad.safetensors")
    features.write_features(bad, np.full((4, 2), np.nan, np.float32), list("abcd"),
                                {"features": "f", "tower": "t", "model": "m"}, 0)  # fmt: skip
    save = lambda name, values, names: features.write_features(
        tmp_path / name, values, names, {"features": "f", "tower": "t", "model": "m"}, 0)  # fmt: skip
    ones = np.ones((4, 6), np.float32)
    save("narrow.st", ones[:, :3].copy(), list("abcd"))
    save("zero.st", ones * np.array([[1], [1], [0], [1]], np.float32), list("abcd"))
    save("huge.st", ones * np.float32(1e37), list("abcd"))
    save("whole.st", ones.astype(np.int64), list("abcd"))
    save_file({"features": ones}, tmp_path / "deep.st", {features.KEY: "[" * 100_000})
    names = [4, None, "abcd", [[1]] * 4, dict.fromkeys("abcd")]
    for i, value in enumerate(names):
        save(f"names{i}.st", ones, value)
    foreign_files = [*(f"names{i}.st" for i in range(len(names))), "whole.st", "deep.st"]
    cases = [
        *(([tmp_path / name], f"{name}: not a file of image features") for name in foreign_files),
        ([good, tmp_path / "narrow.st"], "are from different vision towers"),
        ([tmp_path / "zero.st"], "zero.st: the features of some images are all 0"),
        ([tmp_path / "huge.st"], "huge.st: some features are NaN or infinite"),
        ([tmp_path / "none"], "no such file"),
        ([good, foreign], "foreign.safetensors: not a file of image features"),
        ([tmp_path / "text.safetensors"], "text.safetensors: not a file of image features"),
        ([bad], "bad.safetensors: some features are NaN or infinite"),
        ([good, write(tmp_path / "o.safetensors", tower="u", model="n")], "towers (of 'm' and 'n'): embed both"),
        ([good, write(tmp_path / "few.safetensors", n=3)], "few.safetensors: 3 images, but at least 4 are"),
        ([good, good], "coco.safetensors is given twice"),
        ([good] * 9, "9 features files, but a plot has at most 8"),
    ]
    for files, message in cases:
        with pytest.raises(distribution.InputError, match=".") as error:
            distribution.read_sets([str(file) for file in files])
        assert message in str(error.value) and "\n" not in str(error.value)


def test_equal_file_names_become_paths(tmp_path):
    paths = [tmp_path / folder / "images.safetensors" for folder in ("coco", "mmvet")]
    sets = distribution.read_sets([str(write(path, seed)) for seed, path in enumerate(paths)])
    assert [s.label for s in sets] == [str(path.with_suffix("")) for path in paths]


def test_eight_groups_look_different_and_are_readable():
    assert len({svg.mark(0, 0, i) for i in range(svg.NUM_COLORS)}) == 8

    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    light, dark = svg.STYLE.split("@media")
    for style in (light, dark):
        color = lambda name, style=style: style.split(f"--{name}: ")[1][:7]
        paper = luminance(color("paper"))
        for i in range(8):
            low, high = sorted([paper, luminance(color(f"c{i}"))])
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_pages_start_without_torch():
    code = ("import sys, stic_min.report.distribution, stic_min.report.descriptions; "
            "assert not {'torch', 'sklearn', 'numpy'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
