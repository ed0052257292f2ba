"""Describe, then respond (DaR, section 4): how a model is asked about pictures at test time.

Two calls: the model describes the picture with a fixed captioning prompt, then it answers the question with that
description in front. Direct answering is the second call alone. `args` has the sampling flags of the command line.
"""

from stic_min import InputError, sampler
from stic_min.runtime import console
from stic_min.runtime.work import prefetch, row_seed
from stic_min.text import DESCRIBE_PROMPT, IMAGE_MARK, with_description, with_image


def length(llava, text, pictures):
    """Tokens of a user text with its pictures."""
    return llava.prompt_length(llava.chat_prompt(text, len(pictures)), pictures)


def excess(llava, text, pictures, args):
    """By how many tokens a user text with its pictures is too long, if an answer is to follow (of 128 at least)."""
    room = llava.config.decoder.max_positions - min(args.max_new_tokens, 128)
    return length(llava, text, pictures) - min(llava.config.max_length, room)


def check_question(llava, text, pictures, args):
    """Raises InputError if it can't be asked."""
    if IMAGE_MARK in text:
        raise InputError(f"{IMAGE_MARK} in its text, which would ask for a second picture")
    if (over := excess(llava, text, pictures, args)) > 0:
        raise InputError(f"{over} tokens more than the model's sequence holds")


def fit(llava, description, text, pictures, args):
    """`description`, shortened from its end if with `text` it is too long for the model; None if nothing of it fits.

    Decoding and encoding again may change the count, so it is cut until it fits.
    """
    ids, whole = llava.tokenizer.encode(description), description
    while (over := excess(llava, with_description(description, text), pictures, args)) > 0 and ids:
        ids = ids[:-over]
        description = llava.tokenizer.decode(ids)
    if description != whole:
        lengths = f"{len(whole)} to {len(description)} characters"
        console.warn(f"a description is cut from {lengths} to fit the model's sequence")
    return description if over <= 0 else None


def user_text(llava, text, description, pictures, args):
    """What the second call asks: the text, behind its pictures' marks and the description if there is one."""
    if description is not None:
        description = fit(llava, description, text, pictures, args)
    return with_image(text if description is None else with_description(description, text), len(pictures))


def say(llava, user, pictures, args, *name):
    """The answer to one user text with its pictures' marks; the seed goes by `name`."""
    prompt, seed = llava.chat_prompt(user, images=0), row_seed(args.seed, *name)
    how = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    [sample] = sampler.sample(llava, [prompt], [pictures], [seed], **how)
    return llava.tokenizer.decode(sample.ids)


# ---------------------------------------------------------------- many questions, into files


def run(llava, groups, prepare, ranks, what, args, max_new_tokens):
    """Samples what prepare(group) asks for, over this rank's share of groups of keys -> yields (key, text, finish).

    A group is about one picture and stays together: prepare(group) -> its requests, in a worker thread.
    """
    groups = groups[ranks.rank :: ranks.world]
    count = sum(map(len, groups))
    progress = console.Progress(what, count, ranks)

    def requests():
        for group, made in zip(groups, prefetch(prepare, groups)):
            progress.add(len(group) - len(made))  # what could not be prepared
            yield from made

    how = {"max_new_tokens": max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    for key, sample in sampler.stream(llava, requests(), slots=min(args.batch_size, count), **how):
        yield key, llava.tokenizer.decode(sample.ids), sample.finish
        progress.add()


def request(llava, key, user, tiles, seed):
    prompt = llava.chat_prompt(user, images=0)
    return sampler.Request(key, llava.tokenizer.encode_prompt(prompt), tiles, seed)


def read_descriptions(path, records):
    """{picture: description}. Raises InputError if one is no text."""
    for record in records:
        if not isinstance(record.get("description"), str):
            raise InputError(f"{path}: {record['image']!r} has no description")
    return {record["image"]: record["description"] for record in records}


def describe_pictures(llava, shown, read, output, args, max_new_tokens):
    """One description a picture, into `output` -> {name: description} of all that are there, on every rank.

    shown: {name: question}; read(question) -> its pictures. What can't be read is left to `answer_questions` to report.
    PAPER vs RELEASED (E, see README.md): the release leaves <image> out, so its model describes blind. That is what
    a question without pictures gives.
    """
    ranks, todo = output.ranks, [name for name in shown if name not in output.done]
    ranks.say(f"{len(shown)} pictures to describe, {len(shown) - len(todo)} of them already in {output.path}")

    def prepare(group):
        [name] = group
        try:
            pictures = read(shown[name])
        except InputError:
            return []
        if excess(llava, DESCRIBE_PROMPT, pictures, args) > 0:
            console.warn(f"{name} is not described: with its prompt it is longer than the model's sequence")
            return []
        seed, tiles = row_seed(args.seed, "describe", name), [llava.tiles(p) for p in pictures]
        return [request(llava, name, with_image(DESCRIBE_PROMPT, len(pictures)), tiles, seed)]

    groups = [[name] for name in todo]
    what = f"{args.command} descriptions"
    for name, text, finish in run(llava, groups, prepare, ranks, what, args, max_new_tokens):
        output.append({"image": name, "description": text, "finish": finish})
    output.finish(list(shown))
    ranks.barrier()  # the first rank has put them together
    return read_descriptions(output.path, output.read(output.path))


def by_picture(questions):
    """The keys of questions in groups about one picture, each of those without one on its own."""
    groups = {}
    for key, question in questions.items():
        groups.setdefault((key,) if question["image"] is None else question["image"], []).append(key)
    return list(groups.values())


def answer_questions(llava, questions, descriptions, entries, read, output, args):
    """Answers into `output`, behind `entries` -> its records in the questions' order, on the first rank only.

    questions, descriptions (None: asked directly) and entries (what the file says beside `text`) go by the same keys;
    read(question) -> its pictures. A question whose picture can't be read, or that is too long, stays without answer.
    """
    ranks = output.ranks
    groups = by_picture({key: question for key, question in questions.items() if key not in output.done})
    left = sum(map(len, groups))
    ranks.say(f"{len(questions)} questions, {len(questions) - left} of them already in {output.path}")

    def prepare(group):
        made, pictures, tiles = [], None, None
        for key in group:
            question = questions[key]
            try:
                pictures = read(question) if pictures is None else pictures
                check_question(llava, question["text"], pictures, args)
            except InputError as error:
                console.warn(f"question {key} has no answer: {error}")
                continue
            tiles = tiles or [llava.tiles(picture) for picture in pictures]
            user = user_text(llava, question["text"], descriptions[key], pictures, args)
            made.append(request(llava, key, user, tiles, row_seed(args.seed, "answer", key)))
        return made

    what, limit = f"{args.command} answers", args.max_new_tokens
    for key, text, finish in run(llava, groups, prepare, ranks, what, args, limit):
        output.append(entries[key] | {"text": text, "finish": finish})
    return output.finish(list(questions))


def measure(llava, questions, read, args, ranks):
    """What the model would be asked, for --check -> {key: tokens of the question with its picture}, {picture: tokens of
    the describer's prompt with it}, {picture: why it can't be read}, {key: why it can't be asked about one that can}.
    """
    tokens, describing, broken, unasked = {}, {}, {}, {}
    groups = by_picture(questions)
    progress = console.Progress("checking images", len(groups), ranks)

    def prepare(group):
        image, found = questions[group[0]]["image"], []
        try:
            pictures = read(questions[group[0]])
        except InputError as error:
            return image, str(error), found
        for key in group:
            try:
                check_question(llava, questions[key]["text"], pictures, args)
                found.append((key, length(llava, questions[key]["text"], pictures), None))
            except InputError as error:
                found.append((key, None, str(error)))
        return image, length(llava, DESCRIBE_PROMPT, pictures), found

    for image, described, found in prefetch(prepare, groups):
        if isinstance(described, str):
            broken[image] = described
        elif image is not None:
            describing[image] = described
        tokens |= {key: count for key, count, error in found if error is None}
        unasked |= {key: error for key, _, error in found if error is not None}
        progress.add()
    return tokens, describing, broken, unasked
