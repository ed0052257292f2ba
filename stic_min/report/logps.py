"""log p of both responses of preference pairs, under an adapter and under the model before training."""

import copy
from pathlib import Path

from stic_min import InputError
from stic_min.data import Pair
from stic_min.report.images import find_folder
from stic_min.runtime import flags
from stic_min.runtime.console import Progress
from stic_min.runtime.files import brief, read_json
from stic_min.runtime.work import prefetch
from stic_min.text import TEMPLATES

MICRO_BATCH = 4  # pairs per forward pass


def training_settings(adapter) -> dict:
    """The run.json of an adapter's training, as far as it determines log p; {} without one."""
    file = Path(adapter) / "run.json"
    run = read_json(file) if file.is_file() else {}
    names = {"image_mode": ("pad", "anyres"), "template": tuple(TEMPLATES), "dtype": flags.DTYPES}
    for name, values in names.items():
        if name in run and run[name] not in values:
            raise InputError(f"{file}: {name} is {brief(run[name])}, not one of {', '.join(values)}")
    length = run.get("max_length", 1)
    if type(length) is not int or length < 1:
        raise InputError(f"{file}: max_length is {brief(length)}, not a whole number of at least 1")
    return run


def response_logps(pairs: list[Pair], folders: list[Path], model, adapter, device=None) -> list[tuple | None]:
    """(logp_w, logp_l, ref_logp_w, ref_logp_l) of each pair: log p of y_w and y_l given (v, x), summed over
    their tokens, under the adapter and under theta_0, the model before training. None for a pair without its
    image, or without room for a response.

    Image mode, template, maximum length and dtype are those of the adapter's training, if it has a run.json.
    """
    import torch

    from stic_min.batch import collate
    from stic_min.loader import load_llava, open_llava
    from stic_min.loss import token_logps
    from stic_min.runtime.ranks import start_device
    from stic_min.samples import load_tiles, pair_sample

    device = start_device(device)
    run = training_settings(adapter)
    mode = run.get("image_mode", "pad")
    dtype = run.get("dtype", "bfloat16" if device.type == "cuda" else "float32")
    options = {"image_mode": mode, "template": run.get("template"), "dtype": getattr(torch, dtype)}
    llava = load_llava(model, adapter=adapter, device=device, **options)
    _, weights = open_llava(model, **options)  # for theta_0's projector: `llava` has the trained one
    llava.reference_projector = copy.deepcopy(llava.mm_projector)
    for name, parameter in llava.reference_projector.named_parameters():
        parameter.data.copy_(weights[f"mm_projector.{name}"].read())
    max_length = run.get("max_length", 1024 if mode == "pad" else 4096)
    max_length = min(max_length, llava.config.decoder.max_positions)

    def prepare(numbers):
        """The samples and tiles of the pairs that have an image."""
        prepared = []
        for i in numbers:
            try:
                sample = pair_sample(pairs[i], llava, find_folder(pairs[i].image, folders), max_length)
                prepared.append((i, sample, load_tiles(sample, llava)))
            except InputError:
                continue
        return prepared

    def both_logps(batch):
        return token_logps(llava(batch), batch.labels).sum(-1).view(-1, 2)  # (B, 2): chosen, rejected

    results = [None] * len(pairs)
    progress = Progress("log p", len(pairs))
    batches = [range(i, min(i + MICRO_BATCH, len(pairs))) for i in range(0, len(pairs), MICRO_BATCH)]
    for numbers, prepared in zip(batches, prefetch(prepare, batches)):
        if prepared:
            present, samples, tiles = zip(*prepared)
            batch = collate(samples, tiles, llava.config, device)
            with torch.no_grad():
                logps = both_logps(batch)
                with llava.as_reference():
                    logps = torch.cat([logps, both_logps(batch)], dim=1)  # (B, 4)
            for i, values in zip(present, logps.tolist()):
                results[i] = tuple(values)
        progress.add(len(numbers))
    return results
