"""Curves: read from metrics.jsonl, also while the run writes it."""

import json

import pytest

from tune2gguf.runs.curves import read_curves
from tune2gguf.runs.samples import Sample, read_samples

BASE = {"step": 0, "epoch": 0, "val_loss": 4.0, "val_rows": 2, "val_tokens": 5}
STEP = {"step": 1, "epoch": 0, "loss": 3.9, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 10.0}
LATER = BASE | {
    "step": 2,
    "val_loss": 3.0,
    "val_low": 2.5,
    "val_high": 3.5,
    "val_row_losses": [6.0, 9.0],
    "val_row_tokens": [2, 3],
}


def write_lines(path, *records, end=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def test_curves_are_what_metrics_jsonl_says(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", BASE, STEP, {"step": 2, "epoch": 0, "skipped": "loss is nan"}, LATER)
    curves = read_curves(tmp_path)
    assert [(step.step, step.loss, step.lr, step.skipped) for step in curves.training] == [
        (1, 3.9, 1e-4, None),
        (2, None, None, "loss is nan"),
    ]
    assert curves.base.loss == 4.0 and curves.base.low is None and curves.base.row_losses == ()
    assert curves.final == curves.best
    assert (curves.final.low, curves.final.high) == (2.5, 3.5)
    assert (curves.final.row_losses, curves.final.row_tokens) == ((6.0, 9.0), (2, 3))


def test_best_is_the_lowest_after_a_step_and_the_earliest_of_equals(tmp_path):
    losses = [1.0, 3.0, 2.0, 2.0, 2.5]
    write_lines(tmp_path / "metrics.jsonl", *(BASE | {"step": n, "val_loss": loss} for n, loss in enumerate(losses)))
    curves = read_curves(tmp_path)
    assert (curves.base.step, curves.best.step, curves.final.step) == (0, 2, 4)


def test_a_line_still_being_written_is_left_for_later(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", BASE, end='{"step": 1, "epo')
    assert len(read_curves(tmp_path).validations) == 1
    assert read_curves(tmp_path).training == ()


def test_a_broken_line_before_the_last_is_an_error_with_its_number(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", BASE, end='{"step": 1,\n' + json.dumps(STEP) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: cannot be read as JSON"):
        read_curves(tmp_path)


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is the folder of a run"):
        read_curves(tmp_path)


def test_samples_are_read_and_may_be_missing(tmp_path):
    assert read_samples(tmp_path) == ()
    message = {"role": "user", "content": "Hi?"}
    record = {"step": 0, "epoch": 0, "row": 3, "prompt": [message], "reference": "Ahoy", "reply": "<b>", "extra": 1}
    write_lines(tmp_path / "samples.jsonl", record | {"ended_by_itself": False})
    assert read_samples(tmp_path) == (Sample(0, 0, 3, (message,), "Ahoy", "<b>", False),)
