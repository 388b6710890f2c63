"""The check of a run's steps: the rows fill at least one, and the warm-up ends before the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def find_plan_problems(
    *,
    num_rows: int,
    rows_per_step: int,
    num_training_steps: int,
    warmup_steps: int,
    unit: str = "rows",
    num_packs: int | None = None,
) -> Iterator[str]:
    """Yield the problems of a run with these rows, steps and warm-up.

    Args:
        unit: what a step takes, rows or packs of them
        num_packs: packs that the rows make, if known
    """
    found = f"{num_rows} training rows{'' if num_packs is None else f', which make {num_packs} packs'}"
    if rows_per_step > (num_rows if num_packs is None else num_packs):
        yield (
            f"a step takes {rows_per_step} {unit}, but there are only {found}; "
            "lower batch_size or gradient_accumulation_steps"
        )
    if warmup_steps > num_training_steps:
        yield (
            f"warmup_steps={warmup_steps} is longer than the run of {num_training_steps} steps; "
            f"use at most {num_training_steps // 10}, or more epochs"
        )


def check_plan(**counts: Any) -> None:
    """Check the plan again, with the exact counts of rows that are read and split.

    Raises:
        ValueError: with every problem, one per line
    """
    raise_problems(find_plan_problems(**counts))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ValueError with every problem, one per line; return if there are none."""
    message = "\n".join(dict.fromkeys(problems))
    if message:
        raise ValueError(message)
