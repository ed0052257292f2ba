"""One preference pair as HTML: both images, both prompts, and both responses with the words that differ."""

import difflib
import re
import textwrap
from dataclasses import dataclass
from html import escape

from stic_min import InputError
from stic_min.data import Pair
from stic_min.report.gallery import Images, image_tag
from stic_min.report.images import find_image, thumbnail
from stic_min.report.page import math, number
from stic_min.runtime.files import brief, check_text
from stic_min.text import without_marks

SIDE = 192  # pixels of a thumbnail
LONG_PROMPT = 160  # characters; longer prompts are folded
LONG_COMPARISON = 100_000  # words of one response times words of the other
KINDS = {  # how the dispreferred response came about
    "prompt": "misleading prompt",
    "low_resolution": "low resolution",
    "color_jitter": "color jitter",
    "corrupted": "other corruption",
    "unknown": "unknown",
    "clean": "captioning prompt alone",
}

STYLE = """
.pairs { --dispreferred: #fbe3b9; } .pairs .list { display: block; }
@media (prefers-color-scheme: dark) { .pairs { --dispreferred: #57410f; } }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4em 2em; border-top: 1px solid var(--line);
  margin-top: 1.2em; padding-top: .8em; }
.pair:first-child { border-top: 0; margin-top: 0; }
.pair p { margin: 0; } .pair > p { grid-column: 1 / -1; } .pair .x { padding-bottom: .4em; }
.pair .name, .pair .origin { font-weight: 600; }
.pair .tag { font-size: .8em; font-weight: 400; border: 1px solid var(--gray); border-radius: 1em;
  padding: .05em .7em; margin-left: .4em; white-space: nowrap; }
.pair .tag.wrong { border-color: currentColor; }
.pair section { display: grid; grid-template-rows: subgrid; grid-row: span 4; gap: .4em; min-width: 0; }
.pair .seen { display: flex; gap: 1em; align-items: flex-start; }
.pair figure { flex: none; width: 192px; max-width: 45%; }
.pair .missing { display: flex; align-items: center; aspect-ratio: 1; padding: 1em; }
.pair .text { background: var(--panel); padding: .7em; }
.pair .rejected mark { background: var(--dispreferred); }
@media (max-width: 45em) {
  .pair { grid-template-columns: 1fr; } .pair section + section { margin-top: .8em; }
}
"""


@dataclass
class Entry:
    """A pair with what its record says about how it came about."""

    pair: Pair
    record: dict
    logps: tuple[float, float, float, float] | None = None  # of y_w and y_l under theta, then under theta_0

    @property
    def corruption(self) -> dict:
        """The recorded parameters of h; {} if there are none."""
        corruption = self.record.get("corruption")
        return corruption if isinstance(corruption, dict) else {}

    @property
    def kind(self) -> str:
        """The key of KINDS."""
        if self.corruption or self.record.get("image_corruption"):
            if not self.corruption and self.record.get("no_corruption"):
                return "clean"  # recorded as corrupted, as in the release, but generated from the clean image
            kind = self.corruption.get("kind")
            return kind if kind in ("low_resolution", "color_jitter") else "corrupted"
        return "prompt" if self.text("hallu_prompt") else "unknown"

    @property
    def corrupted(self) -> bool:
        return self.kind not in ("prompt", "clean", "unknown")

    @property
    def seed(self) -> int | None:
        """Of the corruption, which it replays."""
        seed = self.corruption.get("seed")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise InputError(f"{self.pair.where}: the corruption's seed is not a whole number in [0, 2^63)")
        return seed

    @property
    def equal(self) -> bool:
        return self.pair.chosen == self.pair.rejected

    @property
    def margin(self) -> float | None:
        """DPO's margin without beta: how much more likely training made y_w than y_l, in log p."""
        if self.logps is None:
            return None
        logp_w, logp_l, ref_logp_w, ref_logp_l = self.logps
        return (logp_w - ref_logp_w) - (logp_l - ref_logp_l)

    def text(self, name: str) -> str:
        """A text of the record; "" without one."""
        value = self.record.get(name)
        if not isinstance(value, str):
            return ""
        check_text(value, f"{self.pair.where}: {name}")
        return value.strip()


# ---------------------------------------------------------------- images


@dataclass
class View:
    """The images of a pair, as the model sees them; keys of `Images`."""

    clean: str = ""  # v; "" if it is missing
    corrupted: str = ""  # h(v); "" if both responses are about v, or if h(v) can't be replayed
    changed: bool = False  # the replayed corruption has other parameters than the recorded one


def view_of(entry: Entry, folders: list, images: Images) -> View:
    """Opens the image and replays its corruption. In pad mode, an image is the square that the model sees;
    small ones become larger by bicubic interpolation, like the model's input."""
    from stic_min.images import corrupt, open_image, pad_to_square

    seed = entry.seed
    try:
        image = open_image(find_image(entry.pair.image, folders))
    except InputError:
        return View()
    square = pad_to_square if entry.record.get("image_mode") == "pad" else lambda image: image
    small = lambda image: images.add(thumbnail(square(image), SIDE, enlarge=True))
    view = View(small(image))
    if seed is not None:
        corrupted, parameters = corrupt(image, seed)
        view.corrupted = small(corrupted)
        view.changed = any(entry.corruption.get(name) != value for name, value in parameters.items())
    return view


def image_html(letter, name, key, caption="") -> str:
    """key: "" shows a placeholder."""
    shown = image_tag(key, f"{letter}: {name}")
    if not key:
        shown = f"<div class=missing>no image {letter}: {escape(name)}</div>"
    return f"<figure>{shown}<figcaption>{math(letter)}{escape(caption)}</figcaption></figure>"


def corruption_text(corruption) -> str:
    """color jitter: brightness 0.585, hue 0.0221, hue first."""
    values = {name: value for name, value in corruption.items() if name not in ("kind", "seed")}
    order = values.pop("brightness_first", None)
    form = lambda value: number(value, ".3g") if isinstance(value, float) else brief(value)
    texts = [f"{brief(name).replace('_', ' ')} {form(value)}" for name, value in values.items()]
    if isinstance(order, bool):
        texts.append("brightness first" if order else "hue first")
    kind = brief(corruption.get("kind", "corrupted")).replace("_", " ")
    return f"{kind}: {', '.join(texts)}" if texts else kind


# ---------------------------------------------------------------- text


def count_words(text: str) -> int:
    return len(text.split())


def marked(chosen: str, rejected: str) -> tuple[str, str]:
    """Both responses as HTML, with the words marked that the other one does not have at this place."""
    tokens = [re.findall(r"\s*(?:\w+(?:['’-]\w+)*|[^\w\s])", text) for text in (chosen, rejected)]
    stripped = [[token.strip() for token in side] for side in tokens]
    # Long responses that repeat the same words would take minutes; then frequent words are no anchors.
    is_long = len(stripped[0]) * len(stripped[1]) > LONG_COMPARISON
    matcher = difflib.SequenceMatcher(None, *stripped, autojunk=is_long)
    html = ["", ""]
    for tag, *bounds in matcher.get_opcodes():
        for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
            run = "".join(tokens[side][start:end])
            text = run.lstrip()
            if tag != "equal" and text:
                html[side] += f"{run[: len(run) - len(text)]}<mark>{escape(text)}</mark>"
            else:
                html[side] += escape(run)
    return html[0], html[1]


def prompt_html(label, text):
    """A prompt with its letter; a long one is folded."""
    if not text:
        return ""
    if len(text) <= LONG_PROMPT:
        return f"<p>{label}: “{escape(text)}”</p>"
    beginning = textwrap.shorten(text, 60, placeholder=" …")
    return f"<details><summary>{label}: “{escape(beginning)}”</summary><p>“{escape(text)}”</p></details>"


def side_html(entry, side, distribution, image, prompt, text) -> str:
    """One response and what it was sampled from. distribution: in letters. The others are HTML."""
    i = ("chosen", "rejected").index(side)
    y, title = (("y_w", "Preferred"), ("y_l", "Dispreferred"))[i]
    response = getattr(entry.pair, side)
    facts = [f"{count_words(response):,} words, {len(response):,} characters"]
    if not getattr(entry.pair, f"{side}_stopped"):
        facts.append('<span class="wrong">cut off at the maximum length</span>')
    elif entry.text(f"{side}_finish") == "stop":
        facts.append("ended by itself")
    if entry.logps:
        after, before = entry.logps[i], entry.logps[i + 2]
        texts = [number(before, ".2f"), number(after, ".2f"), number(after - before, "+.2f")]
        facts.append("log p {} before training, {} after ({})".format(*texts))
    origin = f"{y} ~ {distribution}" if distribution else y
    return (
        f"<section class={side}><p class=origin>{title}: {math(origin)}</p>"
        f"<div class=seen>{image}<div>{prompt}</div></div><p class=text>{text}</p>"
        f"<p class=note>{'; '.join(facts)}</p></section>"
    )


def article(position: int, entry: Entry, view: View) -> str:
    """A pair as HTML. position: from 1."""
    pair = entry.pair
    text_w, text_l = marked(pair.chosen.strip(), pair.rejected.strip())
    image_w = image_html("v", pair.image, view.clean)
    prompt_w = prompt_html(f"step-by-step prompt {math('x_g')}", entry.text("chosen_prompt"))
    distributions = "p( · | v, x_g)", "p( · | v, x_b)"
    if entry.corrupted:
        distributions = "p( · | v, x_g)", "p( · | h(v), x)"
        caption = f", {corruption_text(entry.corruption)}"
        if view.changed:
            caption += "; replayed with other parameters than recorded"
        image_l = image_html("h(v)", pair.image, view.corrupted, caption)
        prompt_l = prompt_html(f"captioning prompt {math('x')}", entry.text("rejected_prompt"))
    elif entry.kind == "prompt":
        image_l = image_html("v", pair.image, view.clean, ", the same image")
        x_b = entry.text("rejected_prompt") or entry.text("hallu_prompt")
        prompt_l = prompt_html(f"misleading prompt {math('x_b')}", x_b)
    elif entry.kind == "clean":
        distributions = "p( · | v, x_g)", "p( · | v, x)"
        image_l = image_html("v", pair.image, view.clean, ", the same image, not corrupted")
        prompt_l = prompt_html(f"captioning prompt {math('x')}", entry.text("rejected_prompt"))
    else:
        distributions = "", ""
        image_l = prompt_l = ""
    tags = [] if entry.kind == "unknown" else [f"<span class=tag>{KINDS[entry.kind]}</span>"]
    if entry.margin is not None:
        tags.append(f"<span class=tag>margin {number(entry.margin, '+.2f')}</span>")
    if entry.equal:
        tags.append('<span class="tag wrong">equal responses</span>')
    return (
        f"<article class=pair><p class=name>{position:,}. {escape(pair.image)} {''.join(tags)}</p>"
        f"<p class=x>Trained as responses to {math('x')}: “{escape(without_marks(pair.prompt))}”</p>"
        + side_html(entry, "chosen", distributions[0], image_w, prompt_w, text_w)
        + side_html(entry, "rejected", distributions[1], image_l, prompt_l, text_l)
        + "</article>"
    )
