"""Preference pairs as a gallery: images as the model saw them, prompts, and how the two responses differ.

Works from a pairs file alone: the recorded seed of a corruption replays it. With an adapter, the page also
has log p of both responses before and after training.
"""

import copy
import difflib
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean

from stic_min import InputError
from stic_min.data import Pair, parse_pair
from stic_min.formats.image_folder import image_path
from stic_min.formats.records import read_kind
from stic_min.report import svg
from stic_min.report.gallery import STYLE as GALLERY_STYLE
from stic_min.report.gallery import gallery
from stic_min.report.options import Options, recorded_folder
from stic_min.report.page import data_uri, html_table, page
from stic_min.runtime import flags
from stic_min.runtime.console import Progress
from stic_min.runtime.files import brief, check_text, read_json, write_text
from stic_min.runtime.work import prefetch
from stic_min.text import TEMPLATES, without_marks

LIMIT = 10_000  # pairs in one gallery, about 15 KB each
SIDE = 192  # pixels of a thumbnail
LONG_PROMPT = 160  # characters; longer prompts are folded
MICRO_BATCH = 4  # pairs per forward pass
KINDS = {  # how the dispreferred response came about
    "prompt": "misleading prompt",
    "low_resolution": "low resolution",
    "color_jitter": "color jitter",
    "corrupted": "other corruption",
    "unknown": "unknown",
}
SETTINGS = ("model", "adapter", "fingerprint", "template", "image_mode", "dtype", "temperature", "top_p",
            "max_new_tokens", "seed", "images")  # fmt: skip
LETTERS = {
    "v": "the image as the model sees it",
    "h(v)": "a corrupted copy",
    "x": "captioning prompt",
    "x_g": "step-by-step prompt",
    "x_b": "misleading prompt",
    "y_w": "preferred response",
    "y_l": "dispreferred response",
}

STYLE = GALLERY_STYLE + """
.pairs { --w: #d5e7ff; --l: #fbe3b9; }
@media (prefers-color-scheme: dark) { .pairs { --w: #1b416f; --l: #57410f; } }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4em 2em; border-top: 1px solid var(--line);
  margin-top: 1.2em; padding-top: .8em; }
.pair:first-child { border-top: 0; margin-top: 0; }
.pair h3, .pair > p { grid-column: 1 / -1; } .pair h3 { font-size: 1em; } .pair .x { padding-bottom: .4em; }
.pair h3, .pair h4, .pair p { margin: 0; }
.pair .tag { font-size: .8em; font-weight: 400; border: 1px solid var(--gray); border-radius: 1em;
  padding: .05em .7em; margin-left: .4em; white-space: nowrap; }
.pair .tag.wrong { border-color: currentColor; border-radius: 1em; }
.pair section { display: grid; grid-template-rows: subgrid; grid-row: span 4; gap: .4em; min-width: 0; }
.pair .seen { display: flex; gap: 1em; align-items: flex-start; }
.pair figure { flex: none; width: 192px; max-width: 45%; }
.pair .missing { display: flex; align-items: center; aspect-ratio: 1; padding: 1em; font-size: .85em;
  background: var(--panel); }
.pair .response { white-space: pre-wrap; background: var(--panel); padding: .7em; }
.pairs mark { color: var(--ink); background: var(--w); border-radius: 3px; }
.pairs .rejected mark { background: var(--l); }
.pairs .settings { display: grid; gap: .2em 2em;
  grid-template-columns: repeat(auto-fill, minmax(8.5em, 1fr)); }
.pairs .settings div { border-top: 1px solid var(--line); padding: .2em 0; }
.pairs .settings dt { color: var(--soft); font-size: .85em; } .pairs dd { margin: 0; }
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
            kind = self.corruption.get("kind")
            return kind if kind in ("low_resolution", "color_jitter") else "corrupted"
        return "prompt" if self.text("hallu_prompt") else "unknown"

    @property
    def corrupted(self) -> bool:
        return self.kind not in ("prompt", "unknown")

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


def read_entries(path) -> list[Entry]:
    return [Entry(parse_pair(where, record), record) for where, record in read_kind(path, "pairs")]


def section(path: str | Path, options: Options) -> str:
    """The pairs of a file as an HTML fragment, for a page with STYLE; with --adapter, also log p."""
    entries = read_entries(path)
    folders = image_folders(path, entries, options)
    if options.adapter:
        pairs = [entry.pair for entry in entries]
        for entry, logps in zip(entries, response_logps(pairs, folders, options.model, options.adapter)):
            entry.logps = logps
    views = see(entries[:LIMIT], folders)
    return (
        f"<h2>Preference pairs: {escape(Path(path).name)}</h2><div class=pairs>"
        + summary(entries)
        + notes(path, entries, views, folders, options)
        + margin_chart(entries)
        + settings(entries)
        + pair_gallery(entries[:LIMIT], views)
        + "</div>"
    )


def write(path: str | Path, options: Options) -> Path:
    """Writes NAME.html next to the file and returns its path."""
    out = Path(path).with_suffix(".html")
    write_text(out, page(f"Preference pairs: {Path(path).name}", section(path, options), STYLE))
    return out


def image_folders(path, entries, options) -> list[Path]:
    """Where images are looked up: --images, or the folder that generate_pairs.py used, if it exists."""
    if options.images:
        return options.images
    run = Path(path).with_suffix(".run.json")
    folder = recorded_folder(read_json(run), "--images") if run.is_file() else None
    if folder and folder.is_dir():
        return [folder]
    name = entries[0].text("images")  # of that folder, which may be next to the file
    folder = Path(path).parent / name
    return [folder] if name and name == folder.name and folder.is_dir() else []


# ---------------------------------------------------------------- images


@dataclass
class View:
    """The images of a pair, as the model sees them."""

    clean: str = ""  # v, a data URI
    corrupted: str = ""  # h(v); "" if both responses are about v, or if h(v) can't be replayed
    missing: bool = False
    changed: bool = False  # the replayed corruption has other parameters than the recorded one


def find_folder(name, folders):
    """The first of `folders` with this image. Raises InputError if there is none."""
    for folder in folders:
        try:
            image_path(folder, name)
            return folder
        except InputError:
            continue
    raise InputError(f"no such image: '{brief(name)}'")


def thumbnail(image, pad):
    """A data URI of an image; in pad mode, of the square that the model sees. Small images become larger by
    bicubic interpolation, like the model's input."""
    from PIL import Image

    from stic_min.images import pad_to_square

    if pad:
        image = pad_to_square(image)
    scale = SIDE / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    return data_uri(image.resize(size, Image.BICUBIC), "JPEG", quality=70, optimize=True)


def view_of(entry, folders) -> View:
    from stic_min.images import corrupt, open_image

    seed = entry.seed
    try:
        name = entry.pair.image
        image = open_image(image_path(find_folder(name, folders), name))
    except InputError:
        return View(missing=True)
    pad = entry.record.get("image_mode") == "pad"
    view = View(thumbnail(image, pad))
    if seed is not None:
        corrupted, parameters = corrupt(image, seed)
        view.corrupted = thumbnail(corrupted, pad)
        view.changed = any(entry.corruption.get(name) != value for name, value in parameters.items())
    return view


def see(entries, folders) -> list[View]:
    """The images of all pairs, opened and corrupted in threads."""
    progress = Progress("images", len(entries))
    views = []
    for view in prefetch(lambda entry: view_of(entry, folders), entries):
        views.append(view)
        progress.add()
    return views


# ---------------------------------------------------------------- log p before and after training


def training_settings(adapter) -> dict:
    """The run.json of an adapter's training, as far as it determines log p; {} without one."""
    file = Path(adapter) / "run.json"
    run = read_json(file) if file.is_file() else {}
    names = {"image_mode": ("pad", "anyres"), "template": tuple(TEMPLATES), "dtype": flags.DTYPES}
    for name, values in names.items():
        if name in run and run[name] not in values:
            raise InputError(f"{file}: {name} is {brief(run[name])}, not one of {', '.join(values)}")
    length = run.get("max_length", 1)
    if type(length) is not int or length < 1:
        raise InputError(f"{file}: max_length is {brief(length)}, not a whole number of at least 1")
    return run


def response_logps(pairs: list[Pair], folders: list[Path], model, adapter, device=None) -> list[tuple | None]:
    """(logp_w, logp_l, ref_logp_w, ref_logp_l) of each pair: log p of y_w and y_l given (v, x), summed over
    their tokens, under the adapter and under theta_0, the model before training. None for a pair without its
    image, or without room for a response.

    Image mode, template, maximum length and dtype are those of the adapter's training, if it has a run.json.
    """
    import torch

    from stic_min.batch import collate
    from stic_min.loader import load_llava, open_llava
    from stic_min.loss import token_logps
    from stic_min.runtime.ranks import start_device
    from stic_min.samples import load_tiles, pair_sample

    device = start_device(device)
    run = training_settings(adapter)
    mode = run.get("image_mode", "pad")
    dtype = run.get("dtype", "bfloat16" if device.type == "cuda" else "float32")
    options = {"image_mode": mode, "template": run.get("template"), "dtype": getattr(torch, dtype)}
    llava = load_llava(model, adapter=adapter, device=device, **options)
    _, weights = open_llava(model, **options)  # for theta_0's projector: `llava` has the trained one
    llava.reference_projector = copy.deepcopy(llava.mm_projector)
    for name, parameter in llava.reference_projector.named_parameters():
        parameter.data.copy_(weights[f"mm_projector.{name}"].read())
    max_length = run.get("max_length", 1024 if mode == "pad" else 4096)
    max_length = min(max_length, llava.config.decoder.max_positions)

    def prepare(numbers):
        """The samples and tiles of the pairs that have an image."""
        prepared = []
        for i in numbers:
            try:
                sample = pair_sample(pairs[i], llava, find_folder(pairs[i].image, folders), max_length)
                prepared.append((i, sample, load_tiles(sample, llava)))
            except InputError:
                continue
        return prepared

    def both_logps(batch):
        return token_logps(llava(batch), batch.labels).sum(-1).view(-1, 2)  # (B, 2): chosen, rejected

    results = [None] * len(pairs)
    progress = Progress("log p", len(pairs))
    batches = [range(i, min(i + MICRO_BATCH, len(pairs))) for i in range(0, len(pairs), MICRO_BATCH)]
    for numbers, prepared in zip(batches, prefetch(prepare, batches)):
        if prepared:
            present, samples, tiles = zip(*prepared)
            batch = collate(samples, tiles, llava.config, device)
            with torch.no_grad():
                logps = both_logps(batch)
                with llava.as_reference():
                    logps = torch.cat([logps, both_logps(batch)], dim=1)  # (B, 4)
            for i, values in zip(present, logps.tolist()):
                results[i] = tuple(values)
        progress.add(len(numbers))
    return results


# ---------------------------------------------------------------- summary


def count_words(text):
    return len(text.split())


def pair_count(count):
    return "1 pair" if count == 1 else f"{count:,} pairs"


def share(count, total):
    return f"{100 * count / total:.1f}%" if total else ""


def number(value, form):
    """With a minus sign instead of a hyphen."""
    return f"{value:{form}}".replace("-", "−")


def margins_of(entries):
    """Those of the pairs that differ: the margin of two equal responses is 0 and means nothing."""
    return [entry.margin for entry in entries if entry.logps and not entry.equal]


def summary(entries) -> str:
    """Counts and means by kind, as a table."""
    groups = {name: [e for e in entries if e.kind == kind] for kind, name in KINDS.items()}
    groups = {name: group for name, group in groups.items() if group}
    if len(groups) > 1:
        groups["all"] = entries

    def counted(test):
        counts = [(sum(map(test, group)), len(group)) for group in groups.values()]
        return [f"{count:,} ({share(count, total)})" for count, total in counts]

    def average_words(side):
        return [f"{mean(count_words(getattr(e.pair, side)) for e in group):.1f}" for group in groups.values()]

    rows = [
        ["pairs", *(f"{len(group):,} ({share(len(group), len(entries))})" for group in groups.values())],
        ["equal responses", *counted(lambda entry: entry.equal)],
        ["preferred cut off", *counted(lambda entry: not entry.pair.chosen_stopped)],
        ["dispreferred cut off", *counted(lambda entry: not entry.pair.rejected_stopped)],
        ["words, preferred", *average_words("chosen")],
        ["words, dispreferred", *average_words("rejected")],
    ]
    if any(entry.logps for entry in entries):
        margins = [margins_of(group) for group in groups.values()]
        rows += [
            ["margin, mean", *(number(mean(group), "+.2f") if group else "" for group in margins)],
            ["margin > 0", *(share(sum(margin > 0 for margin in group), len(group)) for group in margins)],
        ]
    return html_table(["kind of pair", *groups], rows, 0)


def notes(path, entries, views, folders, options) -> str:
    """What is missing or unexpected, one line each."""
    lines = []
    if Path(f"{path}.lock").exists():
        lines.append("The file is incomplete: its run was stopped or is still writing to it.")
    if len(entries) > len(views):
        lines.append(f"The gallery shows the first {len(views):,} of {pair_count(len(entries))}.")
    if missing := sum(view.missing for view in views):
        names = ", ".join(str(folder) for folder in options.images) or ", ".join(f.name for f in folders)
        reason = f"not found in {names}, or not readable" if names else "pass their folder with --images"
        lines.append(f"The images of {missing:,} of {pair_count(len(views))} are missing: {reason}.")
    if changed := sum(view.changed for view in views):
        lines.append(f"The corrupted images of {pair_count(changed)} are not those that the model saw: "
                     "replayed from their seeds, the corruptions have other parameters.")  # fmt: skip
    if seedless := sum(entry.corrupted and entry.seed is None for entry in entries):
        lines.append(f"The corrupted images of {pair_count(seedless)} can't be shown: no seed is recorded.")
    unscored = sum(entry.logps is None for entry in entries)
    if options.adapter and unscored:
        lines.append(f"No log p for {pair_count(unscored)}: no image, or no room for a response.")
    return "".join(f"<p class=note>{escape(line)}</p>" for line in lines)


def margin_chart(entries) -> str:
    margins = margins_of(entries)
    if not margins:
        return ""
    p_w, p_l, ref_p_w, ref_p_l = map(math, ("p_θ(y_w)", "p_θ(y_l)", "p_0(y_w)", "p_0(y_l)"))
    text = (
        f"Margin: (log {p_w} − log {ref_p_w}) − (log {p_l} − log {ref_p_l}), by how much training made the "
        f"preferred response more likely than the dispreferred one; {math('p_0')} is the model before "
        f"training. It is DPO's margin without the factor {math('β')}. Equal responses are left out."
    )
    return f"<p class=note>{text}</p>" + svg.histogram("Margins", margins, "margin", "pairs")


def settings(entries) -> str:
    """How the pairs were generated, as far as their records say."""
    parts = []
    for name in SETTINGS:
        values = Counter(str(entry.record[name]) for entry in entries if entry.record.get(name) is not None)
        texts = [brief(value) for value, _ in values.most_common(3)]
        if len(values) > 3:
            texts.append("…")
        if texts:
            label = name.replace("_", " ")
            parts.append(f"<div><dt>{label}</dt><dd>{escape(', '.join(texts))}</dd></div>")
    return f"<dl class=settings>{''.join(parts)}</dl>" if parts else ""


# ---------------------------------------------------------------- one pair


def math(text):
    """y_w -> an italic letter with a subscript."""
    return "<i>" + re.sub(r"_(\w)", r"<sub>\1</sub>", escape(text)) + "</i>"


def marked(chosen: str, rejected: str) -> tuple[str, str]:
    """Both responses as HTML, with the words marked that the other one does not have at this place."""
    tokens = [re.findall(r"\s*(?:\w+(?:['’-]\w+)*|[^\w\s])", text) for text in (chosen, rejected)]
    stripped = [[token.strip() for token in side] for side in tokens]
    matcher = difflib.SequenceMatcher(None, *stripped, autojunk=False)
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


def image_html(letter, name, image_number, caption="") -> str:
    """image_number: of the page's stored images; None shows a placeholder."""
    name = escape(name)
    if image_number is None:
        shown = f"<div class=missing>no image {letter}: {name}</div>"
    else:
        shown = f'<img data-image="{image_number}" alt="{letter}: {name}">'
    return f"<figure>{shown}<figcaption>{math(letter)}{escape(caption)}</figcaption></figure>"


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
        f"<section class={side}><h4>{title}: {math(origin)}</h4>"
        f"<div class=seen>{image}<div>{prompt}</div></div><p class=response>{text}</p>"
        f"<p class=note>{'; '.join(facts)}</p></section>"
    )


def article(position, entry, view, store) -> str:
    """A pair as HTML. position: from 1. store: puts a data URI into the page -> its number, None for ""."""
    pair = entry.pair
    text_w, text_l = marked(pair.chosen.strip(), pair.rejected.strip())
    image_w = image_html("v", pair.image, store(view.clean))
    prompt_w = prompt_html(f"step-by-step prompt {math('x_g')}", entry.text("chosen_prompt"))
    distributions = "p( · | v, x_g)", "p( · | v, x_b)"
    if entry.corrupted:
        distributions = "p( · | v, x_g)", "p( · | h(v), x)"
        caption = f", {corruption_text(entry.corruption)}"
        if view.changed:
            caption += "; replayed with other parameters than recorded"
        image_l = image_html("h(v)", pair.image, store(view.corrupted), caption)
        prompt_l = prompt_html(f"captioning prompt {math('x')}", entry.text("rejected_prompt"))
    elif entry.kind == "prompt":
        image_l = image_html("v", pair.image, store(view.clean), ", the same image")
        x_b = entry.text("rejected_prompt") or entry.text("hallu_prompt")
        prompt_l = prompt_html(f"misleading prompt {math('x_b')}", x_b)
    else:
        distributions = "", ""
        image_l = prompt_l = ""
    tags = [] if entry.kind == "unknown" else [f"<span class=tag>{KINDS[entry.kind]}</span>"]
    if entry.margin is not None:
        tags.append(f"<span class=tag>margin {number(entry.margin, '+.2f')}</span>")
    if entry.equal:
        tags.append('<span class="tag wrong">equal responses</span>')
    return (
        f"<article class=pair><h3>{position:,}. {escape(pair.image)} {''.join(tags)}</h3>"
        f"<p class=x>Trained as responses to {math('x')}: “{escape(without_marks(pair.prompt))}”</p>"
        + side_html(entry, "chosen", distributions[0], image_w, prompt_w, text_w)
        + side_html(entry, "rejected", distributions[1], image_l, prompt_l, text_l)
        + "</article>"
    )


def pair_gallery(entries, views) -> str:
    images = {}  # {data URI: number}
    store = lambda uri: images.setdefault(uri, len(images)) if uri else None
    progress = Progress("pairs", len(entries))
    articles = []
    for position, (entry, view) in enumerate(zip(entries, views), 1):
        articles.append(article(position, entry, view, store))
        progress.add()
    kinds = list(KINDS)
    filters = {
        "kind": (list(KINDS.values()), [kinds.index(entry.kind) for entry in entries]),
        "responses": (["different", "equal"], [int(entry.equal) for entry in entries]),
    }
    extra = [count_words(entry.pair.chosen) - count_words(entry.pair.rejected) for entry in entries]
    orders = {"preferred longer first": (extra, -1), "dispreferred longer first": (extra, 1)}
    if any(entry.logps for entry in entries):
        margins = [round(entry.margin, 4) if entry.logps else None for entry in entries]
        orders |= {"lowest margin first": (margins, 1), "highest margin first": (margins, -1)}
    letters = "; ".join(f"{math(letter)} {meaning}" for letter, meaning in LETTERS.items())
    return (
        f"<p class=note>{letters}. <mark>Marked</mark>: words that the other response does not have at this "
        f"place.</p>{gallery('pairs', articles, list(images), filters, orders)}"
    )
