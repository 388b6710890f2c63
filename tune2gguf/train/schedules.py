"""Learning rate schedules: linear warm-up, then cosine, linear or constant. Every step has a rate above 0."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tune2gguf.guide import SCHEDULERS


def compute_rate_factor(step: int, *, name: str, num_warmup_steps: int, num_training_steps: int) -> float:
    """Return the factor of the peak learning rate at a step.

    Warm-up: (step + 1) / num_warmup_steps, which reaches the peak at its last step. After it, with the progress
    p = (step - num_warmup_steps) / (num_training_steps - num_warmup_steps) in [0, 1):
    cosine (1 + cos(pi p)) / 2, linear 1 - p, constant 1.

    Args:
        step: optimizer steps already taken, from 0

    Raises:
        ValueError: if the name is unknown
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler={name!r} is unknown; use one of {', '.join(SCHEDULERS)}")
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if name == "constant":
        return 1.0
    # LambdaLR asks for the factor after the last step, too.
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps))
    return (1.0 + math.cos(math.pi * progress)) / 2.0 if name == "cosine" else 1.0 - progress


def compute_learned_share(schedule: LRScheduler, step: int, num_steps: int) -> float:
    """Return the share of the learning rate, summed over all steps, that the first `step` steps have.

    For a schedule whose rates are not known ahead, return the share of the steps.
    """
    compute_factor = schedule.lr_lambdas[0] if isinstance(schedule, LambdaLR) else lambda taken: 1.0
    rates = [compute_factor(taken) for taken in range(num_steps)]
    return sum(rates[:step]) / sum(rates)


def get_schedule(optimizer: Optimizer, *, name: str, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Return the schedule that sets the optimizer's learning rate; step it after each optimizer step."""
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return LambdaLR(optimizer, partial(compute_rate_factor, name=name, **steps))
