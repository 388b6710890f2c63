"""Numbers of rows and extrapolations are those of their formulas."""

import math

import numpy as np
import pytest

from tune2gguf.verdict.paired import choose_best_crosswise, count_rows_needed, extrapolate_gain


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
