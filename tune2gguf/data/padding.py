"""What padding costs with rows in random order, and with rows of like length together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from tune2gguf.data.batches import Step, plan_epoch
from tune2gguf.data.prepare import PreparedData


@dataclass(frozen=True)
class EpochCost:
    """One way to make batches of the training rows: `positions` are what the model computes, padding included."""

    name: str
    num_steps: int
    num_tokens: int
    num_positions: int

    @property
    def padding(self) -> float:
        """The share of the positions that is padding."""
        return 1 - self.num_tokens / self.num_positions


def _compute_rows_epochs(data: PreparedData, seed: int, cut: dict[str, int]) -> Iterator[EpochCost]:
    lengths = data.train.lengths()
    for name, grouped_by in (("rows in shuffled order", None), ("rows grouped by length", lengths)):
        plan = [
            plan_epoch(len(lengths), seed=seed, epoch=0, rank=rank, lengths=grouped_by, **cut)
            for rank in range(cut["world_size"])
        ]
        yield _compute_cost(name, plan, lengths)


def _compute_cost(name: str, plan: list[list[Step]], lengths: np.ndarray) -> EpochCost:
    batches = [batch for steps in plan for step in steps for batch in step]
    sizes = np.array([len(batch) for batch in batches])
    rows = np.fromiter(chain.from_iterable(batches), np.int64)
    longest = np.maximum.reduceat(lengths[rows], np.cumsum(sizes) - sizes)
    return EpochCost(name, len(plan[0]), int(lengths.sum()), int(sizes @ longest))


def describe_padding(data: PreparedData, *, seed: int, batch_size: int) -> str:
    """Return the padding of the run's first epoch in one process, and what it would be in the other order."""
    cut = {"batch_size": batch_size, "accumulation_steps": 1, "world_size": 1}
    shuffled, grouped = _compute_rows_epochs(data, seed, cut)
    if data.unit == "packs":
        saved = f"{grouped.padding:.1%} for rows grouped by length"
        return f"padding: {1 - data.sequences.fill:.1%} of the positions, {saved}"
    return (
        f"padding: {grouped.padding:.1%} of the positions, {shuffled.padding:.1%} if rows were not grouped by length;"
        f" grouping saves {1 - grouped.num_positions / shuffled.num_positions:.0%} of the work"
    )
