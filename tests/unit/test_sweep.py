"""What a sweep searches is known, and right, before anything runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.sweep import Sweep, add_guide_space, check_sweep, list_overrides, parse_overrides, run_sweep

CONFIG = REPOSITORY / "examples/quickstart/lora.yaml"


@pytest.fixture
def sweep(tmp_path, run_arguments) -> Sweep:
    fixed = [one for one in run_arguments[2:] if not one.startswith(("output_dir=", "resume="))]
    return Sweep(tmp_path / "sweep", CONFIG, tuple(fixed), {"learning_rate": ("1e-3", "2e-3"), "epochs": ("1", "2")})


def test_overrides_with_several_values_are_searched():
    fixed, space = parse_overrides(["epochs=2", "learning_rate=5e-5,1e-4", "dataset.files=[a.jsonl,b.jsonl]"])
    assert fixed == ("epochs=2", "dataset.files=[a.jsonl,b.jsonl]")
    assert space == {"learning_rate": ("5e-5", "1e-4")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs"], "key=value"),
        (["output_dir=x"], "--out names"),
        (["resume=auto"], "set by the sweep"),
        (["epochs=1,1"], "each value once"),
        (["epochs=1,"], "each value once"),
        (["epochs=1,2", "epochs=3"], "as one value and as several"),
        (["epochs=1,2", "epochs=3,4"], "given twice"),
    ],
)
def test_overrides_that_make_no_sweep_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(overrides)


def test_guide_searches_its_values_but_not_those_given():
    space = add_guide_space(CONFIG, ["weight_decay=0"], {"learning_rate": ("1e-3", "2e-3")})
    assert space == {
        "learning_rate": ("1e-3", "2e-3"),
        "lora_dropout": ("0.1", "0.2"),
        "lora_alpha": ("16", "32", "8"),
    }


def test_every_combination_is_a_trial_with_a_folder_of_its_own(sweep):
    combinations = sweep.list_combinations()
    assert len(combinations) == 4
    assert combinations[3] == {"learning_rate": "2e-3", "epochs": "2"}
    overrides = list_overrides(sweep, 3)
    assert overrides[-4:] == ["learning_rate=2e-3", "epochs=2", f"output_dir={sweep.folder}/trial-003", "resume=auto"]
    check_sweep(sweep)


def test_a_bad_value_is_refused_with_its_combination_before_anything_runs(sweep):
    bad = Sweep(sweep.folder, CONFIG, sweep.fixed, {"learning_rate": ("1e-3", "5"), "epochs": ("1", "2")})
    with pytest.raises(ValueError, match=r"learning_rate=5 epochs=1: learning_rate=5 is out of range") as error:
        run_sweep(bad)
    assert str(error.value).count("\n") == 0  # the same problem is said once
    assert not sweep.folder.exists()


def test_without_validation_rows_there_is_nothing_to_rank_by(sweep):
    blind = Sweep(sweep.folder, CONFIG, (*sweep.fixed, "dataset.validation_files=null"), sweep.space)
    blind = Sweep(sweep.folder, CONFIG, (*blind.fixed, "dataset.validation_split=null"), sweep.space)
    with pytest.raises(ValueError, match="ranks by validation loss"):
        check_sweep(blind)


def test_nothing_to_search_is_refused(sweep):
    with pytest.raises(ValueError, match="nothing to search"):
        check_sweep(Sweep(sweep.folder, CONFIG, sweep.fixed, {}))


def test_folder_of_another_sweep_is_refused(sweep):
    sweep.folder.mkdir()
    (sweep.folder / "sweep.json").write_text(json.dumps({"config": str(CONFIG), "fixed": [], "space": {}}))
    with pytest.raises(ValueError, match="is the folder of another sweep"):
        run_sweep(sweep)


def test_without_optuna_one_sentence_says_how_to_get_it(sweep, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['optuna'] = None\n")
    command = [sys.executable, "scripts/sweep.py", "--config", str(CONFIG), "--out", str(tmp_path / "s"), "epochs=1,2"]
    environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a sweep needs Optuna: pip install")
