"""Stage 1 of STIC (Algorithm 1, second half): preference pairs -> theta_1, by DPO + alpha * NLL (Eq. 4.1)
with LoRA.

  python train_stage1.py --model M --pairs pairs.jsonl --images DIR --out runs/stage1
  torchrun --nproc_per_node=4 train_stage1.py ...      the same global batches on four GPUs, sharded by FSDP

Reads the output of generate_pairs.py, or pairs published by others. The reference model is theta_0: the same
weights with LoRA off and the original projector. (A second round continues training the first one's
--adapter. Its reference is still theta_0, or the model with the adapter --reference.) To resume a run that
was stopped, run the same command again.
"""

import argparse
import math
from pathlib import Path

import torch

from stic_min import InputError, check, cost, training
from stic_min.batch import collate
from stic_min.checkpoint import settings_of_run
from stic_min.data import parse_pair
from stic_min.formats.image_folder import check_folder
from stic_min.formats.records import read_kind
from stic_min.loss import argmax_logps, dpo_loss, stic_loss, token_logps
from stic_min.runtime import consistency, flags, preset, process
from stic_min.runtime.files import fingerprint, sha256
from stic_min.runtime.ranks import start_ranks
from stic_min.samples import length_limit, load_tiles, pair_sample, prepare


def pair_logps(llava, batch, rejected_score="text"):
    """log p(y_w | v, x) and log p(y_l | v, x), each (B,). A pair has two rows: chosen, rejected."""
    logits = llava(batch)  # (2 B, R, V)
    logp_w, logp_l = token_logps(logits, batch.labels).sum(-1).view(-1, 2).unbind(1)
    if rejected_score == "argmax":  # PAPER vs RELEASED (A): not y_l, but the model's own top tokens
        logp_l = argmax_logps(logits[1::2], batch.labels[1::2]).sum(-1)
    return logp_w, logp_l


@torch.no_grad()
def reference_logps(llava, batch, rejected_score="text"):
    """The same under theta_0."""
    with llava.as_reference():  # LoRA off, and the projector as it was
        return pair_logps(llava, batch, rejected_score)


@torch.no_grad()
def check_reference(llava, sample, beta):
    """With LoRA's B = 0, theta equals theta_0 (as --adapter does --reference), so the DPO term must be ln 2
    before step 1."""
    batch = collate([sample], [load_tiles(sample, llava)], llava.config, llava.device)
    term = dpo_loss(*pair_logps(llava, batch), *reference_logps(llava, batch), beta).mean().item()
    if not abs(term - math.log(2)) <= 1e-6:  # in bf16 as well; also true for NaN
        raise InputError(f"before step 1, the DPO term is {term:.6f}, not ln 2: policy and reference differ")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("--pairs", required=True, metavar="FILE", help="file of preference pairs, a JSON list or JSON Lines")
    add("--images", required=True, metavar="DIR", help="root folder of the pairs' images")
    add("--out", required=True, metavar="DIR", help="output folder for adapter, log and checkpoints")
    add("--beta", type=flags.not_negative, default=0.1,  # PAPER vs RELEASED (M): the paper gives no value
        help="DPO temperature (the paper's lambda); larger values stay closer to the reference")
    add("--alpha", type=flags.not_negative, default=1 / 1024,
        help="weight of -log p(y_w), summed over its tokens; 0 gives plain DPO "
             "(default: 1/1024, as in the paper)")  # fmt: skip
    add("--rejected-score", choices=["text", "argmax"], default="text",
        help="score of the rejected response: log p of its text or, as in the release, of the model's own "
             "top token at each of its positions")  # fmt: skip
    add("--reference", metavar="DIR",
        help="adapter folder of the reference model, as in iterated methods (default: none, for theta_0)")
    flags.add_model_flags(parser, image_mode="pad, as in Table 4")
    flags.add_limit_flag(parser)
    flags.add_training_flags(parser, lr=1e-7, batch_size=4, dropout=0.0, max_length=1024)  # Table 4
    preset.add_flags(parser, rejected_score="argmax", template="vicuna_v1", projector_lr=0.0)
    return preset.parse_args(parser)


def main():
    args = parse_args()
    check.out_dir(args.out)
    check_folder(args.images)
    ranks = start_ranks("cpu" if args.check else args.device, training=True)

    # Tokenize all pairs and decode all images before the weights are loaded. --check ends here, with a
    # report. `llava` is on the meta device until then; `weights` records where to read its parameters.
    llava, adapter, weights = training.build(args, ranks, keep_reference=True)
    max_length = length_limit(args, llava, pad_default=1024)
    problems = check.Problems(args.check)
    pairs, samples = prepare(
        args, ranks, problems, read_kind(args.pairs, "pairs"), parse_pair,
        lambda pair: pair_sample(pair, llava, args.images, max_length),
    )  # fmt: skip
    truncated = f"{sum(sample.cut for sample in samples)} truncated to {max_length} tokens"
    ranks.print(f"{len(samples)} pairs, {truncated}")
    consistency.same_preset(args, args.pairs, problems)
    consistency.same_model(args, args.pairs, llava.config.template, ranks)
    consistency.preferences(pairs, samples, args.pairs, ranks, problems, args.rejected_score)
    check.verify_images(samples, ranks, problems)
    stage_settings = {"beta": args.beta, "alpha": args.alpha, "pairs": sha256(args.pairs)}
    if args.reference:
        stage_settings["reference"] = fingerprint(args.reference)
    cost.fit_training(args, llava, adapter, samples, ranks)  # --micro-batch and --shard, unless given
    settings = settings_of_run(args, llava, adapter, max_length, **stage_settings)
    if args.check:
        return check.report_training(
            args, llava, adapter, samples, settings, problems, ranks, reference=True
        )

    training.shard(llava, args, ranks)  # FSDP: every decoder block, then the rest
    training.load(llava, weights, args, ranks)  # each rank reads its own rows
    check.image_matters(llava, samples[0])
    policy, reference = (folder and Path(folder).resolve() for folder in (args.adapter, args.reference))
    if policy == reference:
        check_reference(llava, samples[0], args.beta)

    run = training.Run(args, llava, adapter, samples, ranks, settings)  # order of the data, log, checkpoints
    for step in run.steps():
        global_batch = run.batches[step]  # over all ranks
        differing = sum(pair.differs for pair in global_batch)  # pairs whose responses differ
        for batch in run.micro_batches():  # this rank's share
            ref_logp_w, ref_logp_l = reference_logps(llava, batch, args.rejected_score)  # theta_0, (B,) each
            logp_w, logp_l = pair_logps(llava, batch, args.rejected_score)  # theta
            losses = stic_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, args.beta, args.alpha)  # Eq. 4.1, (B,)
            run.backward(losses.sum() / len(global_batch))  # summed over micro-batches and ranks: the mean

            reward_w = args.beta * (logp_w - ref_logp_w)  # DPO's implicit reward
            reward_l = args.beta * (logp_l - ref_logp_l)
            alpha_nll = -args.alpha * logp_w  # Eq. 4.1's second term; the rest is DPO
            run.log(
                len(global_batch), loss=losses, dpo=losses - alpha_nll, alpha_nll=alpha_nll,
                logp_chosen=logp_w, logp_rejected=logp_l, reward_chosen=reward_w, reward_rejected=reward_l,
            )  # fmt: skip
            chosen, rejected = batch.labels[0::2], batch.labels[1::2]  # (B, R)
            differs = (chosen != rejected).any(-1)  # (B,)
            run.log(1, equal=~differs)  # divided by 1: a count
            if differing:  # the margin of two equal responses is 0 and means nothing
                margin = torch.where(differs, reward_w - reward_l, 0)
                run.log(differing, margin=margin, accuracy=margin > 0)

        norm = run.clip_gradients(training.CLIP_NORM)  # after summing over ranks; a NaN ends the run here
        for group in run.optimizer.param_groups:  # LoRA, projector
            group["lr"] = group["peak"] * training.rate(step, len(run.batches))  # warm-up, then cosine to 0
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.end_step(norm)  # log.jsonl, terminal, and a checkpoint if one is due


if __name__ == "__main__":
    process.run(main)
