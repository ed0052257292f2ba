"""Image distribution against gain (section 6, Figures 8 and 14): how much the CLIP features of two image
folders overlap, and a t-SNE plot of them: evaluate.py tsne.

STIC learns from unlabeled images of one kind. The paper asks whether benchmarks whose images look alike gain
more, and compares the images in a t-SNE plot by eye. Here the overlap is also a number, `overlap`. It is
computed from the features, not from the plot: t-SNE preserves neighbors, but neither distances nor densities.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stic_min import InputError
from stic_min.report import svg
from stic_min.report.features import read_features
from stic_min.runtime import console
from stic_min.runtime.files import check_place, printable, read_json, write_text

if TYPE_CHECKING:
    import numpy as np

NEIGHBORS = 10  # k of `overlap`
FEWEST = 4  # images per features file
ROUGH = 100  # with fewer images, an overlap is a rough estimate
PERPLEXITY = 30

# ---------------------------------------------------------------- overlap


def overlap(a: "np.ndarray", b: "np.ndarray", seed: int = 0) -> float:
    """How much the distributions of two sets of features (N, C) overlap: 1 if they are equal, 0 if disjoint.

    1. Samples n images of each set, n the size of the smaller one, so that both are equally likely.
    2. Among the other 2 n - 1 images, finds each image's k nearest neighbors by cosine similarity:
       k = NEIGHBORS, or n - 1 if that is less.
    3. Counts the neighbors that are from the other set, and divides their share of all neighbors by the share
       expected if the sets' labels were random, n / (2 n - 1).

    This is Schilling's two-sample statistic (1986). With many images, for densities f and g it converges to
    the integral of 2 f g / (f + g), which is 1 only for f = g. If half of g is like f and the rest is far
    away, that is 2/3. Values slightly above 1 are chance.
    """
    import numpy as np

    n = min(len(a), len(b))
    k = min(NEIGHBORS, n - 1)
    rng = np.random.default_rng(seed)
    both = np.concatenate([x[rng.permutation(len(x))[:n]] for x in (a, b)])
    both = both / np.linalg.norm(both, axis=1, keepdims=True)
    is_b = np.arange(2 * n) >= n
    crossings = 0
    for start in range(0, 2 * n, 1024):  # all similarities of 5,000 images each would take 400 MB
        rows = np.arange(start, min(start + 1024, 2 * n))
        similarity = both[rows] @ both.T
        similarity[np.arange(len(rows)), rows] = -np.inf  # an image is not its own neighbor
        neighbors = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        crossings += int((is_b[neighbors] != is_b[rows, None]).sum())
    return crossings / (2 * n * k) / (n / (2 * n - 1))


def overlap_of_halves(features: "np.ndarray", seed: int = 0) -> float:
    """The overlap of two random halves of one set: what chance makes of 1 with half as many images."""
    import numpy as np

    shuffled = features[np.random.default_rng(seed).permutation(len(features))]
    half = len(shuffled) // 2
    return overlap(shuffled[:half], shuffled[half:], seed)


# ---------------------------------------------------------------- t-SNE


def import_tsne():
    """scikit-learn's TSNE. Nothing else here needs that package."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise InputError("tsne needs scikit-learn: pip install scikit-learn") from None
    return TSNE


def is_from_tsne(path):
    """Whether a JSON file has the form of `describe`."""
    try:
        return read_json(path).keys() >= {"reference", "sets"}
    except InputError:
        return False


def tsne(args) -> None:
    """evaluate.py tsne: one plot of several features files, and their overlaps with the first one."""
    import numpy as np

    tsne_class = import_tsne()
    out = Path(args.file)
    if out.suffix != ".svg":
        raise InputError(f"--out {out} must end in .svg")
    check_place(out)
    positions = out.with_suffix(".json")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder, not a file")
    if positions.exists() and not is_from_tsne(positions):
        raise InputError(f"{positions} exists and is not from tsne; choose another --out")
    sets = read_sets(args.features)
    reference, *others = sets
    overlaps = [overlap_of_halves(reference.features)]
    overlaps += [overlap(reference.features, other.features) for other in others]
    everything = np.concatenate([s.features for s in sets])
    console.print_line(f"t-SNE of {len(everything)} images", "stderr")
    perplexity = min(PERPLEXITY, (len(everything) - 1) / 3)
    model = tsne_class(metric="cosine", init="pca", perplexity=perplexity, random_state=0)
    points = np.split(model.fit_transform(everything), np.cumsum([len(s.names) for s in sets])[:-1])

    header, rows = overlap_table(sets, overlaps)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in [header, *rows]:
        console.print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, draw(sets, points, overlaps))
    content = describe(sets, points, overlaps) | {"perplexity": perplexity}
    write_text(positions, json.dumps(content) + "\n")
    console.print_line(f"wrote {out} and {positions}")


def read_sets(paths):
    """Features files that fit together. They are called by their file names, or by their paths if two file
    names are equal."""
    if len(paths) > svg.NUM_COLORS:
        raise InputError(f"{len(paths)} features files, but a plot has at most {svg.NUM_COLORS}")
    sets = [read_features(path) for path in paths]
    if len({s.label for s in sets}) < len(sets):
        for path, image_set in zip(paths, sets):
            image_set.label = printable(str(Path(path).with_suffix("")))
    for path, image_set in zip(paths, sets):
        if paths.count(path) > 1:
            raise InputError(f"{path} is given twice")
        if image_set.kind != sets[0].kind:
            models = " and ".join(repr(s.settings["model"]) for s in (sets[0], image_set))
            raise InputError(f"{paths[0]} and {path} are from different vision towers (of {models}): "
                             "embed both with the same --model")  # fmt: skip
        if len(image_set.names) < FEWEST:
            raise InputError(f"{path}: {len(image_set.names)} images, but at least {FEWEST} are needed")
        if len(image_set.names) < ROUGH:
            console.warn(f"{path}: only {len(image_set.names)} images, so overlaps are rough estimates")
    return sets


def overlap_table(sets, overlaps):
    """(header, rows) of text cells."""
    header = ["images of", "count", f"overlap with {sets[0].label}"]
    rows = [[s.label, f"{len(s.names):,}", f"{value:.2f}"] for s, value in zip(sets, overlaps)]
    rows[0][2] += " (two random halves: 1 up to chance)"
    return header, rows


def describe(sets, points, overlaps):
    """The content of the .json file: what was plotted and computed, and where each image is in the plot."""
    records = []
    for s, value, coordinates in zip(sets, overlaps, points):
        places = {name: [round(float(c), 3) for c in xy] for name, xy in zip(s.names, coordinates)}
        overlap_name = "overlap" if records else "overlap_of_halves"
        records.append({"name": s.label, overlap_name: round(value, 4), **s.settings, "points": places})
    return {"reference": sets[0].label, "neighbors": NEIGHBORS, "sets": records}


def draw(sets, points, overlaps) -> str:
    """All sets in one frame (Figure 8); below it each set with the first one, as in Figure 14."""
    shorten = lambda label, size: label if len(label) <= size else f"{label[: size - 1]}…"
    groups = [[(float(x), float(y)) for x, y in xy] for xy in points]
    xs, ys = zip(*(xy for group in groups for xy in group))
    limits = min(xs), min(ys), max(xs), max(ys)
    width, side, margin = 960, 600, 20
    r = 2.5 if len(xs) <= 2500 else 1.8
    parts = svg.scatter(margin, 40, side, dict(enumerate(groups)), limits, r)
    x, y = margin + side + 30, 60
    for i, (s, value) in enumerate(zip(sets, overlaps)):
        count = f"{len(s.names):,} images"
        note = count if i == 0 else f"{count}, overlap {value:.2f}"
        parts += [svg.mark(x, y - 4, i, 5), svg.text(x + 16, y, shorten(s.label, 36), "start", "title"),
                  svg.text(x + 16, y + 18, note, "start", "soft")]  # fmt: skip
        y += 52
    notes = ["t-SNE of mean CLIP patch features.", "Only neighborhoods have a meaning,",
             "distances and areas do not.", f"Overlap with {shorten(sets[0].label, 24)}:",
             "1 = same distribution, 0 = disjoint."]  # fmt: skip
    parts += [svg.text(x - 6, y + 12 + 20 * i, note, "start", "soft") for i, note in enumerate(notes)]
    bottom = 40 + side + margin
    if len(sets) > 2:
        columns, gap = 4, 16
        panel = (width - 2 * margin - (columns - 1) * gap) / columns
        for i, (s, value) in enumerate(zip(sets[1:], overlaps[1:]), 1):
            row, column = divmod(i - 1, columns)
            left, top = margin + column * (panel + gap), bottom + 24 + row * (panel + 46)
            parts.append(svg.text(left, top - 8, f"{shorten(s.label, 18)}, overlap {value:.2f}", "start"))
            parts += svg.scatter(left, top, panel, {0: groups[0], i: groups[i]}, limits, 0.6 * r)
        bottom += (row + 1) * (panel + 46)
    described = f"Scatter plot of the images of {len(sets)} folders. Overlap with {sets[0].label}: "
    described += ", ".join(f"{s.label} {value:.2f}" for s, value in zip(sets[1:], overlaps[1:])) or "none"
    return svg.chart(width, round(bottom), "Images as the vision tower sees them", parts, described)
