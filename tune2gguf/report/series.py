"""The values that are drawn: taken by step, thinned, smoothed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune2gguf.runs.curves import TrainingStep, Validation

MAX_POINTS = 800
SMOOTHED_SHARE = 0.05


@dataclass(frozen=True)
class Series:
    """Values by step, only those that are numbers; x and y are [values]."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def take_series(lines: Sequence[TrainingStep] | Sequence[Validation], name: str, *, scale: float = 1.0) -> Series:
    """Return the values that the lines have under a name; missing and non-finite ones are left out."""
    pairs = [(line.step, getattr(line, name)) for line in lines]
    kept = [(step, value * scale) for step, value in pairs if value is not None and math.isfinite(value)]
    x, y = np.array(kept, np.float64).reshape(-1, 2).T
    return Series(x, y)


def thin(series: Series, max_points: int = MAX_POINTS) -> tuple[Series, int]:
    """Return the lowest and the highest value of every so many steps, so that no peak is lost, and how many.

    Returns:
        the series itself and 1 where it is short enough
    """
    every = -(-2 * len(series) // max_points)
    if every <= 2:
        return series, 1
    picks = set()
    for start in range(0, len(series), every):
        part = series.y[start : start + every]
        picks |= {start + int(part.argmin()), start + int(part.argmax())}
    kept = sorted(picks)
    return Series(series.x[kept], series.y[kept]), every


def smooth(series: Series) -> tuple[Series, int]:
    """Return the mean over the steps around each, fewer at both ends, and how many steps that are."""
    window = 2 * max(1, round(len(series) * SMOOTHED_SHARE / 2)) + 1
    ones = np.ones(min(window, len(series)))
    sums = np.convolve(series.y, ones, "same")
    return Series(series.x, sums / np.convolve(np.ones(len(series)), ones, "same")), window


def spread(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Return every so many values: a smoothed curve has no peaks to lose."""
    every = -(-len(series) // (MAX_POINTS // 2)) or 1
    picks = np.unique(np.append(np.arange(0, len(series), every), len(series) - 1)) if len(series) else []
    return series.x[picks], series.y[picks]
