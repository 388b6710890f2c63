"""What padding costs with rows in random order, and with rows of like length together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from tune2gguf.data.batches import plan_epoch
from tune2gguf.data.prepare import PreparedData


@dataclass(frozen=True)
class EpochCost:
    """An epoch in one process: `num_positions` are what the model computes, padding included."""

    num_steps: int
    num_tokens: int
    num_positions: int

    @property
    def padding(self) -> float:
        """The share of the positions that is padding."""
        return 1 - self.num_tokens / self.num_positions


def compute_epoch_cost(lengths: np.ndarray, *, is_grouped: bool = False, **plan: int) -> EpochCost:
    """Return what the first epoch costs with sequences of these lengths, grouped by them or shuffled.

    Args:
        plan: seed, batch_size and accumulation_steps, as plan_epoch takes them
    """
    steps = plan_epoch(len(lengths), epoch=0, lengths=lengths if is_grouped else None, **plan)
    batches = [batch for step in steps for batch in step]
    sizes = np.array([len(batch) for batch in batches])
    rows = np.fromiter(chain.from_iterable(batches), np.int64)
    longest = np.maximum.reduceat(lengths[rows], np.cumsum(sizes) - sizes)
    return EpochCost(len(steps), int(lengths.sum()), int(sizes @ longest))


def describe_padding(data: PreparedData, *, seed: int, batch_size: int) -> str:
    """Return the padding of the run's first epoch in one process, and what it would be in the other order."""
    lengths = data.train.lengths()
    grouped = compute_epoch_cost(lengths, seed=seed, batch_size=batch_size, is_grouped=True)
    if data.unit == "packs":
        saved = f"{grouped.padding:.1%} for rows grouped by length"
        return f"padding: {1 - data.sequences.fill:.1%} of the positions, {saved}"
    shuffled = compute_epoch_cost(lengths, seed=seed, batch_size=batch_size)
    return (
        f"padding: {grouped.padding:.1%} of the positions, {shuffled.padding:.1%} if rows were not grouped by length;"
        f" grouping saves {1 - grouped.num_positions / shuffled.num_positions:.0%} of the work"
    )
