"""Stage 2 of STIC (Algorithm 2, second half): instructions, each after the model's own description ->
theta_hat.

  python train_stage2.py --model M --adapter runs/stage1 --instructions instructions.json \\
      --descriptions descriptions.jsonl --images DIR --out runs/stage2
  torchrun --nproc_per_node=4 train_stage2.py ...      the same global batches on four GPUs, sharded by FSDP

Trains on every answer in the described records. Continues from stage 1's LoRA and projector or, without
--adapter, starts from the base model (a control that skips stage 1). --plain is ordinary fine-tuning on the
same records (a control that skips the descriptions) or, without --descriptions, on all records with an image.
runs/stage2 is self-contained apart from the base model. To resume a run that was stopped, run the same
command again.
"""

import argparse

from stic_min import check, cost, training
from stic_min.checkpoint import settings_of_run
from stic_min.data import Infusion, parse_instruction
from stic_min.formats.image_folder import check_folder
from stic_min.formats.records import read_kind
from stic_min.loss import sft_loss
from stic_min.runtime import consistency, flags, preset, process
from stic_min.runtime.files import sha256
from stic_min.runtime.ranks import start_ranks
from stic_min.samples import instruction_sample, length_limit, prepare


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("--instructions", required=True, metavar="FILE", help="file of LLaVA instruction data, a JSON list")
    add("--descriptions", metavar="FILE",
        help="output of generate_pairs.py --describe; required, except with --plain")
    add("--images", required=True, metavar="DIR", help="root folder of the instructions' images")
    add("--out", required=True, metavar="DIR", help="output folder for adapter, log and checkpoints")
    add("--one-line", action="store_true", help="use the paper's one-line form for descriptions in prompts")
    add("--plain", action="store_true", help="train on the same records without descriptions (a control)")
    flags.add_model_flags(parser, image_mode="pad, as in Table 4")
    flags.add_limit_flag(parser)
    flags.add_training_flags(parser, lr=2e-5, batch_size=64, dropout=0.05, max_length=2048)  # Table 4
    preset.add_flags(parser, template="vicuna_v1", projector_lr=0.0)
    args = preset.parse_args(parser)
    if not args.plain and not args.descriptions:
        parser.error("the following arguments are required: --descriptions")
    if args.plain and args.one_line:
        parser.error("--plain omits descriptions, so --one-line has no effect: use one of them")
    return args


def main():
    args = parse_args()
    check.out_dir(args.out)
    check_folder(args.images)
    ranks = start_ranks("cpu" if args.check else args.device, training=True)

    # Tokenize all records and decode all images before the weights are loaded. --check ends here, with a
    # report. `llava` is on the meta device until then; `weights` records where to read its parameters.
    llava, adapter, weights = training.build(args, ranks, keep_reference=False)
    max_length = length_limit(args, llava, pad_default=2048)
    problems = check.Problems(args.check)
    infusion = Infusion(args.instructions, args.one_line, args.plain)  # parses descriptions
    records, parse = infusion.records, parse_instruction  # --plain without descriptions: all with an image
    if args.descriptions:
        records, parse = read_kind(args.descriptions, "descriptions"), infusion
    instructions, samples = prepare(
        args, ranks, problems, records, parse,
        lambda instruction: instruction_sample(instruction, llava, args.images, max_length),
    )  # fmt: skip
    truncated = f"{sum(sample.cut for sample in samples)} truncated to {max_length} tokens"
    ranks.print(f"{infusion.summary()}; {len(samples)} used for training, {truncated}")
    consistency.same_preset(args, args.descriptions, problems)
    consistency.stage2_adapter(args.adapter, ranks)
    if not args.plain:
        consistency.same_model(args, args.descriptions, llava.config.template, ranks)
        consistency.one_text([entry.description for entry in instructions], "descriptions", ranks)
    check.verify_images(samples, ranks, problems)
    files = {"instructions": args.instructions, "descriptions": args.descriptions}
    stage_settings = {name: sha256(path) for name, path in files.items() if path}
    stage_settings |= {"plain": args.plain, "one_line": args.one_line}
    cost.fit_training(args, llava, adapter, samples, ranks)  # --micro-batch and --shard, unless given
    settings = settings_of_run(args, llava, adapter, max_length, **stage_settings)
    if args.check:
        return check.report_training(
            args, llava, adapter, samples, settings, problems, ranks, reference=False
        )

    training.shard(llava, args, ranks)  # FSDP: every decoder block, then the rest
    training.load(llava, weights, args, ranks)  # each rank reads its own rows
    check.image_matters(llava, samples[0])

    run = training.Run(args, llava, adapter, samples, ranks, settings)  # order of the data, log, checkpoints
    for step in run.steps():
        global_batch = run.batches[step]  # over all ranks
        tokens_in_batch = sum(sample.scored for sample in global_batch)
        for batch in run.micro_batches():  # this rank's share
            nll, tokens = sft_loss(llava(batch), batch.labels)  # Algorithm 2: -log p(y | v, x), summed
            run.backward(nll / tokens_in_batch)  # summed over micro-batches and ranks: the mean

            run.log(tokens_in_batch, loss=nll)
            run.log(1, answer_tokens=tokens)

        norm = run.clip_gradients(training.CLIP_NORM)  # after summing over ranks; a NaN ends the run here
        for group in run.optimizer.param_groups:  # LoRA, projector
            group["lr"] = group["peak"] * training.rate(step, len(run.batches))  # warm-up, then cosine to 0
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.end_step(norm)  # log.jsonl, terminal, and a checkpoint if one is due


if __name__ == "__main__":
    process.run(main)
