"""Run folders with given curves: copies of a real run with other config and metrics."""

from dataclasses import replace
from pathlib import Path

from tests.conftest import make_conversations
from tests.runs import copy_real_run, edit_config, get_tiny_base, set_metrics
from tune2gguf.runs.curves import Curves, TrainingStep, Validation
from tune2gguf.runs.files import VERDICT_FILE
from tune2gguf.runs.plan import write_plan

NUM_VALIDATION_ROWS = 40  # as in make_curves


def write_run(run_dir: Path, curves: Curves, *overrides: str, has_other_rows: bool = False) -> Path:
    """Write a finished run of 100 training rows without verdict.

    Args:
        has_other_rows: its validation rows differ from the other runs' rows
    """
    validation = make_conversations(NUM_VALIDATION_ROWS, start=400 if has_other_rows else 300)
    copy_real_run(
        get_tiny_base(), run_dir, training=make_conversations(100), validation=validation if curves.final else ()
    )
    edit_config(run_dir, "epochs=3", *overrides)
    write_plan(run_dir, {"num_steps": len(curves.training), "lines": ["100 steps"]})
    records = [*map(_complete_validation, curves.validations), *map(_complete_step, curves.training)]
    records.sort(key=lambda record: record.step)
    set_metrics(run_dir, [record.to_record() for record in records])
    (run_dir / VERDICT_FILE).unlink()
    return run_dir


def _complete_validation(one: Validation) -> Validation:
    indices = one.row_indices or tuple(range(one.rows))
    return replace(one, low=one.loss - 0.1, high=one.loss + 0.1, row_indices=indices)


def _complete_step(step: TrainingStep) -> TrainingStep:
    return replace(step, tokens=500, seconds=0.5, tokens_per_second=1000.0, peak_memory_bytes=2_000_000_000)
