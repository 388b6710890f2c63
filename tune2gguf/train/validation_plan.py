"""Which validation rows are measured, and at which steps: as much of both as a tenth of the training time pays for.

Everything here is counted, nothing is timed: a run that is resumed measures what one that was never stopped does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SHARE = 0.10  # of the training time
# What a forward pass over a token costs of a training step's work on it. Backward through a frozen base costs about as
# much as forward, and the adapter, the clipping and the optimizer come on top.
FORWARD_SHARE = 0.4
# What a step of generating costs, in trained tokens: one token of every reply, for which all weights are read.
GENERATION_COST = 13
MAX_REPLY_TOKENS, MIN_REPLY_TOKENS = 64, 16
TIMES_A_RUN = 10
# The interval of the mean of fewer rows is so wide that measuring them less often tells more.
ENOUGH_ROWS = 32


@dataclass(frozen=True)
class ValidationPlan:
    """What a run measures on its validation rows."""

    rows: list[int]  # indices of the validation rows that are measured, ascending; the same every time
    num_validation_rows: int
    every_n_steps: int  # between validations; each epoch's end has one besides
    num_validations: int  # with the one before training
    training_tokens: float  # of the whole run
    share: float  # of the training time that they cost, estimated
    samples_share: float = 0.0  # likewise of the samples
    max_reply_tokens: int = 0  # of a sample

    def is_due(self, step: int, *, is_epoch_end: bool) -> bool:
        """Whether there is a validation after so many steps; before training there always is."""
        return is_epoch_end or step % self.every_n_steps == 0

    def describe(self) -> str:
        """Return the line that a run says before it starts."""
        if not self.rows:
            return "validation: no rows, so that over- and underfitting stay unseen; see dataset.validation_split"
        measured = "all" if len(self.rows) == self.num_validation_rows else f"{len(self.rows)}"
        line = (
            f"validation: {self.num_validation_rows} rows, {measured} of them measured {self.num_validations} times, "
            f"about {self.share:.0%} of the training time"
        )
        if self.samples_share > 0:
            line += f", and {self.samples_share:.0%} for the samples"
        if len(self.rows) < self.num_validation_rows:
            line += f"; all of them: max_val_rows={self.num_validation_rows}"
        return line


def plan_validation(
    *,
    lengths: np.ndarray,
    digests: Sequence[bytes],
    training_tokens: float,
    steps_per_epoch: int,
    epochs: int,
    every_n_steps: int | None = None,
    max_rows: int | None = None,
    num_samples: int = 0,
    reply_tokens: float = 0.0,
) -> ValidationPlan:
    """Choose the rows and the steps of a run's validations.

    Rows are taken in the order of their digests, so that a smaller choice is a part of a larger one, and two runs on
    the same validation rows can be compared whatever their seed.

    Args:
        lengths: tokens of each validation row, [rows]
        digests: of each validation row's content
        training_tokens: that the run trains on in all epochs together
        every_n_steps: None takes the most often of TIMES_A_RUN times a run and less for which MAX_SHARE allows
            ENOUGH_ROWS rows (or max_rows, or all where there are fewer); at the least each epoch's end, and twice
            on the way of a single one
        max_rows: exact; None takes as many as MAX_SHARE allows, at least one
        num_samples: validation prompts that are answered, in replies of at most so many tokens as half of MAX_SHARE
            allows; what they leave of MAX_SHARE is for the rows
        reply_tokens: of a validation reply, on average
    """
    by_digest = sorted(range(len(digests)), key=lambda row: digests[row])
    costs = FORWARD_SHARE * np.cumsum(np.asarray(lengths, np.float64)[by_digest])
    allowed = MAX_SHARE * training_tokens
    max_reply_tokens, samples_cost = 0, 0.0
    if num_samples > 0 and by_digest:
        max_reply_tokens, samples_cost = _limit_replies(allowed / 2, epochs=epochs, reply_tokens=reply_tokens)
    budget = max(allowed - samples_cost, allowed / 2)
    if every_n_steps is None:
        wanted = min(len(by_digest), ENOUGH_ROWS if max_rows is None else max_rows)
        wanted_cost = costs[wanted - 1] if wanted else 0.0
        every_n_steps = _choose_interval(wanted_cost, budget, steps_per_epoch=steps_per_epoch, epochs=epochs)
    times = count_validations(every_n_steps, steps_per_epoch=steps_per_epoch, epochs=epochs)
    if max_rows is None:
        max_rows = max(1, int(np.searchsorted(costs * times, budget, side="right")))
    rows = by_digest[:max_rows]
    return ValidationPlan(
        rows=sorted(rows),
        num_validation_rows=len(by_digest),
        every_n_steps=every_n_steps,
        num_validations=times,
        training_tokens=training_tokens,
        share=float(costs[len(rows) - 1]) * times / training_tokens if rows else 0.0,
        samples_share=samples_cost / training_tokens,
        max_reply_tokens=max_reply_tokens,
    )


def _limit_replies(budget: float, *, epochs: int, reply_tokens: float) -> tuple[int, float]:
    """Return how long a sample may be, and what all of them cost in trained tokens.

    All prompts are answered together. The base is taken to go on until it is cut off, as it often does, the adapter
    to answer as the validation rows do.
    """
    cost = 0.0
    for limit in range(MAX_REPLY_TOKENS, MIN_REPLY_TOKENS - 1, -1):
        cost = GENERATION_COST * (limit + epochs * min(reply_tokens, limit))
        if cost <= budget:
            break
    return limit, cost


def _choose_interval(cost: float, budget: float, *, steps_per_epoch: int, epochs: int) -> int:
    """Return the steps between validations that cost so much each; the fewest that show a shape if no more fit.

    Those at the epochs' ends do, unless there is but one: a curve has to be seen on its way.
    """
    num_steps = steps_per_epoch * epochs
    for times in range(TIMES_A_RUN, 0, -1):
        interval = math.ceil(num_steps / times)
        if cost * count_validations(interval, steps_per_epoch=steps_per_epoch, epochs=epochs) <= budget:
            break
    return min(interval, steps_per_epoch if epochs > 1 else math.ceil(num_steps / 3))


def count_validations(every_n_steps: int, *, steps_per_epoch: int, epochs: int) -> int:
    """Return how often a run measures: before training, after every n steps, and at each epoch's end."""
    ends_between = sum(1 for epoch in range(1, epochs + 1) if epoch * steps_per_epoch % every_n_steps)
    return 1 + epochs * steps_per_epoch // every_n_steps + ends_between
