"""Merges an adapter into a checkpoint, W + (alpha / r) B A, and keeps the checkpoint's layout.

  python -m stic_min.merge --model M --adapter runs/stage2 --out llava-stic

Whatever loads M (LLaVA, transformers, this project) also loads the result. The sum is computed in fp32 and
rounded to the target dtype. The fraction of the update that survives rounding is printed, because at the
paper's learning rates bf16 loses much of it. Using the adapter unmerged loses nothing.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from stic_min import InputError
from stic_min.formats.adapters import read_adapter
from stic_min.formats.tensors import INDEX_FILES, canonical, open_shard, shards, write_tensors
from stic_min.loader import open_llava
from stic_min.runtime import console, flags, process
from stic_min.runtime.files import read_json, write_text
from stic_min.runtime.ranks import place

ENOUGH = 0.9  # below this surviving fraction, the merged model is not the one that was trained
# Not copied: indices of the old shards, and files of an adapter, which transformers would apply a second
# time.
NOT_COPIED = *INDEX_FILES, "adapter_config.json", "run.json"


def merge_shard(tensors, adapter, dtype=None):
    """{key: function that reads it} of one shard -> merged {key: tensor}, and the sums <W' - W, D> and <D, D>
    over its changed tensors, where D is the exact change."""
    merged = {}
    survived = exact = 0.0
    for key, read in tensors.items():
        old = read()
        name = canonical(key) or ""
        target = dtype if dtype and old.is_floating_point() else old.dtype
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in adapter.tensors:
            A, B = adapter.tensors[f"{module}.lora_A"], adapter.tensors[f"{module}.lora_B"]
            change = adapter.alpha / adapter.r * (B @ A)  # (out, in)
        elif name in adapter.tensors:
            change = adapter.tensors[name] - old.float()  # the projector
        else:
            # A copy, because safetensors rejects tensors that share memory.
            merged[key] = old.to(target).clone(memory_format=torch.contiguous_format)
            continue
        merged[key] = (old.float() + change).to(target).contiguous()
        survived += ((merged[key].double() - old.double()) * change).sum().item()
        exact += change.double().square().sum().item()
    return merged, survived, exact


def write_merged(folder, adapter, out, dtype=None, tokenizer=None):
    """Writes the checkpoint in `folder`, merged, to `out`. Returns the surviving fraction of the change."""
    files = shards(folder)
    weight_map = {}
    survived = exact = 0.0
    progress = console.Progress("merging shards", len(files))
    for file in files:
        tensors, shard_survived, shard_exact = merge_shard(open_shard(file), adapter, dtype)
        survived += shard_survived
        exact += shard_exact
        name = Path(file.name.replace("pytorch_model", "model")).stem + ".safetensors"
        write_tensors(tensors, out / name)
        weight_map |= dict.fromkeys(tensors, name)
        progress.add()
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        write_text(out / INDEX_FILES[0], json.dumps(index, indent=2) + "\n")

    skipped = (*NOT_COPIED, "tokenizer.json") if tokenizer else NOT_COPIED
    for file in folder.iterdir():
        if file.is_file() and file.name not in skipped and file.suffix not in (".bin", ".safetensors"):
            shutil.copyfile(file, out / file.name)
    if tokenizer:
        shutil.copyfile(tokenizer, out / "tokenizer.model")
    config = read_json(folder / "config.json")
    tower = config.get("mm_vision_tower")
    if tower and not Path(tower).is_absolute() and (folder / tower / "config.json").is_file():
        shutil.copytree(folder / tower, out / tower)  # inside the checkpoint
    if dtype:
        names = {"torch_dtype"} | ({"dtype"} & config.keys())
        config |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
        write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    return survived / exact if exact else 1.0


def merge(model, adapter, out, dtype=None, vision=None, tokenizer=None, other_base=False) -> float:
    """Writes the merged checkpoint to the new folder `out`, one shard at a time, in `dtype` (None: as
    stored).

    Returns the fraction of the change that survived rounding: <W' - W, D> / <D, D> over all changed tensors,
    where D is the exact change.
    """
    folder, out = Path(model), Path(out)
    if out.exists():
        raise InputError(f"{out} already exists")
    # No file records the template, so the merged checkpoint has the base's, whichever it is.
    options = {"template": "vicuna_v1", "other_base": other_base}
    llava, _ = open_llava(folder, vision=vision, tokenizer=tokenizer, **options)
    adapter = read_adapter(adapter, llava)
    for note in llava.notes[1:]:
        console.print_line(console.one_line(note), "stderr")
    temporary = out.with_name(f"{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        fraction = write_merged(folder, adapter, temporary, dtype, tokenizer)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    temporary.rename(out)
    return fraction


def main():
    parser = argparse.ArgumentParser(prog="python -m stic_min.merge", description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="LLaVA checkpoint folder, as published")
    parser.add_argument("--adapter", required=True, metavar="DIR",
                        help="LoRA adapter folder; its projector is merged too")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="output folder for the merged checkpoint; must not exist yet")
    parser.add_argument("--dtype", choices=flags.DTYPES,
                        help="precision of the merged weights (default: as stored)")
    parser.add_argument("--vision", metavar="DIR",
                        help="CLIP folder, needed only if the checkpoint has no vision tower and its "
                             "config.json does not point to one")
    parser.add_argument("--tokenizer", metavar="FILE",
                        help="tokenizer.model file (default: the checkpoint's)")
    parser.add_argument("--other-base", action="store_true",
                        help="accept an --adapter that was trained on other base weights")
    args = parser.parse_args()
    if place()[0]:
        return  # there is no work for other ranks
    dtype = getattr(torch, args.dtype) if args.dtype else None
    fraction = merge(args.model, args.adapter, args.out, dtype, args.vision, args.tokenizer, args.other_base)
    print(f"wrote {args.out}; {100 * fraction:.2f}% of the update survived rounding")
    if fraction < ENOUGH:
        better = "float32" if dtype == torch.float16 else "float16"
        console.warn(f"rounding lost the rest: use the adapter unmerged, or merge with --dtype {better}")


if __name__ == "__main__":
    process.run(main)
