"""Ctrl-C and SIGTERM: the run is saved, the resume command is printed, and the run resumes exactly there."""

import signal

import pytest

from tests.recipes.launch import Launch, count_lines, read_outcome, run_to_end
from tests.recipes.test_resume import HARD
from tune2gguf.runs.checkpoints import find_damage, list_checkpoints


@pytest.fixture
def arguments(run_arguments) -> list[str]:
    return [*run_arguments, *HARD, "save_every_n_steps=5"]


@pytest.mark.parametrize(
    ("num_processes", "signum", "ranks"),
    [
        (1, signal.SIGINT, [0]),
        (2, signal.SIGTERM, [1]),
        (1, signal.SIGTERM, [0]),
        (2, signal.SIGINT, [0, 1]),
    ],
)
def test_signal_saves_says_how_to_go_on_and_the_rest_is_the_same(arguments, tmp_path, num_processes, signum, ranks):
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "whole.log", num_processes=num_processes)
    folder, log = tmp_path / "stopped", tmp_path / "stopped.log"
    arguments = [*arguments, f"output_dir={folder}", "resume=auto"]
    launch = Launch(arguments, log, num_processes=num_processes)
    launch.wait_until(lambda: count_lines(folder / "metrics.jsonl") >= 3)
    for rank in ranks:
        launch.signal(signum, rank=rank)
    assert set(launch.wait(timeout=30)) == {128 + signum}, log.read_text()
    text = log.read_text()
    steps = sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())
    assert (
        f"saved {folder}/checkpoints/step_{steps[-1]}; to go on from there: the same command with resume=auto" in text
    )
    assert text.count(f"stopped by {signum.name}") == 1 and "Traceback" not in text
    assert steps[-1] < 12
    run_to_end(arguments, log, num_processes=num_processes)
    assert read_outcome(folder) == read_outcome(tmp_path / "whole")


def test_signal_while_it_answers_leaves_the_answers_for_later(arguments, tmp_path):
    """The validation before training writes its line first; then a reply fills the row's room."""
    arguments = [*arguments, "num_samples=1", "max_seq_len=512"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "whole.log")
    folder, log = tmp_path / "stopped", tmp_path / "stopped.log"
    launch = Launch([*arguments, f"output_dir={folder}"], log)
    launch.wait_until(lambda: count_lines(folder / "metrics.jsonl") >= 1)
    launch.signal(signal.SIGTERM)
    assert launch.wait(timeout=30) == [143], log.read_text()
    assert count_lines(folder / "metrics.jsonl") == 1 and count_lines(folder / "samples.jsonl") == 0
    run_to_end([*arguments, f"output_dir={folder}", "resume=auto"], log)
    assert read_outcome(folder) == read_outcome(tmp_path / "whole")


def test_second_signal_ends_at_once_and_the_last_checkpoint_is_intact(arguments, tmp_path):
    """The first signal alone would save and end the run with 130. Both reach a stopped process at the same time."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    launch = Launch([*arguments, "save_every_n_steps=1"], log)
    launch.wait_until(lambda: count_lines(folder / "metrics.jsonl") >= 3)
    for signum in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        launch.signal(signum)
    assert launch.wait(timeout=10) == [143]
    assert "stopped by" not in log.read_text()
    assert all(find_damage(path) is None for path in list_checkpoints(folder / "checkpoints"))
    run_to_end([*arguments, "resume=auto"], log)


def test_signal_before_training_ends_at_once_with_nothing_to_save(arguments, tmp_path):
    log = tmp_path / "log"
    launch = Launch([*arguments, "resume=auto"], log)
    launch.wait_until(lambda: log.exists() and "loading the base" in log.read_text())
    launch.signal(signal.SIGINT)
    assert launch.wait(timeout=10) == [130]
    assert "Traceback" not in log.read_text()
    run_to_end([*arguments, "resume=auto"], log)
