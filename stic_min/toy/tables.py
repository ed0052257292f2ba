"""The study's results as study.json, study.md and two SVG plots.

Values are means over seeds ± sample standard deviation (omitted where all seeds agree exactly). Differences
are paired: both models have the same seed, and the sign is counted over the seeds.
"""

from html import escape
from statistics import mean, stdev

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
    "prompts": "STIC, rejected from bad prompts only",
    "corruptions": "STIC, rejected from corruptions only",
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

COLORS = ("#1f6feb", "#d1495b", "#2a9d5c", "#8a5cc2")
FONT = 'font-family="system-ui, sans-serif" font-size="13"'


def text(x, y, words, anchor="middle", **attributes):
    attributes = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT} {attributes}>{escape(words)}</text>'


def frame(width, height, title, parts):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><rect width="100%" height="100%" fill="white"/>'
        f'{text(width / 2, 24, title, font_weight="bold")}'
        + "\n".join(parts)
        + "</svg>\n"
    )


def axis(low, high, left, right, y_of):
    """Grid lines and labels at every 5%."""
    parts = []
    for value in range(low, high + 1, 5):
        y = y_of(value)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        label = f"{value}%" if value == high else str(value)
        parts.append(text(left - 8, y + 4, label, "end", fill="#555"))
    return parts


def scale(values, top, bottom):
    """Bounds around the values, multiples of 5, and the function from a value to its y coordinate."""
    low = int(min(values) // 5 * 5) - 5
    high = int(-(-max(values) // 5) * 5)
    return low, high, lambda value: bottom - (value - low) / (high - low) * (bottom - top)


def scale_plot(result):
    """Figure 7: F1 of captions by number of pairs; one dot per seed and a line through the means."""
    scales, models = result["scales"], result["models"]
    left, right = 60, 600
    top = 60 + 20 * len(models)
    bottom = top + 260
    values = [v["f1"] for variants in models.values() for name in ("base", *scales) for v in variants[name]]
    low, high, y_of = scale(values, top, bottom)
    x_of = lambda i: left + 30 + i * (right - left - 60) / (len(scales) - 1)
    parts = axis(low, high, left, right, y_of)
    parts += [text(x_of(i), bottom + 22, f"{n:,}") for i, n in enumerate(scales.values())]
    x_label = "preference pairs in stage 1 (at half the learning rate of the tables)"
    parts.append(text((left + right) / 2, bottom + 46, x_label))
    for number, (model, variants) in enumerate(models.items()):
        color = COLORS[number % len(COLORS)]
        y = 48 + 20 * number
        parts.append(f'<line x1="{left}" x2="{left + 30}" y1="{y}" y2="{y}" stroke="{color}" '
                     'stroke-width="2.5"/>')  # fmt: skip
        parts.append(text(left + 38, y + 4, f"after stage 1 on {model}; dashed: before", "start"))
        means = [mean(v["f1"] for v in variants[name]) for name in scales]
        points = " ".join(f"{x_of(i):.1f},{y_of(m):.1f}" for i, m in enumerate(means))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        for i, name in enumerate(scales):
            parts += [f'<circle cx="{x_of(i):.1f}" cy="{y_of(v["f1"]):.1f}" r="3" fill="{color}" '
                      'fill-opacity="0.5"/>' for v in variants[name]]  # fmt: skip
        base = y_of(variants["base"][0]["f1"])
        parts.append(f'<line x1="{left}" x2="{right}" y1="{base:.1f}" y2="{base:.1f}" stroke="{color}" '
                     'stroke-dasharray="5 4"/>')  # fmt: skip
    return frame(right + 40, bottom + 60, "Objects in captions, F1: more pairs, better captions", parts)


def stages_plot(result):
    """Figure 6 and Table 2: accuracy of base, stage 1 and STIC, direct and with DaR; one dot per seed."""
    labels = {"base": "base", "stage1": "stage 1", "stic": "STIC"}
    modes = {"direct": "direct", "dar": "with DaR"}
    models = result["models"]
    top, bottom, left = 80, 320, 60
    width = left + 30 + 310 * len(models)
    rows = [v for variants in models.values() for name in labels for v in variants[name]]
    values = [v[mode] for v in rows for mode in modes]
    low, high, y_of = scale(values, top, bottom)
    parts = axis(low, high, left, width - 20, y_of)
    for k, label in enumerate(modes.values()):
        parts.append(f'<rect x="{left + 10 + 90 * k}" y="38" width="14" height="14" fill="{COLORS[k]}"/>')
        parts.append(text(left + 30 + 90 * k, 50, label, "start"))
    for m, (model, variants) in enumerate(models.items()):
        for i, (name, label) in enumerate(labels.items()):
            center = left + 60 + 310 * m + 95 * i
            for k, mode in enumerate(modes):
                accuracies = [v[mode] for v in variants[name]]
                x = center - 36 + 38 * k
                y = y_of(mean(accuracies))
                parts.append(f'<rect x="{x}" y="{y:.1f}" width="34" height="{bottom - y:.1f}" '
                             f'fill="{COLORS[k]}" fill-opacity="0.75"/>')  # fmt: skip
                parts += [f'<circle cx="{x + 17}" cy="{y_of(value):.1f}" r="2.5" fill="#222"/>'
                          for value in accuracies]  # fmt: skip
                parts.append(text(x + 17, y_of(max(accuracies)) - 7, f"{mean(accuracies):.1f}"))
            parts.append(text(center, bottom + 20, label))
        parts.append(text(left + 155 + 310 * m, bottom + 42, model, fill="#555"))
    return frame(width, bottom + 60, "Questions answered right (the axis does not start at 0)", parts)


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
