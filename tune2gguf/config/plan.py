"""The steps of a run: whether the rows fill one, and whether the warm-up ends before the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def find_plan_problems(
    *, num_rows: int, rows_per_step: int, num_training_steps: int, warmup_steps: int
) -> Iterator[str]:
    """Yield why these rows, steps and warm-up do not make a run."""
    if rows_per_step > num_rows:
        yield (
            f"a step takes {rows_per_step} rows, but there are only {num_rows} training rows; "
            "lower batch_size or gradient_accumulation_steps"
        )
    if warmup_steps > num_training_steps:
        yield (
            f"warmup_steps={warmup_steps} is longer than the run of {num_training_steps} steps; "
            f"use at most {num_training_steps // 10}, or more epochs"
        )


def check_plan(**counts: int) -> None:
    """Check, by find_plan_problems, what can be known for sure only when the rows are read, split and counted.

    Raises:
        ValueError: with every problem, one a line
    """
    raise_problems(find_plan_problems(**counts))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ValueError with every problem, one a line; return where there is none."""
    message = "\n".join(dict.fromkeys(problems))
    if message:
        raise ValueError(message)
