"""Stage 1 of STIC (Algorithm 1, second half): preference pairs -> theta_1, by DPO + alpha * NLL (Eq. 4.1) with LoRA.

  python train_stage1.py --model M --pairs pairs.jsonl --images DIR --out runs/stage1
  torchrun --nproc_per_node=4 train_stage1.py ...      the same global batches on four GPUs, the model sharded (FSDP)

Reads the pairs of generate_pairs.py or the published ones. The reference is theta_0: the same weights with LoRA off,
and with the frozen projector. The same command again resumes a run that was stopped.
"""

import argparse
import math

import torch

from stic_min import InputError, cli, lora, training
from stic_min.data import pair_item, read_pairs, subset
from stic_min.loss import stic_loss, token_logps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--pairs", required=True, metavar="FILE", help="preference pairs, JSON list or JSON lines")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder their pictures are in")
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter, log and checkpoints")
    parser.add_argument("--beta", type=cli.not_negative, default=0.1, help="the paper's lambda: how far from theta_0")
    parser.add_argument("--alpha", type=cli.not_negative, default=1 / 1024, help="of -log p(y_w); 0 is plain DPO")
    cli.add_model_flags(parser, image_mode="pad, as Table 4", adapter=False)
    cli.add_limit_flag(parser)
    training.add_flags(parser, lr=1e-7, batch_size=4, dropout=0.0, max_length=1024)
    args = parser.parse_args()
    ranks = cli.start_ranks(args.device, backend=None)

    pairs = subset(read_pairs(args.pairs), args.limit, args.seed)
    llava, adapter = training.build(args, ranks, keep_reference=True)
    max_length = args.max_length or (1024 if llava.config.image_mode == "pad" else 4096)
    items = [pair_item(pair, llava, args.images, max_length) for pair in pairs]
    ranks.say(f"{len(items)} pairs, {sum(item.cut for item in items)} cut to {max_length} tokens")
    training.check_pictures(items, ranks)
    training.check_picture_matters(llava, items[0])

    settings = training.settings(args, llava, files=[args.pairs])
    run = training.Run(args, llava, adapter, items, ranks, settings)
    for step, batches in run.steps():
        size = len(run.batches[step])
        sums = dict.fromkeys(("loss", "dpo", "nll", "margin", "accuracy"), 0.0)
        for indices, counts in batches:
            batch = run.collate(indices)
            # Each pair's rows are (chosen, rejected), scored behind one prompt.
            with torch.no_grad(), lora.disabled(llava):
                reference = llava(batch, reference=True)  # (2 B, 1 + R, V)
                ref_logp_w, ref_logp_l = token_logps(reference, batch.labels).sum(-1).view(-1, 2).unbind(1)  # (B,) each
                del reference
            logp_w, logp_l = token_logps(llava(batch), batch.labels).sum(-1).view(-1, 2).unbind(1)  # (B,) each
            losses = stic_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, args.beta, args.alpha)  # Eq. 4.1
            run.backward(losses.sum() / size * counts)
            if counts:
                nll = -args.alpha * logp_w.detach()
                margin = args.beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l)).detach()
                for name, value in (("loss", losses), ("dpo", losses - nll), ("nll", nll), ("margin", margin),
                                    ("accuracy", margin > 0)):
                    sums[name] += value.sum().item() / size
        if step == 0:  # B = 0, so theta is theta_0
            [dpo] = run.total(sums["dpo"])
            if abs(dpo - math.log(2)) > 1e-4:
                raise InputError(f"step 1: the DPO term is {dpo:.6f}, not ln 2, so policy and reference differ")
        run.update(step, sums)
    run.finish()


if __name__ == "__main__":
    cli.run(main)
