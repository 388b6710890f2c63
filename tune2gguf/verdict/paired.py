"""Paired statistics of losses on the same rows: the rows needed, the best validation, a forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tune2gguf.runs.intervals import CONFIDENCE, Estimate

POWER = 0.80
# The error of a forecast besides the rows' own: a factor, and the difference between seeds as a share of the gain. Both
# come from benchmarks/judge_chains.py.
FORECAST_FACTOR, SEED_NOISE = 1.5, 0.015


def count_rows_needed(numerators: np.ndarray, denominators: np.ndarray, *, margin: float) -> int:
    """Return the number of rows needed to detect a difference of `margin` in the ratio of the sums.

    n = ((z(1 - alpha / 2) + z(power)) * s / margin) ** 2, the sample size of a test on a mean (NIST/SEMATECH e-Handbook
    of Statistical Methods, 7.2.2.2), here at 95 % confidence and 80 % power. s is the standard deviation of a row's
    contribution to the ratio, (numerator - ratio * denominator) / mean(denominators): its linearization (W. G. Cochran,
    Sampling Techniques, 3rd ed. 1977, section 6.4).
    """
    from scipy import stats

    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    ratio = numerators.sum() / denominators.sum()
    spread = float(np.std((numerators - ratio * denominators) / denominators.mean(), ddof=1))
    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return math.ceil((quantiles * spread / margin) ** 2)


def choose_best_crosswise(losses: np.ndarray) -> np.ndarray:
    """Return each row's loss at the validation that is best on the other half of the rows.

    The lowest of many noisy values is biased low, so the values after it seem to rise. The best is therefore chosen on
    the even rows and measured on the odd ones, and vice versa.

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
    """Forecast of the gain from doubling the learning, as a share of the gain before: by a short and a long tail.

    Both curves go through the beginning, the point at the fraction `at` of the learning so far, and its end, x = 1.
    The short tail is an exponential approach to a floor, gain(x) = (1 - exp(-k x)) / (1 - exp(-k)), so that
    gain(2 x) / gain(x) - 1 = exp(-k x). The long tail is a hyperbola, gain(x) = x (1 + h) / (x + h), so that
    gain(2 x) / gain(x) - 1 = h / (2 x + h). Losses of fine-tuning follow neither, but mostly lie between: the
    forecast is their geometric mean. A curve that does not bend counts as a line: 1.

    Attributes:
        at: fraction of the learning so far, between 0 and 1
        most: upper limit, the loss over the gain so far, as no loss falls below zero
        whole: the learning of the whole run over the learning so far; 1 at the end of the run
    """

    at: float
    most: float
    whole: float = 1.0

    def estimate(self, late_share: float) -> float:
        """Return the forecast, given the share of the gain that came after `at`. It rises with that share."""
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
        """Return the forecast with an interval. docs/verdict.md says how often it held on recorded runs.

        It reaches from the short tail at the lower end of the rows' interval to the long tail at its upper end, widened
        by the error of both: no curve has exactly these shapes, and runs with other seeds end differently.
        """
        low = self.find_short_tail(late_share.low) / FORECAST_FACTOR - SEED_NOISE
        high = self.find_long_tail(late_share.high) * FORECAST_FACTOR + SEED_NOISE
        return Estimate(self.estimate(late_share.value), low, high)


def _fit_short_tail(early_share: float, at: float) -> float:
    """Return exp(-k) of the short tail with this share of its gain at the fraction `at`."""
    from scipy.optimize import brentq

    if early_share >= 1:
        return 0.0
    if early_share <= at:
        return 1.0

    def miss(rate: float) -> float:
        return math.expm1(-rate * at) / math.expm1(-rate) - early_share

    steepest = 700.0  # exp(-700) is about the smallest float64
    if miss(steepest) <= 0:
        return 0.0
    slowest = 1e-6
    if miss(slowest) >= 0:
        return 1.0
    return math.exp(-brentq(miss, slowest, steepest))
