"""Algorithm 1, first half: unlabeled pictures -> preference pairs, all by the model itself. With --describe, the first
half of Algorithm 2: instructions -> the model's own descriptions of their pictures.

  python generate_pairs.py --model M --images DIR --out pairs.jsonl
  python generate_pairs.py --describe instructions.json --model M --adapter runs/stage1 --images DIR \\
      --out descriptions.jsonl
  torchrun --nproc_per_node=4 generate_pairs.py ...      the same, the pictures shared out over four GPUs

Preferred: the picture under the step-by-step prompt. Dispreferred: half the time a prompt that invites invention, half
the time the captioning prompt on a corrupted picture. One JSON line a pair, written at once; the same command again
skips what is there. A picture that can't be read is one warning and is counted at the end.
"""

import argparse
import os
import random
from pathlib import Path

from stic_min import InputError, check, lora, sampler
from stic_min.data import each, image_records, parse_instruction, say_left_out
from stic_min.formats.adapters import read_adapter
from stic_min.formats.image_folder import check_folder, foreign_images, image_path, list_images
from stic_min.formats.records import read_names
from stic_min.images import corrupt, open_image
from stic_min.loader import load_llava, open_llava
from stic_min.runtime import consistency, console, flags, process
from stic_min.runtime.files import brief
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import start_ranks
from stic_min.runtime.work import prefetch, row_seed, subset
from stic_min.text import CAPTION_PROMPTS, GOOD_PROMPT, HALLUCINATION_PROMPTS, with_image


def plan_pair(name, seed):
    """What Algorithm 1 draws for one picture, from (seed, name) alone: x, and x_b or the seed of h(v)."""
    rng = random.Random(row_seed(seed, name, "plan"))
    x = rng.choice(CAPTION_PROMPTS)
    if rng.random() < 0.5:
        return {"x": x, "x_b": rng.choice(HALLUCINATION_PROMPTS), "corruption_seed": None}
    return {"x": x, "x_b": None, "corruption_seed": row_seed(seed, name, "corruption")}


def pair_rows(name, picture, seed):
    """[(prompt, picture, seed), ...] to sample for one picture, and the function that makes its record of them."""
    plan = plan_pair(name, seed)
    x, bad_prompt, bad_picture, corruption = plan["x"], plan["x_b"], picture, None
    if bad_prompt is None:
        bad_prompt = x  # y_b ~ p(. | h(v), x)
        bad_picture, corruption = corrupt(picture, plan["corruption_seed"])
        corruption["seed"] = plan["corruption_seed"]
    rows = [
        (GOOD_PROMPT, picture, row_seed(seed, name, "chosen")),
        (bad_prompt, bad_picture, row_seed(seed, name, "rejected")),
    ]

    def record(texts, finishes):
        turns = lambda text: [
            {"role": "user", "content": with_image(x)},  # what is trained on is x, never x_g or x_b
            {"role": "assistant", "content": text},
        ]
        return {
            "image": name,
            "image_corruption": corruption is not None,
            "hallu_prompt": plan["x_b"] or "",
            "chosen": turns(texts[0]),
            "rejected": turns(texts[1]),
            "chosen_prompt": GOOD_PROMPT,
            "rejected_prompt": bad_prompt,
            "corruption": corruption,
            "chosen_finish": finishes[0],
            "rejected_finish": finishes[1],
        }

    return rows, record


def description_rows(id, name, picture, seed):
    """The same for one description: x_des ~ P, y_des ~ p(. | v, x_des)."""
    x = random.Random(row_seed(seed, id, "plan")).choice(CAPTION_PROMPTS)

    def record(texts, finishes):
        return {"id": id, "image": name, "prompt": x, "description": texts[0], "finish": finishes[0]}

    return [(x, picture, row_seed(seed, id, "description"))], record


# ---------------------------------------------------------------- what there is to make


def names_to_pair(args, ranks):
    """Names of the pictures that get a pair: all of --images, or those of --names."""
    if args.names:
        names = read_names(args.names)
        if again := len(names) - len(set(names)):
            ranks.say(f"{again} of {len(names)} names in {args.names} repeat another one: one pair each is made")
        return names
    names = list_images(args.images)
    if foreign := foreign_images(args.images):
        ranks.say(f"{foreign} in {args.images}: left out, convert them to JPEG or PNG")
    return names


def records_to_describe(args, ranks):
    """{id: where, id, record} of the instructions whose picture is here; the others are counted and left out.

    LLaVA's own data spans five collections of pictures, so --limit is drawn from what is there.
    """
    left_out = {}
    records = {entry[1]: entry for entry in image_records(args.describe, left_out)[0]}
    if left_out:
        ranks.say(say_left_out(left_out))
    here = {id: e for id, e in records.items() if os.path.isfile(os.path.join(args.images, e[2]["image"]))}
    if len(here) < len(records):
        ranks.say(f"{len(records) - len(here)} of {len(records)} records have no picture in {args.images}: left out")
    if not here:
        raise InputError(f"no picture of {args.describe} is in {args.images}")
    return here


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of pictures")
    parser.add_argument("--names", metavar="FILE", help="only these of its images, one name per line or a JSON list")
    parser.add_argument("--describe", metavar="FILE", help="LLaVA instruction data: describe its pictures instead")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines, appended to")
    flags.add_model_flags(parser)
    flags.add_check_flag(parser)
    flags.add_limit_flag(parser)
    flags.add_sampling_flags(parser, temperature=0.2, batch_size=8)
    args = parser.parse_args()
    if args.describe and args.names:
        parser.error("--names goes with pairs; --describe takes its pictures from the instructions")
    check.file_out(args.out)
    check_folder(args.images)
    ranks = start_ranks("cpu" if args.check else args.device)

    # items: {key: image name}; the key is the picture, or the id of the instruction it belongs to
    if args.describe:
        records = records_to_describe(args, ranks)
        asked = items = {id: record["image"] for id, (_, _, record) in records.items()}
    else:
        asked = names_to_pair(args, ranks)
        items = {name: name for name in asked}
    consistency.limit(args, len(items), ranks)
    keys = subset(list(items), args.limit, args.seed)
    problems = [] if args.check else None
    if args.describe:  # what is wrong with them is said now, not in stage 2
        each(lambda key: parse_instruction(*records[key]), keys, problems)

    options = flags.model_options(args, ranks)
    if args.check:
        llava, _ = open_llava(args.model, **options)  # without its weights
        if args.adapter:
            lora.attach(llava, read_adapter(args.adapter, llava))
    else:
        console.say_loading(args, ranks)
        llava = load_llava(args.model, adapter=args.adapter, device=ranks.device, **options)
        console.say_loaded(llava, ranks)
    settings = {"images": Path(args.images).resolve().name, **flags.run_settings(args, llava)}
    if args.check and not args.dtype:
        del settings["dtype"]  # a GPU's default is another than this machine's
    output = Output(args.out, "id" if args.describe else "image", settings, ranks)
    if not args.check:
        output.start()
    todo = [key for key in keys if key not in output.done]
    what = "descriptions" if args.describe else "pairs"
    ranks.say(f"{len(keys)} {what} to make, {len(keys) - len(todo)} of them already in {args.out}")

    left, todo = len(todo), keys if args.check else todo[ranks.rank :: ranks.world]
    progress = console.Progress(what, len(todo), ranks)
    under_way = {}  # {key: its samples so far, the function for its record}

    def prepare(key):
        """In a worker thread: (key, the function for its record, its requests), or what is wrong in their place."""
        try:
            picture = open_image(image_path(args.images, items[key]))
            rows, record = (
                description_rows(key, items[key], picture, args.seed)
                if args.describe
                else pair_rows(key, picture, args.seed)
            )
            lengths = [llava.prompt_length(llava.chat_prompt(p), [v]) for p, v, _ in rows]
            if max(lengths) > llava.config.max_length:
                limit = llava.config.max_length
                raise InputError(f"{brief(key)}: a prompt of {max(lengths)} tokens, the model's limit is {limit}")
        except InputError as error:
            return key, None, error
        tiles = {id(v): llava.tiles(v) for _, v, _ in rows}
        ids = [llava.tokenizer.encode_prompt(llava.chat_prompt(p)) for p, _, _ in rows]
        requests = [sampler.Request((key, i), ids[i], [tiles[id(v)]], seed) for i, (_, v, seed) in enumerate(rows)]
        return key, record, requests

    if args.check:
        if not ranks.first:
            return
        made, skipped = {}, []
        for key, record, found in prefetch(prepare, todo):
            progress.add()
            if record is None:
                skipped.append(str(found))
            else:
                made[key] = [len(r.ids) - 1 + llava.config.image_tokens(r.tiles[0].size) for r in found]
        return check.generation(args, llava, what, made, left, skipped, asked, problems)

    def requests():
        for key, record, made in prefetch(prepare, todo):
            if record is None:
                console.warn(f"skipped: {made}")
                progress.add()
            else:
                under_way[key] = [None] * len(made), record
                yield from made

    slots = min(args.batch_size, len(todo) * (1 if args.describe else 2))
    how = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    for (key, i), sample in sampler.stream(llava, requests(), slots=slots, **how):
        samples, record = under_way[key]
        samples[i] = sample
        if not all(samples):
            continue
        del under_way[key]
        texts = [llava.tokenizer.decode(sample.ids) for sample in samples]
        if all(texts):
            output.append(record(texts, [sample.finish for sample in samples]))
        else:
            console.warn(f"skipped: {brief(key)}: the model's answer is empty")
        progress.add()

    records = output.finish(keys)
    if ranks.first:
        finishes = [value for r in records for name, value in r.items() if name.endswith("finish")]
        print(f"{len(records)} {what} in {args.out}, {len(keys) - len(records)} skipped; "
              f"{finishes.count('length')} of {len(finishes)} answers reached --max-new-tokens")
        texts = [r["description"] if args.describe else r["chosen"][1]["content"] for r in records]
        consistency.one_text(texts, "descriptions" if args.describe else "chosen responses", ranks)
        if equal := sum(not args.describe and r["chosen"] == r["rejected"] for r in records):
            print(f"in {equal} of {len(records)} pairs chosen and rejected are the same: no preference to learn from")
        if not records:
            raise InputError(f"no {what}: every picture was skipped")


if __name__ == "__main__":
    process.run(main)
