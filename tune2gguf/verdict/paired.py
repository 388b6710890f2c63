"""Paired comparisons of losses on the same rows: how many rows they take, which is the best, what more would bring."""

from __future__ import annotations

import math

import numpy as np

from tune2gguf.runs.intervals import CONFIDENCE

POWER = 0.80


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


def extrapolate_gain(late_share: float, at: float) -> float:
    """Return what as much learning again would bring, as a share of the gain so far.

    The curve is taken for an exponential approach to a floor, through its beginning, the point after the fraction `at`
    of the learning, and its end: gain(x) = (1 - exp(-k x)) / (1 - exp(-k)) at the fraction x, so that gain(at) =
    1 - late_share gives k, and gain(2) - 1 = exp(-k) is the answer. Real curves have longer tails than exponentials,
    so that the answer is rather low. A curve that does not bend is taken for a line: 1.

    Args:
        late_share: of the gain, that came after `at`
        at: fraction of the learning, between 0 and 1
    """
    from scipy.optimize import brentq

    early_share = 1 - late_share
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
