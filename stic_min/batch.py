"""Sequences: prompts, conversations and alternative responses, concatenated into one flat row of tokens."""

from dataclasses import dataclass

import torch

from stic_min.loss import IGNORE
from stic_min.mistral import Packed, Span
from stic_min.runtime.work import to_device
from stic_min.text import IMAGE


@dataclass
class Example:
    """One prompt and what is scored after it. The ids hold one IMAGE per image.

    `trunk` is a prompt or a whole conversation, in segments. `branches` are alternative responses to the
    trunk, all of them scored: [chosen, rejected] in stage 1. The trunk is computed only once for all its
    branches.
    """

    name: str  # for messages
    trunk: list[tuple[list[int], bool]]  # (ids, are they scored?) of each segment; the first is never scored
    branches: list[list[int]]


@dataclass
class Batch:
    """Examples in one flat row of T tokens, without padding; G groups of up to R positions are scored.

    A group is the answers of one conversation, or one branch. An example, a pair whose image takes 3 tokens:

                    prompt (the trunk)                     chosen          rejected
    flat index      0    1       2  3  4  5  6             7   8   9       10  11
    ids             <s>  [INST]  v  v  v  x  [/INST]       w1  w2  </s>    l1  </s>
    positions       0    1       2  3  4  5  6             7   8   9       7   8      both continue the prompt
    attends to      prompt                                 prompt, chosen  prompt, rejected       (causally)

    scored[0]                                6             7   8   9
    labels[0]                                -100          w1  w2  </s>
    scored[1]                                6             10  11  0
    labels[1]                                -100          l1  </s> -100

    Logits are read at `scored`; those at [t] predict labels[t + 1]. Rows are padded with 0 and -100.
    """

    ids: torch.Tensor  # (T,) int64, IMAGE at every position of an image
    positions: torch.Tensor  # (T,) int64, for the rotary embedding
    attend: Packed  # which token attends to which
    tiles: list  # the images.Tiles of all images, in order
    # (G, R) int64: the flat positions whose logits are read. Each scored segment is preceded by the position
    # just before it, because the logits there predict its first token. Rows are padded with 0.
    scored: torch.Tensor
    # (G, R) int64: the ids at those positions; -100 at the position before each segment, and in the padding.
    labels: torch.Tensor
    # (N, S, Cv) of all tiles, kept after the first forward: CLIP is frozen, so theta and theta_0 share them.
    patches: torch.Tensor | None = None


def collate(examples: list[Example], tiles: list[list], config, device="cpu") -> Batch:
    """Concatenates `examples`. tiles[i]: the Tiles of examples[i], one for each IMAGE, in order."""
    ids, positions, spans = [], [], []  # of the flat row
    scored, labels = [], []  # one list per group
    for example, example_tiles in zip(examples, tiles):
        remaining_tiles = iter(example_tiles)
        start = len(ids)
        answers, answer_labels = [], []
        for segment, is_scored in example.trunk:
            first = len(ids)
            for token in segment:
                if token == IMAGE:
                    ids += [IMAGE] * config.image_tokens(next(remaining_tiles).size)
                else:
                    ids.append(token)
            if is_scored:
                answers += range(first - 1, len(ids))
                answer_labels += [IGNORE, *ids[first:]]
        end = len(ids)
        positions += range(end - start)
        spans.append(Span(start, end))
        if answers:
            scored.append(answers)
            labels.append(answer_labels)

        for branch in example.branches:
            first = len(ids)
            ids += branch
            positions += range(end - start, end - start + len(branch))
            spans.append(Span(first, len(ids), prefix=(start, end)))
            scored.append([end - 1, *range(first, len(ids))])  # all branches start at the prompt's last token
            labels.append([IGNORE, *branch])

    longest = max(map(len, scored), default=0)
    scored = [group + [0] * (longest - len(group)) for group in scored]
    labels = [group + [IGNORE] * (longest - len(group)) for group in labels]
    tensor = lambda values: to_device(torch.tensor(values, dtype=torch.int64), torch.device(device))
    all_tiles = [image_tiles for example_tiles in tiles for image_tiles in example_tiles]
    return Batch(tensor(ids), tensor(positions), Packed(spans), all_tiles, tensor(scored), tensor(labels))
