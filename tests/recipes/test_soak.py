"""It keeps running: nothing grows over thousands of steps."""

import os
from pathlib import Path

import pytest

from tests.recipes.launch import Launch, count_lines
from tune2gguf.runs.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow
STEPS = 2000


def measure(pid: int) -> tuple[int, int]:
    """Return resident memory in KiB and open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd"))


def test_memory_and_files_do_not_grow_over_2000_steps(run_arguments, tmp_path):
    """With validation, checkpoints and logging: 20 rows in steps of one are 100 epochs, and 500 checkpoints."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    often = ["batch_size=1", f"epochs={STEPS // 20}", "save_every_n_steps=4", "lora_dropout=0.1"]
    launch = Launch([*run_arguments, *often], log)
    (process,) = launch.processes
    measured = []
    for lines in range(STEPS // 4, STEPS, STEPS // 20):
        launch.wait_until(lambda lines=lines: count_lines(folder / "metrics.jsonl") >= lines, timeout=300)
        # At most one is being written and one removed besides those that are kept.
        assert len(list_checkpoints(folder / "checkpoints")) <= 3
        measured.append(measure(process.pid))
    assert launch.wait(timeout=300) == [0], log.read_text()
    memory, files = zip(*measured, strict=True)
    print(f"resident KiB {memory}, open files {files}")
    assert max(memory) < 1.02 * memory[0]
    # One more while a checkpoint is being written.
    assert max(files) - min(files) <= 2
    assert count_lines(folder / "metrics.jsonl") == STEPS + STEPS // 20 + 1
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [f"step_{STEPS - 4}", f"step_{STEPS}"]
