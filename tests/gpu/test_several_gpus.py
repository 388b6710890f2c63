"""Several GPUs through NCCL are one run: the losses of one GPU with the same rows a step, and exact when resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.gpu.models import MARKS
from tests.gpu.test_recipe import read_losses, run_to_end
from tests.recipes.launch import count_lines, read_outcome

pytestmark = [*MARKS, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

# 20 rows in steps of 8 are two whole steps and one of 4 rows.
OPTIONS = ["device=cuda", "gradient_accumulation_steps=2", "epochs=4", "learning_rate=0.003", "max_seq_len=128"]


def start_torchrun(arguments: list[str], log: Path) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with log.open("a") as output:
        return subprocess.Popen(
            [*launch, "recipes/lora_finetune.py", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": python_path},
            stdout=output,
            stderr=output,
        )


def run_on_two(arguments: list[str], folder: Path) -> Path:
    log = folder.with_suffix(".log")
    assert start_torchrun([*arguments, f"output_dir={folder}"], log).wait(timeout=300) == 0, log.read_text()
    return folder


@pytest.mark.parametrize("base", ["fp32", "bf16", "fp8", "nf4"])
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_gpus_have_the_losses_of_one_with_the_same_rows_a_step(run_arguments, wide_base, tmp_path, base, parallel):
    dtype = "fp32" if base == "fp32" else "bf16"
    arguments = [*run_arguments, f"base_dir={wide_base}", *OPTIONS, f"dtype={dtype}", f"base_weights={base}"]
    alone = run_to_end([*arguments, "batch_size=4"], tmp_path / "alone")
    two = run_on_two([*arguments, "batch_size=2", f"parallel={parallel}"], tmp_path / parallel)
    tolerance = 1e-4 if base == "fp32" else 0.02
    for key in ("loss", "val_loss"):
        found, expected = read_losses(two, key), read_losses(alone, key)
        assert len(expected) > 3
        assert found == pytest.approx(expected, rel=tolerance), key


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_a_run_of_which_a_process_was_killed_ends_as_if_never_stopped(run_arguments, wide_base, tmp_path, parallel):
    arguments = [*run_arguments, f"base_dir={wide_base}", *OPTIONS, "dtype=bf16", "base_weights=bf16"]
    arguments += ["batch_size=2", "lora_dropout=0.1", "dataset.packing=true", f"parallel={parallel}"]
    arguments += ["save_every_n_steps=1", "epochs=12"]
    whole = read_outcome(run_on_two(arguments, tmp_path / "whole"))
    folder = tmp_path / "killed"
    log = folder.with_suffix(".log")
    process = start_torchrun([*arguments, f"output_dir={folder}"], log)
    deadline = time.monotonic() + 200
    while count_lines(folder / "metrics.jsonl") < 4 and process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    ranks = psutil.Process(process.pid).children()
    ranks[-1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(timeout=120) != 0, "the kill hit the run"
    assert time.monotonic() - started < 60
    assert read_outcome(run_on_two([*arguments, "resume=auto"], folder)) == whole
