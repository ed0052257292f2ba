"""What the methods share: command lines, steps that generate records, and the format of their pairs."""

import argparse
import sys
from pathlib import Path

import generate_pairs
from stic_min import InputError, check, generate
from stic_min.formats.image_folder import check_folder
from stic_min.generate import Response, Sampling
from stic_min.runtime import flags
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import start_ranks
from stic_min.text import with_image

OUT_HELP = "output file, JSON Lines; existing records are kept"


def command_line(method: str, description: str):
    """A parser, and a function that adds a step to it: add_step(name, summary, flag=help, ...), whose flags
    are required and take a file or a folder."""
    parser = argparse.ArgumentParser(prog=f"python -m stic_min.neighbours.{method}", description=description,
                                     formatter_class=flags.HelpFormatter)  # fmt: skip
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add_step(name, summary, **files):
        step = steps.add_parser(name, help=summary, description=summary, formatter_class=flags.HelpFormatter)
        for flag, text in files.items():
            metavar = "DIR" if "folder" in text else "FILE"
            step.add_argument(f"--{flag}", required=True, metavar=metavar, help=text)
        return step

    return parser, add_step


def train(script, defaults: list[str], given: list[str]) -> None:
    """Runs a training script with a method's defaults. Of two equal flags, the later one counts."""
    name = f"{script.__name__}.py"
    if {"-h", "--help"} & set(given):
        print(f"{name} {' '.join(defaults)}: these are the defaults here, not those below\n")
    sys.argv = [name, *defaults, *given]
    script.main()


# ---------------------------------------------------------------- generation


def start(args):
    """Before anything is loaded: checks --out and --images, and starts the ranks."""
    check.out_file(args.out)
    check_folder(args.images)
    return start_ranks("cpu" if args.check else args.device)


def settings_of(args, llava) -> dict:
    """What identifies a run of the model over images."""
    settings_of_model = flags.run_settings if "temperature" in args else flags.model_settings
    settings = {"images": Path(args.images).resolve().name, **settings_of_model(args, llava)}
    if args.check and not args.dtype:
        del settings["dtype"]  # the default on a GPU may differ from this machine's
    return settings


def open_output(args, settings, ranks) -> Output:
    """The file --out, which --check only reads."""
    output = Output(args.out, "id", settings, ranks)
    return output if args.check else output.start()


def responses(args, llava, output, groups, prepare, what, problems, queries_per_job=1):
    """Yields (job, [Response, ...]) of this rank's share of what is not yet in the output. With --check,
    prints the report and yields nothing.

    groups: lists of keys about one image; prepare(group) opens it and returns their jobs.
    """
    keys = [key for group in groups for key in group]
    remaining = [[key for key in group if key not in output.done] for group in groups]
    remaining = [group for group in remaining if group]
    count, ranks = sum(map(len, remaining)), output.ranks
    ranks.print(f"{len(keys)} {what} to generate, {len(keys) - count} of them already in {args.out}")
    if args.check:
        generate_pairs.dry_run(args, llava, keys, prepare, what, count, keys, problems, ranks)
    else:
        sampling = Sampling.from_args(args)
        yield from generate.generate(llava, remaining, prepare, sampling, ranks, what, queries_per_job)


def write_records(path, settings: dict, records: dict[str, dict], ranks) -> list[dict]:
    """Writes {id: record} to a file, without a model; what is already in it is kept."""
    output = Output(path, "id", settings, ranks).start()
    for key in list(records)[ranks.rank :: ranks.world]:
        if key not in output.done:
            output.append(records[key])
    return output.finish(list(records))


def report(args, records, count, what, finishes):
    """Prints the counts of a step over `count` inputs. finishes: "stop" or "length" of every response."""
    print(f"{len(records)} {what} in {args.out}, {count - len(records)} skipped; "
          f"{finishes.count('length')} of {len(finishes)} responses reached --max-new-tokens")
    if not records:
        raise InputError(f"no {what}: every record was skipped")


def pair_record(key: str, image: str, prompt: str, chosen: Response, rejected: Response) -> dict:
    """A preference pair in the format of generate_pairs.py. The prompt has no <image> yet."""
    user = {"role": "user", "content": with_image(prompt)}
    return {"id": key, "image": image,
            "chosen": [user, {"role": "assistant", "content": chosen.text}],
            "rejected": [user, {"role": "assistant", "content": rejected.text}],
            "chosen_finish": chosen.finish, "rejected_finish": rejected.finish}  # fmt: skip
