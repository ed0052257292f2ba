"""The study's results as study.json, study.md and two SVG plots.

A figure is a mean over seeds ± its sample standard deviation (none where all seeds agree to the digit). A difference is
between two models of the same seed, and its sign is counted over the seeds.
"""

import json
from statistics import mean, stdev

from stic_min.toy import world

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
    "chair_i": "CHAIR_i ↓", "chair_s": "CHAIR_s ↓", "precision": "precision", "recall": "recall", "f1": "F1",
    "signature": "absent signature objects ↓", "direct": "VQA direct", "dar": "VQA DaR", "gain": "DaR − direct",
}  # fmt: skip

# claim of the paper or the exploration, (variant, value) minus (variant, value), and the sign it should have
CLAIMS = [
    ("captions", "STIC hallucinates less than the base", ("stic", "chair_i"), ("base", "chair_i"), -1),
    (
        "captions",
        "STIC hallucinates less than positives only (Table 3)",
        ("stic", "chair_i"),
        ("positives", "chair_i"),
        -1,
    ),
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
]


def spread(values, signed=False):
    form = "{:+.1f}" if signed else "{:.1f}"
    text = form.format(mean(values))
    return text if len(set(values)) == 1 else f"{text} ± {stdev(values):.1f}"


def markdown(header, rows):
    return "\n".join(["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]])


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
            agree = sum(d * sign > 0 for d in differences)
            cells += [spread(differences, signed=True), f"{agree} of {len(differences)}"]
        rows.append([kind, text, "−" if sign < 0 else "+", *cells])
    return markdown(["", "claim", "sign", *(cell for name in models for cell in (name, "seeds that agree"))], rows)


def types_table(variants):
    columns = [("base", "direct"), ("base", "dar"), ("stic", "direct"), ("stic", "dar"), ("plain", "direct")]
    rows = [
        [kind, *(spread([v[f"{mode} {kind}"] for v in variants[name]]) for name, mode in columns)]
        for kind in sorted(world.QUESTIONS)
    ]
    return markdown(["question", "base", "base, DaR", "STIC", "STIC, DaR", "continued SFT"], rows)


def scale_table(scales, variants):
    rows = [
        [f"{n:,}", *(spread([v[key] for v in variants[name]]) for key in ("f1", "chair_i", "signature"))]
        for name, n in scales.items()
    ]
    return markdown(["pairs", "F1", "CHAIR_i ↓", "absent signature objects ↓"], rows)


# ---------------------------------------------------------------- plots, as SVG

COLORS = ("#1f6feb", "#d1495b", "#2a9d5c", "#8a5cc2")
FONT = 'font-family="system-ui, sans-serif" font-size="13"'


def text(x, y, words, anchor="middle", **more):
    more = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT} {more}>{words}</text>'


def frame(width, height, title, parts):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="white"/>{text(width / 2, 24, title, font_weight="bold")}'
        + "\n".join(parts)
        + "</svg>\n"
    )


def axis(low, high, step, left, right, y_of, unit="%"):
    parts = []
    for i in range(round((high - low) / step) + 1):
        value = low + i * step
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}" stroke="#ddd"/>')
        parts.append(
            text(
                left - 8,
                y_of(value) + 4,
                f"{value:g}{unit if i == round((high - low) / step) else ''}",
                "end",
                fill="#555",
            )
        )
    return parts


def scale_plot(result):
    """Figure 7: F1 of the captions against the number of pairs, a dot a seed and a line through the means."""
    scales, width, height, left, right, top, bottom = result["scales"], 640, 380, 60, 470, 45, 320
    all_values = [v["f1"] for variants in result["models"].values() for name in scales for v in variants[name]]
    all_values += [variants["base"][0]["f1"] for variants in result["models"].values()]
    low, high = min(all_values) // 5 * 5, 100
    x_of = lambda i: left + 30 + i * (right - left - 60) / (len(scales) - 1)
    y_of = lambda v: bottom - (v - low) / (high - low) * (bottom - top)
    parts = axis(low, high, 5, left, right, y_of)
    parts += [text(x_of(i), bottom + 22, f"{n:,}") for i, n in enumerate(scales.values())]
    parts.append(text((left + right) / 2, bottom + 46, "preference pairs in stage 1"))
    for (model, variants), color in zip(result["models"].items(), COLORS):
        means = [mean(v["f1"] for v in variants[name]) for name in scales]
        points = " ".join(f"{x_of(i):.1f},{y_of(m):.1f}" for i, m in enumerate(means))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{x_of(i):.1f}" cy="{y_of(v["f1"]):.1f}" r="3" fill="{color}" fill-opacity="0.5"/>'
            for i, name in enumerate(scales)
            for v in variants[name]
        ]
        base = y_of(variants["base"][0]["f1"])
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{base:.1f}" y2="{base:.1f}" stroke="{color}" stroke-dasharray="5 4"/>'
        )
        parts.append(text(right + 8, y_of(means[-1]) + 4, f"stage 1 on {model}", "start", fill=color))
        parts.append(text(right + 8, base + 4, f"{model} itself", "start", fill=color))
    return frame(width, height, "Objects in captions, F1: more pairs, better captions", parts)


def stages_plot(result):
    """Figure 6 and Table 2: accuracy on questions of base, stage 1 and STIC, direct and with DaR; a dot a seed."""
    names, modes = ("base", "stage1", "stic"), (("direct", "direct"), ("dar", "describe, then respond"))
    models, width, height, top, bottom, left = result["models"], 120 + 300 * len(result["models"]), 380, 75, 310, 60
    values = [v[mode] for variants in models.values() for name in names for v in variants[name] for mode, _ in modes]
    low, high = min(values) // 5 * 5 - 5, -(-max(values) // 5) * 5
    y_of = lambda v: bottom - (v - low) / (high - low) * (bottom - top)
    parts = axis(low, high, 5, left, width - 30, y_of)
    for k, (_, label) in enumerate(modes):
        parts.append(f'<rect x="{left + 10 + 110 * k}" y="38" width="14" height="14" fill="{COLORS[k]}"/>')
        parts.append(text(left + 30 + 110 * k, 50, label, "start"))
    for m, (model, variants) in enumerate(models.items()):
        for i, name in enumerate(names):
            for k, (mode, _) in enumerate(modes):
                x, own = left + 30 + 300 * m + 90 * i + 32 * k, [v[mode] for v in variants[name]]
                y = y_of(mean(own))
                parts.append(
                    f'<rect x="{x}" y="{y:.1f}" width="28" height="{bottom - y:.1f}" fill="{COLORS[k]}" '
                    'fill-opacity="0.75"/>'
                )
                parts += [f'<circle cx="{x + 14}" cy="{y_of(v):.1f}" r="2.5" fill="#222"/>' for v in own]
                parts.append(
                    text(x + 14, min(y, *(y_of(v) for v in own)) - 6, f"{mean(own):.1f}", font_size_adjust="none")
                )
            parts.append(
                text(
                    left + 60 + 300 * m + 90 * i,
                    bottom + 20,
                    {"base": "base", "stage1": "stage 1", "stic": "STIC"}[name],
                )
            )
        parts.append(text(left + 150 + 300 * m, bottom + 44, model, fill="#555"))
    return frame(width, height, "Questions answered right (axis does not start at 0)", parts)


def write(out, result):
    """Files in `out`; prints the tables."""
    first, last, pairs = result["seeds"][0], result["seeds"][-1], result["images"]
    parts = [
        f"{result['test_images']} pictures of the {result['split']} split, seeds {first} to {last}, {pairs} pairs; "
        "in %, mean ± standard deviation over the seeds."
    ]
    for name, variants in result["models"].items():
        parts += [f"**{name}**", main_table(variants), types_table(variants), scale_table(result["scales"], variants)]
    parts += ["**Paired differences**", claims_table(result["models"])]
    report = "\n\n".join(parts) + "\n"
    (out / "study.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "study.md").write_text(report)
    (out / "pairs.svg").write_text(scale_plot(result))
    (out / "stages.svg").write_text(stages_plot(result))
    print(f"{report}\nwrote study.json, study.md, pairs.svg and stages.svg to {out}")
