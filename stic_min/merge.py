"""Folds an adapter into a checkpoint: W + (alpha / r) B A, in the layout that the checkpoint came in.

  python -m stic_min.merge --model M --adapter runs/stage2 --out llava-stic

Whatever loads M (LLaVA, transformers, this project) loads the result. The sum is made in fp32 and rounded to the
target dtype; what rounding leaves of the change is printed, because at the paper's learning rates bf16 swallows much
of it. Using the adapter unmerged loses nothing.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from stic_min import InputError
from stic_min.formats.adapters import read_adapter
from stic_min.formats.tensors import canonical, open_shard, shards, write_tensors
from stic_min.loader import open_llava
from stic_min.runtime import console, flags, process
from stic_min.runtime.files import read_json
from stic_min.runtime.ranks import place

ENOUGH = 0.9  # of a change; where rounding leaves less of it, the merged model is another than the one that was trained
# Indices of the old shards, and what is not of the checkpoint: transformers would apply an adapter beside it once more.
LEFT_OUT = "model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json", "run.json"


def merge_shard(tensors, adapter, dtype=None):
    """{key: function that reads it} of one shard -> merged {key: tensor}, and the sums <W' - W, D> and <D, D>."""
    merged, kept, wanted = {}, 0.0, 0.0
    for key, read in tensors.items():
        old, name = read(), canonical(key) or ""
        target = dtype if dtype and old.is_floating_point() else old.dtype
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in adapter.tensors:
            A, B = adapter.tensors[f"{module}.lora_A"], adapter.tensors[f"{module}.lora_B"]
            change = adapter.alpha / adapter.r * (B @ A)  # (out, in)
        elif name in adapter.tensors:
            change = adapter.tensors[name] - old.float()  # the projector
        else:
            # A copy, because safetensors wants no two tensors to share memory.
            merged[key] = old.to(target).clone(memory_format=torch.contiguous_format)
            continue
        merged[key] = (old.float() + change).to(target).contiguous()
        kept += ((merged[key].double() - old.double()) * change).sum().item()
        wanted += change.double().square().sum().item()
    return merged, kept, wanted


def write_merged(folder, adapter, out, dtype=None, tokenizer=None):
    """The checkpoint `folder` with its weights merged, into the folder `out`. Returns the surviving fraction."""
    files, kept, wanted, weight_map = shards(folder), 0.0, 0.0, {}
    progress = console.Progress("merging shards", len(files))
    for file in files:
        tensors, *sums = merge_shard(open_shard(file), adapter, dtype)
        kept, wanted = kept + sums[0], wanted + sums[1]
        name = Path(file.name.replace("pytorch_model", "model")).stem + ".safetensors"
        write_tensors(tensors, out / name)
        weight_map |= dict.fromkeys(tensors, name)
        progress.add()
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    stale = (*LEFT_OUT, "tokenizer.json") if tokenizer else LEFT_OUT
    for file in folder.iterdir():
        if file.is_file() and file.name not in stale and file.suffix not in (".bin", ".safetensors"):
            shutil.copyfile(file, out / file.name)
    if tokenizer:
        shutil.copyfile(tokenizer, out / "tokenizer.model")
    config = read_json(folder / "config.json")
    tower = config.get("mm_vision_tower")
    if tower and not Path(tower).is_absolute() and (folder / tower / "config.json").is_file():
        shutil.copytree(folder / tower, out / tower)  # one that lies inside the checkpoint
    if dtype:
        config |= {key: str(dtype).removeprefix("torch.") for key in {"torch_dtype"} | ({"dtype"} & config.keys())}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return kept / wanted if wanted else 1.0


def merge(model, adapter, out, dtype=None, vision=None, tokenizer=None, other_base=False):
    """Writes the merged checkpoint to the new folder `out`, one shard at a time, in `dtype` (None: as stored).

    Returns the fraction of the change that survived: <W' - W, D> / <D, D> over all changed tensors, D the exact
    change. Raises InputError if `out` exists, or for whatever loader and adapter find wrong.
    """
    folder, out = Path(model), Path(out)
    if out.exists():
        raise InputError(f"{out} exists already")
    # The template is in no file: the merged checkpoint has whatever the base has.
    llava, _ = open_llava(folder, vision=vision, tokenizer=tokenizer, template="vicuna_v1", other_base=other_base)
    adapter = read_adapter(adapter, llava)
    for note in llava.notes[1:]:
        console.print_line(console.one_line(note), "stderr")
    beside = out.with_name(f"{out.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        survived = write_merged(folder, adapter, beside, dtype, tokenizer)
    except BaseException:
        shutil.rmtree(beside)
        raise
    beside.rename(out)
    return survived


def main():
    parser = argparse.ArgumentParser(prog="python -m stic_min.merge", description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="LLaVA checkpoint folder, as published")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="LoRA adapter; its projector comes along")
    parser.add_argument("--out", required=True, metavar="DIR", help="new checkpoint folder")
    parser.add_argument("--dtype", choices=flags.DTYPES, help="of the result (default: as stored)")
    parser.add_argument("--vision", metavar="DIR", help="CLIP's folder, where the checkpoint holds or finds none")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, if not the checkpoint's")
    parser.add_argument("--other-base", action="store_true", help="use --adapter though its base had other weights")
    args = parser.parse_args()
    if place()[0]:
        return  # no work for several ranks
    dtype = getattr(torch, args.dtype) if args.dtype else None
    survived = merge(args.model, args.adapter, args.out, dtype, args.vision, args.tokenizer, args.other_base)
    print(f"wrote {args.out}; {100 * survived:.2f} % of the change survived rounding")
    if survived < ENOUGH:
        better = "float32" if dtype == torch.float16 else "float16"
        console.warn(f"rounding took the rest: use the adapter unmerged, or merge with --dtype {better}")


if __name__ == "__main__":
    process.run(main)
