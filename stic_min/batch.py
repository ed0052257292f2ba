"""Sequences: many prompts, conversations and alternative responses side by side in one flat row of tokens."""

from dataclasses import dataclass

import torch

from stic_min import InputError
from stic_min.loss import IGNORE
from stic_min.mistral import Packed, Span
from stic_min.text import IMAGE


@dataclass
class Example:
    """One prompt and what is scored after it. Ids hold one IMAGE for each picture.

    `trunk` is a list of (ids, scored?) segments in order: a prompt, or a whole conversation. `branches` are
    alternative responses to the trunk, all scored: [chosen, rejected] in stage 1. The trunk is computed once for all.
    """

    name: str  # for messages
    trunk: list
    branches: list

    def check(self, pictures):
        """Raises InputError naming the example if its image slots and its number of pictures disagree."""
        slots = sum(ids.count(IMAGE) for ids, _ in self.trunk)
        if slots != pictures:
            raise InputError(f"{self.name}: {slots} <image> in the text but {pictures} picture(s)")


@dataclass
class Batch:
    """Examples side by side in one flat row of T tokens (see mistral.Packed); G groups of up to R are scored.

    A pair is laid out as  prompt | chosen | rejected , and its two groups are (prompt's last, chosen) and (prompt's
    last, rejected). A conversation is  prompt | answer | prompt | answer , and one group.
    """

    ids: torch.Tensor  # (T,) int64, IMAGE at every position of a picture
    positions: torch.Tensor  # (T,) int64, branches all start at the end of their trunk
    attend: Packed
    tiles: list  # the pictures (images.Tiles) in order
    scored: torch.Tensor  # (G, R) int64, a row a scored trunk or branch: flat indices of its scored segments, each
    # behind that of the token before it, whose logits predict its first
    labels: torch.Tensor  # (G, R) int64, the ids at those indices; -100 at the tokens before, and where a row is padded
    patches: torch.Tensor | None = None  # (N, S, Cv) of all tiles, once CLIP has seen them: theta_0 sees the same


def collate(examples, tiles, config, device="cpu"):
    """Lays out `examples` flat. tiles[i]: the Tiles of examples[i], one for each IMAGE, in order."""
    ids, positions, spans, rows, labels = [], [], [], [], []
    for example, pictures in zip(examples, tiles):
        start, pictures, row, row_labels = len(ids), iter(pictures), [], []
        for segment, is_scored in example.trunk:
            first = len(ids)
            for i in segment:
                ids += [IMAGE] * config.image_tokens(next(pictures).size) if i == IMAGE else [i]
            if is_scored:
                row += range(first - 1, len(ids))
                row_labels += [IGNORE, *ids[first:]]
        if row:
            rows.append(row)
            labels.append(row_labels)
        end = len(ids)
        positions += range(end - start)
        spans.append(Span(start, end))
        for branch in example.branches:
            first = len(ids)
            ids += branch
            positions += range(end - start, end - start + len(branch))
            spans.append(Span(first, len(ids), prefix=(start, end)))
            rows.append([end - 1, *range(first, len(ids))])
            labels.append([IGNORE, *branch])
    longest = max(map(len, rows), default=0)
    labels = [row + [IGNORE] * (longest - len(row)) for row in labels]
    rows = [row + [0] * (longest - len(row)) for row in rows]
    tensor = lambda x: torch.tensor(x, dtype=torch.int64, device=device)
    flat_tiles = [t for pictures in tiles for t in pictures]
    return Batch(tensor(ids), tensor(positions), Packed(spans), flat_tiles, tensor(rows), tensor(labels))
