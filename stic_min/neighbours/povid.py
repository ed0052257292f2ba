"""POVID (arXiv 2402.11411): preference training on hallucinations, first those that another model wrote into
good answers, then the model's own on noisy images.

  P="python -m stic_min.neighbours.povid"        torchrun --nproc_per_node=4 -m ... works as well
  $P pairs --data POVID_preference_data_for_VLLMs.json --out pairs.jsonl
  $P stage1 --model M --pairs pairs.jsonl --images DIR --out runs/povid1
  $P stage2 --model M --adapter runs/povid1 --pairs pairs.jsonl --images DIR --out runs/povid2

pairs: converts the published data, LLaVA's records with `rejected_conversations`. stage1: plain DPO, which
is train_stage1.py with the authors' settings. stage2: one more epoch on the same pairs, with a second DPO
term. Its rejected response, "argmax-noisy", is what the model expects with a noisy image: the most probable
token at each position of the chosen text. These tokens are scored with the clean image. To resume a step, run
the same command again.

The authors' (YiyangZhou/POVID): both terms have weight 0.5; stage 2's reference is the model of stage 1;
noise is added before the image is padded and resized; policy and reference each determine their own
argmax-noisy, anew at every step, so that the two may score different tokens.

Ours: noisy values outside [0, 1] are clamped, while the authors' conversion to 8 bits wraps them around. The
batch size is 4, since the authors' number of GPUs is not known. LoRA has no dropout (--lora-dropout 0.05).
Stage 2 continues stage 1's LoRA; the authors merge it and train a new one (stic_min.merge, then stage2
without --adapter). Their scripts set a learning rate for the projector, but their code freezes it
(--projector-lr 0), like STIC's release. A line break in their scripts is missing its backslash, so that their
maximum length is 1,048, not the 1,024 that they intend and that is used here.
"""

import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import train_stage1
from stic_min import InputError, check, cost, training
from stic_min.batch import Batch
from stic_min.checkpoint import settings_of_run
from stic_min.data import parse_pair
from stic_min.formats.image_folder import check_folder
from stic_min.formats.records import read_kind, skipped_line, unique_key
from stic_min.generate import Response
from stic_min.images import open_image
from stic_min.loss import IGNORE, dpo_loss, token_logps
from stic_min.neighbours import common
from stic_min.runtime import consistency, flags, process
from stic_min.runtime.files import fingerprint, sha256
from stic_min.runtime.ranks import start_ranks
from stic_min.runtime.work import row_seed
from stic_min.samples import TrainingSample, length_limit, pair_sample, prepare
from stic_min.text import without_marks

TRAINING = "--alpha 0 --beta 0.1 --lr 1e-7 --epochs 3".split()  # of stage 1
NOISE_STEP = 500  # t, of 1,000

# ---------------------------------------------------------------- the published data


def run_pairs(args):
    """POVID's JSON -> our pairs. What is not a single-turn pair about one image is skipped and counted."""
    check.out_file(args.out)
    ranks = start_ranks("cpu")
    pairs, skipped, taken = {}, {}, {}
    response = lambda text, stopped: Response(text, "stop" if stopped else "length")
    for where, record in read_kind(args.data, "pairs"):
        try:
            pair = parse_pair(where, record)
        except InputError as error:
            skipped[where] = str(error)
            continue
        key = unique_key(record, pair.image, where, taken)
        chosen = response(pair.chosen, pair.chosen_stopped)
        rejected = response(pair.rejected, pair.rejected_stopped)
        pairs[key] = common.pair_record(key, pair.image, without_marks(pair.prompt), chosen, rejected)
    if skipped:
        ranks.print(skipped_line(skipped))
    if not pairs:
        raise InputError(f"{args.data}: no pairs")
    common.write_records(args.out, {"data": sha256(args.data)[:12]}, pairs, ranks)
    ranks.print(f"{len(pairs)} pairs in {args.out}")


# ---------------------------------------------------------------- noise


def remaining_signal(step=NOISE_STEP):
    """alpha-bar_t: the product of 1 - beta up to 0-based step t, for betas on a sigmoid from 1e-5 to 5e-3."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, 0)[step]


def add_noise(image: Image.Image, seed: int) -> Image.Image:
    """The forward diffusion step: x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps, clamped."""
    x_0 = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)  # (height, width, 3)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    signal = remaining_signal()
    x_t = signal.sqrt() * x_0 + (1 - signal).sqrt() * eps
    return Image.fromarray((255 * x_t.clamp(0, 1)).round().byte().numpy())


@dataclass
class NoisySample(TrainingSample):
    noise_seed: int = 0


@dataclass
class NoisyBatch(Batch):
    noisy: Batch | None = None  # the same tokens with noisy images; only the chosen responses are scored


class NoisyRun(training.Run):
    """A training.Run whose batches are NoisyBatches."""

    def __init__(self, args, llava, adapter, samples, ranks, settings):
        super().__init__(args, llava, adapter, samples, ranks, settings)
        # Noise follows from the step and the place in the global batch, so that ranks, micro-batches and
        # resuming do not change it.
        for step, batch in enumerate(self.batches):
            seeds = [row_seed(args.seed, "noise", step, i) for i in range(len(batch))]
            self.batches[step] = [replace(sample, noise_seed=seed) for sample, seed in zip(batch, seeds)]

    def load(self, samples):
        batch = super().load(samples)
        images = [add_noise(open_image(sample.image), sample.noise_seed) for sample in samples]
        tiles = [self.llava.tiles(image) for image in images]
        noisy = replace(batch, tiles=tiles, scored=batch.scored[0::2], labels=batch.labels[0::2])
        return NoisyBatch(**vars(batch), noisy=noisy)


# ---------------------------------------------------------------- stage 2


@torch.no_grad()
def noisy_labels(llava, noisy):
    """(B, R): the most probable token at each scored position, given the noisy image and the chosen text."""
    tokens = llava(noisy).argmax(-1)  # (B, R); those at [t] are predicted for t + 1
    return F.pad(tokens[:, :-1], (1, 0)).masked_fill(noisy.labels == IGNORE, IGNORE)


def scores(llava, batch):
    """log p with the clean image, each (B,): of y_w, of y_l, and of the argmax-noisy tokens after y_w."""
    labels = noisy_labels(llava, batch.noisy)
    logits = llava(batch)  # (2 B, R, V)
    logp_w, logp_l = token_logps(logits, batch.labels).sum(-1).view(-1, 2).unbind(1)
    return logp_w, logp_l, token_logps(logits[0::2], labels).sum(-1)


@torch.no_grad()
def reference_scores(llava, batch):
    """The same under the reference, with the tokens that are its own argmax."""
    with llava.as_reference():
        return scores(llava, batch)


def povid_terms(theta, reference, beta):
    """The two DPO losses, each (B,), whose mean is the loss: y_w over y_l, and y_w over argmax-noisy.

    theta and reference: what `scores` returns.
    """
    (logp_w, *rejected), (ref_logp_w, *ref_rejected) = theta, reference
    return [dpo_loss(logp_w, logp, ref_logp_w, ref, beta) for logp, ref in zip(rejected, ref_rejected)]


def run_stage2(args):
    check.out_dir(args.out)
    check_folder(args.images)
    ranks = start_ranks("cpu" if args.check else args.device, training=True)
    args.reference = args.reference or args.adapter

    llava, adapter, weights = training.build(args, ranks, keep_reference=True)
    max_length = length_limit(args, llava, pad_default=1024)
    problems = check.Problems(args.check)
    pairs, samples = prepare(
        args, ranks, problems, read_kind(args.pairs, "pairs"), parse_pair,
        lambda pair: NoisySample(**vars(pair_sample(pair, llava, args.images, max_length))),
    )  # fmt: skip
    truncated = f"{sum(sample.cut for sample in samples)} truncated to {max_length} tokens"
    ranks.print(f"{len(samples)} pairs, {truncated}")
    consistency.preferences(pairs, samples, args.pairs, ranks, problems)
    check.verify_images(samples, ranks, problems)
    stage_settings = {"beta": args.beta, "pairs": sha256(args.pairs), "noise_step": NOISE_STEP}
    if args.reference:
        stage_settings["reference"] = fingerprint(args.reference)
    cost.fit_training(args, llava, adapter, samples, ranks)
    settings = settings_of_run(args, llava, adapter, max_length, **stage_settings)
    if args.check:
        forwards = 3  # without gradient: two of the reference, and the policy's with the noisy image
        return check.report_training(
            args, llava, adapter, samples, settings, problems, ranks, reference=forwards
        )

    training.shard(llava, args, ranks)
    training.load(llava, weights, args, ranks)
    check.image_matters(llava, samples[0])
    if args.adapter == args.reference:
        train_stage1.check_reference(llava, samples[0], args.beta)

    run = NoisyRun(args, llava, adapter, samples, ranks, settings)
    for step in run.steps():
        global_batch = run.batches[step]  # over all ranks
        differing = sum(pair.differs for pair in global_batch)  # pairs whose responses differ
        for batch in run.micro_batches():  # this rank's share
            reference = reference_scores(llava, batch)  # three (B,): y_w, y_l, argmax-noisy
            theta = scores(llava, batch)
            dpo, dpo_noisy = povid_terms(theta, reference, args.beta)
            losses = 0.5 * dpo + 0.5 * dpo_noisy  # (B,)
            run.backward(losses.sum() / len(global_batch))  # summed over micro-batches and ranks: the mean

            reward_w, reward_l, reward_noisy = (args.beta * (p - ref) for p, ref in zip(theta, reference))
            run.log(
                len(global_batch), loss=losses, dpo=dpo, dpo_noisy=dpo_noisy,
                logp_chosen=theta[0], logp_rejected=theta[1], logp_noisy=theta[2],
                reward_chosen=reward_w, reward_rejected=reward_l, reward_noisy=reward_noisy,
            )  # fmt: skip
            differs = (batch.labels[0::2] != batch.labels[1::2]).any(-1)  # (B,)
            run.log(1, equal=~differs)
            if differing:
                margin = torch.where(differs, reward_w - reward_l, 0)
                run.log(differing, margin=margin, accuracy=margin > 0)

        norm = run.clip_gradients(training.CLIP_NORM)
        for group in run.optimizer.param_groups:  # LoRA, projector
            group["lr"] = group["peak"] * training.rate(step, len(run.batches))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.end_step(norm)


# ---------------------------------------------------------------- the commands


def parse_args():
    parser, add_step = common.command_line("povid", __doc__)
    add_step(
        "pairs", "convert POVID's preference data; needs no model",
        data="file of POVID's data, a JSON list", out=common.OUT_HELP,
    )  # fmt: skip
    add_step("stage1", f"train_stage1.py {' '.join(TRAINING)}; takes all of its flags")
    stage2 = add_step(
        "stage2", "DPO with the rejected texts and with the model's own tokens on noisy images",
        pairs="file of preference pairs, those of stage 1", images="root folder of the pairs' images",
        out="output folder for adapter, log and checkpoints",
    )  # fmt: skip
    add = stage2.add_argument
    add("--beta", type=flags.not_negative, default=0.1, help="DPO temperature")
    add("--reference", metavar="DIR", help="adapter folder of the reference (default: --adapter)")
    flags.add_model_flags(stage2, image_mode="pad")
    flags.add_limit_flag(stage2)
    flags.add_training_flags(stage2, lr=1e-7, batch_size=4, dropout=0.0, max_length=1024)
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["stage1"]:
        return common.train(train_stage1, TRAINING, sys.argv[2:])
    args = parse_args()
    {"pairs": run_pairs, "stage2": run_stage2}[args.step](args)


if __name__ == "__main__":
    process.run(main)
