"""The demo's page: STIC explained by the images, responses and numbers of one run, as one self-contained HTML
file for a reader who knows nothing of STIC. What the text claims follows from the run's scores."""

import re
from html import escape

from stic_min.data import Infusion, parse_pair
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.loss import dpo_loss
from stic_min.report.page import data_uri, page
from stic_min.report.svg import line_chart
from stic_min.runtime.files import read_json, read_records, write_text
from stic_min.scorers.common import wilson
from stic_min.text import DESCRIBE_PROMPT, GOOD_PROMPT, TEMPLATES, with_description, without_marks
from stic_min.toy import captions, pair_figure, vqa

HALLUCINATED, CORRECT = 8, 4  # pictures with captions before and after, by the base model's caption

STYLE = """
p, h3, .note, ol.flow { max-width: 62em; } h3 { font-size: 1em; margin: 1.6em 0 .4em; }
img { image-rendering: pixelated; width: 144px; height: 144px; max-width: 100%; }
.lead { font-size: 1.1em; } i { font-family: Georgia, "Times New Roman", serif; font-size: 1.05em; }
.result { border-left: 4px solid var(--blue); background: var(--panel); padding: .7em 1em; font-weight: 600; }
.letters { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19em, 100%), 1fr)); gap: .15em 2em;
  background: var(--panel); padding: .7em 1em; margin: .8em 0; font-size: .9em; }
.letters div { display: flex; gap: .7em; } .letters dt { min-width: 4em; } .letters dd { margin: 0; }
ol.flow { list-style: none; padding: 0; display: grid; grid-template-columns: repeat(5, 1fr); gap: 1.6em;
  max-width: none; }
.flow li { position: relative; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .7em .9em; font-size: .9em; }
.flow li + li::before { content: "→"; position: absolute; left: -1.45em; top: 40%; font-size: 1.1em; }
.flow b, .flow code { display: block; } .flow code { color: var(--soft); margin-top: .5em; }
.pair { display: flex; flex-wrap: wrap; gap: 1em; } .pair > svg { flex: 0 1 412px; min-width: 0; }
.equation { background: var(--panel); padding: .7em 1em; line-height: 2; }
.example { display: grid; grid-template-columns: 144px minmax(0, 1fr); gap: 1.2em; margin: 1em 0; max-width: 62em; }
.example pre { margin: 0; } pre .own { background: var(--own); } pre u { text-underline-offset: .25em; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25em, 100%), 1fr)); gap: 1.5em 2em; }
.gallery .example { margin: 0; grid-template-columns: 112px minmax(0, 1fr); font-size: .93em; }
.gallery img { width: 112px; height: 112px; } .gallery p { margin: 0 0 .4em; }
.wrong { text-decoration: line-through; } td .wrong { text-decoration: none; } td span { padding: 0 .3em; }
.missed { color: var(--soft); font-size: .9em; } td:first-child small { display: block; }
@media (max-width: 62em) { ol.flow { grid-template-columns: minmax(0, 1fr); }
  .flow li + li::before { content: "↓"; left: 50%; top: -1.5em; } }
@media (max-width: 30em) { .example { grid-template-columns: minmax(0, 1fr); }
  .gallery .example { grid-template-columns: 84px minmax(0, 1fr); } .gallery img { width: 84px; height: 84px; } }
"""

LETTERS = {
    "v": "an image without any label",
    "x": "a short captioning prompt",
    "x_g": "the careful prompt: look at this, then at that",
    "x_b": "a misleading prompt that asks for things that could be there",
    "h(v)": "the image, corrupted: low resolution or wrong colors",
    "y_w": "the preferred response, the winner",
    "y_l": "the dispreferred response, the loser",
    "p_θ(y | v, x)": "probability that a model with weights $θ$ responds $y$ to $v$ and $x$",
    "θ_0": "the base model, also the reference that stage 1 compares with",
    "θ_1": "the model after stage 1",
    "θ̂": "the model after stage 2: STIC",
    "β": "how strongly the margin counts; the paper writes λ",
    "α": "weight of the second term, which keeps $y_w$ likely",
    "ℓ(t)": "log(1 + e<sup>−t</sup>), small when $t$ is large",
    "x_q": "a question or an instruction",
    "y_d": "the model's own description of the image",
}

# ---------------------------------------------------------------- pieces of HTML


def prose(text):
    """HTML with formulas between dollar signs: a word after an underscore is a subscript."""
    formula = lambda match: "<i>" + re.sub(r"_(\w+)", r"<sub>\1</sub>", match[1]) + "</i>"
    return re.sub(r"\$([^$]+)\$", formula, text)


def letters(*names):
    """What the letters mean that a section uses."""
    rows = "".join(f"<div><dt>${name}$</dt><dd>{LETTERS[name]}</dd></div>" for name in names)
    return prose(f'<dl class="letters">{rows}</dl>')


def section(name, title, *parts):
    return f'<section id="{name}"><h2>{title}</h2>{"".join(parts)}</section>'


def table(header, rows):
    """Cells are HTML."""
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    body = "".join(line("td", row) for row in rows)
    return prose(f'<div class="wide" tabindex="0"><table>{line("th", header)}{body}</table></div>')


def example(image, alt, *parts):
    picture = f'<img src="{data_uri(image)}" alt="{escape(alt)}">'
    return f'<div class="example">{picture}<div>{"".join(parts)}</div></div>'


def marked(text, question):
    """A caption as HTML: present objects on green, absent ones struck out on red, omissions listed below."""
    present = set(question["objects"])
    names = captions.pattern(question["vocabulary"])
    mark = lambda match: f'<span class="{"right" if match[0].lower() in present else "wrong"}">{match[0]}</span>'
    missed = sorted(present - set(captions.mentions(text, question["vocabulary"])))
    omissions = f'<div class="missed">not mentioned: {", ".join(missed)}</div>' if missed else ""
    return names.sub(mark, escape(text)) + omissions


def signed(value, better, digits=1):
    """A change as HTML: green if it has the sign `better`, red if it has the other one."""
    number = f"{value:+.{digits}f}".replace("-", "−")
    if float(f"{value:.{digits}f}") == 0:
        return f"{0:.{digits}f}"
    return f'<span class="{"right" if value * better > 0 else "wrong"}">{number}</span>'


def number(value):
    return f"{value:.2f}".replace("-", "−")


def change(subject, before, after, better):
    """A sentence about two percentages; it claims an improvement only if there is one. better: +1 or -1."""
    difference = round(after, 1) - round(before, 1)
    if difference == 0:
        return f"{subject} stayed at {before:.1f}%: no improvement."
    verb = "rose" if difference > 0 else "fell"
    verdict = "" if difference * better > 0 else ": no improvement"
    return f"{subject} {verb} from {before:.1f}% to {after:.1f}%{verdict}."


# ---------------------------------------------------------------- the sections


def introduction(run):
    (_, chair, f1, direct, dar), *_, (_, chair_after, f1_after, direct_after, dar_after) = run.scores
    return prose(
        '<h1>STIC on a toy world</h1><p class="lead"><b>Self-Training on Image Comprehension</b> (Deng et al., 2024, '
        "arXiv 2405.19716) lets a vision-language model improve without new labels. The model describes each image "
        "twice, once as well as it can and once badly on purpose, and learns to prefer the first description.</p>"
        f"<p>This page follows one run from images to scores. Every image, response and number on it comes from "
        f"this run: {len(run.scenes):,} drawn pictures and a tiny LLaVA (1.3 million parameters).</p>"
        '<p class="result">In this run, '
        f'{change("the share of absent objects among those that captions mention", chair, chair_after, -1)} '
        f'{change("Questions answered correctly, with a description first,", dar, dar_after, +1)}</p>'
    )


def problem(run):
    question = next(iter(run.shown), None)
    caption = f'<p>Asked: “{escape(question["text"])}”</p><p>{marked(run.before[question["question_id"]], question)}</p>'
    return section(
        "problem", "The problem: a model that mentions what it expects",
        "<p>The base model learned from captions that mention a place's usual objects whether or not they are in the "
        "picture: a beach has a yellow star. Its own captions do the same. This is a <b>hallucination</b>. "
        '<span class="right">Green</span>: the object is in the picture. <span class="wrong">Red</span>: it is not. '
        "The marks are only for you: STIC does not know which captions are wrong.</p>",
        run.example(question, caption),
        prose("<p>What a model says depends on how it is asked. Of the objects that the base model mentions when asked "
              f"carefully, {run.absent(0):.0f}% are absent; when misled or shown a corrupted image, "
              f"{run.absent(1):.0f}%. STIC trains the model on this difference.</p>"),
    )  # fmt: skip


def recipe(run):
    steps = [
        ("pairs", "1. Pairs", "Images in, two responses to each out: a preferred $y_w$ and a dispreferred $y_l$, both by "
         "the base model $θ_0$.", "generate_pairs.py"),
        ("stage1", "2. Stage 1", "Training on the pairs makes $y_w$ more likely than $y_l$: $θ_0$ becomes $θ_1$.",
         "train_stage1.py"),
        ("stage2", "3. Descriptions", "$θ_1$ describes the images of some of its original training questions.",
         "generate_pairs.py --describe"),
        ("stage2", "4. Stage 2", "Fine-tuning on these questions, each with its description: $θ_1$ becomes $θ̂$.",
         "train_stage2.py"),
        ("dar", "5. Describe, respond", "At test time, $θ̂$ describes an image, reads its description and answers.",
         "evaluate.py --dar"),
    ]  # fmt: skip
    boxes = [f'<li><b><a href="#{name}">{title}</a></b>{prose(text)}<code>{script}</code></li>'
             for name, title, text, script in steps]  # fmt: skip
    return section("recipe", "The recipe: five steps", f'<ol class="flow">{"".join(boxes)}</ol>')


def pairs(run):
    titles = {False: "A misleading prompt", True: "A corrupted image"}
    parts, rows = [], []
    for corrupted, pair in run.examples.items():
        scene = run.scenes[pair["image"]]
        left, right = pair_figure.card_figures(pair, run.unlabeled(pair), scene.names)
        x = escape(without_marks(pair["chosen"][0]["content"]))
        parts += [f'<h3>{titles[corrupted]}</h3><div class="pair">{left}{right}</div>',
                  prose("<p>What training sees of it: the clean image $v$, both responses, and "), f"<i>x</i> = “{x}”</p>"]
    for corrupted in run.examples:
        wrong = [run.wrong(pair) for pair in run.pairs if pair["image_corruption"] == corrupted]
        equal = sum(y_w == y_l for y_w, y_l in map(pair_figure.responses, run.pairs_of(corrupted)))
        counts = sum(w < l for w, l in wrong), sum(w == l for w, l in wrong), sum(w > l for w, l in wrong)
        rows.append([titles[corrupted], f"{len(wrong)}", *map(str, counts), str(equal)])
    return section(
        "pairs", "Step 1: pairs of responses",
        letters("v", "x", "x_g", "x_b", "h(v)", "y_w", "y_l", "θ_0"),
        prose("<p>For each image, the base model writes $y_w$ to the careful prompt. It writes $y_l$ either to a "
              "misleading prompt or to a short prompt about a corrupted image; a coin decides.</p>"),
        *parts,
        "<p>Shown is, of each kind, the pair whose responses differ most in absent objects. Not all pairs are so clear. "
        "The toy world knows what is in each picture, so they can be counted; STIC cannot see these counts:</p>",
        table(["$y_l$ from", "pairs", "$y_l$ has more absent objects than $y_w$", "as many", "fewer", "equal responses"],
              rows),
        f"<details><summary>The whole careful prompt</summary><p>{escape(GOOD_PROMPT)}</p></details>",
    )  # fmt: skip


def stage1(run):
    beta, alpha = run.settings["beta"], run.settings["alpha"]
    tables = []
    for corrupted, pair in run.examples.items():
        (w_0, l_0), (w_1, l_1) = run.logps(pair)
        columns = []
        for w, l in ((w_0, l_0), (w_1, l_1)):
            term = dpo_loss(w, l, w_0, l_0, beta).item()
            columns.append([w.item(), l.item(), beta * ((w - w_0) - (l - l_0)).item(), term, -alpha * w.item()])
            columns[-1].append(columns[-1][3] + columns[-1][4])
        names = ["log $p_θ(y_w | v, x)$", "log $p_θ(y_l | v, x)$", "margin", "$ℓ$(margin)",
                 "$−α$ log $p_θ(y_w | v, x)$", "loss"]  # fmt: skip
        better = [1, -1, 1, -1, -1, -1]
        rows = [[name, number(a), number(b), signed(b - a, sign, 2)]
                for name, a, b, sign in zip(names, *columns, better)]  # fmt: skip
        kind = "corrupted image" if corrupted else "misleading prompt"
        tables.append(f"<div><h3>The pair with the {kind}</h3>"
                      + table(["", "before ($θ_0$)", "after ($θ_1$)", "change"], rows) + "</div>")  # fmt: skip
    curves = {
        "Loss per pair: its two terms": {"ℓ(margin)": "dpo", "−α log p of the preferred": "alpha_nll"},
        "Margin": {"margin": "margin"},
        "log p of the responses": {"preferred": "logp_chosen", "dispreferred": "logp_rejected"},
        "Share of pairs with a positive margin": {"accuracy": "accuracy"},
    }
    charts = []
    for title, keys in curves.items():
        series = {name: [(r["step"], r[key]) for r in run.log if key in r] for name, key in keys.items()}
        if all(series.values()):
            charts.append(line_chart(title, series, zero=True))
    return section(
        "stage1", "Step 2: stage 1 learns to prefer",
        letters("p_θ(y | v, x)", "θ_0", "θ_1", "β", "α", "ℓ(t)"),
        prose('<div class="equation wide" tabindex="0">loss = $ℓ$(margin) − $α$ log $p_θ(y_w | v, x)$<br>'
              "margin = $β$ [ (log $p_θ(y_w | v, x)$ − log $p_θ0(y_w | v, x)$) − "
              "(log $p_θ(y_l | v, x)$ − log $p_θ0(y_l | v, x)$) ]</div>"
              "<p>This is the paper's Eq. 4.1. The margin asks how much likelier the preferred response has become, "
              "compared with the dispreferred one. Training starts with $θ = θ_0$, so every margin is 0 and $ℓ$(0) = log 2 "
              "= 0.69. The second term asks that the preferred response is likely in its own right. Only LoRA weights and "
              f"the projector are trained; here $β$ = {beta:g} and $α$ = {alpha:g}. Log-probabilities are natural "
              "logarithms, summed over a response's tokens. For the two pairs above:</p>"),
        f'<div class="charts">{"".join(tables)}</div>',
        "<p>Green: the change has the direction that the loss asks for. Red: it does not.</p><h3>All pairs</h3>"
        f"<p>Each of the {len(run.log)} steps is an average over {run.settings['batch_size']} other pairs, so the curves "
        "are noisy. Margin and share count only pairs whose responses differ.</p>",
        f'<div class="charts">{"".join(charts)}</div>',
    )  # fmt: skip


def stage2(run):
    where, record = run.descriptions[0]
    infused = Infusion(run.out / "instruct/instructions.json")(where, record)
    users, answers = zip(*infused.turns)
    sequence = ""
    for prompt, answer in zip(TEMPLATES[run.settings["template"]].turns(users), answers):
        prompt = escape(prompt).replace(escape(infused.description), f'<span class="own">{escape(infused.description)}</span>')
        sequence += f"{prompt} <u>{escape(answer)}&lt;/s&gt;</u>"
    image = open_image(run.out / "instruct/images" / infused.image)
    return section(
        "stage2", "Steps 3 and 4: descriptions join the prompt",
        letters("θ_1", "θ̂", "x_q", "y_d"),
        prose("<p>The base model was once trained on questions $x_q$ with true answers. For "
              f"{len(run.descriptions):,} such conversations, $θ_1$ writes a description $y_d$ of the image, given a short "
              "prompt. Stage 2 trains on them again, with the description in front of the first question, so that the model "
              "learns to use its own descriptions. The first of them, exactly as trained:</p>"),
        example(image, "The picture that the conversation is about", f"<pre>{sequence}</pre>"),
        '<p class="note"><span class="own">Blue background</span>: the model\'s own description. <u>Underlined</u>: what '
        "the loss scores, −log p of the answers. &lt;image&gt; is the place of the picture.</p>",
    )  # fmt: skip


def describe_and_respond(run):
    direct, dar = run.answers("direct"), run.answers("dar")
    right = {name: {q["question_id"]: vqa.is_right(texts[q["question_id"]], q["answer"]) for q in run.questions}
             for name, texts in (("direct", direct), ("dar", dar))}  # fmt: skip
    outcome = lambda q: (right["direct"][q["question_id"]], right["dar"][q["question_id"]])
    titles = {(False, True): "Right only after describing", (True, False): "Right only when asked directly"}
    parts = []
    for kind, title in titles.items():
        if question := next((q for q in run.questions if outcome(q) == kind), None):
            key, description = question["question_id"], run.dar_descriptions[question["image"]]
            tick = lambda name, text: f'<span class="{"right" if right[name][key] else "wrong"}">{escape(text)}</span>'
            asked = escape(with_description(description, question["text"]))
            parts += [f"<h3>{title}</h3>", run.example(question, (
                f"<p>Question: {escape(question['text'])} True answer: {escape(question['answer'])}</p>"
                f"<p>Answered directly: {tick('direct', direct[key])}</p><p>Asked first: “{DESCRIBE_PROMPT}”</p>"
                f"<pre>{escape(description)}</pre><p>Asked then:</p><pre>{asked}</pre><p>Answer: {tick('dar', dar[key])}</p>"))]
    counts = {kind: sum(outcome(q) == kind for q in run.questions) for kind in ((True, True), *titles, (False, False))}
    both, gained, lost, neither = counts.values()
    return section(
        "dar", "Step 5: describe, then respond",
        letters("θ̂", "x_q", "y_d"),
        prose(f"<p>At test time, $θ̂$ first describes the image, then answers with its description $y_d$ in front of the "
              f"question $x_q$. Of {len(run.questions)} questions, it answers {both} correctly either way, {gained} only "
              f"after describing, {lost} only when asked directly, and {neither} not at all. The first of each kind:</p>"),
        *parts,
    )  # fmt: skip


def results(run):
    header = ["in %", "absent objects mentioned (CHAIR_i)<br>↓ lower is better",
              "objects in captions, F1<br>↑ higher is better", "questions, asked directly<br>↑ higher is better",
              "questions, described first<br>↑ higher is better"]  # fmt: skip
    (_, *base), *_ = run.scores
    rows = []
    for name, *values in run.scores:
        cells = [f"{value:.1f}" for value in values]
        if name != "base":
            better = (-1, 1, 1, 1)
            cells = [f"{cell} {signed(v - b, s)}" for cell, v, b, s in zip(cells, values, base, better)]
        rows.append([escape(name), *cells])
    low, high = wilson(base[2] / 100, len(run.questions))
    shown = "".join(
        run.example(q, *(f"<p><small>{name}</small><br>{marked(texts[q['question_id']], q)}</p>"
                         for name, texts in (("before", run.before), ("after", run.after))))
        for q in run.shown
    )  # fmt: skip
    return section(
        "results", "Before and after",
        table(header, rows),
        f"<p>Next to each score is its difference from the base model. CHAIR_i: share of the mentioned objects that are "
        "absent. F1: the mean of precision (mentioned objects that are present) and recall (present objects that are "
        f"mentioned). All on {len(run.captions)} new pictures with {len(run.questions)} questions. That few questions "
        f"leave room for chance: the 95% interval of the base model's {base[2]:.1f}% reaches from {low:.1f}% to "
        f"{high:.1f}%.</p>",
        "<h3>Captions of the base model and of STIC</h3>"
        f"<p>The first {HALLUCINATED} pictures whose caption by the base model mentions an absent object, and the first "
        f"{CORRECT} whose caption does not.</p>",
        f'<div class="gallery">{shown}</div>',
    )  # fmt: skip


def conclusion(run):
    (_, chair, *_, dar), (_, chair_1, *_, dar_1), (_, chair_2, *_, dar_2) = run.scores
    return section(
        "conclusion", "What this shows, and what it does not",
        f"<p>{change('In this run, the share of absent objects', chair, chair_2, -1)} The model had no labels for this, only "
        "its own responses; STIC can correct what a model expects, not what it cannot see. "
        f"{change('From stage 1 to stage 2, questions answered correctly with a description', dar_1, dar_2, +1)}</p>"
        "<p>The toy world is built so that the careful prompt is the better one. The run shows what STIC does where that "
        "holds, not that it holds for a given model. And it is a single run: stic_min/toy/README.md in the repository has "
        "five seeds, two base models and controls.</p>",
    )  # fmt: skip


# ---------------------------------------------------------------- the page


class Run:
    """What the sections show of a demo's folder, after the demo has finished."""

    def __init__(self, out, model, scenes, scores):
        self.out, self.scenes, self.scores = out, scenes, scores
        self.models = load_llava(model), load_llava(model, adapter=out / "stage1")
        self.pairs = [pair for _, pair in read_records(out / "pairs.jsonl")]
        self.settings = read_json(out / "stage1/run.json")
        self.log = [record for _, record in read_records(out / "stage1/log.jsonl")]
        self.descriptions = read_records(out / "stic-descriptions.jsonl")
        self.captions, self.questions = captions.load(out / "dev"), vqa.load(out / "dev")
        self.of_image = {question["image"]: question for question in self.captions}
        self.before = self.read("toycaptions-base-direct", "question_id", "text")
        self.after = self.read("toycaptions-stic-direct", "question_id", "text")
        self.dar_descriptions = self.read("toyvqa-stic-dar.descriptions", "image", "description")
        kinds = [kind for kind in (False, True) if self.pairs_of(kind)]
        self.examples = {kind: pair_figure.select(self.pairs_of(kind), scenes) for kind in kinds}
        wrong = [q for q in self.captions if self.hallucinates(q)]
        self.shown = wrong[:HALLUCINATED] + [q for q in self.captions if not self.hallucinates(q)][:CORRECT]

    def read(self, name, key, value):
        return {record[key]: record[value] for _, record in read_records(self.out / f"results/{name}.jsonl")}

    def answers(self, mode):
        return self.read(f"toyvqa-stic-{mode}", "question_id", "text")

    def hallucinates(self, question):
        """Whether the base model's caption mentions an absent object."""
        mentioned = captions.mentions(self.before[question["question_id"]], question["vocabulary"])
        return bool(set(mentioned) - set(question["objects"]))

    def pairs_of(self, corrupted):
        return [pair for pair in self.pairs if pair["image_corruption"] == corrupted]

    def unlabeled(self, pair):
        return open_image(self.out / "unlabeled" / pair["image"])

    def mentions(self, pair):
        """For each response, whether each mentioned object is absent."""
        present = self.scenes[pair["image"]].names
        return [[name not in present for name in captions.mentions(y, pair_figure.VOCABULARY)]
                for y in pair_figure.responses(pair)]  # fmt: skip

    def wrong(self, pair):
        return [sum(mentions) for mentions in self.mentions(pair)]

    def absent(self, i):
        """Share of absent objects among those that the i-th responses mention, in percent."""
        mentions = [absent for pair in self.pairs for absent in self.mentions(pair)[i]]
        return 100 * sum(mentions) / max(1, len(mentions))

    def example(self, question, *parts):
        if question is None:
            return ""
        objects = self.of_image[question["image"]]["objects"]
        return example(open_image(self.out / "dev" / question["image"]), f"Picture of {', '.join(objects)}", *parts)

    def logps(self, pair):
        """((log p(y_w), log p(y_l)) of the base model, the same after stage 1)."""
        parsed = parse_pair("", pair)
        for llava in self.models:
            prompt, image = llava.chat_prompt(parsed.prompt, images=0), self.unlabeled(pair)
            yield [llava.response_logp(prompt, y, [image]) for y in (parsed.chosen, parsed.rejected)]


def write(out, model, scenes, scores):
    """Writes story.html to the demo's folder `out`. scenes: {name of an unlabeled picture: its Scene}. scores:
    [[model, CHAIR_i, F1, accuracy, accuracy with DaR], ...] of base, stage 1 and STIC."""
    run = Run(out, model, scenes, scores)
    parts = introduction, problem, recipe, pairs, stage1, stage2, describe_and_respond, results, conclusion
    body = "".join(part(run) for part in parts)
    write_text(out / "story.html", page("STIC on a toy world", body, STYLE))
