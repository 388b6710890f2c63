"""The plan of a run's validations: rows and steps, within a tenth of the training time.

Costs are counted, not timed, so a resumed run measures the same as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

MAX_SHARE = 0.10  # of the training time
# Cost of a forward pass over a token, as a share of a training step over it. Backward through a frozen base costs about
# as much as forward; adapter, clipping and optimizer come on top.
FORWARD_SHARE = 0.4
MAX_REPLY_TOKENS, MIN_REPLY_TOKENS = 64, 16
TIMES_A_RUN = 10
# Below this, the interval of the mean is wide: more rows tell more than more validations.
ENOUGH_ROWS = 32


@dataclass(frozen=True)
class GenerationCost:
    """The cost of generation by one process, in tokens that all processes would train in that time.

    Attributes:
        token: one token of every reply; it reads all weights, and a GPU trains many tokens in that time
        always_covered: spent however short the training is; on an H200 the time of 1 s (1B) to 4 s (8B)
        forward: a forward pass over a token
    """

    token: float
    always_covered: float
    forward: float = FORWARD_SHARE


# By kind of device, for a run of one process. On an H200 a token costs 124 to 239 (benchmarks/generation.py), the first
# three of a reply some times as much, and one of a base that is sharded over two GPUs 350.
GENERATION_COSTS = {"cpu": GenerationCost(13, 0), "cuda": GenerationCost(250, 50_000)}


def get_generation_cost(device: torch.device, num_processes: int) -> GenerationCost:
    """Return the cost in a run of so many processes; a kind of device that was never measured has a CPU's."""
    alone = GENERATION_COSTS.get(device.type, GENERATION_COSTS["cpu"])
    return GenerationCost(*(cost * num_processes for cost in astuple(alone)))


@dataclass(frozen=True)
class ValidationPlan:
    """The validation rows that a run measures, when, and at what cost."""

    rows: list[int]  # indices of the measured validation rows, ascending; the same every time
    num_validation_rows: int
    every_n_steps: int  # between validations; each epoch's end adds one
    num_validations: int  # including the one before training
    training_tokens: float  # of the whole run
    share: float  # estimated cost, as a share of the training time
    samples_share: float = 0.0  # likewise for the samples
    max_reply_tokens: int = 0  # of a sample

    def is_due(self, step: int, *, is_epoch_end: bool) -> bool:
        """Whether a validation is due after this step; at step 0 one always is."""
        return is_epoch_end or step % self.every_n_steps == 0

    def describe(self) -> str:
        """Return the line that a run prints before training."""
        if not self.rows:
            return "validation: no rows, so over- and underfitting stay unseen; set dataset.validation_split"
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
    generation: GenerationCost,
    every_n_steps: int | None = None,
    max_rows: int | None = None,
    num_samples: int = 0,
    reply_tokens: float = 0.0,
) -> ValidationPlan:
    """Choose the rows and the steps of a run's validations.

    Rows are taken in the order of their digests. A smaller choice is then part of a larger one, and runs with other
    seeds measure the same rows.

    Args:
        lengths: tokens of each validation row, [rows]
        digests: content digest of each validation row
        training_tokens: tokens trained on, over all epochs
        every_n_steps: None: validate up to TIMES_A_RUN times per run, as often as MAX_SHARE covers ENOUGH_ROWS rows
            (or max_rows, or all if there are fewer); at least at each epoch's end, and twice within a single epoch
        max_rows: exact; None: as many as MAX_SHARE covers, at least one
        num_samples: validation prompts to answer; half of MAX_SHARE limits their tokens, or what the device always
            covers; the rows get the rest
        reply_tokens: mean tokens of a validation reply
    """
    by_digest = sorted(range(len(digests)), key=lambda row: digests[row])
    costs = FORWARD_SHARE * np.cumsum(np.asarray(lengths, np.float64)[by_digest])
    allowed = MAX_SHARE * training_tokens
    max_reply_tokens, samples_cost = 0, 0.0
    if num_samples > 0 and by_digest:
        samples_budget = max(allowed / 2, generation.always_covered)
        max_reply_tokens, samples_cost = _limit_replies(
            samples_budget, generation.token, epochs=epochs, reply_tokens=reply_tokens
        )
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


def _limit_replies(budget: float, token_cost: float, *, epochs: int, reply_tokens: float) -> tuple[int, float]:
    """Return the most tokens of a sample reply, and the cost of all replies in trained tokens.

    All prompts are answered in one batch. The base is assumed to reach the limit, as it often does, and the adapter to
    answer as long as the validation rows do.
    """
    cost = 0.0
    for limit in range(MAX_REPLY_TOKENS, MIN_REPLY_TOKENS - 1, -1):
        cost = token_cost * (limit + epochs * min(reply_tokens, limit))
        if cost <= budget:
            break
    return limit, cost


def _choose_interval(cost: float, budget: float, *, steps_per_epoch: int, epochs: int) -> int:
    """Return the steps between validations of this cost each: up to TIMES_A_RUN per run, within the budget.

    At least each epoch has one, and a single epoch three: fewer do not show the shape of the curve.
    """
    num_steps = steps_per_epoch * epochs
    for times in range(TIMES_A_RUN, 0, -1):
        interval = math.ceil(num_steps / times)
        if cost * count_validations(interval, steps_per_epoch=steps_per_epoch, epochs=epochs) <= budget:
            break
    return min(interval, steps_per_epoch if epochs > 1 else math.ceil(num_steps / 3))


def count_validations(every_n_steps: int, *, steps_per_epoch: int, epochs: int) -> int:
    """Return the number of validations: before training, after every n steps, and at each epoch's end."""
    ends_between = sum(1 for epoch in range(1, epochs + 1) if epoch * steps_per_epoch % every_n_steps)
    return 1 + epochs * steps_per_epoch // every_n_steps + ends_between
