"""Rows to batches: which rows each step takes on each rank, and the tensors they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.data.packing import Pack, make_positions

if TYPE_CHECKING:
    import torch

    from tune2gguf.data.tokenize import TokenizedRow

# Rows are grouped by length within so many steps. On the lengths of benchmarks/make_rows.py 2 to 17 % of padding is
# left at batch sizes of 2 to 8, against 42 to 147 % in a shuffled order; longer windows are less random.
WINDOW_STEPS = 16

# A step of one rank: its micro-batches, each a list of row indices.
Step = list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, padded on the right; under causal attention no row sees its padding.

    Attributes:
        tokens: [batch, seq] int64
        labels: [batch, seq] int64, not shifted: the token where it is supervised, else loss.IGNORED_LABEL
        supervised: [n] int64, places of the flat batch whose next token is supervised
        row_starts: [rows + 1] int32, first token of each row in the flat batch, then its size; None where rows are
            not packed
        longest_row: tokens of the longest row; None where rows are not packed
        input_pos: [batch, seq] int64, the position of each token in its own row; None where rows are not packed
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    supervised: torch.Tensor
    row_starts: torch.Tensor | None = None
    longest_row: int | None = None
    input_pos: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the program does not wait until it is there."""
        import torch

        def move(value: torch.Tensor) -> torch.Tensor:
            is_sent = device.type == "cuda" and value.device.type == "cpu"
            return (value.pin_memory() if is_sent else value).to(device, non_blocking=is_sent)

        parts = vars(self).items()
        return Batch(**{name: move(part) if isinstance(part, torch.Tensor) else part for name, part in parts})


def make_empty_batch() -> Batch:
    """Return a batch without a supervised token: it goes through the whole model and adds nothing."""
    import torch

    from tune2gguf.model.loss import IGNORED_LABEL

    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(torch.zeros((1, 2), dtype=torch.long), torch.full((1, 2), IGNORED_LABEL), nothing)


def plan_epoch(
    num_rows: int,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    accumulation_steps: int = 1,
    world_size: int = 1,
    rank: int = 0,
    lengths: np.ndarray | None = None,
) -> list[Step]:
    """Return this rank's share of every step of an epoch. Every row stands in exactly one step, on one rank.

    The order depends on seed and epoch only, and step i takes the same rows however batch_size * accumulation_steps *
    world_size is split. The last step takes what is left; ranks then differ by at most one row, and some may have none.

    Args:
        num_rows: rows, or packs of rows
        lengths: tokens of each row, [num_rows]; rows of like length then share a step, so that little is padded
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(num_rows)
    rows_per_step = batch_size * accumulation_steps * world_size
    if lengths is not None:
        order = _group_by_length(order, lengths, rows_per_step, generator)
    steps = [order[start : start + rows_per_step].tolist() for start in range(0, num_rows, rows_per_step)]
    # Neighbours in a step are of like length: every world_size-th row gives all ranks about the same work.
    shares = [rows[rank::world_size] for rows in steps]
    return [[rows[start : start + batch_size] for start in range(0, len(rows), batch_size)] for rows in shares]


def _group_by_length(
    order: np.ndarray, lengths: np.ndarray, rows_per_step: int, generator: np.random.Generator
) -> np.ndarray:
    """Sort each window of steps by length and shuffle its steps; what does not fill a step stays last, as it came."""
    num_steps = len(order) // rows_per_step
    full = order[: num_steps * rows_per_step].reshape(num_steps, rows_per_step)
    windows = []
    for start in range(0, num_steps, WINDOW_STEPS):
        window = full[start : start + WINDOW_STEPS].ravel()
        steps = window[np.argsort(lengths[window], kind="stable")].reshape(-1, rows_per_step)
        windows.append(generator.permutation(steps).ravel())
    return np.concatenate([*windows, order[num_steps * rows_per_step :]])


def collate(sequences: Sequence[TokenizedRow | Pack], *, pad_id: int) -> Batch:
    """Return rows, or packs of rows, as one batch, padded to its longest sequence."""
    import torch

    from tune2gguf.model.loss import IGNORED_LABEL, find_supervised

    longest = max(len(sequence.tokens) for sequence in sequences)
    tokens = np.full((len(sequences), longest), pad_id, np.int64)
    labels = np.full((len(sequences), longest), IGNORED_LABEL, np.int64)
    for index, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        tokens[index, :length] = sequence.tokens
        labels[index, :length] = np.where(sequence.supervised, sequence.tokens, IGNORED_LABEL)
    tokens, labels = torch.from_numpy(tokens), torch.from_numpy(labels)
    supervised = find_supervised(labels)
    packs = [sequence.row_lengths for sequence in sequences if isinstance(sequence, Pack)]
    if not packs:
        return Batch(tokens, labels, supervised)
    row_starts, input_pos = make_positions(packs, longest)
    longest_row = int(np.diff(row_starts).max())
    return Batch(tokens, labels, supervised, torch.from_numpy(row_starts), longest_row, torch.from_numpy(input_pos))
