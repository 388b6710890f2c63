"""The recipe on a CUDA device: equal to the CPU, and after kill and resume equal to an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_run_arguments
from tests.gpu.models import MARKS
from tests.recipes.launch import count_lines, read_outcome

pytestmark = MARKS

# 20 rows at 6 rows per step: 3 full steps and one of 2 rows, 4 steps per epoch, 24 in all.
OPTIONS = ["batch_size=3", "gradient_accumulation_steps=2", "epochs=6", "learning_rate=0.003", "max_seq_len=128"]


def start_recipe(arguments: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "recipes/lora_finetune.py", *arguments]
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with log.open("a") as output:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "2"},  # several runs share the cores
            stdout=output,
            stderr=output,
        )


def run_to_end(arguments: list[str], folder: Path) -> Path:
    log = folder.with_suffix(".log")
    assert start_recipe([*arguments, f"output_dir={folder}"], log).wait(timeout=300) == 0, log.read_text()
    return folder


def read_losses(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def start_runs(pool: ThreadPoolExecutor, base_dir: Path, folder: Path) -> dict[tuple[str, str], Future]:
    """Start all runs of these tests in parallel, longest first; each future returns the run's folder."""
    arguments = [*make_run_arguments(folder, base_dir), f"base_dir={base_dir}", *OPTIONS]
    exact = ["dtype=bf16", "base_weights=bf16", "device=cuda", "lora_dropout=0.1", "save_every_n_steps=1"]
    kept = ["device=cuda", "lora_dropout=0.1", "enable_activation_checkpointing=true"]
    named: dict[tuple[str, str], list[str]] = {
        ("kept", "false"): kept,
        ("offloaded", "false"): [*kept, "enable_activation_offloading=true"],
    }
    runs = {}
    for packing in ("false", "true"):
        named |= {("whole", packing): exact, ("again", packing): exact, ("other", packing): [*exact, "seed=43"]}
        named |= {(device, packing): [f"device={device}"] for device in ("cpu", "cuda")}
        own = [*arguments, *exact, f"dataset.packing={packing}"]
        runs["killed", packing] = pool.submit(kill_and_resume, own, _place(folder, f"killed-{packing}"))
    for (name, packing), own in named.items():
        own = [*arguments, *own, f"dataset.packing={packing}"]
        runs[name, packing] = pool.submit(run_to_end, own, _place(folder, f"{name}-{packing}"))
    return runs


def _place(folder: Path, name: str) -> Path:
    """Return a run's folder, alone in its parent: runs in one parent share a ledger."""
    (folder / name).mkdir()
    return folder / name / "run"


def kill_and_resume(arguments: list[str], folder: Path) -> Path:
    """Kill a run three times, resume it to its end, and return its folder."""
    resuming = [*arguments, "resume=auto"]
    num_kills = sum(kill_after(resuming, folder, lines) for lines in (2, 7, 13))
    assert num_kills > 0, "no kill hit the run"
    return run_to_end(resuming, folder)


def kill_after(arguments: list[str], folder: Path, lines: int) -> bool:
    """Start the run and kill it after `lines` lines of metrics; return whether it was still running."""
    process = start_recipe([*arguments, f"output_dir={folder}"], folder.with_suffix(".log"))
    deadline = time.monotonic() + 300
    while process.poll() is None and count_lines(folder / "metrics.jsonl") < lines:
        assert time.monotonic() < deadline, folder.with_suffix(".log").read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("packing", ["false", "true"])
def test_losses_of_a_run_are_those_of_the_cpu(recipe_runs, packing):
    on_cpu, on_cuda = (recipe_runs[device, packing].result() for device in ("cpu", "cuda"))
    for key in ("loss", "val_loss"):
        assert read_losses(on_cuda, key) == pytest.approx(read_losses(on_cpu, key), rel=1e-3)
    assert read_losses(on_cuda, "loss")[-1] < 0.8 * read_losses(on_cuda, "loss")[0]


def test_offloading_in_the_recipe_changes_no_loss(recipe_runs):
    kept, offloaded = (recipe_runs[name, "false"].result() for name in ("kept", "offloaded"))
    assert read_losses(offloaded, "loss") == pytest.approx(read_losses(kept, "loss"), rel=1e-4)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_killed_and_resumed_equals_never_stopped(recipe_runs, packing):
    whole = read_outcome(recipe_runs["whole", packing].result())
    # Attention's backward is deterministic; if this fails, resuming is not the cause.
    assert read_outcome(recipe_runs["again", packing].result()) == whole, "the same run twice is not the same"
    assert read_outcome(recipe_runs["killed", packing].result()) == whole
    other = read_outcome(recipe_runs["other", packing].result())
    assert other["last"] != whole["last"], "negative control: other masks end elsewhere"
