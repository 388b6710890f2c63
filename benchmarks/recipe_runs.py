"""Runs of the recipe, several side by side on one or more devices. Finished runs are not repeated."""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tune2gguf.commands import format_overrides

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "examples/quickstart/lora.yaml"
SMOLLM2 = REPOSITORY / "models/SmolLM2-135M-Instruct"
# The last file of a finished run.
END_FILE = "verdict.json"

T = TypeVar("T")


def is_finished(run_dir: Path) -> bool:
    return (run_dir / END_FILE).is_file()


def add_arguments(parser: argparse.ArgumentParser, *, out: Path) -> None:
    """Add the options for output folder, devices, jobs and precision."""
    parser.add_argument("--out", type=Path, default=out, help="folder of the runs and their logs")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="numbers of GPUs, or cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side per device")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="dtype of base and computation")


def do_side_by_side(do: Callable[[T, str], object], tasks: Sequence[T], *, devices: list[str], jobs: int) -> None:
    """Call do(task, device) for each task in order, `jobs` at a time on each device."""
    free: queue.Queue[str] = queue.Queue()
    for device in devices * jobs:
        free.put(device)

    def take(task: T) -> None:
        device = free.get()
        try:
            do(task, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices) * jobs) as pool:
        list(pool.map(take, tasks))


def make_overrides(run_dir: Path, settings: Mapping[str, Any], *, device: str, precision: str) -> dict[str, Any]:
    """Return the overrides of the quickstart's config for a run without samples, on one of --devices."""
    return {
        "device": "cpu" if device == "cpu" else "cuda",
        "dtype": precision,
        "base_weights": precision,
        "num_samples": 0,
        "keep_last": 1,
        "output_dir": str(run_dir),
        "resume": "auto",
        "base_dir": str(SMOLLM2),
        **settings,
    }


def run_recipe(run_dir: Path, arguments: Sequence[str], *, device: str, threads: int) -> bool:
    """Run the recipe with these arguments; return whether the run finished. Its output is beside its folder."""
    if is_finished(run_dir):
        return True
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    search_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": search_path}
    if device != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, str(REPOSITORY / "recipes/lora_finetune.py"), *arguments]
    started, log_path = time.perf_counter(), run_dir.with_name(f"{run_dir.name}.log")
    with log_path.open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    print(
        f"{run_dir.name}: {'done' if done.returncode == 0 else f'FAILED ({log_path})'} in {seconds:.0f} s", flush=True
    )
    return done.returncode == 0


def train(run_dir: Path, settings: Mapping[str, Any], *, device: str, precision: str, threads: int) -> bool:
    """Train with the quickstart's config and these settings, unless the run is finished; return whether it is now."""
    overrides = make_overrides(run_dir, settings, device=device, precision=precision)
    arguments = ["--config", str(CONFIG), *format_overrides(overrides)]
    return run_recipe(run_dir, arguments, device=device, threads=threads)


def count_threads(devices: Sequence[str], jobs: int) -> int:
    """Return the CPU threads of each run."""
    return max(1, (os.cpu_count() or 1) // (len(devices) * jobs))
