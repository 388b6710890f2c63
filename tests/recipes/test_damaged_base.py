"""Damaged bases: one without a finite loss is named before the first step, and a run that skips every step fails."""

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_UNTIED, write_tiny_base
from tests.recipes.launch import Launch

UP = "model.layers.1.mlp.up_proj.weight"


def damage(base_dir: Path, name: str, value: float, *, times: bool = False) -> Path:
    """Set a weight of a new base's tensor to a value, or multiply the whole tensor by it."""
    write_tiny_base(base_dir, TINY_UNTIED)
    weights = load_file(base_dir / "model.safetensors")
    if times:
        weights[name] *= value
    else:
        weights[name][3, 5] = value
    save_file(weights, base_dir / "model.safetensors", metadata={"format": "pt"})
    return base_dir


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "overrides", [[], ["dataset.validation_files=null", "max_val_rows=null"]], ids=["validated", "not"]
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_skipped(value, overrides, run_arguments, tmp_path):
    base_dir, log = damage(tmp_path / "damaged", UP, value), tmp_path / "log"
    arguments = [*run_arguments, f"base_dir={base_dir}", "on_nonfinite=skip", *overrides]
    assert Launch(arguments, log).wait() == [1]
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert f"{base_dir}: the loss is nan before the first step" in line
    assert f"{UP} has 1 non-finite value" in line
    assert "on_nonfinite" not in line and "resume=auto" not in log.read_text()


def test_a_weight_that_is_finite_but_far_too_large_is_named(run_arguments, tmp_path):
    base_dir, log = damage(tmp_path / "damaged", UP, 3e38), tmp_path / "log"
    assert Launch([*run_arguments, f"base_dir={base_dir}"], log).wait() == [1]
    assert f"all weights are finite; the largest, 3e+38, is in {UP}" in log.read_text()


def test_two_processes_name_it_once(run_arguments, tmp_path):
    base_dir, log = damage(tmp_path / "damaged", UP, math.nan), tmp_path / "log"
    launch = Launch([*run_arguments, f"base_dir={base_dir}"], log, num_processes=2)
    assert set(launch.wait()) == {1}
    assert log.read_text().count(f"{UP} has 1 non-finite value") == 1


def test_a_run_that_skipped_every_step_fails(run_arguments, tmp_path):
    """A finite loss, but no finite gradient."""
    base_dir, log = damage(tmp_path / "damaged", "lm_head.weight", 1e25, times=True), tmp_path / "log"
    arguments = [*run_arguments, f"base_dir={base_dir}", "on_nonfinite=skip"]
    assert Launch(arguments, log).wait() == [1]
    assert "error: all 5 steps were skipped, so nothing was learned; the last: step 5: the grad" in log.read_text()
    assert not (tmp_path / "runs/tiny/last").exists()
