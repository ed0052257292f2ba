"""Pairs, instructions and descriptions: what is read of each record, and what of it is scored.

The one place that validates them: every function raises InputError with one line that names the file and the sample.
Reads the published formats as they are (JSON list or JSON lines), with and without `<image>` in the user turn.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from stic_min import InputError
from stic_min.batch import Example
from stic_min.formats.image_folder import image_path
from stic_min.formats.records import EXPECTED, IMAGE_KEYS, image_name, kind, pair_sides, read_kind
from stic_min.images import image_size, open_image
from stic_min.runtime.files import brief, check_text, field
from stic_min.text import IMAGE, IMAGE_MARK, TEMPLATES, with_description, with_image, without_marks


def each(make, entries, problems=None):
    """[make(entry), ...]. With a list of `problems`, what is wrong with entries goes there, and they are left out."""
    made = []
    for entry in entries:
        try:
            made.append(make(entry))
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return made


# ---------------------------------------------------------------- preference pairs (Algorithm 1)


@dataclass
class Pair:
    """One preference: y_w (chosen, the winner) over y_l (rejected, the loser) as answers to x about the picture."""

    where: str  # file and record, for messages
    image: str
    prompt: str  # x with its <image>, the captioning prompt; never x_g or x_b
    chosen: str  # y_w
    rejected: str  # y_l
    chosen_stopped: bool  # ended by the end token; False: by length
    rejected_stopped: bool


def image_first(text, where):
    """A user turn with one <image>, moved to the front as LLaVA trains it; added if the data left it out.

    PAPER vs RELEASED (D, see README.md): the release leaves the mark out, and then trains without the picture.
    """
    if text.count(IMAGE_MARK) > 1:
        raise InputError(f"{where}: {text.count(IMAGE_MARK)} <image> in the text but 1 picture")
    return with_image(without_marks(text))


def parse_pair(where, record):
    """A record in one of the forms of `pair_sides` -> Pair. Raises InputError naming it."""
    if kind(record) != "pairs":
        raise InputError(f"{where}: not a preference pair; {EXPECTED}")
    image = image_name(record, where)
    where = f"{where} ({brief(image)})"
    turns = {}
    for side, said in pair_sides(record).items():
        roles = [message["role"] for message in said]
        if roles != ["user", "assistant"]:
            shown = brief(roles)
            raise InputError(f"{where}: {side} is not one user and one assistant message but {shown}; {EXPECTED}")
        turns[side] = [field(m, "content", f"{where}: {side}, {m['role']}") for m in said]
    if image_first(turns["chosen"][0], where) != image_first(turns["rejected"][0], where):
        raise InputError(f"{where}: chosen and rejected answer different prompts")
    stopped = lambda side: record.get(f"{side}_finish", "stop") != "length"
    prompt = image_first(turns["chosen"][0], where)
    return Pair(where, image, prompt, turns["chosen"][1], turns["rejected"][1], stopped("chosen"), stopped("rejected"))


def read_pairs(path, problems=None):
    """All pairs of a JSON list or JSON lines -> [Pair]; `problems` as `each` takes them."""
    return each(lambda entry: parse_pair(*entry), read_kind(path, "pairs"), problems)


# ---------------------------------------------------------------- instructions and descriptions (Algorithm 2)


@dataclass
class Instruction:
    where: str
    id: str  # unique within its file
    image: str
    turns: list  # [(user, answer), ...], one <image> among the users
    description: str = ""  # the model's own, in front of the first of them; for messages


def image_records(path, left_out=None):
    """LLaVA's instruction list -> [(where, id, record)] of those with an image, and how many there are in all.

    Ids are made unique (`id#2` for a second record of that id): LLaVA's own data repeats some. Without one, the
    image's name is the id. With a dict `left_out`, what is wrong with other images than one goes there by id.
    """
    records, with_images, taken, repeats = read_kind(path, "instructions"), [], set(), {}
    for where, record in records:
        if any(record.get(key) for key in IMAGE_KEYS):
            try:
                image, wrong = image_name(record, where), None
            except InputError as error:
                image, wrong = where, error
                if left_out is None:
                    raise
            name = unique = image if record.get("id") in (None, "") else str(record["id"])
            check_text(name, f"{where}: id")
            while unique in taken:
                repeats[name] = repeats.get(name, 1) + 1
                unique = f"{name}#{repeats[name]}"
            taken.add(unique)
            if wrong:
                left_out[unique] = str(wrong)
            else:
                with_images.append((where, unique, record | {"image": image}))
    if not with_images:
        first = f" (the first of {len(left_out)} left out: {next(iter(left_out.values()))})" if left_out else ""
        raise InputError(f"{path}: none of its {len(records)} records has an image{first}")
    return with_images, len(records)


def say_left_out(left_out):
    """One line on what `image_records` left out."""
    return f"{len(left_out)} records left out, the first: {next(iter(left_out.values()))}"


def parse_instruction(where, id, record):
    """A record of LLaVA's instruction data -> Instruction. Raises InputError naming it if turns or marks are off."""
    image = image_name(record, where)
    where = f"{where} ({brief(id)})"
    messages = record.get("conversations")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where}: no conversations")
    messages = messages[1:] if messages and messages[0].get("from") == "gpt" else messages  # as LLaVA does
    roles = [m.get("from") for m in messages]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise InputError(f"{where}: turns are {brief(roles)}, not human and gpt in turn")
    users = [field(m, "value", f"{where}: a human turn") for m in messages[::2]]
    answers = [field(m, "value", f"{where}: a gpt turn") for m in messages[1::2]]
    marked = [i for i, text in enumerate(users) if IMAGE_MARK in text] or [0]
    if len(marked) > 1:
        raise InputError(f"{where}: {len(marked)} <image> in the text but 1 picture")
    users[marked[0]] = image_first(users[marked[0]], where)
    return Instruction(where, id, image, list(zip(users, answers)))


def infuse(instruction, description, one_line=False):
    """Section 4, stage 2: the model's own description in front of the first instruction, behind the picture."""
    (user, answer), *later = instruction.turns
    text = with_description(description, user.removeprefix(f"{IMAGE_MARK}\n"), one_line)
    user = with_image(text) if user.startswith(IMAGE_MARK) else text
    return Instruction(instruction.where, instruction.id, instruction.image, [(user, answer), *later], description)


def read_infused(instructions, descriptions, one_line=False, plain=False, problems=None):
    """The described instructions, infused -> [Instruction] and a line of counts. `plain` leaves the descriptions out.

    Descriptions carry the record's id; published ones that have none join on the image, the k-th description of a
    picture with its k-th record. `problems` as `each` takes them.
    """
    left_out = {}
    records, total = image_records(instructions, left_out)
    by_id = {id: (where, id, record) for where, id, record in records}
    by_image = {}
    for entry in records:
        by_image.setdefault(entry[2]["image"], []).append(entry)
    taken = set()

    def describe(where, record):
        image, text = image_name(record, where), field(record, "description", where)
        if record.get("id") is not None:
            entry = by_id.get(str(record["id"]))
            if str(record["id"]) in left_out:
                raise InputError(left_out[str(record["id"])])
        else:
            entry = next((e for e in by_image.get(image, []) if e[1] not in taken), None)
        if entry is None:
            shown = brief(record.get("id", image))
            raise InputError(f"{where}: describes '{shown}', which {instructions} does not have")
        if entry[1] in taken:
            raise InputError(f"{where}: {brief(entry[1])} is described twice")
        taken.add(entry[1])
        instruction = parse_instruction(*entry)
        if instruction.image != image:
            shown = brief(instruction.image)
            raise InputError(f"{where}: describes {brief(image)}, but {instruction.where} shows {shown}")
        return instruction if plain else infuse(instruction, text, one_line)

    described = each(lambda entry: describe(*entry), read_kind(descriptions, "descriptions"), problems)
    counts = f"{len(described)} described of {len(records)} records with an image, {total} in all"
    if left_out:
        counts += f"; {say_left_out(left_out)}"
    return described, counts


# ---------------------------------------------------------------- what is trained on


@dataclass
class Item:
    """What training needs to know of one sample before its picture is loaded."""

    example: Example
    image: Path
    length: int  # positions in the flat row
    scored: int  # supervised tokens
    cut: bool  # whether a response was shortened to the maximum length
    differs: bool = True  # whether chosen and rejected do; where not, the gradient of the DPO term is 0


def cut_to(ids, room):
    return ids[:room], len(ids) > room


def pair_item(pair, llava, folder, max_length):
    """Pair -> Item: the prompt as trunk, [chosen, rejected] as branches, each cut to `max_length` merged tokens."""
    tokenizer, path = llava.tokenizer, image_path(folder, pair.image)
    prompt = tokenizer.encode_prompt(llava.chat_prompt(pair.prompt, images=0))
    length = len(prompt) - 1 + llava.config.image_tokens(image_size(path))
    if length >= max_length:
        raise InputError(f"{pair.where}: the prompt takes {length} tokens, no room for a response in {max_length}")
    # A response that ended by length gets no end token: the model never said it there.
    chosen, cut_w = cut_to(tokenizer.encode_response(pair.chosen, pair.chosen_stopped), max_length - length)
    rejected, cut_l = cut_to(tokenizer.encode_response(pair.rejected, pair.rejected_stopped), max_length - length)
    example = Example(pair.where, [(prompt, False)], [chosen, rejected])
    scored = len(chosen) + len(rejected)
    return Item(example, path, length + scored, scored, cut_w or cut_l, chosen != rejected)


def instruction_item(instruction, llava, folder, max_length):
    """Instruction -> Item: one conversation, every answer scored, ended in the answer that reaches `max_length`."""
    tokenizer, path = llava.tokenizer, image_path(folder, instruction.image)
    users, answers = zip(*instruction.turns)
    prompts = TEMPLATES[llava.config.template].turns(users)
    image_tokens, trunk, room, cut = llava.config.image_tokens(image_size(path)), [], max_length, False
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        prompt = tokenizer.encode_prompt(prompt, first=i == 0)
        left = room - len(prompt) - prompt.count(IMAGE) * (image_tokens - 1)
        if left <= 0:
            cut = True
            break
        answer, cut = cut_to(tokenizer.encode_response(answer), left)
        trunk += [(prompt, False), (answer, True)]
        room = left - len(answer)
        if cut:
            break
    if not trunk:
        raise InputError(f"{instruction.where}: the first prompt alone is longer than {max_length} tokens")
    if sum(ids.count(IMAGE) for ids, _ in trunk) != 1:
        raise InputError(f"{instruction.where}: <image> comes only after {max_length} tokens")
    scored = sum(len(ids) for ids, is_scored in trunk if is_scored)
    return Item(Example(instruction.where, trunk, []), path, max_length - room, scored, cut)


def global_batches(lengths, size, seed):
    """One epoch: indices in random order, `size` at a time, the last batch as short as it comes.

    Within a batch longest first, so that ranks that take every n-th get like lengths. That is what LLaVA's
    group_by_modality_length (Table 4) comes to: it shuffles, and sorts within one global batch.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [sorted(batch, key=lambda i: -lengths[i]) for batch in batches]


def load_tiles(item, llava):
    return [llava.tiles(open_image(item.image))]
