"""Sweeps: all points are known and checked before the first run."""

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.sweep import list_points, rank_points, run_sweep

CONFIG = REPOSITORY / "examples/quickstart/lora.yaml"


@pytest.fixture
def fixed(run_arguments) -> list[str]:
    return [one for one in run_arguments[2:] if not one.startswith(("output_dir=", "epochs="))]


def test_every_combination_is_a_run_in_a_folder_of_its_own(tmp_path):
    points = list_points(["learning_rate=5e-5,1e-4", "dataset.files=[a.jsonl,b.jsonl]", "epochs=1, 2"], tmp_path)
    assert [point.values for point in points] == [
        "learning_rate=5e-5 epochs=1",
        "learning_rate=5e-5 epochs=2",
        "learning_rate=1e-4 epochs=1",
        "learning_rate=1e-4 epochs=2",
    ]
    folder = tmp_path / "learning_rate-1e-4-epochs-2"
    given = ["learning_rate=1e-4", "dataset.files=[a.jsonl,b.jsonl]", "epochs=2"]
    assert points[3].run_dir == folder
    assert points[3].overrides == [*given, f"output_dir={folder}", "resume=auto"]


def test_values_that_are_paths_stay_in_the_folder_of_the_sweep(tmp_path):
    points = list_points(["base_source=hf://a/b,../../c"], tmp_path)
    assert [point.run_dir.name for point in points] == ["base_source-hf-a-b", "base_source-..-..-c"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs=1,2", "output_dir=x"], "choose its folder with --out"),
        (["epochs=1,2", "resume=auto"], "set by the sweep"),
        (["epochs=1,2", "epochs=3"], "each key once"),
        (["epochs=1", "dataset.files=[a.jsonl,b.jsonl]"], "nothing to sweep"),
    ],
)
def test_overrides_that_make_no_sweep_are_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list_points(overrides, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rate=1e-3,5", "epochs=1,2"], "^learning_rate=5 epochs=1: learning_rate=5 is out of range"),
        (["epochs=1,"], "^epochs=: epochs is empty"),
        (["epochs=1,2", "seed"], "key=value"),
    ],
)
def test_a_bad_value_is_refused_with_its_combination_before_anything_runs(overrides, message, fixed, tmp_path):
    folder = tmp_path / "sweep"
    with pytest.raises(ValueError, match=message):
        run_sweep(CONFIG, list_points([*fixed, *overrides], folder))
    assert not folder.exists()


def test_without_validation_rows_there_is_nothing_to_rank_by(fixed, tmp_path):
    blind = [one for one in fixed if not one.startswith("dataset.validation_files=")]
    blind += ["dataset.validation_files=null", "dataset.validation_split=null", "epochs=1,2"]
    points = list_points(blind, tmp_path / "sweep")
    with pytest.raises(ValueError, match="ranks by validation loss"):
        run_sweep(CONFIG, points)
    with pytest.raises(ValueError, match="no run has a validation loss"):
        rank_points(points)
