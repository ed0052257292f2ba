"""A descriptions file as a page: counts, how a description is put into a prompt, and a gallery.

Reads the output of generate_pairs.py --describe, published files like it, and the .descriptions.jsonl files
of evaluate.py --dar. The gallery's first page is HTML. The other pages are JSON, which a script parses when
they are shown, so that 5,000 descriptions open quickly.
"""

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean

from stic_min import InputError
from stic_min.data import Infusion, Instruction, infuse
from stic_min.formats.image_folder import image_path
from stic_min.formats.records import image_name, read_kind
from stic_min.report.options import Options, recorded_folder
from stic_min.report.page import data_uri, html_table, page
from stic_min.runtime.console import Progress
from stic_min.runtime.files import brief, check_text, read_json, write_text
from stic_min.runtime.work import prefetch
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, with_description, with_image

PAGE_SIZE = 24  # descriptions
EXAMPLES = 3  # descriptions inside a prompt
TURNS = 2  # of their conversations
MANY = 1500  # images; with more of them, thumbnails are smaller, so that the page stays below about 20 MB
SETTINGS = ("benchmark", "mode", "model", "adapter", "fingerprint", "template", "image_mode", "dtype",
            "temperature", "top_p", "max_new_tokens", "seed", "images")  # fmt: skip

STYLE = """
.descriptions { --own-text: #d5e7ff; }
@media (prefers-color-scheme: dark) { .descriptions { --own-text: #1b416f; } }
.descriptions .tools { display: flex; flex-wrap: wrap; gap: .5em 1em; align-items: center; padding: .5em 0;
  position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.descriptions .tools[hidden] { display: none; }
.descriptions select, .descriptions button, .descriptions input { font: inherit; color: inherit;
  background: var(--panel); border: 1px solid var(--gray); border-radius: 4px; padding: .2em .6em; }
.descriptions input { width: 4.5em; } .descriptions button:disabled { opacity: .5; }
.descriptions :focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.descriptions .list { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26em, 100%), 1fr));
  gap: 0 2em; scroll-margin-top: 4em; }
.description { display: grid; grid-template-columns: 112px 1fr; gap: 0 1em; padding: .9em 0;
  border-top: 1px solid var(--line); align-items: start; align-content: start; }
.description p { margin: 0 0 .3em; } .description .text { white-space: pre-wrap; }
.description > div { min-width: 0; }
.description img { width: 112px; max-height: 160px; object-fit: contain; object-position: top; }
.description .missing { width: 112px; padding: 1.5em .5em; background: var(--panel); font-size: .85em; }
.descriptions pre { margin: .3em 0 1em; } .descriptions mark { color: inherit; background: var(--own-text); }
.descriptions pre b { color: var(--right); font-weight: inherit; text-decoration: underline; }
.descriptions table { overflow-wrap: break-word; }
.descriptions .settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5em, 1fr));
  gap: .2em 2em; }
.descriptions .settings div { border-top: 1px solid var(--line); padding: .2em 0; }
.descriptions .settings dt { color: var(--soft); font-size: .85em; } .descriptions dd { margin: 0; }
"""

SCRIPT = """
{
  const gallery = document.currentScript.parentElement, find = name => gallery.querySelector(name);
  const list = find(".list"), back = find(".back"), next = find(".next"), page = find("input");
  const kind = find("select"), size = PAGE_SIZE, {count, cut} = JSON.parse(find("script.index").textContent);
  const blocks = {0: [...list.children].map(item => item.outerHTML)};
  const block = n => blocks[n] ??= JSON.parse(find(`script[data-block="${n}"]`).textContent);
  const show = scroll => {
    const order = kind && kind.value ? cut : [...Array(count).keys()];
    const pages = Math.ceil(order.length / size);
    page.max = pages;
    page.value = Math.min(pages, Math.max(1, Math.floor(page.value) || 1));
    const start = (page.value - 1) * size, shown = order.slice(start, start + size);
    list.innerHTML = shown.map(i => block(Math.floor(i / size))[i % size]).join("");
    find(".pages").textContent = pages.toLocaleString("en");
    find(".count").textContent = `${(start + 1).toLocaleString("en")} to `
      + `${(start + shown.length).toLocaleString("en")} of ${order.length.toLocaleString("en")}`;
    back.disabled = +page.value === 1;
    next.disabled = +page.value === pages;
    if (scroll && list.getBoundingClientRect().top < 0) list.scrollIntoView();
  };
  if (kind) kind.onchange = () => { page.value = 1; show(true); };
  page.onchange = () => show(true);
  back.onclick = () => { page.value--; show(true); };
  next.onclick = () => { page.value++; show(true); };
  find(".tools").hidden = false;
  show();
}
""".replace("PAGE_SIZE", str(PAGE_SIZE))


# ---------------------------------------------------------------- the records


@dataclass
class Entry:
    """One description."""

    where: str  # file and record, for messages
    record: dict
    image: str  # "" if the model described without seeing the image
    text: str

    @property
    def cut(self) -> bool:
        return self.record.get("finish") == "length"

    @property
    def prompt(self) -> str:
        """What the model was asked; "" if unknown. evaluate.py always asks the same, without recording it."""
        prompt = self.record.get("prompt", DESCRIBE_PROMPT if "benchmark" in self.record else "")
        return prompt if isinstance(prompt, str) else ""


def read(path: str | Path) -> list[Entry]:
    """The descriptions of a file. Raises InputError for the first bad record."""
    entries = []
    for where, record in read_kind(path, "descriptions"):
        blind = record.get("image") == "" and "benchmark" in record
        text = record.get("description")
        if not isinstance(text, str):
            raise InputError(f"{where}: no description")
        check_text(text, f"{where}: description")
        check_text(str(record.get("prompt")), f"{where}: prompt")
        entries.append(Entry(where, record, "" if blind else image_name(record, where), text.strip()))
    return entries


def recorded_run(path) -> dict:
    """The .run.json next to a .jsonl file; {} without one."""
    run = Path(path).with_suffix(".run.json")
    return read_json(run) if run.is_file() else {}


def image_folders(path, entries, options: Options) -> list[Path]:
    """Where images are looked up: --images and --data, or the folder of the recorded command if it exists."""
    if folders := [*options.images, *options.data]:
        return folders
    run = recorded_run(path)
    recorded = [recorded_folder(run, "--images"), recorded_folder(run, "--data")]
    name = entries[0].record.get("images")
    if isinstance(name, str) and name == Path(name).name:
        recorded.append(Path(path).parent / name)
    return [folder for folder in recorded if folder and folder.is_dir()][:1]


# ---------------------------------------------------------------- summary


def summary(path, entries) -> str:
    """Counts and lengths, then the same for each prompt."""
    images = len({entry.image for entry in entries if entry.image})
    about = f"of {images:,} image{'s' * (images != 1)}" if images else "generated without seeing an image"
    lines = [f"{len(entries):,} description{'s' * (len(entries) != 1)} {about}, {lengths(entries)}."]
    if any("finish" in entry.record for entry in entries):
        cut = sum(entry.cut for entry in entries)
        number = f"{cut:,} ({100 * cut / len(entries):.1f}%)" if cut else "None"
        lines.append(f"{number} {'was' if cut < 2 else 'were'} cut off at the maximum length.")
    else:
        lines.append("How they ended is not recorded.")
    if empty := sum(not entry.text for entry in entries):
        lines.append(f"{empty:,} empty.")
    if repeats := len(entries) - len({entry.text for entry in entries}):
        lines.append(f"{repeats:,} with the same text as an earlier one.")
    if Path(f"{path}.lock").exists():
        lines.append("The file is incomplete: its run was stopped or is still writing to it.")
    html = f"<p>{' '.join(lines)}</p>"
    prompts = Counter(entry.prompt for entry in entries)
    if set(prompts) == {""}:
        return html + "<p class=note>Their prompts are not recorded.</p>"
    rows = []
    for prompt, count in prompts.most_common(20):
        group = [entry for entry in entries if entry.prompt == prompt]
        cut = sum(entry.cut for entry in group)
        words = mean(len(entry.text.split()) for entry in group)
        rows.append([brief(prompt) or "not recorded", f"{count:,}", f"{words:.1f}", f"{cut:,}"])
    if len(prompts) > len(rows):
        html += f"<p class=note>The {len(rows)} most frequent of {len(prompts):,} prompts:</p>"
    return html + html_table(["prompt", "count", "mean words", "cut off"], rows, 0)


def lengths(entries):
    words = [len(entry.text.split()) for entry in entries]
    return f"{mean(words):.1f} words on average ({min(words):,} to {max(words):,})"


def settings(entries) -> str:
    """How the descriptions were generated, as far as their records say."""
    parts = []
    for name in SETTINGS:
        values = Counter(json.dumps(e.record[name], ensure_ascii=False) for e in entries if name in e.record)
        if values and set(values) != {"null"}:
            texts = [brief(value.strip('"')) for value, _ in values.most_common(3)]
            text = ", ".join([*texts, "…"] if len(values) > 3 else texts)
            parts.append(f"<div><dt>{name.replace('_', ' ')}</dt><dd>{escape(text)}</dd></div>")
    return f"<dl class=settings>{''.join(parts)}</dl>" if parts else ""


# ---------------------------------------------------------------- inside a prompt


def infused(path, entries) -> tuple[list[Instruction], str]:
    """The first descriptions in front of their instructions, as stage 2 does it, and a note if these are not
    known: then a placeholder stands for them."""
    stage = "question" if "benchmark" in entries[0].record else "instruction"
    placeholder = f"(the {stage} about this image)"
    examples = [
        infuse(Instruction(e.where, "", e.image, [(with_image(placeholder, bool(e.image)), "")]), e.text)
        for e in entries[:EXAMPLES]
    ]
    if stage == "question":
        return examples, "A placeholder stands for the benchmark's question."
    instructions = recorded_folder(recorded_run(path), "--describe")
    reason = "which file of instructions was described is not recorded"
    if instructions:
        name = escape(brief(instructions.name))
        reason = f"the file of instructions, {name}, is not where it was when it was described"
        if instructions.is_file():
            try:
                infusion = Infusion(instructions)
                return [infusion(e.where, e.record) for e in entries[:EXAMPLES]], ""
            except InputError:
                reason = f"{name} does not have the instructions of these descriptions"
    return examples, f"A placeholder stands for the instruction: {reason}."


def marked_prompt(instruction: Instruction, template: str) -> str:
    """The conversation as the model reads it, as HTML: what the description adds is <mark>, and the answers,
    which stage 2 trains on, are <b>."""
    added = with_description(instruction.description, "")
    users, answers = zip(*instruction.turns)
    html = ""
    for prompt, answer in list(zip(TEMPLATES[template].turns(users), answers))[:TURNS]:
        before, mark, after = prompt.partition(added) if not html else (prompt, "", "")
        html += f"{escape(before)}{f'<mark>{escape(mark)}</mark>' if mark else ''}{escape(after)}"
        html += f" <b>{escape(answer)}&lt;/s&gt;</b>" if answer else ""
    more = len(users) - TURNS
    return html + (f"\n({more} more turn{'s' * (more > 1)})" if more > 0 else "")


def prompts(path, entries) -> str:
    """How the first descriptions look inside a prompt: of stage 2, or of DaR's second call."""
    examples, note = infused(path, entries)
    dar = "benchmark" in entries[0].record
    template = entries[0].record.get("template")
    known = template in TEMPLATES
    template = template if known else "mistral_instruct"
    if dar:
        title = "Inside a prompt of describe-and-respond"
        text = "Describe and respond (section 4): the model is asked with its own description in front."
    else:
        title = "Inside a prompt of stage 2"
        text = ("Description-infused fine-tuning (section 4, Algorithm 2): the model's own description is "
                "put in front of the first instruction.")  # fmt: skip
    text += " <mark>Marked</mark>: what the description adds."
    if not dar and not note:
        text += " <u>Underlined</u>: the answers that stage 2 trains on."
    name = escape(brief(template))
    notes = [note, f"Template: {name}{'' if known else ', an assumption, since none is recorded'}."]
    if not dar:
        notes.append("With train_stage2.py --one-line, the description takes one line, as in the paper.")
    html = f"<h3>{title}</h3><p>{text}</p><p class=note>{' '.join(filter(None, notes))}</p>"
    return html + "".join(f"<pre>{marked_prompt(example, template)}</pre>" for example in examples)


# ---------------------------------------------------------------- images and gallery


def thumbnails(entries, folders) -> tuple[list[str], Counter]:
    """Data URIs of all images, "" for those that can't be shown, and why: {reason: count}."""
    from PIL import Image

    from stic_min.images import open_image

    side, quality = (160, 75) if len(entries) <= MANY else (112, 65)  # pixels

    def look(entry):
        if not entry.image:
            return "", ""
        for folder in folders:
            try:
                path = image_path(folder, entry.image)
            except InputError:
                continue
            try:
                image = open_image(path)
            except InputError:
                return "", "not readable"
            image.thumbnail((side, side), Image.BICUBIC)
            return data_uri(image, "JPEG", quality=quality), ""
        return "", "not found"

    progress = Progress("images", len(entries))
    uris, problems = [], Counter()
    for uri, problem in prefetch(look, entries):
        uris.append(uri)
        problems[problem] += bool(problem)
        progress.add()
    return uris, +problems


def missing_line(problems, folders, count) -> str:
    if not problems:
        return ""
    if not folders:
        text = "The images are not shown, because no image folder is known: pass --images."
    else:
        were = lambda number: "was" if number == 1 else "were"
        reasons = " and ".join(f"{n:,} {were(n)} {problem}" for problem, n in problems.items())
        text = f"Of {count:,} images, {reasons} in {' or '.join(str(folder) for folder in folders)}."
    return f"<p class=note>{escape(text)}</p>"


def card(number, entry, uri) -> str:
    """One description as HTML."""
    if uri:
        image = f'<img src="{uri}" loading=lazy alt="{escape(entry.image)}">'
    else:
        image = f"<div class=missing>{'no image' if entry.image else 'described without an image'}</div>"
    facts = [f"{len(entry.text.split()):,} words"]
    if entry.record.get("finish") == "stop":
        facts.append("ended by itself")
    if entry.cut:
        facts.append('<span class="wrong">cut off at the maximum length</span>')
    prompt = f"<p class=note>“{escape(entry.prompt)}”</p>" if entry.prompt else ""
    name = f" <small>{escape(brief(entry.image))}</small>" if entry.image else ""
    return (
        f"<article class=description>{image}<div><p><b>{number:,}.</b>{name}</p>{prompt}"
        f"<p class=text>{escape(entry.text) or '<i>empty</i>'}</p><p class=note>{', '.join(facts)}</p>"
        "</div></article>"
    )


def as_json(value, attributes):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" {attributes}>{text}</script>'


def gallery(entries, uris) -> str:
    cards = [card(number, *item) for number, item in enumerate(zip(entries, uris), 1)]
    blocks = [cards[start : start + PAGE_SIZE] for start in range(0, len(cards), PAGE_SIZE)]
    if len(blocks) == 1:
        return f"<div class=list>{''.join(cards)}</div>"
    cut = [i for i, entry in enumerate(entries) if entry.cut]
    choice = ""
    if 0 < len(cut) < len(entries):
        choices = '<option value="">all</option><option value="cut">cut off</option>'
        choice = f"<label>show <select>{choices}</select></label>"
    return (
        f"<div><div class=tools hidden>{choice}<button type=button class=back>‹ previous</button>"
        "<label>page <input type=number min=1 value=1></label> <span>of <span class=pages></span></span>"
        "<button type=button class=next>next ›</button>"
        "<span class=count role=status aria-live=polite></span></div>"
        f"<noscript><p class=note>Without JavaScript, only the first {PAGE_SIZE} are shown.</p></noscript>"
        f"<div class=list>{''.join(blocks[0])}</div>"
        + as_json({"count": len(entries), "cut": cut}, "class=index")
        + "".join(as_json(block, f'data-block="{n}"') for n, block in enumerate(blocks[1:], 1))
        + f"<script>{SCRIPT}</script></div>"
    )


# ---------------------------------------------------------------- the page


def section(path: str | Path, options: Options | None = None) -> str:
    """The descriptions of a file as an HTML fragment, for a page with STYLE."""
    entries = read(path)
    folders = image_folders(path, entries, options or Options())
    uris, problems = thumbnails(entries, folders)
    return (
        f"<h2>Descriptions: {escape(Path(path).name)}</h2><div class=descriptions>"
        + summary(path, entries)
        + settings(entries)
        + missing_line(problems, folders, len(entries))
        + prompts(path, entries)
        + "<h3>Gallery</h3>"
        + gallery(entries, uris)
        + "</div>"
    )


def write(path: str | Path, options: Options | None = None) -> Path:
    """Writes NAME.html next to NAME.jsonl and returns its path."""
    out = Path(path).with_suffix(".html")
    write_text(out, page(f"Descriptions: {Path(path).name}", section(path, options), STYLE))
    return out
