"""A descriptions file as a page: counts, how a description is put into a prompt, and a gallery.

Reads the output of generate_pairs.py --describe, published files like it, and the .descriptions.jsonl files
of evaluate.py --dar.
"""

from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean

from stic_min import InputError
from stic_min.data import Infusion, Instruction, infuse
from stic_min.formats.records import image_name, read_kind
from stic_min.report import record as records
from stic_min.report.gallery import Images, gallery, image_tag
from stic_min.report.images import find_image, image_folders, in_threads, missing_line, read_thumbnail
from stic_min.report.options import Options, recorded_folder
from stic_min.report.page import html_table, note, page_of, percent, plural, settings
from stic_min.runtime.files import brief, check_text, write_text
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, with_description, with_image

SIDE = 160  # pixels of a thumbnail
EXAMPLES = 3  # descriptions inside a prompt
TURNS = 2  # of their conversations
SETTINGS = ("benchmark", "mode", "model", "adapter", "fingerprint", "template", "image_mode", "dtype",
            "temperature", "top_k", "top_p", "max_new_tokens", "seed", "images", "preset")  # fmt: skip

STYLE = """
pre u { color: var(--right); }
"""


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


# ---------------------------------------------------------------- summary


def summary(entries) -> str:
    """Counts and lengths, then the same for each prompt."""
    images = len({entry.image for entry in entries if entry.image})
    about = f"of {plural(images, 'image')}" if images else "generated without seeing an image"
    words = [len(entry.text.split()) for entry in entries]
    lines = [f"{plural(len(entries), 'description')} {about}, {mean(words):.1f} words on average "
             f"({min(words):,} to {max(words):,})."]  # fmt: skip
    if any("finish" in entry.record for entry in entries):
        cut = sum(entry.cut for entry in entries)
        count = f"{cut:,} ({percent(cut, len(entries))})" if cut else "None"
        lines.append(f"{count} {'was' if cut < 2 else 'were'} cut off at the maximum length.")
    else:
        lines.append("How they ended is not recorded.")
    if empty := sum(not entry.text for entry in entries):
        lines.append(f"{empty:,} empty.")
    if repeats := len(entries) - len({entry.text for entry in entries}):
        lines.append(f"{repeats:,} with the same text as an earlier one.")
    return f"<p>{' '.join(lines)}</p>{prompt_table(entries)}"


def prompt_table(entries) -> str:
    prompts = Counter(entry.prompt for entry in entries)
    if set(prompts) == {""}:
        return note("Their prompts are not recorded.")
    rows = []
    for prompt, count in prompts.most_common(20):
        group = [entry for entry in entries if entry.prompt == prompt]
        words = mean(len(entry.text.split()) for entry in group)
        cut = sum(entry.cut for entry in group)
        rows.append([brief(prompt) or "not recorded", f"{count:,}", f"{words:.1f}", f"{cut:,}"])
    more = len(prompts) > len(rows)
    text = f"The {len(rows)} most frequent of {len(prompts):,} prompts:" if more else ""
    return note(text) + html_table(["prompt", "count", "mean words", "cut off"], rows, "Prompts")


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
    instructions = recorded_folder(records.of_output(Path(path)), "--describe")
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
    which stage 2 trains on, are <u>."""
    added = with_description(instruction.description, "")
    users, answers = zip(*instruction.turns)
    html = ""
    for prompt, answer in list(zip(TEMPLATES[template].turns(users), answers))[:TURNS]:
        before, mark, after = prompt.partition(added) if not html else (prompt, "", "")
        html += f"{escape(before)}{f'<mark>{escape(mark)}</mark>' if mark else ''}{escape(after)}"
        html += f" <u>{escape(answer)}&lt;/s&gt;</u>" if answer else ""
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


# ---------------------------------------------------------------- gallery


def card(number, entry, image) -> str:
    """One description as HTML. image: its key in `Images`, or None."""
    placeholder = f"<div class=missing>{'no image' if entry.image else 'described without an image'}</div>"
    shown = image_tag(image, entry.image) if image else placeholder
    facts = [f"{len(entry.text.split()):,} words"]
    if entry.record.get("finish") == "stop":
        facts.append("ended by itself")
    if entry.cut:
        facts.append('<span class="wrong">cut off at the maximum length</span>')
    prompt = f"<p class=note>“{escape(entry.prompt)}”</p>" if entry.prompt else ""
    name = f" <small>{escape(brief(entry.image))}</small>" if entry.image else ""
    return (
        f"<article class=card>{shown}<div><p><b>{number:,}.</b>{name}</p>{prompt}"
        f"<p class=text>{escape(entry.text) or '<i>empty</i>'}</p><p class=note>{', '.join(facts)}</p>"
        "</div></article>"
    )


# ---------------------------------------------------------------- the page


def section(path: str | Path, options: Options) -> str:
    """The descriptions of a file as HTML, from an <h2> on."""
    entries = read(path)
    first = entries[0].record
    given = options.data + options.images if "benchmark" in first else options.images
    folders = image_folders(path, given, first.get("images"))
    images = Images()

    def look(entry):
        try:
            return images.add(read_thumbnail(find_image(entry.image, folders), SIDE))
        except InputError:
            return None

    keys = in_threads("images", lambda entry: look(entry) if entry.image else None, entries)
    missing = sum(bool(entry.image) and key is None for entry, key in zip(entries, keys))
    cards = [card(number, *item) for number, item in enumerate(zip(entries, keys), 1)]
    ends = {"show": (["not cut off", "cut off"], [int(entry.cut) for entry in entries])}
    return (
        f"<h2>Descriptions: {escape(Path(path).name)}</h2>"
        + summary(entries)
        + note(records.unfinished(path))
        + note(missing_line(missing, len(entries), "description", folders, given))
        + settings([entry.record for entry in entries], SETTINGS)
        + prompts(path, entries)
        + f"<h3>Gallery</h3>{gallery('descriptions', cards, images, ends)}"
    )


def write(path: str | Path, options: Options) -> Path:
    """Writes NAME.html next to NAME.jsonl and returns its path."""
    out = Path(path).with_suffix(".html")
    write_text(out, page_of(section(path, options), STYLE))
    return out
