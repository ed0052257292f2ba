"""SIMA (arXiv 2405.15973): the model judges its own answers, and learns to prefer the better ones.

  SIMA="python -m stic_min.neighbours.sima"        or torchrun --nproc_per_node=4 -m stic_min.neighbours.sima
  $SIMA answers --model M --instructions instructions.json --images DIR --out answers.jsonl
  $SIMA critique --model M --answers answers.jsonl --images DIR --out critiques.jsonl
  $SIMA pairs --critiques critiques.jsonl --out pairs.jsonl
  $SIMA train --model M --pairs pairs.jsonl --images DIR --out runs/sima

answers: one sampled and one greedy answer per question. critique: the same model sees the image, the
question, the reference answer and both answers, gives its reasons and chooses one. pairs: verdicts ->
preference pairs. train: train_stage1.py with the authors' beta, learning rate, epochs and maximum length, DPO
without STIC's NLL term. To resume a step, run the same command again.

SIMA needs labels where STIC needs none: the critic reads the reference answer. It also always reads the
sampled answer first, so that favoring a position looks like favoring a kind of answer. Three options are
therefore ours: critique --label-free judges against the image alone; critique --both-orders asks a second
time, with the answers swapped, and reports the position bias; pairs --agreeing keeps only verdicts that
survive the swap.

Also ours: the critic's prompt and the rule for verdicts (sima_critic.py). Identical answers are not judged;
the authors' code (si0wang/SIMA) makes pairs of them. A critique has at most 512 tokens instead of 4,096, to
fit LLaVA-1.5; critique --prompt takes a shorter prompt, for a model with a shorter context. Sampling is from
all tokens; transformers' default adds --top-k 50 to theirs. In training, the batch size is 4, since their
number of GPUs is not known; LoRA has no dropout (--lora-dropout 0.05); the projector is trained, which their
code freezes (--projector-lr 0); and the rejected text is scored, not the model's own top tokens
(--rejected-score argmax).
"""

import sys

import train_stage1
from generate_pairs import records_to_describe, with_existing_image
from stic_min import InputError, check, dar
from stic_min.data import parse_instruction
from stic_min.formats.image_folder import image_path
from stic_min.formats.records import image_name, unique_key
from stic_min.generate import Job, Query, Response, Sampling, open_model
from stic_min.images import open_image
from stic_min.neighbours import common
from stic_min.neighbours.sima_critic import (
    ORDERS,
    critic_prompt,
    decide,
    preferences,
    read_template,
    report_lines,
)
from stic_min.runtime import consistency, console, flags, process
from stic_min.runtime.files import brief, read_records, sha256, text_field
from stic_min.runtime.ranks import start_ranks
from stic_min.runtime.work import row_seed, subset
from stic_min.text import without_marks

ANSWER_FIELDS = "id image question ground_truth sampled sampled_finish greedy greedy_finish".split()
CRITIQUE_FIELDS = [*ANSWER_FIELDS, "critiques", "unjudged"]
TRAINING = "--alpha 0 --beta 0.1 --lr 1e-7 --epochs 3 --max-length 2048".split()


# ---------------------------------------------------------------- answers


def read_questions(args, ranks) -> dict[str, tuple[str, str, dict]]:
    """{key: (where, key, record)} of LLaVA's list of instructions, or of SIMA's JSON Lines of image, text and
    ground_truth. Records whose image is missing are counted and skipped."""
    records = read_records(args.instructions)
    if "text" not in records[0][1]:
        return records_to_describe(args.instructions, args.images, ranks)
    entries, taken = {}, {}
    for where, record in records:
        image = image_name(record, where)
        key = unique_key(record, image, where, taken)  # there may be several questions about an image
        entries[key] = where, key, record | {"image": image}
    return with_existing_image(entries, args.instructions, args.images, ranks)


def parse_question(where: str, key: str, record: dict) -> dict:
    """The question of a record and its reference answer; those of the first turn, in a conversation."""
    if "text" in record:
        question, reference = text_field(record, "text", where), record.get("ground_truth")
        if reference is not None:  # a label-free critic needs none
            text_field(record, "ground_truth", where)
    else:
        question, reference = parse_instruction(where, key, record).turns[0]
    fields = {"id": key, "image": record["image"], "question": without_marks(question)}
    text_field(fields, "question", where)  # more than <image>
    return fields | {"ground_truth": reference}


def answer_job(record, image, seed):
    """Both answers share the image's prefill; a greedy one needs no seed."""
    sampled = Query(record["question"], [image], row_seed(seed, record["id"], "sampled"))
    greedy = Query(record["question"], [image], seed=None)
    return Job(record["id"], [sampled, greedy], record)


def answer_record(job, responses):
    sampled, greedy = responses
    return job.fields | {"sampled": sampled.text, "sampled_finish": sampled.finish,
                         "greedy": greedy.text, "greedy_finish": greedy.finish}  # fmt: skip


def run_answers(args):
    ranks = common.start(args)
    problems = check.Problems(args.check)
    available = read_questions(args, ranks)
    consistency.limit(args, len(available), ranks)
    keys = subset(list(available), args.limit, args.seed)
    parsed = problems.collect(lambda key: parse_question(*available[key]), keys)
    questions = {record["id"]: record for record in parsed}
    llava = open_model(args, ranks)
    settings = common.settings_of(args, llava) | {"instructions": sha256(args.instructions)[:12]}
    output = common.open_output(args, settings, ranks)

    def prepare(group):
        record = questions[group[0]]
        return [answer_job(record, open_image(image_path(args.images, record["image"])), args.seed)]

    groups = [[key] for key in questions]
    for job, answers in common.responses(args, llava, output, groups, prepare, "answers", problems, 2):
        if all(answer.text for answer in answers):
            output.append(answer_record(job, answers))
        else:
            console.warn(f"skipped: {brief(job.key)}: the model returned an empty response")
    if args.check:
        return
    records = output.finish(keys)
    if ranks.first:
        finishes = [record[f"{name}_finish"] for record in records for name in ORDERS[0]]
        common.report(args, records, len(keys), "answers", finishes)
        consistency.one_text([record["sampled"] for record in records], "sampled answers", ranks)


# ---------------------------------------------------------------- critique


def read_step(path, fields: list[str], step: str) -> tuple[dict[str, dict], dict]:
    """The output of an earlier step -> {id: its fields}, and the settings that all its records share."""
    records, settings = {}, None
    for where, record in read_records(path):
        if missing := [name for name in fields if name not in record]:
            raise InputError(f"{where}: no {missing[0]}; expected the output of sima {step}")
        for name in ("id", "image", "question", "sampled", "greedy"):
            text_field(record, name, where)
        if record["id"] in records:
            raise InputError(f"{where}: {brief(record['id'])} appears twice")
        records[record["id"]] = {name: record[name] for name in fields}
        others = {name: value for name, value in record.items() if name not in fields}
        settings = others if settings is None else settings
        for name in settings | others:
            value, first = others.get(name), settings.get(name)
            if value != first:
                raise InputError(f"{where}: {name} is {value!r}, but {first!r} in the first record: expected "
                                 "the records of one run")  # fmt: skip
    return records, settings


def critic_job(record, image, label_free, both_orders, seed, template=None):
    """One query per order; they share the image's prefill."""
    reference = None if label_free else record["ground_truth"]
    queries = []
    for order in ORDERS if both_orders else ORDERS[:1]:
        responses = [record[name] for name in order]
        prompt = critic_prompt(record["question"], reference, responses, template)
        queries.append(Query(prompt, [image], row_seed(seed, record["id"], "critique", order[0])))
    return Job(record["id"], queries, record)


def critique_record(record, responses=(), unjudged=None):
    """One line of the output. unjudged: why the critic was not asked."""
    critiques = [{"first": order[0], "text": response.text, "finish": response.finish}
                 for order, response in zip(ORDERS, responses)]  # fmt: skip
    return record | {"critiques": critiques, "unjudged": unjudged}


def run_critique(args):
    ranks = common.start(args)
    problems = check.Problems(args.check)
    answers, settings = read_step(args.answers, ANSWER_FIELDS, "answers")
    if not args.label_free:
        has_reference = lambda key: text_field(answers[key], "ground_truth", f"{args.answers}, {brief(key)}")
        problems.collect(has_reference, answers)
    template = args.prompt and read_template(args.prompt, args.label_free)
    llava = open_model(args, ranks)
    critic = common.settings_of(args, llava) | {"top_k": args.top_k}
    critic |= {"label_free": args.label_free, "both_orders": args.both_orders}
    if template:
        critic["prompt"] = sha256(args.prompt)[:12]
    if ranks.first and settings.get("fingerprint") != critic["fingerprint"]:
        console.warn(f"the critic is not the model that generated {args.answers}, as it is in SIMA")
    settings = settings | {f"critic_{name}": value for name, value in critic.items()}
    output = common.open_output(args, settings, ranks)
    sampling = Sampling.from_args(args)
    identical = {key: record for key, record in answers.items() if record["sampled"] == record["greedy"]}
    too_long = []

    def prepare(group):
        record = answers[group[0]]
        image = open_image(image_path(args.images, record["image"]))
        job = critic_job(record, image, args.label_free, args.both_orders, args.seed, template)
        excess = max(dar.tokens_over_limit(llava, query.prompt, [image], sampling) for query in job.queries)
        if excess > 0:
            too_long.append(record)
            raise InputError(f"{brief(job.key)}: the critic's prompt is {excess} tokens too long")
        return [job]

    groups, orders = [[key] for key in answers if key not in identical], 2 if args.both_orders else 1
    for job, texts in common.responses(args, llava, output, groups, prepare, "critiques", problems, orders):
        output.append(critique_record(job.fields, texts))
    if args.check:
        return
    for record in too_long:
        output.append(critique_record(record, unjudged="prompt too long"))
    for key in list(identical)[ranks.rank :: ranks.world]:
        if key not in output.done:
            output.append(critique_record(identical[key], unjudged="identical answers"))
    records = output.finish(list(answers))
    if ranks.first:
        finishes = [critique["finish"] for record in records for critique in record["critiques"]]
        common.report(args, records, len(answers), "critiques", finishes)
        print("\n".join(report_lines(records)))


# ---------------------------------------------------------------- pairs


def pair_record(record: dict, chosen: str) -> dict:
    """A preference pair, and how it came about."""
    [rejected] = {"sampled", "greedy"} - {chosen}
    answer = lambda name: Response(record[name], record[f"{name}_finish"])
    prompt = record["id"], record["image"], record["question"]
    origin = {name: record[name] for name in ("ground_truth", "critiques")}
    origin["preferences"] = preferences(record)  # one per order: sampled, greedy or null
    return common.pair_record(*prompt, answer(chosen), answer(rejected)) | origin


def check_critiques(path, record):
    critiques = record["critiques"]
    is_critique = lambda value: isinstance(value, dict) and isinstance(value.get("text"), str)
    valid = isinstance(critiques, list) and len(critiques) <= 2 and all(map(is_critique, critiques))
    if not valid or not (critiques or isinstance(record["unjudged"], str)):
        raise InputError(f"{path}, {brief(record['id'])}: no critique; expected the output of sima critique")


def run_pairs(args):
    check.out_file(args.out)
    ranks = start_ranks("cpu")
    records, settings = read_step(args.critiques, CRITIQUE_FIELDS, "critique")
    for record in records.values():
        check_critiques(args.critiques, record)
    if args.agreeing and not settings.get("critic_both_orders"):
        raise InputError(f"--agreeing: {args.critiques} was written without --both-orders")
    decisions = {key: decide(record, args.agreeing)[0] for key, record in records.items()}
    pairs = {key: pair_record(records[key], chosen) for key, chosen in decisions.items() if chosen}
    common.write_records(args.out, settings | {"agreeing": args.agreeing}, pairs, ranks)
    if ranks.first:
        print("\n".join(report_lines(list(records.values()), args.agreeing)))
        print(f"{len(pairs)} pairs in {args.out}")
        if not pairs:
            raise InputError(f"no pairs: no record of {args.critiques} has a preference")


# ---------------------------------------------------------------- the command


def parse_args():
    parser, add_step = common.command_line("sima", __doc__)
    answers = add_step(
        "answers", "generate a sampled and a greedy answer per question",
        instructions="file of questions and reference answers: LLaVA instruction data (the first question of "
                     "each record with an image counts), or JSON Lines of image, text and ground_truth",
        images="root folder of the questions' images", out=common.OUT_HELP,
    )  # fmt: skip
    flags.add_model_flags(answers)
    flags.add_check_flag(answers)
    flags.add_limit_flag(answers)
    flags.add_sampling_flags(answers, temperature=0.8, top_p=0.9)

    critique = add_step(
        "critique", "let the model judge its two answers to each question",
        answers="output of answers", images="root folder of the same images", out=common.OUT_HELP,
    )  # fmt: skip
    critique.add_argument("--label-free", action="store_true",
                          help="judge against the image alone, without the reference answer")  # fmt: skip
    critique.add_argument("--both-orders", action="store_true",
                          help="judge a second time, with the answers swapped, and report the position bias")
    critique.add_argument("--prompt", metavar="FILE",
                          help="file with another prompt for the critic; {question}, {reference} (not with "
                               "--label-free), {response_1} and {response_2} in it are filled in, and the "
                               "model must answer it with [[1]] or [[2]]")  # fmt: skip
    flags.add_model_flags(critique)
    flags.add_check_flag(critique)
    flags.add_sampling_flags(critique, temperature=0.0, max_new_tokens=512)

    pairs = add_step(
        "pairs", "turn verdicts into preference pairs; needs no model",
        critiques="output of critique", out=common.OUT_HELP,
    )  # fmt: skip
    pairs.add_argument("--agreeing", action="store_true",
                       help="keep only verdicts that agree in both orders; needs critique --both-orders")
    add_step("train", f"train_stage1.py {' '.join(TRAINING)}; takes all of its flags")
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["train"]:
        return common.train(train_stage1, TRAINING, sys.argv[2:])
    args = parse_args()
    {"answers": run_answers, "critique": run_critique, "pairs": run_pairs}[args.step](args)


if __name__ == "__main__":
    process.run(main)
