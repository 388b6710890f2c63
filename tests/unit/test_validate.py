"""What a run records and says of a validation."""

from tune2gguf.runs.intervals import estimate_ratio
from tune2gguf.train.validation import ValidationLoss, describe_validation


def test_metrics_hold_the_interval_that_the_verdict_computes():
    sums, tokens = [5.0, 9.0, 2.0, 8.0], [4, 5, 2, 3]
    record, estimate = ValidationLoss(sums, tokens).summarize(), estimate_ratio(sums, tokens)
    assert (record["val_loss"], record["val_low"], record["val_high"]) == (24 / 14, estimate.low, estimate.high)


def test_one_row_has_no_interval_and_says_so():
    record = {"step": 3, **ValidationLoss([5.0], [4]).summarize()}
    assert (record["val_loss"], record["val_low"], record["val_high"]) == (1.25, None, None)
    assert describe_validation(record) == "step 3: validation loss 1.2500 (one row has no interval) on 1 rows"
