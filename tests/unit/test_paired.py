"""Paired comparisons: numbers of rows and extrapolations equal their formulas."""

import math

import numpy as np
import pytest

from tune2gguf.runs.intervals import Estimate
from tune2gguf.verdict.paired import FORECAST_FACTOR, SEED_NOISE, Forecast, choose_best_crosswise, count_rows_needed


def test_rows_needed_is_the_sample_size_of_a_test_on_a_mean():
    """With denominators of one, s is the rows' own standard deviation: ((1.95996 + 0.84162) * s / margin) ** 2."""
    rows = np.random.default_rng(2).normal(0.1, 2.0, 50)
    expected = math.ceil(((1.959964 + 0.841621) * rows.std(ddof=1) / 0.3) ** 2)
    assert count_rows_needed(rows, np.ones(50), margin=0.3) == expected
    assert count_rows_needed(rows, np.ones(50), margin=0.15) == pytest.approx(4 * expected, rel=0.01)


def test_crosswise_choice_is_unbiased_where_the_plain_one_is_not():
    """Ten validations differ by noise only: the lowest is below the last one, but not if it is chosen on other rows."""
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


@pytest.mark.parametrize("whole", [1.0, 3.0])
@pytest.mark.parametrize("at", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("bend", [0.1, 1.0, 2.5, 8.0])
def test_a_forecast_is_bounded_by_the_exponential_and_the_hyperbola_that_it_is_exact_for(bend, at, whole):
    def short(x):
        return 1 - math.exp(-bend * x)

    def long(x):
        return x / (x + bend)

    forecast = Forecast(at, math.inf, whole)
    further = [curve(2 * whole) / curve(whole) - 1 for curve in (short, long)]
    assert forecast.find_short_tail(1 - short(at) / short(1)) == pytest.approx(further[0], rel=1e-5)
    assert forecast.find_long_tail(1 - long(at) / long(1)) == pytest.approx(further[1], rel=1e-6)
    late_share = 1 - short(at) / short(1)
    bounds = forecast.find_short_tail(late_share), forecast.find_long_tail(late_share)
    assert forecast.estimate(late_share) == pytest.approx(math.sqrt(math.prod(bounds)))
    assert bounds[0] < forecast.estimate(late_share) < bounds[1]
    widened = forecast.widen(Estimate(late_share, late_share, late_share))
    assert widened.low == pytest.approx(bounds[0] / FORECAST_FACTOR - SEED_NOISE)
    assert widened.high == pytest.approx(bounds[1] * FORECAST_FACTOR + SEED_NOISE)


def test_a_forecast_of_a_line_is_all_of_it_again_and_of_a_flat_end_nothing():
    forecast = Forecast(0.5, math.inf)
    assert forecast.estimate(0.5) == forecast.estimate(0.9) == 1.0
    assert forecast.estimate(0.0) == forecast.estimate(-0.2) == 0.0
    assert forecast.estimate(1e-300) < 1e-9


def test_no_loss_is_forecast_below_zero():
    """A loss that fell by 4 to 0.2 can gain a twentieth more at most. Negative control: without the limit."""
    assert Forecast(0.5, 0.05).estimate(0.4) == 0.05
    assert Forecast(0.5, math.inf).estimate(0.4) > 0.3
