"""Curves of a known shape: each row follows one path times its difficulty, plus noise per validation."""

import math
from collections.abc import Callable

import numpy as np

from tune2gguf.runs.curves import Curves, TrainingStep, Validation

NUM_STEPS = 100


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    return 1.0


def approach(rate: float, *, floor: float = 0.3, gain: float = 4.0) -> Callable[[float], float]:
    """Return an exponential approach to a floor; a run lasts `rate` time constants."""
    return lambda progress: floor + gain * math.exp(-rate * progress)


def make_curves(
    path: Callable[[float], float],
    *,
    rows: int = 40,
    seed: int = 0,
    schedule: Callable[[float], float] = constant,
    training: Callable[[float], float] | None = None,
    noise: float = 0.02,
    validations: int = 10,
) -> Curves:
    """Return the curves of a run of 100 steps.

    Args:
        path: validation loss by progress, 0 to 1
        schedule: learning rate by progress
        training: training loss by progress; None: it falls from half of the path's start
        noise: noise of a row's loss at one validation, nats per token
    """
    generator = np.random.default_rng(seed)
    tokens = generator.integers(10, 40, rows)
    difficulty = np.clip(1 + 0.3 * generator.standard_normal(rows), 0.1, None)
    measured = []
    for step in np.linspace(0, NUM_STEPS, validations + 1).round().astype(int).tolist():
        per_token = path(step / NUM_STEPS) * difficulty + noise * generator.standard_normal(rows) * (step > 0)
        losses = per_token * tokens
        measured.append(
            Validation(
                step=step,
                epoch=0,
                loss=float(losses.sum() / tokens.sum()),
                rows=rows,
                tokens=int(tokens.sum()),
                row_losses=tuple(losses.tolist()),
                row_tokens=tuple(tokens.tolist()),
            )
        )
    training = training or (lambda progress: path(0) / 2 * math.exp(-2 * progress))
    steps = [
        TrainingStep(
            step=step,
            epoch=(step - 1) // 25,
            loss=training(step / NUM_STEPS) * (1 + 0.05 * generator.standard_normal()),
            lr=1e-4 * schedule((step - 0.5) / NUM_STEPS),
        )
        for step in range(1, NUM_STEPS + 1)
    ]
    return Curves(tuple(steps), tuple(measured))
