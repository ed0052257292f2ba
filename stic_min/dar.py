"""Describe, then respond (DaR, section 4): how a model is asked about an image at test time.

Two calls: the model describes the image, given a fixed captioning prompt; then it answers the question, with
its description in front. Direct answering is the second call alone.
"""

from stic_min import InputError, sampler
from stic_min.generate import Job, Query, generate
from stic_min.runtime import console
from stic_min.runtime.work import prefetch, row_seed
from stic_min.text import DESCRIBE_PROMPT, IMAGE_MARK, with_description


def prompt_length(llava, text, images):
    """Tokens of a user text with its images."""
    return llava.prompt_length(llava.chat_prompt(text, len(images)), images)


def tokens_over_limit(llava, text, images, sampling):
    """Number of tokens by which a user text with its images exceeds the model's limit, with room left for an
    answer (at least 128 tokens)."""
    room = llava.config.decoder.max_positions - min(sampling.max_new_tokens, 128)
    return prompt_length(llava, text, images) - min(llava.config.max_length, room)


def check_question(llava, text, images, sampling):
    """Raises InputError if the question can't be asked."""
    if IMAGE_MARK in text:
        raise InputError(f"its text contains {IMAGE_MARK}, which would stand for a second image")
    if (excess := tokens_over_limit(llava, text, images, sampling)) > 0:
        raise InputError(f"it is {excess} tokens longer than the model's limit")


def truncate_description(llava, description, text, images, sampling):
    """The description, truncated if it is too long for the model together with `text`; None if nothing
    fits.

    Decoding and encoding again may change the number of tokens, so it is cut until it fits.
    """
    excess = lambda: tokens_over_limit(llava, with_description(description, text), images, sampling)
    uncut = description
    ids = llava.tokenizer.encode(description)
    while excess() > 0 and ids:
        ids = ids[: -excess()]
        description = llava.tokenizer.decode(ids)
    if description != uncut:
        lengths = f"{len(uncut)} to {len(description)} characters"
        console.warn(f"a description was truncated from {lengths} to fit the model's sequence")
    return description if excess() <= 0 else None


def user_text(llava, text, description, images, sampling):
    """What the second call asks: the text, after the description if there is one."""
    if description is not None:
        description = truncate_description(llava, description, text, images, sampling)
    return text if description is None else with_description(description, text)


def answer_one(llava, text, images, sampling, *seed_parts):
    """The response to one user text about its images."""
    prompt, seed = llava.chat_prompt(text, len(images)), row_seed(sampling.seed, *seed_parts)
    [sample] = sampler.sample(llava, [prompt], [images], [seed], **sampling.options())
    return llava.tokenizer.decode(sample.ids)


# ---------------------------------------------------------------- many questions, into files


def describe_images(llava, question_of, read, output, sampling, what):
    """Writes one description per image to `output` -> {image: description} of all in the file, on every rank.

    question_of: {image: question}; read(question) -> its images. An unreadable image is left to
    `answer_questions` to report. A question without images is described without seeing any.
    """
    # PAPER vs RELEASED (E): the release leaves <image> out, so its model describes without seeing the image.
    ranks = output.ranks
    remaining = [image for image in question_of if image not in output.done]
    existing = len(question_of) - len(remaining)
    ranks.print(f"{len(question_of)} images to describe, {existing} of them already in {output.path}")

    def prepare(group):
        [name] = group
        try:
            images = read(question_of[name])
        except InputError:
            return []
        if tokens_over_limit(llava, DESCRIBE_PROMPT, images, sampling) > 0:
            console.warn(f"{name} is not described: its prompt is longer than the model's limit")
            return []
        return [Job(name, [Query(DESCRIBE_PROMPT, images, row_seed(sampling.seed, "describe", name))])]

    groups = [[name] for name in remaining]
    for job, [response] in generate(llava, groups, prepare, sampling, ranks, f"{what} descriptions"):
        output.append({"image": job.key, "description": response.text, "finish": response.finish})
    output.finish(list(question_of))
    ranks.barrier()  # until the first rank has merged the part files
    return read_descriptions(output.path, output.read(output.path))


def read_descriptions(path, records):
    """{image: description}"""
    for record in records:
        if not isinstance(record.get("description"), str):
            raise InputError(f"{path}: {record['image']!r} has no description")
    return {record["image"]: record["description"] for record in records}


def group_by_image(questions):
    """The keys of questions in groups about one image; each question without an image is its own group."""
    groups = {}
    for key, question in questions.items():
        groups.setdefault((key,) if question["image"] is None else question["image"], []).append(key)
    return list(groups.values())


def answer_questions(llava, questions, descriptions, entries, read, output, sampling, what):
    """Writes answers to `output` -> its records in the order of the questions, on the first rank only.

    questions, descriptions (None: asked directly) and entries (the record without its answer) have the same
    keys; read(question) -> its images. A question that is too long, or whose image is unreadable, stays
    without answer.
    """
    ranks = output.ranks
    groups = group_by_image({key: question for key, question in questions.items() if key not in output.done})
    existing = len(questions) - sum(map(len, groups))
    ranks.print(f"{len(questions)} questions, {existing} of them already in {output.path}")

    def prepare(group):
        jobs, images = [], None
        for key in group:
            question = questions[key]
            try:
                images = read(question) if images is None else images
                check_question(llava, question["text"], images, sampling)
            except InputError as error:
                console.warn(f"question {key} is skipped: {error}")
                continue
            text = user_text(llava, question["text"], descriptions[key], images, sampling)
            jobs.append(Job(key, [Query(text, images, row_seed(sampling.seed, "answer", key))]))
        return jobs

    for job, [response] in generate(llava, groups, prepare, sampling, ranks, f"{what} answers"):
        output.append(entries[job.key] | {"text": response.text, "finish": response.finish})
    return output.finish(list(questions))


def measure(llava, questions, read, sampling, ranks):
    """What the model would be asked, for --check -> {key: tokens of the question with its image}, {image:
    tokens of its description prompt}, {image: why it is unreadable}, {key: why it can't be asked about a
    readable image}."""
    tokens, describing, unreadable, unasked = {}, {}, {}, {}
    groups = group_by_image(questions)
    progress = console.Progress("checking images", len(groups), ranks)

    def prepare(group):
        image = questions[group[0]]["image"]
        try:
            images = read(questions[group[0]])
        except InputError as error:
            return image, str(error), None, []
        results = []
        for key in group:
            try:
                check_question(llava, questions[key]["text"], images, sampling)
                results.append((key, prompt_length(llava, questions[key]["text"], images), None))
            except InputError as error:
                results.append((key, None, str(error)))
        return image, None, prompt_length(llava, DESCRIBE_PROMPT, images), results

    for image, problem, description_length, results in prefetch(prepare, groups):
        if problem:
            unreadable[image] = problem
        elif image is not None:
            describing[image] = description_length
        tokens |= {key: length for key, length, error in results if error is None}
        unasked |= {key: error for key, _, error in results if error is not None}
        progress.add()
    return tokens, describing, unreadable, unasked
