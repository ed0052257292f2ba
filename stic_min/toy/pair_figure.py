"""One preference pair as an SVG: what the model saw, what it wrote, and what training makes of it."""

import re
import textwrap
from html import escape

from stic_min.images import corrupt, open_image
from stic_min.report import svg
from stic_min.report.page import data_uri
from stic_min.runtime.files import write_text
from stic_min.text import without_marks
from stic_min.toy import world
from stic_min.toy.captions import mentions, pattern

VOCABULARY = world.all_objects()
WIDTH, CARD, MARGIN, PAD, PICTURE = 880, 412, 20, 20, 144  # PICTURE: its side
LINE, ADVANCE = 22, 8.4  # a response's line height and character width, in its monospaced font of 14 pixels
TITLES = {"chosen": "Preferred", "rejected": "Dispreferred"}

STYLE = """
.pair { --right: #116329; --right-back: #d3f5dc; --right-card: #f1fbf4; --right-edge: #9bdcae;
  --wrong: #a40e26; --wrong-back: #ffe1de; --wrong-card: #fff5f4; --wrong-edge: #f5b5b0; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) { .pair { --right: #7ee2a0; --right-back: #12381f; --right-card: #142219;
  --right-edge: #2a6b3f; --wrong: #ff9aa2; --wrong-back: #4a1519; --wrong-card: #271719;
  --wrong-edge: #8a3a3f; --panel: #1d232a; } }
.pair text { font-size: 14px; } .pair image { image-rendering: pixelated; }
.pair .title { font-size: 17px; } .pair .soft { font-size: 12.5px; }
.pair .math { font: italic 16px Georgia, "Times New Roman", serif; }
.pair .response text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.pair .right { fill: var(--right); } .pair .wrong { fill: var(--wrong); }
.pair .right, .pair .wrong { font-weight: bold; }
.pair rect { rx: 4px; } .pair rect.right { fill: var(--right-back); }
.pair rect.wrong { fill: var(--wrong-back); stroke: var(--wrong); }
.pair rect.card { rx: 8px; fill: var(--panel); stroke: var(--line); }
.pair rect.chosen { fill: var(--right-card); stroke: var(--right-edge); }
.pair rect.rejected { fill: var(--wrong-card); stroke: var(--wrong-edge); }
.pair rect.inset { fill: var(--paper); }
"""


def responses(pair):
    """(y_w, y_l) of a line of the pairs file."""
    return pair["chosen"][1]["content"], pair["rejected"][1]["content"]


def select(pairs, scenes):
    """The pair with the largest difference in hallucinated objects, the first of them on ties.

    Pairs with a misleading prompt come before those with a corrupted image, whose wrong objects are
    often right about the corrupted colors.
    """

    def rank(pair):
        present = scenes[pair["image"]].names
        y_w, y_l = ([name not in present for name in mentions(y, VOCABULARY)] for y in responses(pair))
        return not pair["image_corruption"], sum(y_l) - sum(y_w)

    return max(pairs, key=rank)


def text(x, y, words, kind=""):
    """A line of text; a letter after an underscore is a subscript."""
    subscript = r'<tspan dy="3" font-size="75%">\1</tspan><tspan dy="-3">\2</tspan>'
    return re.sub(r"_(\w)([^_<]*)", subscript, svg.text(x, y, words, "start", kind))


def quoted(x, y, prompt, kind):
    """A prompt in the column next to an image, cut after six lines or so."""
    lines = textwrap.wrap(f"“{textwrap.shorten(prompt, 150, placeholder=chr(0xA0) + '…')}”", 29)
    spans = [f'<tspan x="{x}" y="{y + 18 * i}">{escape(line)}</tspan>' for i, line in enumerate(lines)]
    return f'<text class="{kind}">{" ".join(spans)}</text>'


def response_lines(response):
    """One sentence per line, so that the two responses can be compared line by line; no mention is split."""
    joined = pattern(VOCABULARY).sub(lambda match: match[0].replace(" ", "\xa0"), response)
    width = int((CARD - 2 * PAD - 20) / ADVANCE)
    wrapped = [textwrap.wrap(sentence, width) for sentence in re.split(r"(?<=\.)\s+", joined)]
    return [line.replace("\xa0", " ") for lines in wrapped for line in lines]


def response_block(x, y, lines, present, name):
    """The lines of a response, with each mention of an object on green (present) or red (hallucinated)."""
    parts = []
    for i, line in enumerate(lines):
        baseline = y + LINE * i
        marked, end = "", 0
        for match in pattern(VOCABULARY).finditer(line):
            kind = "right" if match[0].lower() in present else "wrong"
            left, width = x + ADVANCE * match.start() - 2, ADVANCE * len(match[0]) + 4
            parts.append(f'<rect class="{kind}" x="{left:.1f}" y="{baseline - 14}" width="{width:.1f}" '
                         'height="19" rx="4"/>')  # fmt: skip
            marked += f'{escape(line[end : match.start()])}<tspan class="{kind}">{match[0]}</tspan>'
            end = match.end()
        # The length holds in any font, so that the rectangles fit.
        parts.append(f'<text x="{x}" y="{baseline}" textLength="{ADVANCE * len(line):.1f}" '
                     f'lengthAdjust="spacingAndGlyphs">{marked}{escape(line[end:])}</text>')  # fmt: skip
    return f'<g class="response {name}">{"".join(parts)}</g>'


def cards(pair, image, present):
    """{chosen, rejected: the parts of its card}, each with its upper left corner at (0, 0), and their height.

    image: the unlabeled image v. present: names of the objects in it.
    """
    labels = {"chosen": ("unlabeled image v", "step-by-step prompt x_g", "y_w ~ p( · | v, x_g)")}
    seen = {"chosen": image, "rejected": image}
    if pair["corruption"]:
        seen["rejected"], _ = corrupt(image, pair["corruption"]["seed"])
        kind = pair["corruption"]["kind"].replace("_", " ")
        labels["rejected"] = f"corrupted image h(v): {kind}", "captioning prompt x", "y_l ~ p( · | h(v), x)"
    elif pair["image_corruption"]:  # --no-corruption
        labels["rejected"] = "the same image v", "captioning prompt x", "y_l ~ p( · | v, x)"
    else:
        labels["rejected"] = "the same image v", "misleading prompt x_b", "y_l ~ p( · | v, x_b)"
    lines = dict(zip(TITLES, map(response_lines, responses(pair))))
    inset = LINE * max(map(len, lines.values())) + 16
    column, top = PAD + PICTURE + 16, 52
    below = top + PICTURE + 36
    height = below + inset + PAD

    def parts(name):
        image_label, prompt_label, source = labels[name]
        href = data_uri(seen[name], optimize=True)
        return [
            svg.rectangle(0.5, 0.5, CARD - 1, height - 1, f"card {name}"),
            text(PAD, 33, TITLES[name], "title"),
            text(column, 33, source, "math"),
            f'<image x="{PAD}" y="{top}" width="{PICTURE}" height="{PICTURE}" href="{href}"/>',
            text(PAD, top + PICTURE + 20, image_label, "soft"),
            text(column, top + 12, prompt_label, "soft"),
            quoted(column, top + 36, pair[f"{name}_prompt"], f"{name} prompt"),
            svg.rectangle(PAD, below, CARD - 2 * PAD, inset, f"card {name} inset"),
            response_block(PAD + 12, below + 23, lines[name], present, name),
        ]

    return {name: parts(name) for name in TITLES}, height


def group(parts, x=0, y=0):
    return f'<g class="pair" transform="translate({x} {y})">{"".join(parts)}</g>'


def card_figures(pair, image, present):
    """[SVG of the preferred response, SVG of the dispreferred one], to be arranged by a page."""
    parts, height = cards(pair, image, present)
    style = f"<style>{STYLE}</style>"
    spoken = {name: f"{TITLES[name]}: {y}" for name, y in zip(TITLES, responses(pair))}
    return [svg.chart(CARD, height, "", [style, group(parts[name])], spoken[name]) for name in TITLES]


def figure(pair, image, present):
    """The two cards side by side, above a panel about training; arguments as for `cards`."""
    parts, y = cards(pair, image, present)
    y += MARGIN + 16  # of the panel
    height = y + 118 + MARGIN
    inner = MARGIN + PAD
    column = inner + PICTURE + 16
    x = without_marks(pair["chosen"][0]["content"])
    note = (
        "Both responses are the toy model's own. Green: the object is in the image v. Red: it is not. "
        "STIC has no such labels."
    )
    panel = [
        svg.rectangle(MARGIN, y, WIDTH - 2 * MARGIN, 118, "card"),
        text(inner, y + 32, "Training sees", "title"),
        text(column, y + 32, f"v, y_w, y_l and x = “{x}”"),
        text(inner, y + 65, "and learns", "title"),
        text(column, y + 65, "log p(y_w | v, x)  ↑", "math right"),
        text(column + 170, y + 65, "log p(y_l | v, x)  ↓", "math wrong"),
        text(column + 340, y + 65, "(Eq. 4.1)", "soft"),
        text(inner, y + 98, note, "soft"),
    ]
    groups = [
        group(parts["chosen"], MARGIN, MARGIN), group(parts["rejected"], WIDTH - MARGIN - CARD, MARGIN),
        group(panel),
    ]  # fmt: skip
    label = f"A preference pair: {pair['image']}"
    return svg.chart(WIDTH, height, "", [f"<style>{STYLE}</style>", *groups], label)


def write_figure(path, pairs, images, scenes):
    """The figure of the pair that `select` chooses. images: the folder. scenes: {image name: its Scene}."""
    pair = select(pairs, scenes)
    write_text(path, figure(pair, open_image(images / pair["image"]), scenes[pair["image"]].names))
