"""Folds an adapter into a checkpoint: W + (alpha / r) B A, in the layout that the checkpoint came in.

  python -m stic_min.merge --model M --adapter runs/stage2 --out llava-stic

Whatever loads M (LLaVA, transformers, this project) loads the result. The sum is made in fp32 and rounded to the
target dtype; what rounding leaves of the change is printed, because at the paper's learning rates bf16 swallows much
of it. Using the adapter unmerged loses nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

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
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)

    files = shards(folder)
    progress = cli.Progress("merging shards", len(files), cli.start_ranks("cpu"))
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
            tensors[key] = new.contiguous()
            weight_map[key] = f"{name}.safetensors"
        save_file(tensors, beside / f"{name}.safetensors", metadata={"format": "pt"})
        progress.add()
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    weights = {*files, folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"}
    for file in folder.iterdir():
        if file.is_file() and file not in weights and file.suffix not in (".bin", ".safetensors"):
            shutil.copyfile(file, beside / file.name)
    if dtype:
        config = read_json(beside / "config.json") | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
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
    dtype = cli.DTYPES[args.dtype] if args.dtype else None
    survived = merge(args.model, args.adapter, args.out, dtype, args.vision, args.tokenizer)
    print(f"wrote {args.out}; {100 * survived:.2f} % of the change survived rounding")


if __name__ == "__main__":
    cli.run(main)
