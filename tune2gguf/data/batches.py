"""Batches: the rows of each step and rank, their split into passes, and the tensors of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.data.packing import Pack, list_rows

if TYPE_CHECKING:
    import torch

    from tune2gguf.data.tokenize import TokenizedRow

MOST_PLANNED_ROWS = 100_000  # in all epochs that are planned ahead


@dataclass(frozen=True)
class Batch:
    """The rows of one pass, concatenated without padding. No row attends to another.

    Attributes:
        tokens: [1, tokens] int64
        labels: [1, tokens] int64, not shifted: the token if it is supervised, else loss.IGNORED_LABEL
        supervised: [n] int64, positions whose next token is supervised, row by row
        row_starts: [rows + 1] int32, first token of each row, then the number of tokens; None for a single row
        longest_row: tokens of the longest row; None for a single row
        input_pos: [1, tokens] int64, the position of each token in its own row; None for a single row
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    supervised: torch.Tensor
    row_starts: torch.Tensor | None = None
    longest_row: int | None = None
    input_pos: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device. Copies from CPU to CUDA are asynchronous."""
        import torch

        def move(value: torch.Tensor) -> torch.Tensor:
            is_sent = device.type == "cuda" and value.device.type == "cpu"
            return (value.pin_memory() if is_sent else value).to(device, non_blocking=is_sent)

        parts = vars(self).items()
        return Batch(**{name: move(part) if isinstance(part, torch.Tensor) else part for name, part in parts})


def make_empty_batch() -> Batch:
    """Return a batch without supervised tokens: it runs through the whole model and adds nothing to the loss."""
    import torch

    from tune2gguf.model.loss import IGNORED_LABEL

    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(torch.zeros((1, 2), dtype=torch.long), torch.full((1, 2), IGNORED_LABEL), nothing)


def plan_epoch(
    lengths: np.ndarray, *, seed: int, epoch: int, rows_per_step: int, world_size: int = 1, rank: int = 0
) -> list[list[int]]:
    """Return this rank's rows of every step of an epoch. Every row is in exactly one step, on one rank.

    The order depends only on seed and epoch, and step i has the same rows for any number of ranks. The last step has
    the remaining rows. Within a step, the ranks' numbers of rows differ by at most one, their tokens by little.

    Args:
        lengths: tokens of each row, or pack of rows, [num_rows]
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    steps = [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]
    return [_take_share(rows, lengths[rows], world_size=world_size, rank=rank) for rows in steps]


def _take_share(rows: np.ndarray, lengths: np.ndarray, *, world_size: int, rank: int) -> list[int]:
    """Return one rank's rows. Longest first, each row goes to the rank with the fewest tokens so far."""
    if world_size == 1:
        return rows.tolist()
    shares: list[list[int]] = [[] for _ in range(world_size)]
    work, least, num_larger = [0] * world_size, len(rows) // world_size, len(rows) % world_size
    for place in np.argsort(-lengths, kind="stable").tolist():
        most = least + (num_larger > 0)
        taker = min((r for r in range(world_size) if len(shares[r]) < most), key=lambda r: work[r])
        num_larger -= len(shares[taker]) == least
        shares[taker].append(place)
        work[taker] += int(lengths[place])
    return rows[sorted(shares[rank])].tolist()


def count_step_tokens(lengths: np.ndarray, plan: Callable[[int], list[list[int]]], *, epochs: int) -> list[int]:
    """Return the tokens of each of this rank's steps in all epochs; for a large data set, in the first epochs.

    All epochs are counted because a later one may have the longest step, whose passes else get lengths of their own.

    Args:
        lengths: tokens of each row
        plan: returns the rows of each step of an epoch
    """
    planned = max(1, min(epochs, MOST_PLANNED_ROWS // len(lengths)))
    return [int(lengths[rows].sum()) for epoch in range(planned) for rows in plan(epoch)]


def lay_out_passes(lengths: Sequence[int], *, tokens_per_pass: int) -> list[list[int]]:
    """Return the rows of each pass, as sorted indices into `lengths`.

    First fit decreasing: longest row first, each into the first pass with room. A row longer than `tokens_per_pass`
    gets a pass of its own.
    """
    passes: list[list[int]] = []
    rooms: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        number = next((number for number, room in enumerate(rooms) if lengths[row] <= room), len(passes))
        if number == len(passes):
            passes.append([])
            rooms.append(tokens_per_pass)
        passes[number].append(row)
        rooms[number] -= lengths[row]
    return [sorted(rows) for rows in passes]


def collate(sequences: Sequence[TokenizedRow | Pack]) -> Batch:
    """Return rows, or packs of rows, as one batch."""
    import torch

    from tune2gguf.model.loss import IGNORED_LABEL, find_supervised

    whole = Pack(tuple(row for sequence in sequences for row in list_rows(sequence)))
    tokens = torch.from_numpy(whole.tokens.astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(whole.supervised)[None], tokens, IGNORED_LABEL)
    supervised = find_supervised(labels)
    if len(whole.rows) == 1:
        return Batch(tokens, labels, supervised)
    lengths = np.array(whole.row_lengths)
    row_starts = np.cumsum([0, *lengths], dtype=np.int32)
    input_pos = np.arange(lengths.sum()) - np.repeat(row_starts[:-1], lengths)
    parts = torch.from_numpy(row_starts), int(lengths.max()), torch.from_numpy(input_pos.astype(np.int64))[None]
    return Batch(tokens, labels, supervised, *parts)
