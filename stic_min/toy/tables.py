"""The study's results as study.json, study.md and two SVG plots.

Values are means over seeds ± sample standard deviation (omitted where all seeds agree exactly). Differences
are paired: both sides have the same base model and seed. They come with a 95% interval (Student's t over the
seeds), and the seeds whose difference has the sign of the mean, or of the paper's claim, are counted. All
seeds are evaluated on the same pictures, so the intervals do not cover the choice of these.
"""

from statistics import mean, stdev

from stic_min.report import svg
from stic_min.report.page import markdown
from stic_min.runtime.files import write_text
from stic_min.toy.files import write_json

LABELS = {
    "base": "base",
    "stage1": "stage 1 (DPO + alpha NLL)",
    "stic": "STIC (stages 1 and 2)",
    "positives": "positives only (Table 3)",
    "stage2only": "stage 2 only",
    "plain": "continued SFT, no descriptions",
    "A": "released A: the model's own top tokens in place of the rejected text",
    "C": "released C: no corrupted images",
    "E": "released E: DaR describes without the image",
    "F": "released F: trained and asked in Vicuna's template",
    "H": "released H: projector frozen",
    "Q": "released Q: top-k 50",
    "released": "released: all of these (--preset released)",
    "prompts": "stage 1, dispreferred from bad prompts only",
    "corruptions": "stage 1, dispreferred from corruptions only",
    "alpha0": "stage 1, alpha = 0",
    "round2-theta0": "stage 1, second round, reference theta_0",
    "round3-theta0": "stage 1, third round, reference theta_0",
    "round2-previous": "stage 1, second round, reference: the first round's result",
    "round3-previous": "stage 1, third round, reference: the second round's result",
}
MAIN = ("base", "stage1", "stic", "positives", "stage2only", "plain")
OF_RELEASE = ("A", "C", "E", "F", "H", "Q", "released")  # compared with STIC
OF_CONTROLS = ("prompts", "corruptions", "alpha0")  # compared with stage 1, as are the rounds
OF_STAGE1 = (*OF_CONTROLS, "round2-theta0", "round3-theta0", "round2-previous",
             "round3-previous")  # fmt: skip
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
COMPARED = ("chair_i", "recall", "f1", "direct", "dar")
# Student's t, two-sided 95%, for 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)

# a claim, as (variant, value) minus (variant, value) and the sign that this difference should have
CLAIMS = [
    ("captions", "STIC hallucinates less than the base", ("stic", "chair_i"), ("base", "chair_i"), -1),
    ("captions", "STIC hallucinates less than positives only (Table 3)",
     ("stic", "chair_i"), ("positives", "chair_i"), -1),
    ("captions", "F1 with four times as many pairs (Figure 7)", ("scale0.5", "f1"), ("scale0.125", "f1"), 1),
    ("captions", "F1 with four times as many again", ("scale2", "f1"), ("scale0.5", "f1"), 1),
    ("VQA", "DaR on the base lowers its accuracy", ("base", "dar"), ("base", "direct"), -1),
    ("VQA", "DaR after STIC raises it (Table 2)", ("stic", "dar"), ("stic", "direct"), 1),
    ("VQA", "STIC with DaR over the base, direct (Table 1)", ("stic", "dar"), ("base", "direct"), 1),
    ("VQA", "the same, both with DaR", ("stic", "dar"), ("base", "dar"), 1),
    ("VQA", "the same, both direct", ("stic", "direct"), ("base", "direct"), 1),
    ("VQA", "with DaR, stage 2 over stage 1 (Figure 6)", ("stic", "dar"), ("stage1", "dar"), 1),
    ("VQA", "with DaR, STIC over positives only (Table 3)", ("stic", "dar"), ("positives", "dar"), 1),
    ("VQA", "STIC with DaR over continued SFT, direct", ("stic", "dar"), ("plain", "direct"), 1),
    ("VQA", "the same, both with DaR", ("stic", "dar"), ("plain", "dar"), 1),
    ("VQA", "STIC over stage 2 only, both with DaR", ("stic", "dar"), ("stage2only", "dar"), 1),
]  # fmt: skip


def spread(values, signed=False, digits=1):
    form = f"{{:+.{digits}f}}" if signed else f"{{:.{digits}f}}"
    text = form.format(mean(values))
    return text if len(set(values)) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def paired(differences, sign=0):
    """'-3.8 ± 0.2 (5/5)': mean, half of its 95% interval, and how many have the claim's sign (by default, the
    mean's); '0' if nothing differs."""
    if not any(differences) and not sign:
        return "0"
    center, n = mean(differences), len(differences)
    text = f"{center:+.1f}"
    if len(set(differences)) > 1:
        t = T95[min(n - 2, len(T95) - 1)]  # for more seeds, a little too wide
        text += f" ± {t * stdev(differences) / n**0.5:.1f}"
    agree = sum(d * (sign or center) > 0 for d in differences)
    return f"{text} ({agree}/{n})"


def main_table(variants):
    rows = [
        [LABELS[name], *(spread([v[key] for v in variants[name]], key == "gain") for key in COLUMNS)]
        for name in MAIN if name in variants
    ]  # fmt: skip
    return markdown(["", *COLUMNS.values()], rows)


def differences_table(variants, names, reference, labels=LABELS):
    """Each variant minus the reference, in percentage points."""
    cells = lambda name: [
        paired([a[key] - b[key] for a, b in zip(variants[name], variants[reference])]) for key in COMPARED
    ]
    rows = [[labels[name], *cells(name)] for name in names if name in variants]
    return markdown([f"minus {labels[reference]}", *(COLUMNS[key] for key in COMPARED)], rows)


def summary_table(models, names, reference, labels=LABELS):
    """Each variant minus the reference over all base models that have it: the mean of their means, the lowest
    and the highest of these, and the pairs of base and seed with the sign of that mean."""
    rows = []
    for name in names:
        cells = []
        for key in COMPARED:
            by_base = [
                [a[key] - b[key] for a, b in zip(variants[name], variants[reference])]
                for variants in models.values() if name in variants
            ]  # fmt: skip
            means = [mean(differences) for differences in by_base]
            center, every = mean(means), sum(by_base, [])
            agree = sum(d * center > 0 for d in every)
            cell = f"{center:+.1f} [{min(means):+.1f}, {max(means):+.1f}] ({agree}/{len(every)})"
            cells.append(cell if any(every) else "0")
        rows.append([labels[name], *cells])
    return markdown([f"minus {labels[reference]}", *(COLUMNS[key] for key in COMPARED)], rows)


def claims_table(models):
    rows = []
    for kind, text, (a, value_a), (b, value_b), sign in CLAIMS:
        cells = []
        for variants in models.values():
            if not {a, b} <= variants.keys():
                cells.append("")
                continue
            differences = [x[value_a] - y[value_b] for x, y in zip(variants[a], variants[b])]
            is_one = a == b == "base"  # one measurement, whatever the number of seeds
            cells.append(f"{differences[0]:+.1f} (one base)" if is_one else paired(differences, sign))
        rows.append([kind, text, "−" if sign < 0 else "+", *cells])
    return markdown(["", "claim", "sign", *models], rows)


def types_table(variants):
    columns = [("base", "direct"), ("base", "dar"), ("stic", "direct"), ("stic", "dar")]
    kinds = [key.removeprefix("direct ") for key in variants["base"][0] if key.startswith("direct ")]
    rows = []
    for kind in kinds:
        values = [[v[f"{mode} {kind}"] for v in variants[name]] for name, mode in columns]
        differences = [paired([a - b for a, b in zip(values[2 + i], values[i])]) for i in range(2)]
        rows.append([kind, *map(spread, values), *differences])
    header = ["question", "base", "base, DaR", "STIC", "STIC, DaR", "STIC − base, direct", "both with DaR"]
    return markdown(header, rows)


def template_table(variants):
    """What row F costs without any training."""
    keys = ("chair_i", "f1", "direct", "dar")
    rows = [[label, *(spread([v[key] for v in variants[name]]) for key in keys)]
            for label, name in (("its own template", "base"), ("Vicuna's", "baseF"))]  # fmt: skip
    return markdown(["base, asked in", *(COLUMNS[key] for key in keys)], rows)


def grid_table(variants, betas, rates):
    """CHAIR_i and F1 of stage 1 by beta and learning rate."""
    def cell(beta, lr):
        name = f"beta{beta:g}-lr{lr:g}"
        values = variants[name if name in variants else "stage1"]
        return f"{spread([v['chair_i'] for v in values])} / {spread([v['f1'] for v in values])}"

    rows = [[f"{beta:g}", *(cell(beta, lr) for lr in rates)] for beta in betas]
    return markdown(["CHAIR_i ↓ / F1; beta", *(f"lr {lr:g}" for lr in rates)], rows)


def rounding_table(variants, names):
    reference = [v["margin"] for v in variants[names[0]]]
    rows = []
    for name in names:
        margins = [v["margin"] for v in variants[name]]
        shares = [100 * a / b for a, b in zip(margins, reference) if b]
        rows.append([name, spread(margins, digits=4), spread(shares) if shares else ""])
    return markdown(["LoRA alone, at lr/100", "margin at the end of training", "% of fp32"], rows)


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
    scales, variants = result["scales"], next(iter(result["models"].values()))
    values = [v["f1"] for name in ("base", *scales) for v in variants[name]]
    axes = plot_area(60, 70, 600, len(scales), values)
    parts = axes.grid("%") + svg.legend(60, 50, ["after stage 1; dashed: before"])
    parts += [svg.text(axes.x(i), axes.bottom + 22, f"{n:,}") for i, n in enumerate(scales.values())]
    x_title = "preference pairs in stage 1 (at half the learning rate of the tables)"
    parts.append(svg.text(330, axes.bottom + 46, x_title, kind="soft"))
    means = [mean(v["f1"] for v in variants[name]) for name in scales]
    base = axes.y(variants["base"][0]["f1"])
    parts.append(svg.line([(axes.left, base), (axes.right, base)], "c0 dashed"))
    parts.append(svg.line([(axes.x(i), axes.y(value)) for i, value in enumerate(means)], "c0"))
    parts += [svg.dot(axes.x(i), axes.y(v["f1"]), "c0") for i, name in enumerate(scales)
              for v in variants[name]]  # fmt: skip
    title = "Objects in captions, F1, by number of preference pairs"
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
        f"{pairs} pairs; in %, mean ± standard deviation over the seeds. Differences: in percentage points, "
        "mean ± half of the 95% interval over the seeds, and the seeds that agree; 0: equal for every seed."
    ]
    for name, variants in result["models"].items():
        parts += [f"**{name}**", main_table(variants), differences_table(variants, MAIN[1:], "base")]
        parts += [types_table(variants), template_table(variants)]
        if "A" in variants:
            parts += [differences_table(variants, OF_RELEASE, "stic")]
            parts += [differences_table(variants, OF_STAGE1, "stage1")]
    name, variants = next(iter(result["models"].items()))
    parts += [f"**{name}, stage 1**", grid_table(variants, result["betas"], result["rates"])]
    parts += [scale_table(result["scales"], variants), rounding_table(variants, result["rounding"])]
    compared = {name: variants for name, variants in result["models"].items() if "A" in variants}
    parts += [f"**{', '.join(compared)}**: mean of their means [lowest, highest] (seeds that agree)"]
    parts += [summary_table(compared, OF_RELEASE, "stic"), summary_table(compared, OF_CONTROLS, "stage1")]
    parts += ["**The paper's claims**", claims_table(result["models"])]
    report = "\n\n".join(parts) + "\n"
    write_json(out / "study.json", result)
    write_text(out / "study.md", report)
    write_text(out / "pairs.svg", scale_plot(result))
    write_text(out / "stages.svg", stages_plot(result))
    print(f"{report}\nwrote study.json, study.md, pairs.svg and stages.svg to {out}")
