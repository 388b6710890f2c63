"""Confidence interval of a ratio of sums, against formulas, the sampling distribution and scipy."""

import math

import numpy as np
import pytest

from tune2gguf.runs.intervals import estimate_ratio


def test_interval_of_many_rows_is_the_normal_one_of_a_ratio():
    """A ratio's standard error is that of numerator - ratio * denominator over the mean denominator."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 40, 400).astype(float)
    differences = tokens * generator.normal(0.5, 1.0, 400)
    estimate = estimate_ratio(differences, tokens)
    residuals = differences - estimate.value * tokens
    error = residuals.std(ddof=1) / tokens.mean() / math.sqrt(400)
    assert estimate.value == pytest.approx(differences.sum() / tokens.sum())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_interval_of_few_rows_covers_the_truth_as_often_as_it_says():
    """Negative control: the plain percentile interval of eight rows covers far less often."""
    from scipy import stats  # imported by few tests: it takes seconds

    generator, hits, plain_hits, draws = np.random.default_rng(1), 0, 0, 400
    ones = np.ones(8)
    for _ in range(draws):
        rows = generator.standard_normal(8)
        estimate = estimate_ratio(rows, ones)
        hits += estimate.low <= 0 <= estimate.high
        plain = stats.bootstrap((rows,), np.mean, method="percentile", n_resamples=999, rng=generator)
        plain_hits += plain.confidence_interval.low <= 0 <= plain.confidence_interval.high
    assert hits / draws > 0.92
    assert plain_hits / draws < 0.90


def test_equal_rows_have_an_interval_without_width():
    estimate = estimate_ratio(np.full(6, 3.0), np.full(6, 2.0))
    assert (estimate.value, estimate.low, estimate.high) == (1.5, 1.5, 1.5)


def draw_losses(generator: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw summed losses and tokens of rows of unequal length; the mean loss is 2 nats per token."""
    tokens = generator.integers(5, 60, num_rows)
    return tokens * generator.normal(2.0, 0.5, num_rows), tokens


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    estimates = [estimate_ratio(*draw_losses(generator, 60)) for _ in range(200)]
    covered = np.mean([estimate.low <= 2.0 <= estimate.high for estimate in estimates])
    assert 0.91 < covered < 0.99


def test_interval_is_that_of_the_mean_over_tokens_of_rows_drawn_whole():
    """Hesterberg's level is the normal's tail beyond sqrt(n / (n - 1)) times Student's quantile."""
    from scipy import stats

    sums, tokens = draw_losses(np.random.default_rng(3), 30)
    rows = np.random.default_rng(4).integers(0, 30, (20_000, 30))
    tail = stats.norm.sf(math.sqrt(30 / 29) * stats.t.ppf(0.975, 29))
    expected = np.quantile(sums[rows].sum(1) / tokens[rows].sum(1), [tail, 1 - tail])
    estimate = estimate_ratio(sums, tokens)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), abs=0.01)
    # Negative control: resampling single tokens would give a four times narrower interval.
    by_token = np.repeat(sums / tokens, tokens)
    means = np.random.default_rng(5).choice(by_token, (500, len(by_token))).mean(1)
    assert np.ptp(np.quantile(means, [0.025, 0.975])) < 0.4 * np.ptp(expected)


def test_interval_is_narrower_with_more_rows_and_the_same_every_time():
    few, many = (draw_losses(np.random.default_rng(1), count) for count in (10, 1000))
    widths = [estimate.high - estimate.low for estimate in (estimate_ratio(*few), estimate_ratio(*many))]
    assert widths[1] < widths[0] / 5
    assert estimate_ratio(*few) == estimate_ratio(*few)
