"""Intervals, numbers of rows and extrapolations are those of their formulas."""

import math

import numpy as np
import pytest
from scipy import stats

from tune2gguf.verdict.paired import choose_best_crosswise, count_rows_needed, estimate_ratio, extrapolate_gain


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


def test_rows_needed_is_the_sample_size_of_a_test_on_a_mean():
    """With denominators of one, s is the rows' own standard deviation: ((1.95996 + 0.84162) * s / margin) ** 2."""
    rows = np.random.default_rng(2).normal(0.1, 2.0, 50)
    expected = math.ceil(((1.959964 + 0.841621) * rows.std(ddof=1) / 0.3) ** 2)
    assert count_rows_needed(rows, np.ones(50), margin=0.3) == expected
    assert count_rows_needed(rows, np.ones(50), margin=0.15) == pytest.approx(4 * expected, rel=0.01)


def test_crosswise_choice_is_unbiased_where_the_plain_one_is_not():
    """Ten validations that differ by noise alone: the lowest of them lies below the last one, chosen crosswise it does
    not."""
    generator, crosswise, plain = np.random.default_rng(3), [], []
    for _ in range(500):
        losses = generator.standard_normal((10, 40))
        crosswise.append((losses[-1] - choose_best_crosswise(losses)).mean())
        plain.append((losses[-1] - losses[losses.sum(axis=1).argmin()]).mean())
    error = np.std(crosswise) / math.sqrt(500)
    assert abs(np.mean(crosswise)) < 3 * error
    assert np.mean(plain) > 10 * error


def test_crosswise_choice_finds_a_best_that_stands_out():
    losses = np.random.default_rng(4).normal(3.0, 0.1, (5, 20))
    losses[2] -= 1
    assert np.array_equal(choose_best_crosswise(losses), losses[2])


@pytest.mark.parametrize("rate", [0.1, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("at", [0.3, 0.5, 0.8])
def test_extrapolated_gain_is_exact_for_an_exponential(rate, at):
    def gain(progress):
        return 1 - math.exp(-rate * progress)

    late_share = 1 - gain(at) / gain(1)
    assert extrapolate_gain(late_share, at) == pytest.approx(gain(2) / gain(1) - 1, rel=1e-6)


def test_extrapolated_gain_of_a_line_is_all_of_it_again_and_of_a_flat_end_nothing():
    assert extrapolate_gain(0.5, 0.5) == extrapolate_gain(0.9, 0.5) == 1.0
    assert extrapolate_gain(0.0, 0.5) == extrapolate_gain(-0.2, 0.5) == 0.0
    assert extrapolate_gain(1e-300, 0.5) < 1e-9
