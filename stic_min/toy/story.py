"""The demo's page: STIC, explained by the images, responses and numbers of one run to a reader who knows
nothing of it. Its text is in story.html; what it claims follows from the run's scores."""

import re
from html import escape
from pathlib import Path

import torch

from stic_min.data import Infusion, parse_pair
from stic_min.images import open_image
from stic_min.loss import dpo_loss
from stic_min.report.curves import smoothing
from stic_min.report.logps import response_logps
from stic_min.report.page import data_uri, math, number, page, wide
from stic_min.report.svg import line_chart
from stic_min.runtime.files import read_json, read_records, read_text, write_text
from stic_min.scorers.common import wilson
from stic_min.text import DESCRIBE_PROMPT, GOOD_PROMPT, TEMPLATES, with_description, without_marks
from stic_min.toy import captions as toy_captions
from stic_min.toy import pair_figure, vqa

HALLUCINATED, CORRECT = 8, 4  # pictures with captions before and after, by the base model's caption
KINDS = {False: "misleading prompt", True: "corrupted image"}

# ---------------------------------------------------------------- pieces of HTML


def formulas(html):
    """HTML with its formulas, which are between dollar signs; a word after an underscore is a subscript."""
    return re.sub(r"\$([^$]+)\$", lambda match: math(match[1]), html)


def table(header, rows, label):
    """Cells are HTML."""
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    body = "".join(line("td", row) for row in rows)
    return formulas(wide(f"<table>{line('th', header)}{body}</table>", label))


def example(image, alt, *parts):
    picture = f'<img src="{data_uri(image)}" alt="{escape(alt)}">'
    return f'<div class="example">{picture}<div>{"".join(parts)}</div></div>'


def judged(text, is_right):
    return f'<span class="{"right" if is_right else "wrong"}">{escape(text)}</span>'


def marked(text, question):
    """A caption as HTML: present objects on green, absent ones struck out on red."""
    mark = lambda match: judged(match[0], match[0].lower() in question["objects"])
    return toy_captions.pattern(question["vocabulary"]).sub(mark, escape(text))


def difference(value, better, digits=1):
    """A change as HTML: green if it has the sign `better`, red if it has the other one."""
    if not round(value, digits):
        return f"{0:.{digits}f}"
    return judged(number(value, f"+.{digits}f"), value * better > 0)


def change(subject, before, after, better):
    """A sentence about two percentages that claims an improvement only if there is one. better: +1 or -1."""
    before, after = round(before, 1), round(after, 1)
    if before == after:
        return f"{subject} stayed at {before:.1f}%: no improvement."
    verdict = "" if (after - before) * better > 0 else ": no improvement"
    return f"{subject} {'rose' if after > before else 'fell'} from {before:.1f}% to {after:.1f}%{verdict}."


# ---------------------------------------------------------------- what fills the text's places


def scores_and_claims(scores):
    base, stage1, stic = scores.values()
    rows = []
    for i, (name, better) in enumerate({
        "hallucinated objects, CHAIR<sub>i</sub><br><small>↓ lower is better</small>": -1,
        "objects in captions, F1<br><small>↑ higher is better</small>": 1,
        "questions, asked directly<br><small>↑ higher is better</small>": 1,
        "questions, after describing<br><small>↑ higher is better</small>": 1,
    }.items()):  # fmt: skip
        cells = [f"{row[i]:.1f}<br>{difference(row[i] - base[i], better)}" for row in (stage1, stic)]
        rows.append([name, f"{base[i]:.1f}", *cells])
    absent = "the share of objects mentioned in captions that are not in the picture"
    return {
        "scores": table(["in %", *map(escape, scores)], rows, "Scores"),
        "hallucinated": change(absent, base[0], stic[0], -1),
        "answered": change("Questions answered correctly after describing", base[3], stic[3], +1),
        "direct": change("Questions answered correctly when asked directly", base[2], stic[2], +1),
        "stage2": change("From stage 1 to stage 2, those after describing", stage1[3], stic[3], +1),
    }


def about_pairs(out, model, scenes):
    """Steps 1 and 2, from pairs.jsonl and stage1/."""
    pairs = [pair for _, pair in read_records(out / "pairs.jsonl")]
    settings = read_json(out / "stage1/run.json")
    absent = lambda pair, y: [name not in scenes[pair["image"]].names
                              for name in toy_captions.mentions(y, pair_figure.VOCABULARY)]  # fmt: skip
    absent_w, absent_l, cards, selected, counts = [], [], [], {}, {}
    for corrupted, kind in KINDS.items():
        group = [pair for pair in pairs if pair["image_corruption"] == corrupted]
        if not group:
            continue
        responses = [pair_figure.responses(pair) for pair in group]
        flags = [[absent(pair, y) for y in both] for pair, both in zip(group, responses)]
        absent_w += [flag for w, _ in flags for flag in w]
        absent_l += [flag for _, l in flags for flag in l]
        more = [sum(l) - sum(w) for w, l in flags]
        counts[kind] = [len(group), sum(d > 0 for d in more), sum(d == 0 for d in more),
                        sum(w == l for w, l in responses), sum(d < 0 for d in more)]  # fmt: skip

        pair = pair_figure.select(group, scenes)
        image = open_image(out / "unlabeled" / pair["image"])
        svgs = pair_figure.card_figures(pair, image, scenes[pair["image"]].names)
        x = escape(without_marks(pair["chosen"][0]["content"]))
        sees = formulas("Training sees the clean image $v$, both responses, and $x$ =")
        cards.append(f"<h3>A pair with a {kind}</h3>")
        cards.append(f'<div class="cards">{"".join(svgs)}</div><p>{sees} “{x}”</p>')
        selected[kind] = parse_pair("", pair)
    logps = response_logps([*selected.values()], [out / "unlabeled"], model, out / "stage1", "cpu")
    losses = [loss_table(f"The pair with a {kind}", values, settings)
              for kind, values in zip(selected, logps)]  # fmt: skip
    labels = ["pairs", "$y_l$ has more absent objects than $y_w$", "$y_l$ has as many",
              "– of these, with identical text", "$y_l$ has fewer"]  # fmt: skip
    share = lambda flags: f"{100 * sum(flags) / max(1, len(flags)):.0f}%"
    rows = [[label, *row] for label, row in zip(labels, zip(*counts.values()))]
    return {
        "pairs": "".join(cards),
        "counts": table(["", *counts], rows, "Pairs by kind"),
        "absent_w": share(absent_w),
        "absent_l": share(absent_l),
        "losses": "".join(losses),
        "careful_prompt": escape(GOOD_PROMPT),
        "beta": f"{settings['beta']:g}",
        "alpha": f"{settings['alpha']:g}",
        "batch_size": settings["batch_size"],
    } | training_curves(out)


def loss_table(title, logps, settings):
    """Eq. 4.1 for one pair, under the models before and after stage 1. logps: from `response_logps`."""
    after, before = torch.tensor(logps).view(2, 2)  # (2,) each: of y_w and of y_l
    ref_w, ref_l = before
    columns = []
    for w, l in (before, after):
        dpo = dpo_loss(w, l, ref_w, ref_l, settings["beta"])
        nll = -settings["alpha"] * w
        margin = settings["beta"] * ((w - ref_w) - (l - ref_l))
        columns.append([value.item() for value in (w, l, margin, dpo, nll, dpo + nll)])
    better = {"log $p_θ(y_w | v, x)$": 1, "log $p_θ(y_l | v, x)$": -1, "margin": 1, "$ℓ$(margin)": -1,
              "$−α$ log $p_θ(y_w | v, x)$": -1, "loss": -1}  # fmt: skip
    rows = [[name, number(before, ".2f"), number(after, ".2f"), difference(after - before, sign, 2)]
            for (name, sign), before, after in zip(better.items(), *columns)]  # fmt: skip
    return f"<div><h3>{title}</h3>{table(['', 'before, $θ_0$', 'after, $θ_1$', 'change'], rows, title)}</div>"


def training_curves(out):
    log = [record for _, record in read_records(out / "stage1/log.jsonl")]
    curves = {
        "Loss: its two terms": {"ℓ(margin)": "dpo", "−α log p of the preferred": "alpha_nll"},
        "Margin (pairs whose responses differ)": {"margin": "margin"},
        "log p of the preferred responses": {"log p": "logp_chosen"},
        "log p of the dispreferred responses": {"log p": "logp_rejected"},
    }
    charts = []
    for title, keys in curves.items():
        series = {name: [(r["step"], r[key]) for r in log if key in r] for name, key in keys.items()}
        if all(series.values()):  # without pairs whose responses differ, there is no margin
            charts.append(line_chart(title, series, zero=True, smooth=smoothing(len(log))))
    return {"steps": len(log), "curves": "".join(charts)}


def about_stage2(out):
    """Steps 3 and 4, from stic-descriptions.jsonl and instruct/."""
    descriptions = read_records(out / "stic-descriptions.jsonl")
    where, first = descriptions[0]
    instruction = Infusion(out / "instruct/instructions.json")(where, first)
    users, answers = zip(*instruction.turns)
    prompts = TEMPLATES[first["template"]].turns(users)
    turns = [f"{escape(p)} <u>{escape(a)}&lt;/s&gt;</u>" for p, a in zip(prompts, answers)]
    description = escape(without_marks(instruction.description))
    sequence = "".join(turns).replace(description, f'<span class="own">{description}</span>', 1)
    image = open_image(out / "instruct/images" / instruction.image)
    alt = "The picture that the conversation is about"
    infused = example(image, alt, f"<pre>{sequence}</pre>")
    return {"instructions": f"{len(descriptions):,}", "infused": infused}


def about_evaluation(out):
    """Step 5, and captions before and after, from dev/ and results/."""

    def read(name, key="question_id", value="text"):
        return {r[key]: r[value] for _, r in read_records(out / f"results/{name}.jsonl")}

    def picture(image, *parts):
        objects = ", ".join(scene_of[image]["objects"])
        return example(open_image(out / "dev" / image), f"Picture with {objects}", *parts)

    def caption(label, captions, question):
        text = captions[question["question_id"]]
        missed = sorted({*question["objects"]} - {*toy_captions.mentions(text, question["vocabulary"])})
        omitted = f'<p class="missed">not mentioned: {", ".join(missed)}</p>' if missed else ""
        return f"<p><small>{label}</small><br>{marked(text, question)}</p>{omitted}"

    captioned, questions = toy_captions.load(out / "dev"), vqa.load(out / "dev")
    scene_of = {question["image"]: question for question in captioned}
    before, after = read("toycaptions-base-direct"), read("toycaptions-stic-direct")
    direct, dar = read("toyvqa-stic-direct"), read("toyvqa-stic-dar")
    descriptions = read("toyvqa-stic-dar.descriptions", "image", "description")

    wrong = [q for q in captioned if 'class="wrong"' in marked(before[q["question_id"]], q)]
    right = [q for q in captioned if q not in wrong]
    shown = wrong[:HALLUCINATED] + right[:CORRECT]
    gallery = [picture(q["image"], caption("before", before, q), caption("after", after, q)) for q in shown]
    asked = f"<p><small>prompt</small><br>{escape(shown[0]['text'])}</p>"

    by_outcome = {(a, b): [] for a in (True, False) for b in (True, False)}
    for q in questions:
        outcome = tuple(vqa.is_right(texts[q["question_id"]], q["answer"]) for texts in (direct, dar))
        by_outcome[outcome].append(q)
    parts = []
    titles = {(False, True): "Right only after describing", (True, False): "Right only when asked directly"}
    for outcome, title in titles.items():
        for q in by_outcome[outcome][:1]:
            key, image = q["question_id"], q["image"]
            description = marked(without_marks(descriptions[image]), scene_of[image])
            parts += [f"<h3>{title}</h3>", picture(
                image,
                f"<p><small>asked directly</small></p><pre>{escape(q['text'])}</pre>"
                f"<p>Answer: {judged(direct[key], outcome[0])} (true: {escape(q['answer'])})</p>",
                f"<p><small>asked “{DESCRIBE_PROMPT}”, then with the description in the prompt</small></p>"
                f"<pre>{with_description(description, escape(q['text']))}</pre>"
                f"<p>Answer: {judged(dar[key], outcome[1])}</p>",
            )]  # fmt: skip
    num_right = len(by_outcome[True, True]) + len(by_outcome[False, True])  # after describing
    low, high = wilson(num_right / len(questions), len(questions))
    return {
        "problem": picture(shown[0]["image"], asked, caption("the base model's caption", before, shown[0])),
        "gallery": "".join(gallery),
        "num_wrong": min(HALLUCINATED, len(wrong)),
        "num_right": min(CORRECT, len(right)),
        "test_images": len(captioned),
        "questions": len(questions),
        "both": len(by_outcome[True, True]),
        "only_dar": len(by_outcome[False, True]),
        "only_direct": len(by_outcome[True, False]),
        "neither": len(by_outcome[False, False]),
        "answers": "".join(parts) or "<p>There is none.</p>",
        "accuracy": f"{100 * num_right / len(questions):.1f}",
        "low": f"{low:.1f}",
        "high": f"{high:.1f}",
    }


def write(out, model, scenes, scores):
    """Writes story.html to the demo's folder `out`.

    scenes: {name of an unlabeled picture: its Scene}. scores: {model: [CHAIR_i, F1, accuracy, accuracy with
    DaR]} of base, stage 1 and STIC, in percent.
    """
    values = {"images": f"{len(scenes):,}", **scores_and_claims(scores), **about_pairs(out, model, scenes),
              **about_stage2(out), **about_evaluation(out)}  # fmt: skip
    style, text = read_text(Path(__file__).with_suffix(".html")).split("</style>")
    body = re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), formulas(text))
    write_text(out / "story.html", page("STIC on a toy world", body, style.removeprefix("<style>")))
