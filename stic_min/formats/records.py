"""Records of data files in the formats of various projects. No model code.

What kind of file it is, which image a record names, and both responses of a preference pair in every known
format.
"""

import json
import re

from stic_min import InputError
from stic_min.runtime.files import check_text, read_records, read_text, text_field
from stic_min.text import IMAGE_MARK

IMAGE_KEYS = "image", "images", "image_path"
KINDS = {  # what each file contains, and the flag that takes it
    "pairs": "preference pairs (--pairs)",
    "descriptions": "descriptions (--descriptions)",
    "instructions": "instructions (--describe, --instructions)",
}


def record_kind(record: dict) -> str | None:
    """The key of KINDS that a record belongs to."""
    if {"chosen", "rejected", "rejected_conversations"} & set(record):
        return "pairs"
    if "description" in record or "conversations" in record:
        return "descriptions" if "description" in record else "instructions"
    return "pairs" if "rejected" in str(record.get("text")) else None


def read_kind(path, kind: str) -> list:
    """`read_records` of one kind. A file of another kind is an error, because flags are easily swapped."""
    records = read_records(path)
    kinds = dict.fromkeys(record_kind(record) for _, record in records)
    other = next(filter(None, kinds), None)
    if other and kind not in kinds:
        raise InputError(f"{path} contains {KINDS[other]}, not {KINDS[kind]}")
    return records


def read_names(path) -> list[str]:
    """Names of images: one per line, or a JSON list like STIC's (data/6k_coco_names.json)."""
    text = read_text(path)
    if re.match(r'\s*\[\s*["\]{]|\s*\{', text):
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            kinds = filter(None, (record_kind(record) for _, record in read_records(path)))
            content = next((KINDS[kind] for kind in kinds), "JSON objects")
            raise InputError(f"{path} contains {content}, not image names (--names)")
    else:
        names = text.split("\n")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InputError(f"{path}: no image names")
    return names


def image_name(record: dict, where: str) -> str:
    """The image that a record names, as a name or as a list of one."""
    image = next((record[key] for key in IMAGE_KEYS if record.get(key)), None)
    if isinstance(image, list):
        if len(image) != 1:
            raise InputError(f"{where}: {len(image)} images, but a sample has one")
        [image] = image
    if isinstance(image, dict):  # a Hugging Face parquet file, converted to JSON
        image = record.get("image_path") or image.get("path")
    if image is not None and not isinstance(image, str):
        raise InputError(f"{where}: image is not a file name")
    return text_field({"image": image}, "image", where)


# ---------------------------------------------------------------- preference pairs

ROLES = {"human": "user", "gpt": "assistant"}
EXPECTED = 'expected: {"image": ..., "prompt": ..., "chosen": ..., "rejected": ...}'


def messages(value, role):
    """Text by `role`, one message, or a list of messages -> [{role, content}, ...]; see `pair_sides`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    turns = []
    for message in value if isinstance(value, list) else []:
        message = message if isinstance(message, dict) else {}
        sender = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts of text, and images, which become marks
            parts = [part if isinstance(part, dict) else {} for part in content]
            texts = [IMAGE_MARK if p.get("type") == "image" else str(p.get("text") or "") for p in parts]
            content = "".join(texts)
        sender = ROLES.get(sender, sender) if isinstance(sender, str) else None
        turns.append({"role": sender, "content": content})
    return turns


def pair_sides(record: dict) -> dict[str, list]:
    """A preference record in any known format -> {"chosen" and "rejected": [{role, content}, ...]}.

    | format                      | question                 | answers                               |
    |-----------------------------|--------------------------|---------------------------------------|
    | ours, STIC's, TRL's         | in chosen and rejected   | chosen, rejected: messages            |
    | TRL's with a prompt         | prompt: text or messages | chosen, rejected: text or messages    |
    | RLAIF-V's                   | question: text           | chosen, rejected: text                |
    | RLHF-V's                    | the same three keys in `text`, an object or its JSON string      |
    | LLaMA-Factory's             | conversations: a message | chosen, rejected: a message           |
    | POVID's                     | in both                  | conversations, rejected_conversations |

    Messages are {role, content} or LLaVA's {from, value}; content is text or TRL's list of parts.
    """
    text = record.get("text")
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError):
            pass
    record = record | (text if isinstance(text, dict) else {})
    question = next((record[key] for key in ("prompt", "question", "conversations") if record.get(key)), None)
    sides = {"chosen": record.get("chosen"), "rejected": record.get("rejected")}
    if record.get("rejected_conversations"):
        sides = {"chosen": record.get("conversations"), "rejected": record["rejected_conversations"]}
    question_turns = messages(question, "user")
    for side, value in sides.items():
        turns = messages(value, "assistant")
        has_question = turns and turns[0]["role"] == "user"
        sides[side] = turns if has_question else [*question_turns, *turns]
    return sides


# ---------------------------------------------------------------- instructions


def unique_key(record: dict, image: str, where: str, taken: dict[str, int]) -> str:
    """The id of a record or, without one, its image; `id#2` for the second record with an id. `taken` is
    updated: {key: how many records have it as their id}."""
    name = key = image if record.get("id") in (None, "") else str(record["id"])
    check_text(name, f"{where}: id")
    while key in taken:
        taken[name] += 1
        key = f"{name}#{taken[name]}"
    taken[key] = 1
    return key


def image_records(path, skipped: dict | None = None) -> tuple[list, int]:
    """LLaVA's instruction list -> [(where, key, record)] of the records with one image, and the number of all
    records.

    Keys are unique, although LLaVA's own data repeats some ids. With a dict `skipped`, records with several
    images are stored there as {key: reason}; otherwise they are errors.
    """
    records = read_kind(path, "instructions")
    with_images = []
    taken = {}
    for where, record in records:
        if not any(record.get(key) for key in IMAGE_KEYS):
            continue
        problem = None
        try:
            image = image_name(record, where)
        except InputError as error:
            if skipped is None:
                raise
            image, problem = where, error
        key = unique_key(record, image, where, taken)
        if problem:
            skipped[key] = str(problem)
        else:
            with_images.append((where, key, record | {"image": image}))
    if not with_images:
        hint = f" ({skipped_line(skipped)})" if skipped else ""
        raise InputError(f"{path}: none of its {len(records)} records has an image{hint}")
    return with_images, len(records)


def skipped_line(skipped):
    """One line about the records that `image_records` skipped."""
    return f"{len(skipped)} records skipped, the first: {next(iter(skipped.values()))}"
