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
import tempfile
from pathlib import Path

import torch

from stic_min import InputError, cli, lora
from stic_min.loader import canonical, open_llava, open_shard, read_json, shards


def merge(model, adapter, out, dtype=None, vision=None, tokenizer=None):
    """Writes the merged checkpoint to the new folder `out`, one shard at a time, in `dtype` (None: as stored).

    Returns the fraction of the change that survived: <W' - W, D> / <D, D> over all changed tensors, D the exact
    change. Raises InputError if `out` exists, or for whatever loader and adapter find wrong.
    """
    folder, out = Path(model), Path(out)
    if out.exists():
        raise InputError(f"{out} exists already")
    llava, source = open_llava(folder, vision=vision, tokenizer=tokenizer)
    read = lora.read_adapter(adapter, llava, canonical)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))

    files = shards(folder)
    progress = cli.Progress("merging shards", len(files), cli.Ranks(0, 1, torch.device("cpu")))
    kept, wanted, weight_map = 0.0, 0.0, {}
    for file in files:
        tensors, name = {}, Path(file.name.replace("pytorch_model", "model")).stem
        for key, load in open_shard(file).items():
            old, ours = load(), canonical(key)
            module = (ours or "").removesuffix(".weight")
            target = dtype if dtype and old.is_floating_point() else old.dtype
            new = old.to(target)
            if f"{module}.lora_A" in read.tensors:
                A, B = read.tensors[f"{module}.lora_A"], read.tensors[f"{module}.lora_B"]
                change = read.alpha / read.r * (B @ A)  # (out, in)
            elif ours in read.tensors:
                change = read.tensors[ours] - old.float()  # the projector
            else:
                change = None
            if change is not None:
                new = (old.float() + change).to(target)
                kept += ((new.double() - old.double()) * change).sum().item()
                wanted += change.double().square().sum().item()
            tensors[key] = new.contiguous() if change is not None else new.clone()  # safetensors wants no shared memory
            weight_map[key] = f"{name}.safetensors"
        lora.write_tensors(tensors, beside / f"{name}.safetensors")
        progress.add()
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    weights = {*files, folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"}
    for file in folder.iterdir():
        if file.is_file() and file not in weights and file.suffix not in (".bin", ".safetensors"):
            shutil.copyfile(file, beside / file.name)
    config = read_json(beside / "config.json")
    tower = folder / config.get("mm_vision_tower", "none")
    if tower.is_dir() and tower.resolve().is_relative_to(folder.resolve()):  # a tower inside the checkpoint
        shutil.copytree(tower, beside / config["mm_vision_tower"])
    if dtype:
        config |= {key: str(dtype).removeprefix("torch.") for key in {"torch_dtype"} | ({"dtype"} & config.keys())}
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    beside.chmod(0o755)
    beside.rename(out)
    return kept / wanted


def main():
    parser = argparse.ArgumentParser(prog="python -m stic_min.merge", description=__doc__,
                                     formatter_class=cli.HelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="LLaVA checkpoint folder, as published")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="LoRA adapter; its projector comes along")
    parser.add_argument("--out", required=True, metavar="DIR", help="new checkpoint folder")
    parser.add_argument("--dtype", choices=sorted(cli.DTYPES), help="of the result (default: as stored)")
    parser.add_argument("--vision", metavar="DIR", help="CLIP's folder, where the checkpoint holds or finds none")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, if not the checkpoint's")
    args = parser.parse_args()
    if int(os.environ.get("RANK", 0)):
        return  # no work for several ranks
    dtype = cli.DTYPES[args.dtype] if args.dtype else None
    survived = merge(args.model, args.adapter, args.out, dtype, args.vision, args.tokenizer)
    print(f"wrote {args.out}; {100 * survived:.2f} % of the change survived rounding")


if __name__ == "__main__":
    cli.run(main)
