"""Stage 1 of STIC (Algorithm 1, second half): preference pairs -> theta_1, by DPO + alpha * NLL (Eq. 4.1) with LoRA.

  python train_stage1.py --model M --pairs pairs.jsonl --images DIR --out runs/stage1
  torchrun --nproc_per_node=4 train_stage1.py ...      the same global batches on four GPUs, the model sharded (FSDP)

Reads the pairs of generate_pairs.py or the published ones. The reference is theta_0: the same weights with LoRA off,
and with the frozen projector. The same command again resumes a run that was stopped.
"""

import argparse
import math

import torch

from stic_min import InputError, check, training
from stic_min.batch import collate
from stic_min.data import each, load_tiles, pair_item, read_pairs
from stic_min.formats.image_folder import check_folder
from stic_min.loss import dpo_loss, stic_loss, token_logps
from stic_min.runtime import consistency, flags, process
from stic_min.runtime.ranks import start_ranks
from stic_min.runtime.work import subset


def pair_logps(llava, batch):
    """log p(y_w | v, x) and log p(y_l | v, x), each (B,). A pair's rows in the batch are chosen, rejected."""
    logits = llava(batch)  # (2 B, R, V)
    return token_logps(logits, batch.labels).sum(-1).view(-1, 2).unbind(1)


def reference_logps(llava, batch):
    """The same under theta_0: LoRA off, and the projector as it was."""
    with torch.no_grad(), llava.as_reference():
        return pair_logps(llava, batch)


@torch.no_grad()
def check_reference(llava, batch, beta):
    """With LoRA's B = 0, theta is theta_0 and the DPO term ln 2. Raises InputError if it is not."""
    term = dpo_loss(*pair_logps(llava, batch), *reference_logps(llava, batch), beta).mean().item()
    if not abs(term - math.log(2)) <= 1e-6:  # in bf16 too; NaN is caught as well
        raise InputError(f"before step 1 the DPO term is {term:.6f}, not ln 2: policy and reference differ")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--pairs", required=True, metavar="FILE", help="preference pairs, JSON list or JSON lines")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder their pictures are in")
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter, log and checkpoints")
    parser.add_argument("--beta", type=flags.not_negative, default=0.1, help="the paper's lambda: how far from theta_0")
    parser.add_argument("--alpha", type=flags.not_negative, default=1 / 1024, help="of -log p(y_w); 0 is plain DPO")
    flags.add_model_flags(parser, image_mode="pad, as Table 4", adapter=False)
    flags.add_limit_flag(parser)
    training.add_flags(parser, lr=1e-7, batch_size=4, dropout=0.0, max_length=1024)
    args = parser.parse_args()
    check.training_out(args.out)
    check_folder(args.images)
    ranks = start_ranks("cpu" if args.check else args.device, backend=None)

    problems = [] if args.check else None  # where --check collects them; else the first one ends the run
    pairs = read_pairs(args.pairs, problems)
    consistency.limit(args, len(pairs), ranks)
    pairs = subset(pairs, args.limit, args.seed)
    llava, adapter = training.build(args, ranks, keep_reference=True)
    max_length = training.length_limit(args, llava, pad=1024)
    items = each(lambda pair: pair_item(pair, llava, args.images, max_length), pairs, problems)
    ranks.say(f"{len(items)} pairs, {sum(item.cut for item in items)} cut to {max_length} tokens")
    consistency.makers(args, args.pairs, llava.config.template, ranks)
    consistency.preferences(pairs, items, args.pairs, ranks, problems)
    check.pictures(items, ranks, problems)
    own = {"beta": args.beta, "alpha": args.alpha, "pairs": training.sha256(args.pairs)}
    settings = training.settings(args, llava, adapter, max_length, **own)
    if args.check:
        return check.training(args, llava, adapter, items, settings, problems, ranks, reference=True)
    check.picture_matters(llava, items[0])
    first = collate([items[0].example], [load_tiles(items[0], llava)], llava.config, llava.device)
    check_reference(llava, first, args.beta)
    run = training.Run(args, llava, adapter, items, ranks, settings)
    for step, micro_batches in run.steps():
        pairs_in_batch = len(run.batches[step])  # the global batch
        differing = sum(items[i].differs for i in run.batches[step])
        for indices, real in micro_batches:
            batch = run.collate(indices)
            ref_logp_w, ref_logp_l = reference_logps(llava, batch)
            logp_w, logp_l = pair_logps(llava, batch)
            losses = stic_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, args.beta, args.alpha)  # Eq. 4.1
            run.backward(losses.sum() / pairs_in_batch * real)

            reward_w, reward_l = args.beta * (logp_w - ref_logp_w), args.beta * (logp_l - ref_logp_l)  # implicit
            differs = torch.tensor([items[i].differs for i in indices], device=logp_w.device)  # (B,)
            run.add(real / pairs_in_batch, loss=losses, dpo=losses + args.alpha * logp_w,
                    alpha_nll=-args.alpha * logp_w, logp_chosen=logp_w, logp_rejected=logp_l,
                    reward_chosen=reward_w, reward_rejected=reward_l)
            run.add(real, equal=~differs)
            if differing:  # where both responses are the same text, the margin is 0 and means nothing
                margin = (reward_w - reward_l)[differs]
                run.add(real / differing, margin=margin, accuracy=margin > 0)
        run.update(step)


if __name__ == "__main__":
    process.run(main)
