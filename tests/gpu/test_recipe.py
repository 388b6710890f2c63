"""The recipe on a CUDA device: as on the CPU, and killed and resumed as never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.gpu.models import MARKS
from tests.recipes.launch import count_lines, read_outcome

pytestmark = MARKS

# 20 rows in steps of 6 are 3 whole steps and one of 2 rows: 4 an epoch, 24 in all.
OPTIONS = ["batch_size=3", "gradient_accumulation_steps=2", "epochs=6", "learning_rate=0.003", "max_seq_len=128"]


@pytest.fixture
def arguments(run_arguments, small_base) -> list[str]:
    return [*run_arguments, f"base_dir={small_base}", *OPTIONS]


def start_recipe(arguments: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "recipes/lora_finetune.py", *arguments]
    with log.open("a") as output:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
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


@pytest.mark.parametrize("packing", ["false", "true"])
def test_losses_of_a_run_are_those_of_the_cpu(arguments, tmp_path, packing):
    arguments = [*arguments, f"dataset.packing={packing}"]
    on_cpu = run_to_end([*arguments, "device=cpu"], tmp_path / "cpu")
    on_cuda = run_to_end([*arguments, "device=cuda"], tmp_path / "cuda")
    for key in ("loss", "val_loss"):
        assert read_losses(on_cuda, key) == pytest.approx(read_losses(on_cpu, key), rel=1e-3)
    assert read_losses(on_cuda, "loss")[-1] < 0.8 * read_losses(on_cuda, "loss")[0]


def test_offloading_in_the_recipe_changes_no_loss(arguments, tmp_path):
    arguments = [*arguments, "device=cuda", "lora_dropout=0.1", "enable_activation_checkpointing=true"]
    kept = run_to_end(arguments, tmp_path / "kept")
    offloaded = run_to_end([*arguments, "enable_activation_offloading=true"], tmp_path / "offloaded")
    assert read_losses(offloaded, "loss") == pytest.approx(read_losses(kept, "loss"), rel=1e-4)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_killed_and_resumed_equals_never_stopped(arguments, tmp_path, packing):
    bf16 = ["dtype=bf16", "base_weights=bf16", "device=cuda", "lora_dropout=0.1", f"dataset.packing={packing}"]
    arguments = [*arguments, *bf16, "save_every_n_steps=1"]
    whole = read_outcome(run_to_end(arguments, tmp_path / "whole"))
    # Attention has a backward that is exact from run to run; if this fails, resuming is not at fault.
    assert read_outcome(run_to_end(arguments, tmp_path / "again")) == whole, "the same run twice is not the same"
    folder = tmp_path / "killed"
    resuming = [*arguments, "resume=auto"]
    num_kills = sum(kill_after(resuming, folder, lines) for lines in (2, 7, 13))
    assert num_kills > 0, "no kill hit the run"
    assert read_outcome(run_to_end(resuming, folder)) == whole
    other = read_outcome(run_to_end([*arguments, "seed=43"], tmp_path / "other"))
    assert other["last"] != whole["last"], "negative control: other masks end elsewhere"


def kill_after(arguments: list[str], folder: Path, lines: int) -> bool:
    """Start the run, kill it when it has written so many lines of metrics; return whether it was still running."""
    process = start_recipe([*arguments, f"output_dir={folder}"], folder.with_suffix(".log"))
    deadline = time.monotonic() + 300
    while process.poll() is None and count_lines(folder / "metrics.jsonl") < lines:
        assert time.monotonic() < deadline, folder.with_suffix(".log").read_text()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL
