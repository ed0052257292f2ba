"""Training data: the tokens of a sample, the order of the epochs, and each rank's micro-batches."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from stic_min import InputError
from stic_min.batch import Example
from stic_min.data import Instruction, Pair
from stic_min.formats.image_folder import image_path
from stic_min.images import image_size, open_image
from stic_min.runtime import consistency
from stic_min.runtime.work import row_seed, subset
from stic_min.text import IMAGE, TEMPLATES


@dataclass
class TrainingSample(Example):
    """An Example, and what training needs to know before its image is loaded."""

    image: Path
    length: int  # positions in the flat row, those of the image included
    cut: bool  # a response was cut to the maximum length

    @property
    def scored(self) -> int:
        """Number of supervised tokens."""
        trunk = sum(len(ids) for ids, is_scored in self.trunk if is_scored)
        return trunk + sum(map(len, self.branches))

    @property
    def differs(self) -> bool:
        """Whether a pair's responses differ; if not, its DPO term has no gradient."""
        return not self.branches or self.branches[0] != self.branches[1]


def pair_sample(pair: Pair, llava, folder: str | Path, max_length: int) -> TrainingSample:
    """The prompt as trunk, [chosen, rejected] as branches, each cut so that prompt and branch fit
    `max_length`."""
    tokenizer = llava.tokenizer
    path = image_path(folder, pair.image)
    prompt = tokenizer.encode_prompt(llava.chat_prompt(pair.prompt, images=0))  # it contains <image> already
    length = len(prompt) - 1 + llava.config.image_tokens(image_size(path))
    room = max_length - length
    if room <= 0:
        limit = f"which leaves no room for a response in {max_length}"
        raise InputError(f"{pair.where}: the prompt takes {length} tokens, {limit}")
    # A response that was cut off gets no end token: the model did not generate it there.
    responses = [
        tokenizer.encode_response(pair.chosen, pair.chosen_stopped),
        tokenizer.encode_response(pair.rejected, pair.rejected_stopped),
    ]
    branches = [ids[:room] for ids in responses]
    length += sum(map(len, branches))
    return TrainingSample(pair.where, [(prompt, False)], branches, path, length, cut=branches != responses)


def instruction_sample(
    instruction: Instruction, llava, folder: str | Path, max_length: int
) -> TrainingSample:
    """One conversation as trunk, every answer scored. It ends with the answer that reaches `max_length`."""
    tokenizer = llava.tokenizer
    path = image_path(folder, instruction.image)
    users, answers = zip(*instruction.turns)
    prompts = TEMPLATES[llava.config.template].turns(users)
    image_tokens = llava.config.image_tokens(image_size(path))
    trunk, room, cut = [], max_length, False
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        prompt_ids = tokenizer.encode_prompt(prompt, first=i == 0)
        answer_room = room - len(prompt_ids) - prompt_ids.count(IMAGE) * (image_tokens - 1)
        if answer_room <= 0:
            cut = True
            break
        answer_ids = tokenizer.encode_response(answer)
        cut = len(answer_ids) > answer_room
        answer_ids = answer_ids[:answer_room]
        trunk += [(prompt_ids, False), (answer_ids, True)]
        room = answer_room - len(answer_ids)
        if cut:
            break
    if not trunk:
        raise InputError(f"{instruction.where}: the first prompt alone is longer than {max_length} tokens")
    if sum(ids.count(IMAGE) for ids, _ in trunk) != 1:
        raise InputError(f"{instruction.where}: its <image> appears only after {max_length} tokens")
    return TrainingSample(instruction.where, trunk, [], path, max_length - room, cut)


def length_limit(args, llava, pad_default, anyres_default=4096):
    """--max-length or the stage's default, at most the model's own maximum."""
    default = pad_default if llava.config.image_mode == "pad" else anyres_default
    return min(args.max_length or default, llava.config.decoder.max_positions)


def prepare(args, ranks, problems, records, parse, make_sample):
    """Parses and tokenizes the records, or a random --limit of them -> (parsed entries, samples)."""
    entries = problems.collect(lambda record: parse(*record), records)
    consistency.limit(args, len(entries), ranks)
    entries = subset(entries, args.limit, args.seed)
    return entries, problems.collect(make_sample, entries)


def counts(samples):
    """For the record of a run."""
    truncated, equal = sum(sample.cut for sample in samples), sum(not sample.differs for sample in samples)
    return {"samples": len(samples), "truncated": truncated, "equal": equal}


# ---------------------------------------------------------------- batches


def global_batches(lengths, size, seed, epochs=1):
    """Indices in random order, `size` at a time, in another order in each epoch; an epoch's last batch may be
    shorter.

    Each batch is sorted, longest first, so that ranks that take every n-th sample get similar lengths. That
    is what LLaVA's group_by_modality_length (Table 4) amounts to: it shuffles, then sorts within each global
    batch.
    """
    batches = []
    for epoch in range(epochs):
        order = list(range(len(lengths)))
        random.Random(row_seed(seed, "epoch", epoch) if epoch else seed).shuffle(order)
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return [sorted(batch, key=lambda i: -lengths[i]) for batch in batches]


def split_batch(batch: list, ranks, size: int) -> list[tuple[list, float]]:
    """Splits a global batch into this rank's micro-batches -> [(samples, weight)], as many on every rank.

    FSDP ranks must run the same number of forward passes. A rank that has run out of samples repeats one with
    weight 0; all others have weight 1.
    """
    share = batch[ranks.rank :: ranks.world]
    longest = math.ceil(len(batch) / ranks.world)
    chunks = [share[start : start + size] for start in range(0, longest, size)]
    return [(chunk, 1.0) if chunk else (batch[:1], 0.0) for chunk in chunks]


def load_tiles(sample: TrainingSample, llava) -> list:
    """The sample's image, ready for CLIP."""
    return [llava.tiles(open_image(sample.image))]
