"""Preference pairs as a gallery: what the model saw and was asked, and how its two responses differ.

A page of 6,000 pairs opens quickly because only its first PAGE_SIZE pairs are HTML. The others are JSON blocks of
as many pairs each, which the script parses when they are shown; a small index of all pairs is enough to filter and
sort them. Equal images are stored once.
"""

import copy
import difflib
import json
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
from stic_min.report.options import Options, recorded_folder
from stic_min.report.page import data_uri, html_table
from stic_min.runtime.console import Progress
from stic_min.runtime.files import brief, check_text, read_json
from stic_min.runtime.work import prefetch
from stic_min.text import without_marks

PAGE_SIZE = 24  # pairs
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

STYLE = """
.pairs { --w: #d5e7ff; --l: #fbe3b9; }
@media (prefers-color-scheme: dark) { .pairs { --w: #1b416f; --l: #57410f; } }
.pairs .tools { display: flex; flex-wrap: wrap; gap: .5em 1em; align-items: center; padding: .5em 0; }
.pairs .turn { position: sticky; top: 0; z-index: 1; background: var(--paper);
  border-bottom: 1px solid var(--line); }
.pairs select, .pairs button, .pairs input { font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--gray); border-radius: 4px; padding: .2em .6em; max-width: 100%; }
.pairs input { width: 4.5em; } .pairs button:disabled { opacity: .5; }
.pairs :focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.pair { scroll-margin-top: 4em; display: grid; grid-template-columns: 1fr 1fr; gap: .4em 2em;
  border-top: 1px solid var(--line); margin-top: 1.2em; padding-top: .8em; }
.pair h3, .pair > p { grid-column: 1 / -1; margin: 0; } .pair h3 { font-size: 1em; } .pair h4 { margin: 0; }
.pair p { margin: 0; } .pair .x { margin-bottom: .4em; }
.tag { font-size: .8em; font-weight: 400; border: 1px solid var(--gray); border-radius: 1em;
  padding: .05em .7em; margin-left: .4em; white-space: nowrap; }
.tag.wrong { border-color: currentColor; border-radius: 1em; }
.pair section { display: grid; grid-template-rows: subgrid; grid-row: span 4; gap: .4em; min-width: 0; }
.pair .seen { display: flex; gap: 1em; align-items: flex-start; }
.pair figure { flex: none; width: 192px; max-width: 45%; }
.pair img, .pair .missing { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--panel); }
.pair .missing { display: flex; align-items: center; padding: 1em; font-size: .85em; }
.pair .response { white-space: pre-wrap; background: var(--panel); padding: .7em; }
mark { color: inherit; background: var(--w); border-radius: 3px; } .rejected mark { background: var(--l); }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5em, 1fr)); gap: .2em 2em; }
.settings div { border-top: 1px solid var(--line); padding: .2em 0; }
.settings dt { color: var(--soft); font-size: .85em; } .settings dd { margin: 0; }
@media (max-width: 45em) { .pair { grid-template-columns: 1fr; } .pair section + section { margin-top: .8em; } }
"""

SCRIPT = """
{
  const gallery = document.currentScript.parentElement, find = name => gallery.querySelector(name);
  const read = name => JSON.parse(find(name).textContent);
  const list = find(".list"), kind = find(".kind"), equal = find(".equal"), sort = find(".sort");
  const back = find(".back"), next = find(".next"), page = find("input"), size = PAGE_SIZE;
  const index = read("script.index"), all = index.kind.map((_, i) => i);
  const first = {pairs: [...list.children].map(pair => pair.outerHTML), images: []};  // of page 1, which is HTML
  for (const image of list.querySelectorAll("[src]")) first.images[image.dataset.image] = image.src;
  const orders = {  // [the values to sort by, ascending or descending]
    longer: [index.difference, -1], shorter: [index.difference, 1],
    lowest: [index.margin, 1], highest: [index.margin, -1],
  };
  let order = all;
  const arrange = () => {
    order = all.filter(i => (!kind.value || index.kind[i] === +kind.value)
                            && (!equal.value || index.equal[i] === +equal.value));
    if (sort.value) {
      const [values, sign] = orders[sort.value];
      const key = i => values[i] === null ? Infinity : sign * values[i];
      order.sort((i, j) => key(i) - key(j) || i - j);
    }
    page.value = 1;
    show();
  };
  const show = () => {
    const pages = Math.max(1, Math.ceil(order.length / size));
    page.max = pages;
    page.value = Math.min(pages, Math.max(1, Math.floor(page.value) || 1));
    const start = (page.value - 1) * size, shown = order.slice(start, start + size);
    if (document.readyState === "loading" && shown.some(i => i >= size)) {  // the blocks are still being read
      list.textContent = "loading";
      return addEventListener("DOMContentLoaded", show, {once: true});
    }
    const blocks = {0: first};
    const block = n => blocks[n] ??= read(`script[data-block="${n}"]`);
    list.innerHTML = shown.map(i => block(Math.floor(i / size)).pairs[i % size]).join("");
    for (const image of list.querySelectorAll("[data-image]")) {
      const number = +image.dataset.image, n = index.images.findLastIndex(start => start <= number);
      image.src = block(n).images[number - index.images[n]];
    }
    find(".pages").textContent = pages.toLocaleString("en");
    find(".count").textContent = !shown.length ? "no pairs" :
      `${(start + 1).toLocaleString("en")} to ${(start + shown.length).toLocaleString("en")} of `
      + `${order.length.toLocaleString("en")} pairs`;
    back.disabled = +page.value === 1;
    next.disabled = +page.value === pages;
    const turn = find(".turn");
    if (list.getBoundingClientRect().top < turn.getBoundingClientRect().bottom - 1) list.scrollIntoView();
  };
  for (const control of [kind, equal, sort]) control.onchange = arrange;
  page.onchange = show;
  back.onclick = () => { page.value--; show(); };
  next.onclick = () => { page.value++; show(); };
  for (const tools of gallery.querySelectorAll(".tools")) tools.hidden = false;
  arrange();
}
""".replace("PAGE_SIZE", str(PAGE_SIZE))


@dataclass
class Entry:
    """A pair with what its record says about how it came about."""

    pair: Pair
    record: dict
    logps: tuple[float, float, float, float] | None = None  # of y_w and y_l under theta, then under theta_0

    @property
    def kind(self) -> str:
        """The key of KINDS."""
        corruption = self.record.get("corruption")
        if isinstance(corruption, dict) or self.record.get("image_corruption"):
            kind = corruption.get("kind") if isinstance(corruption, dict) else None
            return kind if kind in ("low_resolution", "color_jitter") else "corrupted"
        return "prompt" if self.text("hallu_prompt") else "unknown"

    @property
    def equal(self) -> bool:
        return self.pair.chosen == self.pair.rejected

    @property
    def difference(self) -> int:
        """Words of y_w minus words of y_l."""
        return words(self.pair.chosen) - words(self.pair.rejected)

    @property
    def margin(self) -> float | None:
        """DPO's margin without beta: how much more likely training made y_w than y_l, in log p."""
        if self.logps is None:
            return None
        logp_w, logp_l, ref_logp_w, ref_logp_l = self.logps
        return (logp_w - ref_logp_w) - (logp_l - ref_logp_l)

    @property
    def seed(self) -> int | None:
        """Of the corruption, which it replays."""
        corruption = self.record.get("corruption")
        seed = corruption.get("seed") if isinstance(corruption, dict) else None
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise InputError(f"{self.pair.where}: the corruption's seed is not a whole number in [0, 2^63)")
        return seed

    def text(self, name: str) -> str:
        """A text of the record; "" without one."""
        value = self.record.get(name)
        if not isinstance(value, str):
            return ""
        check_text(value, f"{self.pair.where}: {name}")
        return value.strip()


def words(text):
    return len(text.split())


def read(path) -> list[Entry]:
    return [Entry(parse_pair(where, record), record) for where, record in read_kind(path, "pairs")]


def section(path: Path, options: Options) -> str:
    """The pairs of a file as an HTML fragment: summary, settings and gallery; with --adapter, also log p."""
    entries = read(path)
    folders = image_folders(path, entries, options)
    if options.adapter:
        logps = response_logps([entry.pair for entry in entries], folders, options.model, options.adapter)
        for entry, values in zip(entries, logps):
            entry.logps = values
    shown = entries[:LIMIT]
    views = see(shown, folders)
    return (
        "<h2>Preference pairs</h2>"
        + summary(entries, views, folders)
        + settings(entries)
        + gallery(shown, views)
    )


def image_folders(path, entries, options) -> list[Path]:
    """Where images are looked up: --images, or the folder that generate_pairs.py used, if it exists."""
    if options.images:
        return options.images
    run = Path(path).with_suffix(".run.json")
    recorded = recorded_folder(read_json(run), "--images") if run.is_file() else None
    name = entries[0].text("images")
    beside = [Path(path).parent / name] if name == Path(name).name else []
    return [folder for folder in [recorded, *beside] if folder and folder.is_dir()][:1]


# ---------------------------------------------------------------- images


@dataclass
class View:
    """The images of a pair, as the model sees them."""

    clean: str = ""  # v, a data URI
    corrupted: str = ""  # h(v); "" if both responses are about v, or if h(v) can't be replayed
    problem: str = ""  # why there is no image
    changed: bool = False  # whether replaying the corruption gave other parameters than the recorded ones


def folder_of(name, folders):
    """The first of the folders with this image. Raises InputError if there is none."""
    for folder in folders:
        try:
            image_path(folder, name)
            return folder
        except InputError as error:
            if folder == folders[-1]:
                raise error
    raise InputError("no image folder")


def thumbnail(image, pad):
    """A data URI of an image: in pad mode as the square that the model sees, bicubic like its input."""
    from PIL import Image

    from stic_min.images import pad_to_square

    if pad:
        image = pad_to_square(image)
    scale = SIDE / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    return data_uri(image.resize(size, Image.BICUBIC), "JPEG", quality=70)


def see(entries, folders) -> list[View]:
    """Opens and corrupts the images of all pairs, in threads."""
    from stic_min.images import corrupt, open_image

    def look(entry):
        try:
            folder = folder_of(entry.pair.image, folders)
            image = open_image(image_path(folder, entry.pair.image), entry.pair.image)
        except InputError as error:
            return View(problem="not found" if "no " in str(error)[:3] else str(error))
        pad = entry.record.get("image_mode") == "pad"
        view = View(thumbnail(image, pad))
        if entry.seed is not None:
            corrupted, parameters = corrupt(image, entry.seed)
            recorded = entry.record["corruption"]
            view.corrupted = thumbnail(corrupted, pad)
            view.changed = any(recorded.get(name) != value for name, value in parameters.items())
        return view

    progress = Progress("images", len(entries))
    views = []
    for view in prefetch(look, entries):
        views.append(view)
        progress.add()
    return views


# ---------------------------------------------------------------- log p before and after training


def response_logps(pairs: list[Pair], folders: list[Path], model, adapter, device=None) -> list[tuple | None]:
    """(logp_w, logp_l, ref_logp_w, ref_logp_l) of each pair: sums over the tokens of y_w and y_l given (v, x), as
    in stage 1, under the trained model and under theta_0, the model before training. None where there is no
    image, or no room for a response.

    Image mode, template, maximum length and dtype are those of the adapter's training, if it has a run.json.
    """
    import torch

    from stic_min.batch import collate
    from stic_min.loader import load_llava, open_llava
    from stic_min.loss import token_logps
    from stic_min.runtime.ranks import start_device
    from stic_min.samples import load_tiles, pair_sample

    device = start_device(device)
    run = Path(adapter) / "run.json"
    run = read_json(run) if run.is_file() else {}
    mode = run.get("image_mode", "pad")
    dtype = run.get("dtype", "bfloat16" if device.type == "cuda" else "float32")
    options = {"image_mode": mode, "template": run.get("template"), "dtype": getattr(torch, dtype)}
    llava = load_llava(model, adapter=adapter, device=device, **options)
    # `llava` has the trained projector. That of theta_0 is still in the checkpoint.
    _, weights = open_llava(model, **options)
    llava.reference_projector = copy.deepcopy(llava.mm_projector)
    for name, parameter in llava.reference_projector.named_parameters():
        parameter.data.copy_(weights[f"mm_projector.{name}"].read())
    default = 1024 if mode == "pad" else 4096
    max_length = min(run.get("max_length", default), llava.config.decoder.max_positions)

    def prepare(numbers):
        """The samples and tiles of a batch of pairs, without those that have no image."""
        prepared = []
        for i in numbers:
            try:
                sample = pair_sample(pairs[i], llava, folder_of(pairs[i].image, folders), max_length)
                prepared.append((i, sample, load_tiles(sample, llava)))
            except InputError:
                continue
        return prepared

    logps = [None] * len(pairs)
    progress = Progress("log p", len(pairs))
    batches = [range(i, min(i + MICRO_BATCH, len(pairs))) for i in range(0, len(pairs), MICRO_BATCH)]
    for numbers, prepared in zip(batches, prefetch(prepare, batches)):
        progress.add(len(numbers))
        if not prepared:
            continue
        numbers, samples, tiles = zip(*prepared)
        batch = collate(samples, tiles, llava.config, device)
        with torch.no_grad():
            policy = token_logps(llava(batch), batch.labels).sum(-1)  # (2 B,): chosen, rejected, chosen, ...
            with llava.as_reference():
                reference = token_logps(llava(batch), batch.labels).sum(-1)
        rows = torch.cat([policy.view(-1, 2), reference.view(-1, 2)], dim=1)  # (B, 4)
        for i, values in zip(numbers, rows.tolist()):
            logps[i] = tuple(values)
    return logps


# ---------------------------------------------------------------- summary


def share(count, total):
    return f"{100 * count / total:.1f}%" if total else ""


def number(value, form):
    """With a minus sign instead of a hyphen."""
    return f"{value:{form}}".replace("-", "−")


def summary(entries, views, folders) -> str:
    """Counts and means by kind, what is missing, and a histogram of the margins."""
    groups = {name: [e for e in entries if e.kind == kind] for kind, name in KINDS.items()}
    groups = {name: group for name, group in groups.items() if group}
    if len(groups) > 1:
        groups["all"] = entries

    def counted(test):
        counts = [(sum(map(test, group)), len(group)) for group in groups.values()]
        return [f"{count:,} ({share(count, total)})" for count, total in counts]

    average = lambda size: [f"{mean(map(size, group)):.1f}" for group in groups.values()]
    rows = [
        ["pairs", *(f"{len(group):,} ({share(len(group), len(entries))})" for group in groups.values())],
        ["equal responses", *counted(lambda entry: entry.equal)],
        ["preferred cut off", *counted(lambda entry: not entry.pair.chosen_stopped)],
        ["dispreferred cut off", *counted(lambda entry: not entry.pair.rejected_stopped)],
        ["words, preferred", *average(lambda entry: words(entry.pair.chosen))],
        ["words, dispreferred", *average(lambda entry: words(entry.pair.rejected))],
    ]
    if has_logps := any(entry.logps for entry in entries):
        margins = [[e.margin for e in group if e.logps and not e.equal] for group in groups.values()]
        rows += [
            ["margin, mean", *(number(mean(group), "+.2f") if group else "" for group in margins)],
            ["margin > 0", *(share(sum(margin > 0 for margin in group), len(group)) for group in margins)],
        ]
    table = html_table(["kind of pair", *groups], rows, 0)
    return table + notes(entries, views, folders) + (margin_chart(margins[-1]) if has_logps else "")


def notes(entries, views, folders):
    """What is missing or unexpected, one line each."""
    lines = []
    if len(entries) > len(views):
        lines.append(f"The gallery shows the first {len(views):,} of {len(entries):,} pairs.")
    if missing := sum(bool(view.problem) for view in views):
        place = " or ".join(str(folder) for folder in folders)
        place = f"in {place}" if folders else "because no image folder is known: pass --images"
        lines.append(f"{missing:,} of {len(views):,} pairs are shown without their image, not found or not "
                     f"readable {place}.")  # fmt: skip
    if changed := sum(view.changed for view in views):
        lines.append(f"Replaying the corruption of {changed:,} pairs gave other parameters than the recorded "
                     "ones: their corrupted images here are not those that the model saw.")  # fmt: skip
    if without := sum(entry.kind == "corrupted" or entry.kind in ("low_resolution", "color_jitter")
                      and entry.seed is None for entry in entries):  # fmt: skip
        lines.append(f"The corrupted images of {without:,} pairs are not shown: their records have no seed.")
    return "".join(f"<p class=note>{escape(line)}</p>" for line in lines)


def margin_chart(margins) -> str:
    p_w, p_l, ref_w, ref_l = map(math, ("p_θ(y_w)", "p_θ(y_l)", "p_0(y_w)", "p_0(y_l)"))
    text = (
        f"Margin: (log {p_w} − log {ref_w}) − (log {p_l} − log {ref_l}), how much more likely training made the "
        f"preferred response than the dispreferred one. It is DPO's without the factor {math('β')}. Equal "
        "responses are left out."
    )
    chart = svg.histogram("Margins", margins, "margin", "pairs") if margins else ""
    return f"<p class=note>{text}</p>{chart}"


def settings(entries) -> str:
    """How the pairs were generated, as far as their records say."""
    parts = []
    for name in SETTINGS:
        values = Counter(json.dumps(entry.record[name]) for entry in entries if name in entry.record)
        if values and set(values) != {"null"}:
            texts = [brief(value.strip('"')) for value, _ in values.most_common(3)]
            if len(values) > 3:
                texts.append("…")
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
        for side, (start, end) in enumerate(zip(bounds[::2], bounds[1::2])):
            run = "".join(tokens[side][start:end])
            text = run.lstrip()
            if tag != "equal" and text:
                html[side] += f"{run[: len(run) - len(text)]}<mark>{escape(text)}</mark>"
            else:
                html[side] += escape(run)
    return html[0], html[1]


def prompt(label, text):
    """A prompt with its letter; a long one is folded."""
    if not text:
        return ""
    if len(text) <= LONG_PROMPT:
        return f"<p>{label}: “{escape(text)}”</p>"
    beginning = textwrap.shorten(text, 60, placeholder=" …")
    return (
        f"<details><summary>{label}: “{escape(beginning)}”</summary><p>“{escape(text)}”</p></details>"
    )


def ending(entry, side):
    """How a response ended, if its record says so."""
    if entry.text(f"{side}_finish") == "stop":
        return "ended by itself"
    stopped = getattr(entry.pair, f"{side}_stopped")
    return "" if stopped else '<span class="wrong">cut off at the maximum length</span>'


def parameters(corruption):
    """"low resolution: short side 20"."""
    if not isinstance(corruption, dict):
        return "corrupted"
    form = lambda value: number(value, ".3g") if type(value) is float else str(value)
    values = [f"{key.replace('_', ' ')} {form(value)}" for key, value in corruption.items()
              if key not in ("kind", "seed")]  # fmt: skip
    return f"{str(corruption.get('kind')).replace('_', ' ')}: {', '.join(values)}"


def article(position, entry, view, image_number) -> str:
    """A pair as HTML. position: from 1. image_number: data URI -> the number under which the page stores it."""
    pair, kind = entry.pair, entry.kind
    corrupted = kind not in ("prompt", "unknown")
    name = escape(pair.image)

    def figure(uri, label, caption=""):
        if uri:
            shown = f'<img data-image="{image_number(uri)}" alt="{label}: {name}">'
        else:
            shown = f"<div class=missing>{label}: {escape(view.problem or 'not shown')}<br>{name}</div>"
        return f"<figure>{shown}<figcaption>{caption or math(label)}</figcaption></figure>"

    if corrupted:
        caption = f"{math('h(v)')}, {escape(parameters(entry.record.get('corruption')))}"
        if view.changed:
            caption += '<br><span class="wrong">replayed with other parameters than recorded</span>'
        figure_l = figure(view.corrupted, "h(v)", caption)
        source, letter = "p( · | h(v), x)", "captioning prompt " + math("x")
    else:
        figure_l = figure(view.clean, "v", f"{math('v')}, the same image") if kind == "prompt" else ""
        source, letter = "p( · | v, x_b)", "misleading prompt " + math("x_b")
    known = kind != "unknown"
    rejected_prompt = entry.text("rejected_prompt") or entry.text("hallu_prompt")
    text_w, text_l = marked(pair.chosen.strip(), pair.rejected.strip())
    sides = [
        ("chosen", "Preferred", "y_w", "p( · | v, x_g)", figure(view.clean, "v"), text_w, pair.chosen,
         prompt("step-by-step prompt " + math("x_g"), entry.text("chosen_prompt"))),
        ("rejected", "Dispreferred", "y_l", source, figure_l, text_l, pair.rejected,
         prompt(letter, rejected_prompt)),
    ]  # fmt: skip
    html = ""
    for i, (side, title, y, origin, image, text, response, question) in enumerate(sides):
        facts = [f"{words(response):,} words, {len(response):,} characters", ending(entry, side)]
        if entry.logps:
            after, before = entry.logps[i], entry.logps[i + 2]
            before, after, change = number(before, ".2f"), number(after, ".2f"), number(after - before, "+.2f")
            facts.append(f"log p {before} before training, {after} after ({change})")
        html += (
            f"<section class={side}><h4>{title}: {math(f'{y} ~ {origin}' if known else y)}</h4>"
            f"<div class=seen>{image}<div>{question}</div></div><p class=response>{text}</p>"
            f"<p class=note>{'; '.join(filter(None, facts))}</p></section>"
        )
    tags = [KINDS[kind]] if known else []
    if entry.margin is not None:
        tags.append(f"margin {number(entry.margin, '+.2f')}")
    tags = "".join(f"<span class=tag>{tag}</span>" for tag in tags)
    if entry.equal:
        tags += '<span class="tag wrong">equal responses</span>'
    x = escape(without_marks(pair.prompt))
    return (
        f"<article class=pair><h3>{position:,}. {name} {tags}</h3>"
        f"<p class=x>Trained as responses to {math('x')}: “{x}”</p>{html}</article>"
    )


# ---------------------------------------------------------------- the gallery


def letters():
    """The paper's, explained."""
    meanings = {
        "v": "the image as the model sees it",
        "h(v)": "a corrupted copy",
        "x": "captioning prompt",
        "x_g": "step-by-step prompt",
        "x_b": "misleading prompt",
        "y_w": "preferred response",
        "y_l": "dispreferred response",
    }
    texts = [f"{math(letter)} {meaning}" for letter, meaning in meanings.items()]
    return f"{'; '.join(texts)}. <mark>Marked</mark>: words that the other response does not have at this place."


def select(label, kind, choices):
    options = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in choices.items())
    return f"<label>{label} <select class={kind}>{options}</select></label>"


def as_json(value, attributes):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" {attributes}>{text}</script>'


def gallery(entries, views) -> str:
    images = {}  # {data URI: number}, numbered in the order of the pairs
    first_images = []  # number of each block's first image
    blocks = []
    progress = Progress("pairs", len(entries))
    for start in range(0, len(entries), PAGE_SIZE):
        first_images.append(len(images))
        image_number = lambda uri: images.setdefault(uri, len(images))
        chunk = zip(entries[start : start + PAGE_SIZE], views[start : start + PAGE_SIZE])
        blocks.append([article(start + i, *pair, image_number) for i, pair in enumerate(chunk, 1)])
        progress.add(len(blocks[-1]))
    uris = list(images)
    unused = set(range(len(uris)))

    def with_source(match):
        """Also for readers without a script; where an image is repeated, these see its description."""
        image = int(match[1])
        if image not in unused:
            return match[0]
        unused.remove(image)
        return f'{match[0]} src="{uris[image]}"'

    first_page = re.sub(r'<img data-image="(\d+)"', with_source, "".join(blocks[0]))
    bounds = [*first_images, len(uris)]
    scripts = [
        as_json({"pairs": block, "images": uris[bounds[n] : bounds[n + 1]]}, f'data-block="{n}"')
        for n, block in enumerate(blocks[1:], 1)
    ]
    margins = [entry.margin and round(entry.margin, 4) for entry in entries]
    index = {
        "kind": [list(KINDS).index(entry.kind) for entry in entries],
        "equal": [int(entry.equal) for entry in entries],
        "difference": [entry.difference for entry in entries],
        "margin": margins,
        "images": first_images,
    }
    present = {entry.kind for entry in entries}
    kinds = {i: name for i, (kind, name) in enumerate(KINDS.items()) if kind in present}
    orders = {"": "order of the file", "longer": "preferred longer first", "shorter": "dispreferred longer first"}
    if any(margin is not None for margin in margins):
        orders |= {"lowest": "lowest margin first", "highest": "highest margin first"}
    return (
        f"<div class=pairs><p class=note>{letters()}</p><div class=tools hidden>"
        + select("kind", "kind", {"": "all"} | kinds)
        + select("responses", "equal", {"": "all", 0: "different", 1: "equal"})
        + select("sorted by", "sort", orders)
        + "</div><div class='tools turn' hidden><button type=button class=back>‹ previous</button>"
        '<label>page <input type=number min=1 value=1></label> of <span class=pages></span>'
        "<button type=button class=next>next ›</button><span class=count role=status aria-live=polite></span></div>"
        f"<noscript><p class=note>Without JavaScript, only the first {PAGE_SIZE} pairs are shown.</p></noscript>"
        f"<div class=list>{first_page}</div>"
        + as_json(index, "class=index")
        + f"<script>{SCRIPT}</script>"
        + "".join(scripts)
        + "</div>"
    )
