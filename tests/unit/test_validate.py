"""The record and the printed line of a validation."""

from tune2gguf.runs.intervals import estimate_ratio
from tune2gguf.train.validation import ValidationLoss


def test_metrics_hold_the_interval_that_the_verdict_computes():
    sums, tokens = [5.0, 9.0, 2.0, 8.0], [4, 5, 2, 3]
    validation, estimate = ValidationLoss(sums, tokens).at(1, 0, row_indices=range(4)), estimate_ratio(sums, tokens)
    assert (validation.loss, validation.low, validation.high) == (24 / 14, estimate.low, estimate.high)


def test_one_row_has_no_interval_and_says_so():
    validation = ValidationLoss([5.0], [4]).at(3, 0, row_indices=[0])
    assert (validation.loss, validation.low, validation.high) == (1.25, None, None)
    assert validation.describe() == "step 3: validation loss 1.2500 (one row has no interval) on 1 rows"


def test_equal_rows_have_an_interval_of_one_point():
    validation = ValidationLoss([6.0] * 5, [3] * 5).at(1, 0, row_indices=range(5))
    assert (validation.low, validation.high) == (2.0, 2.0)
