"""Self-refinement by triangular consistency, in the spirit of SRF-LLaVA-1.5 (arXiv 2510.10487).

  T="python -m stic_min.neighbours.triangular"       torchrun --nproc_per_node=4 -m ... works as well
  $T tasks --instructions instructions.json --out tasks.json
  $T train --model M --instructions tasks.json --images DIR --out runs/tuned
  $T triplets --model M --adapter runs/tuned --images UNLABELED --out triplets.jsonl
  $T score --model M --adapter runs/tuned --triplets triplets.jsonl --images UNLABELED --out scores.jsonl
  $T select --scores scores.jsonl --out update.json              --random: the control
  $T train --model M --adapter runs/tuned --instructions update.json --images UNLABELED --out runs/refined

The principle is the authors': of image I, question Q and answer A, each should follow from the other two. So
are the steps: tune the model on IQ -> A, IA -> Q and I -> QA, let it write triplets (I, Q, A) about unlabeled
images, keep the consistent ones, and train on them. Their similarity, threshold, prompts, mixture of tasks
and training settings are not public. All of these are ours, so this is not a reproduction, and its results
are not comparable with the paper's.

For another round, repeat the last four commands with --adapter runs/refined and other outputs. Its model must
still write questions: select with --mixture 1 1 1 in all rounds but the last.
"""

import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

import train_stage2
from stic_min import InputError, check, cost
from stic_min.batch import Example, collate
from stic_min.data import parse_instruction
from stic_min.formats.image_folder import image_path, list_images
from stic_min.formats.records import image_records, read_names, skipped_line
from stic_min.generate import Job, Query, open_model
from stic_min.images import open_image
from stic_min.loss import IGNORE, token_logps
from stic_min.neighbours import common
from stic_min.neighbours.triplets import (
    BOTH_PROMPT,
    TASKS,
    Triplet,
    consistency_scores,
    instruction_record,
    parse_form,
    read_triplets,
    select,
)
from stic_min.runtime import consistency, console, flags, process, provenance
from stic_min.runtime.files import brief, read_text, sha256, write_text
from stic_min.runtime.ranks import Ranks, place
from stic_min.runtime.work import prefetch, row_seed, subset
from stic_min.sampler import not_finite
from stic_min.text import IMAGE, without_marks

TRAINING = ["--plain"]  # the paper's settings are not public: the others are stage 2's

# ---------------------------------------------------------------- the three tasks


def write_instructions(args, records, source):
    """Writes a JSON list to --out, and its provenance next to it."""
    out = Path(args.out)
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    if out.is_file() and read_text(out) != text:
        raise InputError(f"{out} already exists, with other content; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    record = provenance.start_record(None, Ranks(0, 1, torch.device("cpu")))
    run_json = {"record": record | {"source": sha256(source)}}
    write_text(provenance.record_file(out), json.dumps(run_json, indent=2) + "\n")
    count = Counter(record["task"] for record in records)
    print(f"{len(records)} records in {out}: " + ", ".join(f"{count[task]} {task}" for task in TASKS))


def run_tasks(args):
    """Every turn of every conversation is one triplet, also a later one that refers to earlier ones."""
    skipped = {}
    entries, total = image_records(args.instructions, skipped)
    turns = []
    for entry in entries:
        instruction = parse_instruction(*entry)
        for number, texts in enumerate(instruction.turns, 1):
            question, answer = map(without_marks, texts)
            turns.append(Triplet(f"{instruction.key}-{number}", instruction.image, question, answer))
    fits = lambda triplet: parse_form(triplet.turn("both")[1]) == (triplet.question, triplet.answer)
    triplets = list(filter(fits, turns))
    if not triplets:
        raise InputError(f"{args.instructions}: no turn fits the form of a triplet")
    print(f"{len(triplets)} turns of {len(entries)} records with an image, {total} in all; "
          f"{len(turns) - len(triplets)} turns do not fit the form of a triplet")  # fmt: skip
    if skipped:
        print(skipped_line(skipped))
    triplets = subset(triplets, args.limit, args.seed)
    records = [instruction_record(triplet, args.mixture, args.seed) for triplet in triplets]
    write_instructions(args, records, args.instructions)


# ---------------------------------------------------------------- I -> QA, on unlabeled images


def triplet_record(job, response):
    """A malformed response stays in the file, without question and answer, so that a restart does not sample
    it again. One that was cut off is malformed."""
    texts = parse_form(response.text) if response.finish == "stop" else None
    question, answer = texts or (None, None)
    return {"id": job.key, "image": job.fields["image"], "question": question, "answer": answer,
            "response": response.text, "finish": response.finish}  # fmt: skip


def run_triplets(args):
    ranks = common.start(args)
    problems = check.Problems(args.check)
    names = list(dict.fromkeys(read_names(args.names))) if args.names else list_images(args.images)
    consistency.limit(args, len(names), ranks)
    names = subset(names, args.limit, args.seed)
    groups = [[f"{name}#{number}" for number in range(1, args.per_image + 1)] for name in names]
    llava = open_model(args, ranks)
    output = common.open_output(args, common.settings_of(args, llava), ranks)

    def prepare(group):
        name = group[0].rpartition("#")[0]
        image = open_image(image_path(args.images, name))
        query = lambda key: Query(BOTH_PROMPT, [image], row_seed(args.seed, key, "triplet"))
        return [Job(key, [query(key)], {"image": name}) for key in group]

    for job, [response] in common.responses(args, llava, output, groups, prepare, "triplets", problems):
        output.append(triplet_record(job, response))
    if args.check:
        return
    keys = [key for group in groups for key in group]
    records = output.finish(keys)
    if ranks.first:
        common.report(args, records, len(keys), "triplets", [record["finish"] for record in records])
        questions = [record["question"] for record in records if record["question"] is not None]
        print(f"{len(records) - len(questions)} of the responses are malformed")
        consistency.one_text(questions, "questions", ranks)
        if not questions:
            raise InputError("every response is malformed: tune the model on the output of tasks first, or "
                             "raise --max-new-tokens")  # fmt: skip


# ---------------------------------------------------------------- log p(A | I, Q) and log p(Q | I, A)


def pack(llava, triplet: Triplet, tiles):
    """Both directions as one Batch. The trunk ends with the image. Two branches follow, IQ -> A and IA -> Q:
    each is the rest of the prompt, whose labels are removed here, and the response."""
    branches, prompt_lengths = [], []
    for task in ("answer", "question"):
        user, response = triplet.turn(task)
        ids = llava.tokenizer.encode_prompt(llava.chat_prompt(user))
        start = ids.index(IMAGE) + 1
        trunk, prompt = ids[:start], ids[start:]
        branches.append(prompt + llava.tokenizer.encode_response(response))
        prompt_lengths.append(len(prompt))
    length = len(trunk) - 1 + llava.config.image_tokens(tiles.size) + max(map(len, branches))
    limit = llava.config.max_length
    if length > limit:
        raise InputError(f"{brief(triplet.key)} takes {length} tokens, but the model's limit is {limit}")
    example = Example(triplet.key, [(trunk, False)], branches)
    batch = collate([example], [[tiles]], llava.config, llava.device)
    for labels, prompt_length in zip(batch.labels, prompt_lengths):
        labels[: 1 + prompt_length] = IGNORE
    return batch


@torch.no_grad()
def mean_logps(llava, batch) -> list[float]:
    """[log p(A | I, Q), log p(Q | I, A)] per token, end token included."""
    sums = token_logps(llava(batch), batch.labels).sum(-1)  # (2,)
    return (sums / (batch.labels != IGNORE).sum(-1)).tolist()


def run_score(args):
    ranks = common.start(args)
    triplets = [triplet for triplet, _ in read_triplets(args.triplets).values()]
    llava = open_model(args, ranks)
    settings = {"triplets": sha256(args.triplets)[:12], **common.settings_of(args, llava)}
    output = common.open_output(args, settings, ranks)
    remaining = [triplet for triplet in triplets if triplet.key not in output.done]
    existing = f"{len(triplets) - len(remaining)} of them already in {args.out}"
    ranks.print(f"{len(triplets)} triplets to score, {existing}")

    def prepare(triplet):
        try:
            tiles = llava.tiles(open_image(image_path(args.images, triplet.image)))
            return triplet, pack(llava, triplet, tiles), None
        except InputError as error:
            return triplet, None, error

    share, lengths = remaining[ranks.rank :: ranks.world], []  # of the packed sequences
    progress = console.Progress("triplets", len(share), ranks)
    for triplet, batch, error in prefetch(prepare, share):
        if error:
            console.warn(f"skipped: {error}")
        else:
            lengths.append(len(batch.ids))
            if not args.check:
                output.append(score_record(llava, triplet, batch))
        progress.add()
    if args.check:
        return check_score(llava, sum(ranks.gather(lengths), []), len(remaining), ranks)
    records = output.finish([triplet.key for triplet in triplets])
    ranks.print(f"{len(records)} triplets scored in {args.out}, {len(triplets) - len(records)} skipped")
    if ranks.first and not records:
        raise InputError("no scores: every triplet was skipped")


def score_record(llava, triplet, batch):
    logps = mean_logps(llava, batch)
    if not all(map(math.isfinite, logps)):
        raise InputError(not_finite(triplet.key, llava.lm_head.weight.dtype))
    return {"id": triplet.key, "image": triplet.image, "question": triplet.question, "answer": triplet.answer,
            "logp_answer": round(logps[0], 6), "logp_question": round(logps[1], 6)}  # fmt: skip


def check_score(llava, lengths, remaining, ranks):
    """The report of --check, which has opened every image and tokenized every triplet."""
    lines = [("triplets", f"{remaining} to score, {remaining - len(lengths)} skipped with a warning")]
    if lengths:
        time = console.clock(cost.prefill_seconds(llava, sum(lengths)))
        lines.append(("tokens", f"per triplet, image included: {check.percentiles(lengths)}"))
        lines.append(("time", f"about {time} on one H200"))
    if ranks.first:
        fails = remaining and not lengths
        check.print_report(lines, ["no scores: every triplet would be skipped"] if fails else [])


# ---------------------------------------------------------------- the consistent ones


def run_select(args):
    entries = read_triplets(args.scores)
    distinct = {}  # a triplet that was sampled twice counts once
    for triplet, record in entries.values():
        values = record.get("logp_answer"), record.get("logp_question")
        if not all(isinstance(value, float) and math.isfinite(value) for value in values):
            raise InputError(f"{args.scores}: {brief(triplet.key)} has no scores; first run the step score")
        distinct.setdefault((triplet.image, triplet.question, triplet.answer), (triplet, values))
    triplets, logps = zip(*distinct.values())
    scores = consistency_scores(logps)
    chosen = select(scores, max(1, round(args.keep * len(triplets))), args.seed, args.random)
    criterion = "sampled at random" if args.random else "the best"
    repeats = len(entries) - len(triplets)
    print(f"{len(chosen)} of {len(triplets)} triplets, {criterion}; {repeats} repeat an earlier one")
    for name, values in zip(("A | I, Q", "Q | I, A"), zip(*logps)):
        mean = statistics.fmean(values[i] for i in chosen)
        print(f"log p({name}) per token: {mean:.4f} on average, {statistics.fmean(values):.4f} over all")
    record = lambda i: instruction_record(triplets[i], args.mixture, args.seed)
    write_instructions(args, [record(i) | {"consistency": round(scores[i], 6)} for i in chosen], args.scores)


# ---------------------------------------------------------------- the command


def add_list_flags(step, mixture, hint=""):
    """The flags of the steps that write instruction data."""
    step.add_argument("--mixture", nargs=3, type=flags.not_negative, default=mixture,
                      metavar=("IQ_A", "IA_Q", "I_QA"),
                      help=f"weights with which each triplet's task is sampled{hint}")  # fmt: skip
    step.add_argument("--seed", type=flags.seed_value, default=0, help="random seed")


def parse_args():
    parser, add_step = common.command_line("triangular", __doc__)
    list_out = "output file of instruction data, a JSON list"

    tasks = add_step(
        "tasks", "turn LLaVA's instruction data into the three tasks",
        instructions="file of LLaVA instruction data, a JSON list", out=list_out,
    )  # fmt: skip
    add_list_flags(tasks, [1.0, 1.0, 1.0])
    flags.add_limit_flag(tasks)

    add_step("train", f"train_stage2.py {' '.join(TRAINING)}, on the output of tasks or select; takes all of "
                      "its flags")  # fmt: skip

    triplets = add_step(
        "triplets", "sample questions with answers about unlabeled images",
        images="folder of the images", out=common.OUT_HELP,
    )  # fmt: skip
    triplets.add_argument("--names", metavar="FILE",
                          help="file of image names to use, one per line or a JSON list")  # fmt: skip
    triplets.add_argument("--per-image", type=flags.positive, default=1, metavar="N",
                          help="number of triplets per image")  # fmt: skip
    flags.add_model_flags(triplets)
    flags.add_check_flag(triplets)
    flags.add_limit_flag(triplets)
    flags.add_sampling_flags(triplets, temperature=0.7, max_new_tokens=512)

    score = add_step(
        "score", "compute log p(A | I, Q) and log p(Q | I, A) per token of each triplet",
        triplets="output of triplets", images="folder of the images", out=common.OUT_HELP,
    )  # fmt: skip
    flags.add_model_flags(score)
    flags.add_check_flag(score)

    select = add_step(
        "select", "keep the most consistent triplets, as instruction data for the update",
        scores="output of score", out=list_out,
    )  # fmt: skip
    select.add_argument("--keep", type=flags.top_p_value, default=0.5, metavar="SHARE",
                        help="share of the triplets to keep")  # fmt: skip
    select.add_argument("--random", action="store_true",
                        help="keep as many, sampled at random with --seed (a control)")  # fmt: skip
    add_list_flags(select, [1.0, 0.0, 0.0], "; 1 1 1 if another round follows")

    args = parser.parse_args()
    if not sum(getattr(args, "mixture", [1])):
        parser.error("--mixture: at least one weight must be positive")
    if getattr(args, "per_image", 1) > 1 and args.temperature == 0:
        parser.error("--per-image needs a --temperature above 0: greedy triplets of an image are all equal")
    return args


def main():
    if sys.argv[1:2] == ["train"]:
        return common.train(train_stage2, TRAINING, sys.argv[2:])
    args = parse_args()
    if args.step in ("tasks", "select"):
        check.out_file(args.out)
        if place()[0]:
            return  # there is no work for other ranks
    {"tasks": run_tasks, "triplets": run_triplets, "score": run_score, "select": run_select}[args.step](args)


if __name__ == "__main__":
    process.run(main)
