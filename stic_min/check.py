"""What is verified before a run, and the report of --check, which needs neither a GPU nor the weights in
memory and fails whenever the run would."""

from collections import Counter
from pathlib import Path

import torch

from stic_min import InputError, checkpoint
from stic_min.batch import collate
from stic_min.cost import generation_cost, training_cost
from stic_min.images import open_image
from stic_min.loss import token_logps
from stic_min.runtime import consistency, console
from stic_min.runtime.files import brief, check_place, read_json
from stic_min.runtime.work import prefetch
from stic_min.samples import load_tiles


class Problems(list):
    """What is wrong with a run's inputs. The first problem ends a run; --check reports all of them."""

    def __init__(self, check: bool):
        super().__init__()
        self.check = check

    def add(self, error: InputError):
        if not self.check:
            raise error
        self.append(str(error))

    def collect(self, function, entries) -> list:
        """[function(entry), ...] over the entries without a problem."""
        results = []
        for entry in entries:
            try:
                results.append(function(entry))
            except InputError as error:
                self.add(error)
        return results


# ---------------------------------------------------------------- guards


def out_dir(out):
    """Before anything is loaded: `out` must be a folder without a finished run, or a place for a new one."""
    if (Path(out) / "adapter_config.json").exists():
        raise InputError(f"{out} holds a finished run; choose another --out, or delete the folder")
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"--out {out} is a file, not a folder")
    check_place(out)


def out_file(out):
    """The same for an output file."""
    if Path(out).is_dir():
        raise InputError(f"--out {out} is a folder, not a file")
    check_place(out)


def verify_images(samples, ranks, problems):
    """Decodes every image once, shared among the ranks, so that a damaged file fails now, not three hours
    into training."""
    paths = sorted({sample.image for sample in samples})[ranks.rank :: ranks.world]
    progress = console.Progress("checking images", len(paths), ranks)

    def problem(path):
        try:
            open_image(path)
        except InputError as error:
            return error

    errors = []
    for error in prefetch(problem, paths):
        errors += [error] if error else []
        progress.add()
    for rank_errors in ranks.gather(errors):
        for error in rank_errors:
            problems.add(error)


@torch.no_grad()
def image_matters(llava, sample):
    """Guards against training that silently ignores the image: log p must change when the image is blanked.

    Every rank must call it.
    """
    tiles = load_tiles(sample, llava)
    logps = []
    for blank in (False, True):
        for image in tiles if blank else []:
            image.pixels = torch.zeros_like(image.pixels)  # CLIP's mean color
        batch = collate([sample], [tiles], llava.config, llava.device)
        logps.append(token_logps(llava(batch), batch.labels))
    if torch.equal(*logps):
        raise InputError(f"{sample.name}: log p is the same with a blank image: {sample.image} has no effect")


# ---------------------------------------------------------------- reports


def percentiles(values):
    ordered = sorted(values)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]
    return f"{at(0)} to {at(1)}; 50% up to {at(0.5)}, 90% up to {at(0.9)}, 99% up to {at(0.99)}"


def abbreviate(names, most=5):
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def repeated(names):
    """Those that appear more than once, in the order of their first appearance."""
    return [name for name, count in Counter(map(str, names)).items() if count > 1]


def print_report(lines, problems):
    """Prints the report. Raises InputError if the run would fail."""
    for name, text in lines:
        print(f"  {name:<12} {text}")
    for problem in problems[:100]:
        print(f"  problem      {problem}")
    if problems:
        reasons = "1 reason" if len(problems) == 1 else f"{len(problems)} reasons"
        hint = " (the first 100 are listed above)" if len(problems) > 100 else ""
        raise InputError(f"the run would fail for {reasons}{hint}")
    print("check passed: no problems found")


def report_training(args, llava, adapter, samples, settings, problems, ranks, reference):
    """The report on a training run: samples, their lengths, what is cut, cost."""
    if not ranks.first:
        return
    if checkpoints := checkpoint.folders(Path(args.out)):
        if not args.dtype:  # the default on a GPU may differ from this machine's
            settings["dtype"] = read_json(checkpoints[-1] / "run.json").get("dtype")
        problems.collect(lambda out: checkpoint.newest(out, settings, print), [Path(args.out)])
    lines = [("samples", f"{len(samples)} usable, {len({sample.image for sample in samples})} images")]
    if images := repeated(sample.image for sample in samples):
        lines.append(("repeated", f"{len(images)} images appear more than once: {abbreviate(images)}"))
    if duplicates := consistency.repeats(samples):
        lines.append(("repeated", f"{duplicates} samples repeat an earlier one"))
    if equal := [sample.name for sample in samples if not sample.differs]:
        lines.append(("equal", f"{len(equal)} pairs with identical responses: {abbreviate(equal)}"))
    if samples:
        cut = [sample.name for sample in samples if sample.cut]
        names = f": {abbreviate(cut)}" if cut else ""
        lines.append(("tokens", f"per sample: {percentiles([sample.length for sample in samples])}"))
        lines.append(("scored", f"of these: {percentiles([sample.scored for sample in samples])}"))
        lines.append(("truncated", f"{len(cut)} to {settings['max_length']} tokens{names}"))
        lines += training_cost(args, llava, adapter, samples, reference)
    print_report(lines, problems)


def report_generation(args, llava, what, lengths, remaining, skipped, requested, problems):
    """The report on generation. lengths: {key: prompt lengths in tokens}; remaining: how many are not yet in
    --out; skipped: error messages of the others; requested: all names as given."""
    lines = [(what, f"{len(lengths) + len(skipped)}, {remaining} of them not yet in {args.out}")]
    if skipped:
        lines.append(("skipped", f"{len(skipped)}, each with a warning"))
    if names := [brief(name) for name in repeated(requested)]:
        shown = abbreviate(names)
        lines.append(("repeated", f"{len(names)} names appear more than once and are used once: {shown}"))
    lines += [("  skipped", problem) for problem in skipped[:100]]
    if not lengths:
        print_report(lines, [*problems, f"no {what}: every image would be skipped"])
    prompts = [length for lengths_of_key in lengths.values() for length in lengths_of_key]
    lines.append(("tokens", f"per prompt, image included: {percentiles(prompts)}"))
    print_report(lines + generation_cost(args, llava, prompts), problems)
