"""Paired comparisons of losses on the same rows: how many rows they take, which is the best, what more would bring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tune2gguf.runs.intervals import CONFIDENCE, Estimate

POWER = 0.80
# The error of a forecast beside the rows' own: a factor, and what two seeds differ by as a share of the gain. Both by
# benchmarks/judge_chains.py.
FORECAST_FACTOR, SEED_NOISE = 1.5, 0.015


def count_rows_needed(numerators: np.ndarray, denominators: np.ndarray, *, margin: float) -> int:
    """Return how many rows it takes to see that the ratio of the sums is off by the margin.

    n = ((z(1 - alpha / 2) + z(power)) * s / margin) ** 2, the sample size of a test on a mean (NIST/SEMATECH e-Handbook
    of Statistical Methods, 7.2.2.2), here at 95 % confidence and 80 % power. s is the standard deviation of what a row
    adds to the ratio, (numerator - ratio * denominator) / mean(denominators): its linearization (W. G. Cochran,
    Sampling Techniques, 3rd ed. 1977, section 6.4).
    """
    from scipy import stats

    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratio = numerators.sum() / denominators.sum()
    spread = float(np.std((numerators - ratio * denominators) / denominators.mean(), ddof=1))
    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return math.ceil((quantiles * spread / margin) ** 2)


def choose_best_crosswise(losses: np.ndarray) -> np.ndarray:
    """Return the losses of each row at the best validation as the other half of the rows sees it.

    The lowest of many noisy values is lower than it would be on other rows, so that whatever comes after it seems to
    rise. Chosen on the even rows and measured on the odd ones, and the other way round, it is not: the choice knows
    nothing of the rows that it is measured on.

    Args:
        losses: summed nats, [validations, rows]

    Returns:
        summed nats, [rows]
    """
    chosen = np.empty(losses.shape[1])
    for half in (0, 1):
        best = losses[:, 1 - half :: 2].sum(axis=1).argmin()
        chosen[half::2] = losses[best, half::2]
    return chosen


@dataclass(frozen=True)
class Forecast:
    """What as much learning again will bring, as a share of the gain by then: by a short tail and by a long one.

    Both curves go through the beginning, the point after the fraction `at` of the learning so far, and its end, x = 1.
    The short tail is an exponential approach to a floor, gain(x) = (1 - exp(-k x)) / (1 - exp(-k)), so that
    gain(2 x) / gain(x) - 1 = exp(-k x). The long tail is a hyperbola, gain(x) = x (1 + h) / (x + h), so that
    gain(2 x) / gain(x) - 1 = h / (2 x + h). Losses of fine-tuning fall by neither, and mostly by something between:
    the forecast is their geometric mean. A curve that does not bend is taken for a line: 1.

    Attributes:
        at: fraction of the learning so far, between 0 and 1
        most: the loss over the gain so far: no loss falls below zero
        whole: the learning of the whole run over that so far; 1 at its end
    """

    at: float
    most: float
    whole: float = 1.0

    def estimate(self, late_share: float) -> float:
        """Return the forecast for a share of the gain that came after `at`; it rises with that share."""
        return math.sqrt(self.find_short_tail(late_share) * self.find_long_tail(late_share))

    def find_short_tail(self, late_share: float) -> float:
        return min(self.most, _fit_short_tail(1 - late_share, self.at) ** self.whole)

    def find_long_tail(self, late_share: float) -> float:
        early_share = 1 - late_share
        if early_share >= 1:
            return 0.0
        if early_share <= self.at:
            return min(self.most, 1.0)
        bend = self.at * (1 - early_share) / (early_share - self.at)
        return min(self.most, bend / (2 * self.whole + bend))

    def widen(self, late_share: Estimate) -> Estimate:
        """Return the forecast with the interval in which the truth lay on recorded runs: docs/verdict.md has how often.

        From the short tail at the lower end of the rows' interval to the long one at its upper end, and beyond by the
        error of both: no shape holds, and two runs that differ in their seed alone do not end alike.
        """
        low = self.find_short_tail(late_share.low) / FORECAST_FACTOR - SEED_NOISE
        high = self.find_long_tail(late_share.high) * FORECAST_FACTOR + SEED_NOISE
        return Estimate(self.estimate(late_share.value), low, high)


def _fit_short_tail(early_share: float, at: float) -> float:
    """Return exp(-k) of the short tail that has this share of its gain at the fraction `at`."""
    from scipy.optimize import brentq

    if early_share >= 1:
        return 0.0
    if early_share <= at:
        return 1.0

    def miss(rate: float) -> float:
        return math.expm1(-rate * at) / math.expm1(-rate) - early_share

    steepest = 700.0  # exp(-700) is about the smallest number there is
    if miss(steepest) <= 0:
        return 0.0
    slowest = 1e-6
    if miss(slowest) >= 0:
        return 1.0
    return math.exp(-brentq(miss, slowest, steepest))
