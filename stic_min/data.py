"""Preference pairs, instructions and descriptions: what is read from each record, and what of it is scored.

All samples are validated here: each error is one line that names the file and the record. Reads the published
formats (a JSON list or JSON Lines), with or without `<image>` in the user turn.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from stic_min import InputError
from stic_min.formats.records import (
    EXPECTED,
    image_name,
    image_records,
    pair_sides,
    read_kind,
    record_kind,
    skipped_line,
)
from stic_min.runtime.files import brief, text_field
from stic_min.text import IMAGE_MARK, with_description, with_image, without_marks

# ---------------------------------------------------------------- preference pairs (Algorithm 1)


@dataclass
class Pair:
    """One preference: y_w (chosen) over y_l (rejected) as responses to x about an image."""

    where: str  # file and record, for messages
    image: str  # name in the image folder
    prompt: str  # x with its <image>, the captioning prompt; never x_g or x_b
    chosen: str  # y_w
    rejected: str  # y_l
    chosen_stopped: bool  # ended by the end token; False: cut off at the maximum length
    rejected_stopped: bool


def image_first(text, where):
    """A user turn with its <image> moved to the front, as LLaVA trains it, or added if it is missing."""
    # PAPER vs RELEASED (D): the release has no <image> in its pairs, and so trains without the images.
    if text.count(IMAGE_MARK) > 1:
        raise InputError(f"{where}: {text.count(IMAGE_MARK)} <image> in the text but 1 image")
    return with_image(without_marks(text))


def parse_pair(where: str, record: dict) -> Pair:
    """One record, in any of the published forms (formats/records.py)."""
    if record_kind(record) != "pairs":
        raise InputError(f"{where}: not a preference pair; {EXPECTED}")
    image = image_name(record, where)
    where = f"{where} ({brief(image)})"
    prompts, responses = {}, {}
    for side, messages in pair_sides(record).items():
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"]:
            roles = brief(roles)
            expected = f"one user and one assistant message; {EXPECTED}"
            raise InputError(f"{where}: {side} is {roles} instead of {expected}")
        user, response = (text_field(m, "content", f"{where}: {side}, {m['role']}") for m in messages)
        prompts[side] = image_first(user, where)
        responses[side] = response
    if prompts["chosen"] != prompts["rejected"]:
        raise InputError(f"{where}: chosen and rejected answer different prompts")
    stopped = {side: record.get(f"{side}_finish", "stop") != "length" for side in responses}
    return Pair(where, image, prompts["chosen"], responses["chosen"], responses["rejected"],
                stopped["chosen"], stopped["rejected"])  # fmt: skip


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a JSON list or JSON Lines. Raises InputError for the first bad record."""
    return [parse_pair(where, record) for where, record in read_kind(path, "pairs")]


# ---------------------------------------------------------------- instructions and descriptions (Algorithm 2)


@dataclass
class Instruction:
    where: str
    key: str  # the record's id, made unique within its file
    image: str
    turns: list[tuple[str, str]]  # (user, answer), with one <image> among the users
    description: str = ""  # the model's own, for messages; `turns` already has it


def parse_instruction(where: str, key: str, record: dict) -> Instruction:
    """One record of LLaVA's instruction data: human and gpt turns, at most one <image>."""
    image = image_name(record, where)
    where = f"{where} ({brief(key)})"
    messages = record.get("conversations")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where}: no conversations")
    if messages and messages[0].get("from") == "gpt":  # LLaVA drops it as well
        messages = messages[1:]
    roles = [m.get("from") for m in messages]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise InputError(f"{where}: turns are {brief(roles)}, but human and gpt must alternate")
    users = [text_field(m, "value", f"{where}: a human turn") for m in messages[::2]]
    answers = [text_field(m, "value", f"{where}: a gpt turn") for m in messages[1::2]]
    marked = [i for i, text in enumerate(users) if IMAGE_MARK in text] or [0]
    if len(marked) > 1:
        raise InputError(f"{where}: {len(marked)} <image> in the text but 1 image")
    users[marked[0]] = image_first(users[marked[0]], where)
    return Instruction(where, key, image, list(zip(users, answers)))


def infuse(instruction: Instruction, description: str, one_line: bool = False) -> Instruction:
    """Section 4, stage 2: puts the model's own description before the first instruction, after the image."""
    (user, answer), *later = instruction.turns
    text = with_description(description, user.removeprefix(f"{IMAGE_MARK}\n"), one_line)
    user = with_image(text) if user.startswith(IMAGE_MARK) else text
    return replace(instruction, turns=[(user, answer), *later], description=description)


class Infusion:
    """Joins descriptions with their instructions: infusion(where, description record) -> the infused
    Instruction.

    A description names the key of its record. Published ones that do not are joined by image: the k-th
    description of an image with its k-th record. `plain` leaves the descriptions out: a control.
    """

    def __init__(self, instructions: str | Path, one_line: bool = False, plain: bool = False):
        self.path, self.one_line, self.plain = instructions, one_line, plain
        self.skipped = {}
        self.records, self.total = image_records(instructions, self.skipped)
        self.by_key = {entry[1]: entry for entry in self.records}
        self.by_image = {}
        for entry in self.records:
            self.by_image.setdefault(entry[2]["image"], []).append(entry)
        self.described = set()  # keys
        self.count = 0  # of the described records without a problem

    def __call__(self, where: str, record: dict) -> Instruction:
        image = image_name(record, where)
        description = text_field(record, "description", where)
        if record.get("id") is not None:
            key = str(record["id"])
            if key in self.skipped:
                raise InputError(self.skipped[key])
            entry = self.by_key.get(key)
        else:
            remaining = (e for e in self.by_image.get(image, []) if e[1] not in self.described)
            entry = next(remaining, None)
        if entry is None:
            name = brief(record.get("id", image))
            raise InputError(f"{where}: describes '{name}', which is not in {self.path}")
        _, key, _ = entry
        if key in self.described:
            raise InputError(f"{where}: {brief(key)} is described twice")
        self.described.add(key)
        instruction = parse_instruction(*entry)
        if instruction.image != image:
            shown = brief(instruction.image)
            other = f"{instruction.where} has the image {shown}"
            raise InputError(f"{where}: describes {brief(image)}, but {other}")
        self.count += 1
        return instruction if self.plain else infuse(instruction, description, self.one_line)

    def summary(self):
        """One line of counts, after all descriptions, if any, have been joined."""
        line = f"{len(self.records)} records with an image, {self.total} in all"
        if self.described:
            line = f"{self.count} described of {line}"
        return f"{line}; {skipped_line(self.skipped)}" if self.skipped else line
