"""Stage 2 of STIC (Algorithm 2, second half): instructions with the model's own descriptions in front -> theta_hat.

  python train_stage2.py --model M --adapter runs/stage1 --instructions instructions.json \\
      --descriptions descriptions.jsonl --images DIR --out runs/stage2
  torchrun --nproc_per_node=4 train_stage2.py ...      the same global batches on four GPUs, the model sharded (FSDP)

Trains exactly the described records, on every answer of theirs. Goes on from stage 1's LoRA and projector; without
--adapter it starts from the base model (the control that skips stage 1); with --plain it is ordinary continued
fine-tuning on the same records (the control that skips the descriptions). runs/stage2 stands alone. The same command
again resumes a run that was stopped.
"""

import argparse

from stic_min import check, training
from stic_min.data import each, instruction_item, read_infused
from stic_min.formats.image_folder import check_folder
from stic_min.loss import sft_loss
from stic_min.runtime import consistency, flags, process
from stic_min.runtime.ranks import start_ranks
from stic_min.runtime.work import subset


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--instructions", required=True, metavar="FILE", help="LLaVA instruction data, a JSON list")
    parser.add_argument("--descriptions", required=True, metavar="FILE", help="of generate_pairs.py --describe")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder their pictures are in")
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter, log and checkpoints")
    parser.add_argument("--one-line", action="store_true", help="put descriptions as the paper prints it, in one line")
    parser.add_argument("--plain", action="store_true", help="a control: the same records without the descriptions")
    flags.add_model_flags(parser, image_mode="pad, as Table 4")
    flags.add_limit_flag(parser)
    training.add_flags(parser, lr=2e-5, batch_size=64, dropout=0.05, max_length=2048)
    args = parser.parse_args()
    if args.plain and args.one_line:
        parser.error("--one-line is how descriptions are put, --plain leaves them out")
    check.training_out(args.out)
    check_folder(args.images)
    ranks = start_ranks("cpu" if args.check else args.device, backend=None)

    problems = [] if args.check else None  # where --check collects them; else the first one ends the run
    instructions, summary = read_infused(args.instructions, args.descriptions, args.one_line, args.plain, problems)
    consistency.limit(args, len(instructions), ranks)
    instructions = subset(instructions, args.limit, args.seed)
    llava, adapter = training.build(args, ranks, keep_reference=False)
    max_length = training.length_limit(args, llava, pad=2048)
    items = each(lambda entry: instruction_item(entry, llava, args.images, max_length), instructions, problems)
    ranks.print(f"{summary}; {len(items)} trained, {sum(item.cut for item in items)} cut to {max_length} tokens")
    consistency.stage2_adapter(args.adapter, ranks)
    if not args.plain:
        consistency.makers(args, args.descriptions, llava.config.template, ranks)
        consistency.one_text([entry.description for entry in instructions], "descriptions", ranks)
    check.pictures(items, ranks, problems)

    own = {name: training.sha256(getattr(args, name)) for name in ("instructions", "descriptions")}
    own |= {"plain": args.plain, "one_line": args.one_line}
    settings = training.settings(args, llava, adapter, max_length, **own)
    if args.check:
        return check.training(args, llava, adapter, items, settings, problems, ranks, reference=False)
    check.picture_matters(llava, items[0])
    run = training.Run(args, llava, adapter, items, ranks, settings)
    for step, micro_batches in run.steps():
        tokens_in_batch = sum(items[i].scored for i in run.batches[step])  # the global batch
        for indices, real in micro_batches:
            batch = run.collate(indices)
            nll, tokens = sft_loss(llava(batch), batch.labels)  # Algorithm 2
            run.backward(nll / tokens_in_batch * real)

            run.add(real / tokens_in_batch, loss=nll)
            run.add(real, answer_tokens=tokens)
        run.update(step)


if __name__ == "__main__":
    process.run(main)
