"""The study's results as study.json, study.md and two SVG plots.

Values are means over seeds ± sample standard deviation (omitted where all seeds agree exactly). Differences
are paired: both models have the same seed, and the sign is counted over the seeds.
"""

from statistics import mean, stdev

from stic_min.report import svg
from stic_min.report.page import markdown
from stic_min.runtime.files import write_text
from stic_min.toy.files import write_json

ROWS = {
    "base": "base",
    "stage1": "stage 1 (DPO + alpha NLL)",
    "stic": "STIC (stages 1 and 2)",
    "positives": "positives only (Table 3)",
    "stage2only": "stage 2 only",
    "plain": "continued SFT, no descriptions",
    "prompts": "STIC, dispreferred from bad prompts only",
    "corruptions": "STIC, dispreferred from corruptions only",
    "alpha0": "STIC, alpha = 0",
}
COLUMNS = {
    "chair_i": "CHAIR_i ↓",
    "chair_s": "CHAIR_s ↓",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "signature": "absent signature objects ↓",
    "direct": "VQA direct",
    "dar": "VQA DaR",
    "gain": "DaR − direct",
}

# a claim, as (variant, value) minus (variant, value) and the sign that this difference should have
CLAIMS = [
    ("captions", "STIC hallucinates less than the base", ("stic", "chair_i"), ("base", "chair_i"), -1),
    ("captions", "STIC hallucinates less than positives only (Table 3)",
     ("stic", "chair_i"), ("positives", "chair_i"), -1),
    ("captions", "F1 with four times as many pairs (Figure 7)", ("scale0.5", "f1"), ("scale0.125", "f1"), 1),
    ("captions", "F1 with four times as many again", ("scale2", "f1"), ("scale0.5", "f1"), 1),
    ("VQA", "DaR on the base lowers its accuracy", ("base", "dar"), ("base", "direct"), -1),
    ("VQA", "DaR after STIC raises it (Table 2)", ("stic", "dar"), ("stic", "direct"), 1),
    ("VQA", "STIC with DaR over the base (Table 1)", ("stic", "dar"), ("base", "direct"), 1),
    ("VQA", "with DaR, stage 2 over stage 1 (Figure 6)", ("stic", "dar"), ("stage1", "dar"), 1),
    ("VQA", "with DaR, STIC over positives only (Table 3)", ("stic", "dar"), ("positives", "dar"), 1),
    ("VQA", "STIC without DaR over the base", ("stic", "direct"), ("base", "direct"), 1),
    ("VQA", "STIC with DaR over continued SFT, direct", ("stic", "dar"), ("plain", "direct"), 1),
    ("VQA", "STIC over stage 2 only, both with DaR", ("stic", "dar"), ("stage2only", "dar"), 1),
]  # fmt: skip


def spread(values, signed=False):
    form = "{:+.1f}" if signed else "{:.1f}"
    text = form.format(mean(values))
    return text if len(set(values)) == 1 else f"{text} ± {stdev(values):.1f}"


def main_table(variants):
    rows = [
        [label, *(spread([v[key] for v in variants[name]], key == "gain") for key in COLUMNS)]
        for name, label in ROWS.items()
    ]
    return markdown(["", *COLUMNS.values()], rows)


def claims_table(models):
    rows = []
    for kind, text, (a, value_a), (b, value_b), sign in CLAIMS:
        cells = []
        for variants in models.values():
            differences = [x[value_a] - y[value_b] for x, y in zip(variants[a], variants[b])]
            agreement = f"{sum(d * sign > 0 for d in differences)} of {len(differences)}"
            cells += [spread(differences, signed=True), "one base" if a == b == "base" else agreement]
        rows.append([kind, text, "−" if sign < 0 else "+", *cells])
    columns = [column for name in models for column in (name, "seeds that agree")]
    return markdown(["", "claim", "sign", *columns], rows)


def types_table(variants):
    columns = [("base", "direct"), ("base", "dar"), ("stic", "direct"), ("stic", "dar"), ("plain", "direct")]
    kinds = [key.removeprefix("direct ") for key in variants["base"][0] if key.startswith("direct ")]
    cells = lambda kind: (spread([v[f"{mode} {kind}"] for v in variants[name]]) for name, mode in columns)
    rows = [[kind, *cells(kind)] for kind in kinds]
    return markdown(["question", "base", "base, DaR", "STIC", "STIC, DaR", "continued SFT"], rows)


def scale_table(scales, variants):
    rows = [
        [f"{n:,}", *(spread([v[key] for v in variants[name]]) for key in ("f1", "chair_i", "signature"))]
        for name, n in scales.items()
    ]
    header = ["pairs, at half the learning rate", "F1", "CHAIR_i ↓", "absent signature objects ↓"]
    return markdown(header, rows)


# ---------------------------------------------------------------- plots, as SVG


def plot_area(left, top, right, places, values):
    """Axes with places 0, 1, ... for groups on x, and the values, in percent, on y."""
    y_ticks = svg.ticks(min(values) - 5, max(values))
    return svg.Axes(left, top, right, top + 240, [-0.5, places - 0.5], y_ticks)


def scale_plot(result):
    """Figure 7: F1 of captions by number of pairs; one dot per seed and a line through the means."""
    scales, models = result["scales"], result["models"]
    values = [v["f1"] for variants in models.values() for name in ("base", *scales) for v in variants[name]]
    axes = plot_area(60, 50 + 20 * len(models), 600, len(scales), values)
    names = [f"after stage 1 on {model}; dashed: before" for model in models]
    parts = axes.grid("%") + svg.legend(60, 50, names, column=True)
    parts += [svg.text(axes.x(i), axes.bottom + 22, f"{n:,}") for i, n in enumerate(scales.values())]
    x_title = "preference pairs in stage 1 (at half the learning rate of the tables)"
    parts.append(svg.text(330, axes.bottom + 46, x_title, kind="soft"))
    for number, variants in enumerate(models.values()):
        color = f"c{number % svg.NUM_COLORS}"
        means = [mean(v["f1"] for v in variants[name]) for name in scales]
        base = axes.y(variants["base"][0]["f1"])
        parts.append(svg.line([(axes.left, base), (axes.right, base)], f"{color} dashed"))
        parts.append(svg.line([(axes.x(i), axes.y(value)) for i, value in enumerate(means)], color))
        parts += [svg.dot(axes.x(i), axes.y(v["f1"]), color) for i, name in enumerate(scales)
                  for v in variants[name]]  # fmt: skip
    title = "Objects in captions, F1: more pairs, better captions"
    return svg.chart(640, axes.bottom + 60, title, parts)


def stages_plot(result):
    """Figure 6 and Table 2: accuracy of base, stage 1 and STIC, direct and with DaR; one dot per seed."""
    labels = {"base": "base", "stage1": "stage 1", "stic": "STIC"}
    modes = {"direct": "direct", "dar": "with DaR"}
    models = result["models"]
    rows = [v for variants in models.values() for name in labels for v in variants[name]]
    width = 80 + 310 * len(models)
    places = 3.4 * len(models) - 0.4  # three per model, with a gap between models
    axes = plot_area(60, 80, width - 20, places, [v[mode] for v in rows for mode in modes])
    parts = axes.grid("%") + svg.legend(60, 50, list(modes.values()))
    for m, (model, variants) in enumerate(models.items()):
        for i, (name, label) in enumerate(labels.items()):
            center = axes.x(3.4 * m + i)
            for k, mode in enumerate(modes):
                accuracies = [v[mode] for v in variants[name]]
                x, y = center - 36 + 38 * k, axes.y(mean(accuracies))
                parts.append(svg.rectangle(x, y, 34, axes.bottom - y, f"c{k} bar"))
                parts += [svg.dot(x + 17, axes.y(value), "ink") for value in accuracies]
                parts.append(svg.text(x + 17, axes.y(max(accuracies)) - 7, f"{mean(accuracies):.1f}"))
            parts.append(svg.text(center, axes.bottom + 20, label))
        parts.append(svg.text(axes.x(3.4 * m + 1), axes.bottom + 42, model, kind="soft"))
    title = "Questions answered correctly (the axis does not start at 0)"
    return svg.chart(width, axes.bottom + 60, title, parts)


def write(out, result):
    """Writes study.json, study.md and the plots to `out`, and prints the tables."""
    first, last, pairs = result["seeds"][0], result["seeds"][-1], result["images"]
    parts = [
        f"{result['test_images']} pictures of the {result['split']} split, seeds {first} to {last}, "
        f"{pairs} pairs; in %, mean ± standard deviation over the seeds."
    ]
    for name, variants in result["models"].items():
        parts += [f"**{name}**", main_table(variants), types_table(variants)]
        parts += [scale_table(result["scales"], variants)]
    parts += ["**Paired differences**", claims_table(result["models"])]
    report = "\n\n".join(parts) + "\n"
    write_json(out / "study.json", result)
    write_text(out / "study.md", report)
    write_text(out / "pairs.svg", scale_plot(result))
    write_text(out / "stages.svg", stages_plot(result))
    print(f"{report}\nwrote study.json, study.md, pairs.svg and stages.svg to {out}")
