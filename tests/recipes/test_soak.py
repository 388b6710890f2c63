"""Long runs: memory and open files do not grow over thousands of steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.recipes.launch import Launch, count_lines
from tune2gguf.runs.checkpoints import list_checkpoints

STEPS = 2000
QUICKSTART_BASE = REPOSITORY / "models/SmolLM2-135M-Instruct"


def measure(pid: int) -> tuple[int, int]:
    """Return resident memory in KiB and open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd"))


needs_base = pytest.mark.skipif(not QUICKSTART_BASE.is_dir(), reason="needs the quickstart's base: scripts/download.py")


@needs_base
def test_bytes_of_a_real_model_are_the_same_beside_busy_processes(tmp_path):
    """Threads wait for each other: other programs change the time of a result, never the result."""
    command = [sys.executable, "recipes/lora_finetune.py", "--config", "examples/quickstart/lora.yaml", "epochs=1"]
    command += ["max_steps_per_epoch=3", "warmup_steps=0", "max_val_rows=1", "num_samples=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    adapters = {}
    for num_busy in (0, 3):
        busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(num_busy)]
        run = tmp_path / f"run_{num_busy}"
        try:
            done = subprocess.run(
                [*command, f"output_dir={run}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
            )
        finally:
            for process in busy:
                process.kill()
                process.wait()
        assert done.returncode == 0, done.stderr[-3000:]
        adapters[num_busy] = (run / "last/adapter_model.safetensors").read_bytes()
    assert adapters[0] == adapters[3]


@needs_base
def test_memory_of_a_real_model_is_flat_after_its_fullest_step_and_within_the_estimate(tmp_path):
    """SmolLM2 on the quickstart's rows: every step has another length, and oneDNN never frees compiled products."""
    options = ["max_val_rows=4", "num_samples=0", "save_every_n_steps=1000", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "recipes/lora_finetune.py", "--config", "examples/quickstart/lora.yaml", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [(record["tokens"], record["peak_memory_bytes"]) for record in records if "lr" in record]
    assert len(steps) == 195
    peaks = [peak for _, peak in steps]
    fullest = max(range(len(steps)), key=lambda at: steps[at][0])
    assert peaks[-1] < 1.03 * peaks[fullest]
    estimate = float(re.search(r"memory: about ([\d.]+) GB", done.stdout + done.stderr).group(1))
    assert peaks[-1] / 1e9 == pytest.approx(estimate, rel=0.1)


def test_memory_and_files_do_not_grow_over_2000_steps(run_arguments, tmp_path):
    """With validation, checkpoints and logging: 100 epochs of 20 steps, and 500 checkpoints."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    often = ["batch_size=1", f"epochs={STEPS // 20}", "save_every_n_steps=4", "lora_dropout=0.1"]
    launch = Launch([*run_arguments, *often], log)
    (process,) = launch.processes
    measured = []
    for lines in range(STEPS // 4, STEPS, STEPS // 20):
        launch.wait_until(lambda lines=lines: count_lines(folder / "metrics.jsonl") >= lines, timeout=300)
        # Besides the kept ones, at most one is being written and one removed.
        assert len(list_checkpoints(folder / "checkpoints")) <= 3
        measured.append(measure(process.pid))
    assert launch.wait(timeout=300) == [0], log.read_text()
    memory, files = zip(*measured, strict=True)
    print(f"resident KiB {memory}, open files {files}")
    # The heap settles within a few MiB.
    assert max(memory) < memory[0] + 10 * 1024
    # One more while a checkpoint is being written.
    assert max(files) - min(files) <= 2
    assert count_lines(folder / "metrics.jsonl") == STEPS + STEPS // 20 + 1
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [f"step_{STEPS - 4}", f"step_{STEPS}"]
