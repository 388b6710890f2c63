"""Rows to batches: which rows each step takes on each rank, and the tensors they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from tune2gguf.data.tokenize import TokenizedRow

# A step of one rank: its micro-batches, each a list of row indices.
Step = list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, padded on the right; under causal attention no row sees its padding."""

    tokens: torch.Tensor  # [batch, seq] int64
    labels: (
        torch.Tensor
    )  # [batch, seq] int64: the token itself where it is supervised, else loss.IGNORED_LABEL; not shifted


def plan_epoch(
    num_rows: int,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    accumulation_steps: int = 1,
    world_size: int = 1,
    rank: int = 0,
) -> list[Step]:
    """Return this rank's share of every step of an epoch. Every row stands in exactly one step, on one rank.

    The order depends on seed and epoch only, and step i takes the same rows however batch_size * accumulation_steps *
    world_size is split. The last step takes what is left; ranks then differ by at most one row, and some may have none.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
    rows_per_step = batch_size * accumulation_steps * world_size
    steps = [order[start : start + rows_per_step] for start in range(0, num_rows, rows_per_step)]
    return [_split_step(rows[rank::world_size], batch_size) for rows in steps]


def _split_step(rows: list[int], batch_size: int) -> Step:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def collate(rows: Sequence[TokenizedRow], *, pad_id: int) -> Batch:
    """Return the rows as one batch, padded to its longest row."""
    import torch

    from tune2gguf.loss import IGNORED_LABEL

    longest = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), longest), pad_id, np.int64)
    labels = np.full((len(rows), longest), IGNORED_LABEL, np.int64)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length] = row.tokens
        labels[index, :length] = np.where(row.supervised, row.tokens, IGNORED_LABEL)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels))
