"""Benchmarks with and without describe-and-respond (DaR), and questions about one picture.

  python evaluate.py scienceqa --model M --adapter runs/stage2 --data ScienceQA --out results/          direct
  python evaluate.py scienceqa --model M --adapter runs/stage2 --data ScienceQA --out results/ --dar    describes first
  python evaluate.py score scienceqa --answers results/scienceqa-stage2-dar.jsonl --data ScienceQA      no model
  python evaluate.py ask --model M --adapter runs/stage2 --image pic.jpg "What is in the picture?"
  torchrun --nproc_per_node=4 evaluate.py scienceqa ...      the questions shared out over four GPUs

Answers are greedy and go to results/BENCHMARK-ADAPTER-{direct,dar}.jsonl, one line each, written at once; the same
command again skips what is there. The paper's numbers were made with --template vicuna_v1 and anyres.
"""

import argparse
import json
import os
from pathlib import Path

from stic_min import InputError, cli, sampler
from stic_min.files import Output, read_records, subset
from stic_min.images import image_path, open_image
from stic_min.loader import load_llava
from stic_min.scorers import scienceqa, toy_captions, toy_vqa
from stic_min.text import DESCRIBE_PROMPT, TEMPLATES, infused, with_image, without_marks

SCORERS = {"scienceqa": scienceqa, "toycaptions": toy_captions, "toyvqa": toy_vqa}


# ---------------------------------------------------------------- answering


def ask(llava, names, texts, pictures, args, purpose):
    """One sample for each user text (with its <image> marks) about its pictures -> list[str]. Seeds go by name."""
    samples = sampler.sample(
        llava,
        [TEMPLATES[llava.config.template].prompt(text) for text in texts],
        pictures,
        [sampler.row_seed(args.seed, purpose, name) for name in names],
        max_new_tokens=args.max_new_tokens,
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


def answer(llava, names, texts, images, pictures, args):
    """texts (without <image>) about pictures[i] -> (answers, descriptions). With --dar the model describes first.

    images[i] is the name of pictures[i]: questions about the same picture share its description.
    PAPER vs RELEASED (E, see README.md): the release describes without <image>, so blind. Ours sees the picture.
    """
    descriptions, users = [None] * len(texts), list(texts)
    if args.dar:
        shown = {image: own for image, own in zip(images, pictures) if own}  # no picture: nothing to describe
        prompts = [with_image(DESCRIBE_PROMPT, len(own)) for own in shown.values()]
        described = dict(zip(shown, ask(llava, list(shown), prompts, list(shown.values()), args, "describe")))
        for i in (i for i, own in enumerate(pictures) if own):
            descriptions[i] = fit(llava, described[images[i]], texts[i], pictures[i], args)
            if descriptions[i] is not None:
                users[i] = infused(descriptions[i], texts[i])
    users = [with_image(text, len(own)) for text, own in zip(users, pictures)]
    return ask(llava, names, users, pictures, args, "answer"), descriptions


# ---------------------------------------------------------------- commands


def run_benchmark(args):
    ranks, scorer = cli.start_ranks(args.device), SCORERS[args.command]
    questions = {q["question_id"]: q for q in subset(scorer.load(args.data), args.limit, args.seed)}
    cli.say_loading(args, ranks)
    llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **cli.model_options(args, ranks))
    label = Path(args.adapter).resolve().name if args.adapter else "base"
    mode = "dar" if args.dar else "direct"
    settings = {"mode": mode, **cli.run_settings(args, llava)}
    path = Path(args.out) / f"{args.command}-{label}-{mode}.jsonl"
    output = Output(path, "question_id", settings, ranks)
    todo = [q for id, q in questions.items() if id not in output.done]
    ranks.say(f"{len(questions)} questions, {len(questions) - len(todo)} of them already in {path}")

    todo = todo[ranks.rank :: ranks.world]
    progress = cli.Progress(f"{args.command} {mode}", len(todo), ranks)
    for start in range(0, len(todo), args.batch_size):
        batch, pictures = [], []
        for question in todo[start : start + args.batch_size]:
            try:
                own = [open_image(image_path(args.data, question["image"]))] if question["image"] else []
                if (over := excess(llava, question["text"], own, args)) > 0:
                    raise InputError(f"{over} tokens more than the model's sequence holds")
                pictures.append(own)
                batch.append(question)
            except InputError as error:
                cli.warn(f"question {question['question_id']} counts as wrong: {error}")
        names = [question["question_id"] for question in batch]
        texts, images = [q["text"] for q in batch], [q["image"] for q in batch]
        answers, descriptions = answer(llava, names, texts, images, pictures, args)
        for question, text, description in zip(batch, answers, descriptions):
            # The recorded prompt is free of the description: scorers read it.
            prompt = with_image(question["text"]) if question["image"] else question["text"]
            record = {"question_id": question["question_id"], "prompt": prompt, "text": text}
            output.append(record | ({"description": description} if description is not None else {}))
        progress.add(len(todo[start : start + args.batch_size]))

    records = output.finish(list(questions))
    if ranks.first:
        scores = scorer.score(list(questions.values()), records)
        beside = path.with_suffix(".scores.json.new")
        beside.write_text(json.dumps(settings | scores, indent=2) + "\n")
        beside.replace(path.with_suffix(".scores.json"))
        print(f"{path}\n{scorer.report(scores)}")


def run_score(args):
    if int(os.environ.get("RANK", 0)):
        return  # no work for several ranks
    scorer = SCORERS[args.benchmark]
    questions, answers = scorer.load(args.data), [record for _, record in read_records(args.answers)]
    try:
        scores = scorer.score(questions, answers)
    except InputError as error:
        raise InputError(f"{args.answers}: {error}") from None
    print(json.dumps(scores, indent=2) if args.json else scorer.report(scores))


def run_ask(args):
    if int(os.environ.get("RANK", 0)):
        return  # no work for several ranks
    if args.dar and not args.image:
        raise InputError("--dar describes a picture first: it needs --image")
    ranks = cli.Ranks(0, 1, cli.start_device(args.device))
    pictures = [open_image(path) for path in args.image]
    cli.say_loading(args, ranks)
    llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **cli.model_options(args, ranks))
    question = without_marks(args.question)
    if (over := excess(llava, question, pictures, args)) > 0:
        raise InputError(f"the question is {over} tokens longer than the model's sequence holds")
    [text], [description] = answer(llava, ["question"], [question], ["picture"], [pictures], args)
    if description is not None:
        print(f"Description: {description}\n")
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, summary, run):
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=cli.HelpFormatter)
        sub.set_defaults(run=run)
        return sub

    for name, scorer in SCORERS.items():
        sub = command(name, scorer.__doc__.split("\n")[0], run_benchmark)
        sub.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files, as published")
        sub.add_argument("--out", required=True, metavar="DIR", help="answers and scores")
        sub.add_argument("--dar", action="store_true", help="describe the picture first, then answer (section 4)")
        cli.add_model_flags(sub)
        cli.add_limit_flag(sub)
        cli.add_sampling_flags(sub, temperature=0.0, batch_size=8)

    sub = command("score", "scores an existing answers file; needs no model", run_score)
    sub.add_argument("benchmark", choices=sorted(SCORERS))
    sub.add_argument("--answers", required=True, metavar="FILE", help="JSON lines of question_id, prompt, text")
    sub.add_argument("--data", required=True, metavar="DIR", help="the benchmark's files, as published")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")

    sub = command("ask", "one question about one picture (or several, or none)", run_ask)
    sub.add_argument("question")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given again")
    sub.add_argument("--dar", action="store_true", help="describe the picture first, then answer (section 4)")
    cli.add_model_flags(sub)
    cli.add_sampling_flags(sub, temperature=0.0)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
