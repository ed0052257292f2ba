"""A stage-1 micro-batch (reference, policy, backward), compared with TRL's DPOTrainer and the release.

  python tests/speed/stage1.py --size small --image-mode pad

The peers: TRL's DPOTrainer with peft on transformers' LLaVA, with its own loss (without alpha * NLL) on the
padded batch; and the scheme of the authors' trainer, four forward passes per pair (policy and reference on
each response) with the logits of the whole sequence. LoRA on all linear layers of the decoder, no optimizer
step, and a frozen projector, as in the peers. In bf16 and fp16 the peers run under autocast, as their
trainers do. Peak memory is measured above the memory in use before the step, in a separate process per run.
"""

import argparse
import itertools
import json
import logging
import tempfile

import torch
from common import VOCABULARY, build, compare, configuration, needed_flops, peak_memory, synthetic_images

from stic_min import lora
from stic_min.batch import Example, collate
from stic_min.images import make_tiles
from stic_min.loss import stic_loss, token_logps
from stic_min.runtime import flags
from stic_min.runtime.ranks import start_device
from stic_min.runtime.work import prefetch
from stic_min.text import IMAGE

BETA, ALPHA = 0.1, 1 / 1024


def samples(args, config):
    """[(tiles of an image, prompt ids before it, prompt ids after it, [chosen ids, rejected ids])]."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
    images = synthetic_images(args.micro_batch)
    tiles = [make_tiles(image, args.image_mode, 336, config.pinpoints) for image in images]
    return [(t, [1, 2], ids(args.text), [ids(args.chosen), ids(args.rejected)]) for t in tiles]


def ours_batch(args, config, device="cpu"):
    rows = samples(args, config)
    examples = [Example("pair", [([*a, IMAGE, *b], False)], responses) for _, a, b, responses in rows]
    return collate(examples, [[tiles] for tiles, *_ in rows], config, device)


def prepared(build_batch):
    """The same batch again and again, built in threads ahead of the step, as in training.Run."""
    return prefetch(lambda _: build_batch(), itertools.repeat(None))


def ours_step(args, llava, batches=None):
    """Attaches LoRA to `llava` -> a function that trains on the next of `batches` and returns the loss."""
    lora.attach(llava, lora.new_adapter(llava, args.r, 2 * args.r, 0.0, seed=0))
    batches = batches or prepared(lambda: ours_batch(args, llava.config, llava.device))

    def logps(batch):
        return token_logps(llava(batch), batch.labels).sum(-1).view(-1, 2).unbind(1)

    def step():
        batch = next(batches)
        with torch.no_grad(), llava.as_reference():
            reference = logps(batch)
        loss = stic_loss(*logps(batch), *reference, BETA, ALPHA).mean()
        loss.backward()
        return loss.item()

    return step


def peer_inputs(args, config, device, dtype):
    """A padded batch in TRL's layout: all chosen sequences, then all rejected ones, each with its image."""
    prompts, responses, tiles = [], [], []
    for which in (0, 1):
        for image_tiles, before, after, pair in samples(args, config):
            prompts.append(before + [VOCABULARY] * config.image_tokens(image_tiles.size) + after)
            responses.append(pair[which])
            tiles.append(image_tiles)
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses))

    def rows(row):
        padded = [r + [0] * (longest - len(r)) for r in map(row, prompts, responses)]
        return torch.tensor(padded, device=device)

    inputs = {
        "input_ids": rows(lambda p, r: p + r),
        "attention_mask": rows(lambda p, r: [1] * len(p + r)),
        "completion_mask": rows(lambda p, r: [0] * len(p) + [1] * len(r)),
    }
    pixels = [t.pixels.to(device, dtype) for t in tiles]
    if args.image_mode == "pad":
        return inputs | {"pixel_values": torch.cat(pixels)}
    sizes = torch.tensor([t.size[::-1] for t in tiles], device=device)
    return inputs | {"pixel_values": torch.stack(pixels), "image_sizes": sizes}


def autocast(args):
    dtype = getattr(torch, args.dtype)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


def peft_config(args):
    from peft import LoraConfig

    targets = rf".*language_model.*\.({'|'.join(lora.TARGETS)})"
    return LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=targets)


def trl_step(args, theirs, config):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    words = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(output_dir=folder, report_to=[], use_cpu=args.device == "cpu", bf16=False,
                             beta=BETA, gradient_checkpointing=False, max_length=None)  # fmt: skip
        pair = Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}])  # the trainer needs one
        trainer = DPOTrainer(theirs, args=settings, train_dataset=pair, processing_class=words,
                             peft_config=peft_config(args))  # fmt: skip
    trainer.model.train()
    inputs = peer_inputs(args, config, trainer.model.device, theirs.dtype)

    def step():
        with autocast(args):
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.item()

    return step


def release_step(args, theirs, config):
    from peft import get_peft_model

    model = get_peft_model(theirs, peft_config(args)).train()
    batch = peer_inputs(args, config, next(model.parameters()).device, theirs.dtype)
    pairs = [(i, i + args.micro_batch) for i in range(args.micro_batch)]

    def logp(row):
        end = int(batch["attention_mask"][row].sum())
        inputs = {name: value[row : row + 1] for name, value in batch.items() if name != "completion_mask"}
        inputs |= {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()  # of the whole sequence
        taken = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return (taken * batch["completion_mask"][row : row + 1, 1:end]).sum(-1)

    def step():
        total = 0.0
        for w, l in pairs:
            with autocast(args):
                with torch.no_grad(), model.disable_adapter():
                    reference = logp(w), logp(l)
                loss = stic_loss(logp(w), logp(l), *reference, BETA, ALPHA).mean() / args.micro_batch
            loss.backward()
            total += loss.item()
        return total

    return step


PEERS = {"TRL DPOTrainer": trl_step, "the release's four forwards": release_step}


def make(peer, args):
    """{name: step} of stic_min and a peer, on shared weights."""
    ours, theirs = build(args.size, args.image_mode, start_device(args.device), getattr(torch, args.dtype))
    return {"stic_min": ours_step(args, ours.train()), peer: PEERS[peer](args, theirs, ours.config)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "7b"], default="small", help="size of the model")
    parser.add_argument("--image-mode", choices=["pad", "anyres"], default="pad", help="image layout")
    parser.add_argument("--text", type=int, default=30, help="length of the prompt after the image, in tokens")
    parser.add_argument("--chosen", type=int, default=270, help="length of the chosen response in tokens")
    parser.add_argument("--rejected", type=int, default=230, help="length of the rejected response in tokens")
    parser.add_argument("--micro-batch", type=int, default=1, help="number of pairs per step")
    parser.add_argument("--r", type=int, default=128, help="LoRA rank")
    parser.add_argument("--repeat", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=flags.DTYPES, default="float32", help="precision of the weights")
    parser.add_argument("--memory-of", choices=["stic_min", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.memory_of:
        peer = args.memory_of if args.memory_of in PEERS else next(iter(PEERS))
        step = make(peer, args)[args.memory_of]
        print(json.dumps(peak_memory(step, torch.device(args.device))))
        return
    config = configuration(args.size, args.image_mode)
    flops = needed_flops(ours_batch(args, config), config, args.r, reference=True)
    compare(__file__, PEERS, make, args, f"a step of {args.micro_batch} pair(s)", flops)


if __name__ == "__main__":
    main()
