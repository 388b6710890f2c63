"""The uncertainty of the validation loss, against the sampling distribution and scipy's limits."""

import numpy as np
import pytest

from tune2gguf.train.validation import ValidationLoss


def draw(generator: np.random.Generator, num_rows: int) -> ValidationLoss:
    """Draw rows of a mean loss of 2 nats a token and unequal lengths."""
    tokens = generator.integers(5, 60, num_rows)
    sums = tokens * generator.normal(2.0, 0.5, num_rows)
    return ValidationLoss(sums.tolist(), tokens.tolist())


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [draw(generator, 60).compute_interval() for _ in range(200)]
    covered = np.mean([low <= 2.0 <= high for low, high in intervals])
    assert 0.89 < covered < 0.99


def test_interval_is_that_of_the_mean_over_tokens_of_rows_drawn_whole():
    loss = draw(np.random.default_rng(3), 30)
    sums, tokens = np.array(loss.row_sums), np.array(loss.row_tokens)
    rows = np.random.default_rng(4).integers(0, 30, (20_000, 30))
    expected = np.quantile(sums[rows].sum(1) / tokens[rows].sum(1), [0.025, 0.975])
    assert loss.compute_interval() == pytest.approx(tuple(expected), abs=0.01)
    # Negative control: tokens drawn one by one would look four times as sure.
    by_token = np.repeat(sums / tokens, tokens)
    means = np.random.default_rng(5).choice(by_token, (500, len(by_token))).mean(1)
    assert np.ptp(np.quantile(means, [0.025, 0.975])) < 0.4 * np.ptp(expected)


def test_interval_is_narrower_with_more_rows_and_the_same_every_time():
    few, many = (draw(np.random.default_rng(1), count) for count in (10, 1000))
    widths = [high - low for low, high in (few.compute_interval(), many.compute_interval())]
    assert widths[1] < widths[0] / 5
    assert few.compute_interval() == few.compute_interval()


def test_one_row_has_no_interval_and_says_so():
    validation = ValidationLoss([5.0], [4]).at(3, 0, row_indices=[0])
    assert (validation.loss, validation.low, validation.high) == (1.25, None, None)
    assert validation.describe() == "step 3: validation loss 1.2500 (one row has no interval) on 1 rows"


def test_equal_rows_have_an_interval_of_one_point():
    assert ValidationLoss([6.0] * 5, [3] * 5).compute_interval() == (2.0, 2.0)
