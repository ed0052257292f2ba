"""One preference pair as an SVG: what the model saw, what it wrote, and what training makes of it."""

import io
import re
import textwrap
from html import escape

from stic_min.images import corrupt, open_image
from stic_min.runtime.files import write_text
from stic_min.text import without_marks
from stic_min.toy import world
from stic_min.toy.captions import mentions, pattern
from stic_min.toy.sheet import data_uri

VOCABULARY = world.all_objects()
WIDTH, CARD, MARGIN, PAD, PICTURE = 880, 412, 20, 20, 144  # PICTURE: its side
LINE, ADVANCE = 22, 8.4  # a response's line height and character width, in its monospaced font of 14 pixels
CARDS = {"chosen": ("Preferred", "#f1fbf4", "#9bdcae"), "rejected": ("Dispreferred", "#fff5f4", "#f5b5b0")}

STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
image { image-rendering: pixelated; }
.title { font-size: 17px; font-weight: 600; }
.note { font-size: 12.5px; fill: #59636e; }
.math { font: italic 16px Georgia, "Times New Roman", serif; }
.response text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.right { fill: #116329; font-weight: bold; } .wrong { fill: #a40e26; font-weight: bold; }
rect.right { fill: #d3f5dc; } rect.wrong { fill: #ffe1de; stroke: #d1242f; }
"""


def responses(pair):
    """(y_w, y_l) of a line of the pairs file."""
    return pair["chosen"][1]["content"], pair["rejected"][1]["content"]


def select(pairs, scenes):
    """The pair with the largest difference in hallucinated objects, the first of them on ties.

    Pairs with a hallucination prompt come before those with a corrupted image, whose wrong objects are
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
    words = re.sub(r"_(\w)([^_]*)", subscript, escape(words, quote=False))
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def box(x, y, width, height, fill, stroke):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{stroke}"/>'


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
    return f'<g class="response" id="{name}">{"".join(parts)}</g>'


def response_card(pair, name, x, lines, inset, image, labels, present):
    """The card of the response `name` (chosen or rejected), with its left edge at x.

    lines: the response's. inset: the height of its block. labels: of the image, of the prompt, and the
    distribution that the response was sampled from.
    """
    title, fill, stroke = CARDS[name]
    image_label, prompt_label, source = labels
    inner = x + PAD
    column = inner + PICTURE + 16
    top = MARGIN + 52
    below = top + PICTURE + 36
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    href = data_uri(png.getvalue())
    return [
        box(x, MARGIN, CARD, below + inset + PAD - MARGIN, fill, stroke),
        text(inner, MARGIN + 33, title, "title"),
        text(column, MARGIN + 33, source, "math"),
        f'<image x="{inner}" y="{top}" width="{PICTURE}" height="{PICTURE}" href="{href}"/>',
        text(inner, top + PICTURE + 20, image_label, "note"),
        text(column, top + 12, prompt_label, "note"),
        quoted(column, top + 36, pair[f"{name}_prompt"], f"{name} prompt"),
        box(inner, below, CARD - 2 * PAD, inset, "#ffffff", stroke),
        response_block(inner + 12, below + 23, lines, present, name),
    ]


def figure(pair, image, present):
    """image: the unlabeled image v. present: names of the objects in it."""
    labels_w = "unlabeled image v", "step-by-step prompt x_g", "y_w ~ p( · | v, x_g)"
    if pair["image_corruption"]:
        image_l, _ = corrupt(image, pair["corruption"]["seed"])
        kind = pair["corruption"]["kind"].replace("_", " ")
        labels_l = f"corrupted image h(v): {kind}", "captioning prompt x", "y_l ~ p( · | h(v), x)"
    else:
        image_l = image
        labels_l = "the same image v", "hallucination prompt x_b", "y_l ~ p( · | v, x_b)"
    lines_w, lines_l = map(response_lines, responses(pair))
    inset = LINE * max(len(lines_w), len(lines_l)) + 16
    y = MARGIN + 52 + PICTURE + 36 + inset + PAD + 16  # of the panel about training
    height = y + 118 + MARGIN
    inner = MARGIN + PAD
    column = inner + PICTURE + 16
    x = without_marks(pair["chosen"][0]["content"])
    note = (
        "Both responses are the toy model's own. Green: the object is in the image v. Red: it is not. "
        "STIC has no such labels."
    )
    parts = [
        box(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", "#d0d7de"),
        *response_card(pair, "chosen", MARGIN, lines_w, inset, image, labels_w, present),
        *response_card(pair, "rejected", WIDTH - MARGIN - CARD, lines_l, inset, image_l, labels_l, present),
        box(MARGIN, y, WIDTH - 2 * MARGIN, 118, "#f6f8fa", "#d0d7de"),
        text(inner, y + 32, "Training sees", "title"),
        text(column, y + 32, f"v, y_w, y_l and x = “{x}”"),
        text(inner, y + 65, "and learns", "title"),
        text(column, y + 65, "log p(y_w | v, x)  ↑", "math right"),
        text(column + 170, y + 65, "log p(y_l | v, x)  ↓", "math wrong"),
        text(column + 340, y + 65, "(Eq. 4.1)", "note"),
        text(inner, y + 98, note, "note"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}"><title>A preference pair: {escape(pair["image"])}</title><style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def write_figure(path, pairs, images, scenes):
    """The figure of the pair that `select` chooses. images: the folder. scenes: {image name: its Scene}."""
    pair = select(pairs, scenes)
    write_text(path, figure(pair, open_image(images / pair["image"]), scenes[pair["image"]].names))
