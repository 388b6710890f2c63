"""Killed anywhere and resumed, a run ends with the bytes of one that was never stopped; what cannot be, is refused."""

import signal
import time
from pathlib import Path

import pytest

from tests.recipes.launch import Launch, count_lines, read_outcome, run_to_end

# Dropout, accumulation and a tail: 20 rows in steps of 6 are 3 whole steps and one of 2 rows, 12 steps in all.
HARD = ["lora_dropout=0.1", "batch_size=2", "gradient_accumulation_steps=3", "epochs=3", "learning_rate=0.01"]
STEPS = 12


@pytest.fixture
def arguments(run_arguments) -> list[str]:
    return [*run_arguments, *HARD, "save_every_n_steps=2"]


def kill_and_resume(arguments: list[str], folder: Path, moments: list[float], **options) -> int:
    """Kill the run at these moments, seconds after its first metrics or of its start where negative; then let it end.

    Returns how many of the kills came before the run's end.
    """
    arguments, log = [*arguments, f"output_dir={folder}", "resume=auto"], folder.with_suffix(".log")
    num_killed = 0
    for moment in moments:
        launch = Launch(arguments, log, **options)
        if moment >= 0:
            before = count_lines(folder / "metrics.jsonl")
            launch.wait_until(lambda before=before: count_lines(folder / "metrics.jsonl") not in (0, before))
        time.sleep(abs(moment))
        launch.signal(signal.SIGKILL)
        num_killed += any(code == -signal.SIGKILL for code in launch.wait())
    run_to_end(arguments, log, **options)
    return num_killed


@pytest.mark.parametrize("packing", ["false", "true"])
def test_killed_and_resumed_equals_never_stopped(arguments, tmp_path, packing):
    arguments = [*arguments, f"dataset.packing={packing}", "max_seq_len=128"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "log")
    whole = read_outcome(tmp_path / "whole")
    # The last kill comes in a run that was resumed already.
    kill_and_resume(arguments, tmp_path / "killed", [0.0, 0.02, 0.05])
    assert read_outcome(tmp_path / "killed") == whole
    # Negative control: other masks end elsewhere.
    run_to_end([*arguments, "seed=43", f"output_dir={tmp_path / 'other'}"], tmp_path / "log")
    assert read_outcome(tmp_path / "other")["last"] != whole["last"]
