"""Describe, then respond (DaR, section 4): how a model is asked about pictures at test time.

Two calls: the model describes the picture with a fixed captioning prompt, then it answers the question with that
description in front. Direct answering is the second call alone. `args` has the sampling flags of the command line.
"""

from stic_min import InputError, cli, sampler
from stic_min.text import DESCRIBE_PROMPT, IMAGE_MARK, TEMPLATES, infused, with_image


def ask(llava, names, texts, pictures, args, purpose, max_new_tokens):
    """One sample for each user text (with its <image> marks) about its pictures -> list[str]. Seeds go by name."""
    samples = sampler.sample(
        llava,
        [TEMPLATES[llava.config.template].prompt(text) for text in texts],
        pictures,
        [sampler.row_seed(args.seed, purpose, name) for name in names],
        max_new_tokens=max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    return [llava.tokenizer.decode(sample.ids) for sample in samples]


def excess(llava, text, pictures, args):
    """By how many tokens a user text with its pictures is too long, if an answer is to follow (of 128 at least)."""
    prompt = TEMPLATES[llava.config.template].prompt(with_image(text, len(pictures)))
    room = llava.config.decoder.max_positions - min(args.max_new_tokens, 128)
    return llava.prompt_length(prompt, pictures) - min(llava.config.max_length, room)


def fit(llava, description, text, pictures, args):
    """`description`, shortened from its end if with `text` it is too long for the model; None if nothing of it fits.

    Decoding and encoding again may change the count, so it is cut until it fits.
    """
    ids, whole = llava.tokenizer.encode(description), description
    while (over := excess(llava, infused(description, text), pictures, args)) > 0 and ids:
        ids = ids[:-over]
        description = llava.tokenizer.decode(ids)
    if description != whole:
        cli.warn(f"a description is cut from {len(whole)} to {len(description)} characters to fit the model's sequence")
    return description if over <= 0 else None


def describe(llava, names, pictures, args, max_new_tokens):
    """The first call: a description for each list of pictures -> list[str].

    PAPER vs RELEASED (E, see README.md): the release leaves <image> out, so its model describes blind. That is what
    an empty list of pictures gives.
    """
    texts = [with_image(DESCRIBE_PROMPT, len(own)) for own in pictures]
    return ask(llava, names, texts, pictures, args, "describe", max_new_tokens)


def respond(llava, names, texts, pictures, descriptions, args):
    """The second call: texts (without <image>) behind descriptions[i] (None: direct) -> list[str]."""
    users = []
    for text, own, description in zip(texts, pictures, descriptions):
        if description is not None:
            description = fit(llava, description, text, own, args)
        user = text if description is None else infused(description, text)
        users.append(with_image(user, len(own)))
    return ask(llava, names, users, pictures, args, "answer", args.max_new_tokens)


# ---------------------------------------------------------------- many questions, batch by batch, into files


def read_descriptions(path, records):
    """{picture: description}. Raises InputError if one is no text."""
    for record in records:
        if not isinstance(record.get("description"), str):
            raise InputError(f"{path}: {record['image']!r} has no description")
    return {record["image"]: record["description"] for record in records}


def describe_pictures(llava, shown, read, output, args, max_new_tokens):
    """One description a picture, into `output` -> {name: description} of all that are there, on every rank.

    shown: {name: question}; read(question) -> its pictures. What can't be read is left to `answer_questions` to report.
    """
    ranks, todo = output.ranks, [name for name in shown if name not in output.done]
    ranks.say(f"{len(shown)} pictures to describe, {len(shown) - len(todo)} of them already in {output.path}")
    todo = todo[ranks.rank :: ranks.world]
    progress = cli.Progress(f"{args.command} descriptions", len(todo), ranks)
    for start in range(0, len(todo), args.batch_size):
        batch = {}
        for name in todo[start : start + args.batch_size]:
            try:
                pictures = read(shown[name])
                if excess(llava, DESCRIBE_PROMPT, pictures, args) <= 0:
                    batch[name] = pictures
                else:
                    cli.warn(f"{name} is not described: with its prompt it is longer than the model's sequence")
            except InputError:
                continue
        for name, text in zip(batch, describe(llava, list(batch), list(batch.values()), args, max_new_tokens)):
            output.append({"image": name, "description": text})
        progress.add(len(todo[start : start + args.batch_size]))
    output.finish(list(shown))
    ranks.barrier()  # the first rank has put them together
    return read_descriptions(output.path, output.read(output.path))


def answer_questions(llava, questions, descriptions, entries, read, output, args):
    """Answers into `output`, behind `entries` -> its records in the questions' order, on the first rank only.

    questions, descriptions (None: asked directly) and entries (what the file says beside `text`) go by the same keys;
    read(question) -> its pictures. A question whose picture can't be read, or that is too long, stays without answer.
    """
    ranks, todo = output.ranks, [key for key in questions if key not in output.done]
    ranks.say(f"{len(questions)} questions, {len(questions) - len(todo)} of them already in {output.path}")
    todo = todo[ranks.rank :: ranks.world]
    progress = cli.Progress(f"{args.command} answers", len(todo), ranks)
    for start in range(0, len(todo), args.batch_size):
        batch = {}
        for key in todo[start : start + args.batch_size]:
            try:
                pictures = read(questions[key])
                if IMAGE_MARK in questions[key]["text"]:
                    raise InputError(f"{IMAGE_MARK} in its text, which would ask for a second picture")
                if (over := excess(llava, questions[key]["text"], pictures, args)) > 0:
                    raise InputError(f"{over} tokens more than the model's sequence holds")
                batch[key] = pictures
            except InputError as error:
                cli.warn(f"question {key} has no answer: {error}")
        texts, behind = [questions[key]["text"] for key in batch], [descriptions[key] for key in batch]
        for key, text in zip(batch, respond(llava, list(batch), texts, list(batch.values()), behind, args)):
            output.append(entries[key] | {"text": text})
        progress.add(len(todo[start : start + args.batch_size]))
    return output.finish(list(questions))
