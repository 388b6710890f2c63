"""Memory of several processes of a run on one machine, relative to as many separate processes.

python benchmarks/shared_base.py --base-dir models/a-random-1B --processes 2 4

One optimizer step of the recipe, parallel=replicate, on the CPU, with a base from scripts/make_random_base.py. Memory
is the sum of the processes' proportional set sizes, which counts shared pages once. It is sampled ten times a second;
peaks are taken until the first step starts (loading) and over the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
GIGABYTE = 1e9


@dataclass
class Peak:
    """Peak bytes of all processes together, and seconds from start to end."""

    loading: int = 0
    run: int = 0
    seconds: float = 0.0


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_arguments(base_dir: Path, folder: Path, *, num_rows: int, base_weights: str) -> list[str]:
    return [
        "recipes/lora_finetune.py",
        *("--config", "configs/llama3_2_1b/lora.yaml", f"base_dir={base_dir}", "base_source=null", "device=cpu"),
        *("model.architecture=null", f"dataset.files=[{write_rows(folder / 'rows.jsonl', num_rows)}]"),
        *("dataset.validation_files=null", "dataset.validation_split=0", "max_seq_len=64", "batch_size=1", "epochs=1"),
        *("gradient_accumulation_steps=1", "warmup_steps=0", "num_samples=0", f"base_weights={base_weights}"),
    ]


def measure(command: list[str], output_dir: Path) -> Peak:
    """Run the command and measure it. Its output folder appears when its base is loaded."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak, started = Peak(), time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            now = measure_pss(process.pid)
            peak.run = max(peak.run, now)
            if not output_dir.exists():
                peak.loading = max(peak.loading, now)
            time.sleep(0.1)
        output.seek(0)
        assert process.returncode == 0, output.read().decode()
    peak.seconds = time.perf_counter() - started
    return peak


def measure_pss(pid: int) -> int:
    """Return the proportional set size of a process and its descendants, in bytes."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, StopIteration):
        pass  # the process ended meanwhile
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dir", type=Path, required=True)
    parser.add_argument("--base-weights", default="bf16", choices=["bf16", "nf4"])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    base_dir = arguments.base_dir.resolve()
    num_bytes = sum(path.stat().st_size for path in base_dir.glob("*.safetensors"))
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}")
    print(
        f"{base_dir.name}, {num_bytes / GIGABYTE:.2f} GB of weights, loaded as {arguments.base_weights}, 1 x 64 tokens"
    )
    print(f"{'':<16}{'loading':>10}{'whole run':>12}{'of weights x n':>18}{'of one x n':>16}{'seconds':>10}")
    one = 0
    for size in [1, *arguments.processes]:
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
        try:
            peak = measure_run(base_dir, folder, arguments.base_weights, size=size)
        finally:
            shutil.rmtree(folder)
        one = one or peak.run
        sizes = f"{peak.loading / GIGABYTE:>7.2f} GB{peak.run / GIGABYTE:>9.2f} GB"
        ratios = f"{peak.run / (size * num_bytes):>18.2f}{peak.run / (size * one):>16.2f}"
        name = "1 process" if size == 1 else f"{size} processes"
        print(f"{name:<16}{sizes}{ratios}{peak.seconds:>10.0f}", flush=True)


def measure_run(base_dir: Path, folder: Path, base_weights: str, *, size: int) -> Peak:
    """Measure a run of `size` processes with one row each."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={size}"]
    options = make_arguments(base_dir, folder, num_rows=size, base_weights=base_weights)
    return measure([*launcher, *options, f"output_dir={folder / 'run'}"], folder / "run")


if __name__ == "__main__":
    main()
