"""95 % intervals of ratios of sums over rows: mean losses, differences, shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
# Few rows need many resamples, because their quantiles lie far in the tails; many rows are costly to resample.
MANY_ROWS, NUM_RESAMPLES, NUM_RESAMPLES_OF_MANY = 1000, 9999, 1999
_MAX_DRAWN_AT_ONCE = 2_000_000  # rows per batch of resamples; bounds the memory


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate of an increasing function of the value."""
        return Estimate(function(self.value), function(self.low), function(self.high))


def estimate_ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Return sum(numerators) / sum(denominators) with its paired bootstrap interval over rows.

    Summed losses over tokens give the token-weighted mean; differences of losses over differences give a share.

    The percentile interval of few rows is too narrow: the bootstrap's spread lacks a factor sqrt(n / (n - 1)), and its
    quantiles are the normal's, not Student's. The level used corrects both (expanded percentile interval:
    T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015), section 5.3
    of the long version, arXiv 1411.5279).

    Args:
        numerators, denominators: one number per row, [rows]; at least two rows
    """
    from scipy import stats

    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    num_rows = len(numerators)
    quantile = math.sqrt(num_rows / (num_rows - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, num_rows - 1)
    interval = stats.bootstrap(
        (numerators, denominators),
        lambda above, below, axis: above.sum(axis) / below.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES if num_rows < MANY_ROWS else NUM_RESAMPLES_OF_MANY,
        batch=max(1, _MAX_DRAWN_AT_ONCE // num_rows),
        confidence_level=float(1 - 2 * stats.norm.sf(quantile)),
        # Other methods divide by the spread of the rows, which is zero for equal rows.
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(numerators.sum() / denominators.sum()), float(interval.low), float(interval.high))
