"""Runs on several GPUs through NCCL: the losses of one GPU with equal rows per step, and exact resumes.

All runs on a number of GPUs share one start of the processes, except runs that are killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import REPOSITORY, make_run_arguments
from tests.gpu.models import MARKS
from tests.gpu.test_recipe import read_losses
from tests.recipes.launch import count_lines, read_outcome

pytestmark = MARKS

PARALLEL = ["replicate", "shard"]
# By base: its settings, and the limit on a loss's difference from one GPU.
BASES = {
    "fp32": (["dtype=fp32", "base_weights=fp32"], 1e-4),
    "bf16": (["dtype=bf16", "base_weights=bf16"], 0.02),
    "fp8": (["dtype=bf16", "base_weights=fp8"], 0.02),
    "nf4": (["dtype=bf16", "base_weights=nf4"], 0.02),
}
# 20 rows at 8 rows per step: two full steps and one of 4 rows, in which some of eight processes have no row.
OPTIONS = ["device=cuda", "epochs=4", "learning_rate=0.003", "max_seq_len=128"]
ROWS = {
    1: ["batch_size=4", "gradient_accumulation_steps=2"],
    2: ["batch_size=2", "gradient_accumulation_steps=2"],
    4: ["batch_size=1", "gradient_accumulation_steps=2"],
    8: ["batch_size=1", "gradient_accumulation_steps=1"],
}
HARD = [*BASES["bf16"][0], "lora_dropout=0.1", "dataset.packing=true", "save_every_n_steps=1", "epochs=20"]
SECONDS = 240  # limit for the processes to start, load, compile and train all runs


@dataclass(frozen=True)
class Runs:
    """The results of one number of GPUs: run folders by name."""

    folder: Path
    exit_codes: dict[str, int]  # of the killed runs


def start(num_gpus: int, arguments: list[str], log: Path) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_gpus)]
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with log.open("a") as output:
        return subprocess.Popen(
            [*launch, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": python_path},
            stdout=output,
            stderr=output,
        )


def start_runs(num_gpus: int, alone: list[list[str]], together: list[list[str]], log: Path) -> subprocess.Popen:
    runs = log.with_suffix(".json")
    runs.write_text(json.dumps({"alone": alone, "together": together}))
    return start(num_gpus, ["tests/recipes/several_runs.py", str(runs)], log)


def finish(process: subprocess.Popen, log: Path) -> None:
    try:
        assert process.wait(timeout=SECONDS) == 0, log.read_text()
    finally:
        process.kill()


def kill_one_process(launcher: subprocess.Popen, metrics: Path, log: Path) -> int:
    """Kill the last process after four written steps; return the launcher's exit code."""
    deadline = time.monotonic() + SECONDS
    while count_lines(metrics) < 4 and launcher.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    processes = psutil.Process(launcher.pid).children()
    processes[-1].send_signal(signal.SIGKILL)
    return launcher.wait(timeout=60)


@pytest.fixture(scope="module", params=[2, 4, 8], ids=lambda num_gpus: f"on_{num_gpus}")
def runs(request, tmp_path_factory, small_base) -> Runs:
    num_gpus = request.param
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} CUDA devices")
    folder = tmp_path_factory.mktemp("runs")
    shared = [*make_run_arguments(folder, small_base), *OPTIONS]
    alone = [
        [*shared, *settings, *ROWS[1], f"output_dir={folder}/alone-{base}"] for base, (settings, _) in BASES.items()
    ]
    shared += ROWS[num_gpus]
    together = [
        [*shared, *settings, f"parallel={parallel}", f"output_dir={folder}/{parallel}-{base}"]
        for parallel in PARALLEL
        for base, (settings, _) in BASES.items()
    ]
    hard = {parallel: [*shared, *HARD, f"parallel={parallel}"] for parallel in PARALLEL}
    together += [[*arguments, f"output_dir={folder}/{parallel}-whole"] for parallel, arguments in hard.items()]
    log = folder / "all.log"
    all_runs = start_runs(num_gpus, alone, together, log)
    killed = {parallel: [*arguments, f"output_dir={folder}/{parallel}-killed"] for parallel, arguments in hard.items()}

    def start_and_kill(parallel: str) -> int:
        own_log = folder / f"{parallel}.log"
        launcher = start(num_gpus, ["recipes/lora_finetune.py", *killed[parallel]], own_log)
        return kill_one_process(launcher, folder / f"{parallel}-killed/metrics.jsonl", own_log)

    with ThreadPoolExecutor() as threads:  # most of a start is waiting
        exit_codes = dict(zip(PARALLEL, threads.map(start_and_kill, PARALLEL), strict=True))
    finish(all_runs, log)
    log = folder / "resumed.log"
    finish(start_runs(num_gpus, [], [[*arguments, "resume=auto"] for arguments in killed.values()], log), log)
    return Runs(folder, exit_codes)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_several_gpus_have_the_losses_of_one_with_the_same_rows_a_step(runs, parallel, base):
    tolerance = BASES[base][1]
    for key in ("loss", "val_loss"):
        found = read_losses(runs.folder / f"{parallel}-{base}", key)
        expected = read_losses(runs.folder / f"alone-{base}", key)
        assert len(expected) > 3
        assert found == pytest.approx(expected, rel=tolerance), key
        # Negative control: the change of one step would be detected.
        assert expected[-1] < (1 - 5 * tolerance) * expected[0]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_run_of_which_a_process_was_killed_ends_as_if_never_stopped(runs, parallel):
    assert runs.exit_codes[parallel] != 0, "the kill hit the run"
    whole = read_outcome(runs.folder / f"{parallel}-whole")
    assert read_outcome(runs.folder / f"{parallel}-killed") == whole
