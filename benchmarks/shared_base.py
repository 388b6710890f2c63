"""What several processes of one machine hold of the base together, beside as many runs that know nothing of each other.

python benchmarks/shared_base.py --base-dir models/a-random-1B --processes 2 4

One optimizer step of the recipe, parallel=replicate, on the CPU; the base is made with scripts/make_random_base.py.
Memory is the sum of the processes' proportional set sizes: what n of them share counts once. It is looked at ten times
a second, apart for the time until the first step begins (loading) and for the whole run.
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
    """The most bytes of all processes together, and seconds from start to end."""

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


def measure(commands: list[list[str]], folders: list[Path]) -> Peak:
    """Run the commands at once; a run's folder appears when its base is loaded."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak, started = Peak(), time.perf_counter()
    with tempfile.TemporaryFile() as output:
        launched = [
            subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
            for command in commands
        ]
        while any(process.poll() is None for process in launched):
            now = sum(measure_pss(process.pid) for process in launched)
            peak.run = max(peak.run, now)
            if not all(folder.exists() for folder in folders):
                peak.loading = max(peak.loading, now)
            time.sleep(0.1)
        output.seek(0)
        assert all(process.returncode == 0 for process in launched), output.read().decode()
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
        pass  # one of them ended meanwhile
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
    print(f"{'':<24}{'loading':>10}{'whole run':>12}{'of weights x n':>18}{'seconds':>10}")
    for size in arguments.processes:
        peaks = []
        for is_one_run in (True, False):
            folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
            try:
                peaks.append(measure_case(base_dir, folder, arguments.base_weights, size=size, is_one_run=is_one_run))
            finally:
                shutil.rmtree(folder)
            peak, name = peaks[-1], f"{size} processes" if is_one_run else f"{size} runs"
            share = peak.run / (size * num_bytes)
            sizes = f"{peak.loading / GIGABYTE:>7.2f} GB{peak.run / GIGABYTE:>9.2f} GB"
            print(f"{name:<24}{sizes}{share:>18.2f}{peak.seconds:>10.0f}", flush=True)
        print(f"{size} processes of a run take {peaks[0].run / peaks[1].run:.2f} of {size} runs' memory", flush=True)


def measure_case(base_dir: Path, folder: Path, base_weights: str, *, size: int, is_one_run: bool) -> Peak:
    if is_one_run:
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={size}"]
        options = make_arguments(base_dir, folder, num_rows=size, base_weights=base_weights)
        return measure([[*launcher, *options, f"output_dir={folder / '0'}"]], [folder / "0"])
    options = make_arguments(base_dir, folder, num_rows=1, base_weights=base_weights)
    folders = [folder / str(number) for number in range(size)]
    return measure([[sys.executable, *options, f"output_dir={path}"] for path in folders], folders)


if __name__ == "__main__":
    main()
