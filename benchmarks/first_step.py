"""Time and memory from the command to the first step on 100 000 rows, with a cold and a warm cache of tokens.

    python benchmarks/first_step.py --out benchmarks/results/first_step_cpu.txt

The rows are make_rows.py's and the tokenizer is Llama 3's. The model has few random weights, because the start is
timed, not the training. Each run is the whole recipe in a process of its own, with the data options of the shipped
config: start, config check, rows read, split, tokenized or mapped from the cache, model, validation loss and samples
before training, first step, the same measurements after it, save and report. Memory is the process's peak, and the
difference to the peak of the same run on 100 rows.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tune2gguf.base.pypi import LLAMA3_TOKENIZER, fetch_pypi_file
from tune2gguf.base.random_base import write_random_base
from tune2gguf.model.architectures import Architecture, RopeScaling

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_SEQ_LEN = 2048
WARM_REPEATS = 3
TINY = Architecture(
    vocab_size=128_256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    intermediate_dim=64,
    head_dim=8,
    max_position_embeddings=MAX_SEQ_LEN,
    tied=True,
    rope_scaling=RopeScaling(factor=32.0),
)


def make_rows(path: Path, num_rows: int) -> Path:
    command = [sys.executable, str(REPOSITORY / "benchmarks/make_rows.py"), str(path), "--rows", str(num_rows)]
    subprocess.run(command, check=True)
    return path


@dataclass(frozen=True)
class Run:
    """Cost of a run of one step; times in seconds, memory in MB."""

    first_step: float  # from the command to the first step's line in metrics.jsonl
    whole: float
    cpu: float  # of the run's process, user and system
    others: float  # other processes' share of the machine's time
    memory: float


def run_one_step(rows: Path, folder: Path, name: str) -> Run:
    """Run the recipe in a process of its own."""
    options = {
        "base_dir": folder / "base",
        "base_source": "null",
        "model.architecture": "null",
        "device": "cpu",
        "dtype": "fp32",
        "base_weights": "fp32",
        "max_seq_len": MAX_SEQ_LEN,
        "dataset.files": f"[{rows}]",
        "epochs": 1,
        "max_steps_per_epoch": 1,
        "warmup_steps": 0,
        "output_dir": folder / name,
    }
    config = str(REPOSITORY / "configs/llama3_2_1b/lora.yaml")
    command = [sys.executable, "recipes/lora_finetune.py", "--config", config]
    command += [f"{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "TUNE2GGUF_CACHE": str(folder / "cache")}
    log = folder / f"{name}.log"
    busy, started = read_busy_seconds(), time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        first_step, usage = watch(process.pid, folder / name / "metrics.jsonl")
    whole = time.perf_counter() - started
    if first_step is None:
        sys.exit(f"error: {' '.join(command)} took no step\n{log.read_text()}")
    cpu = usage.ru_utime + usage.ru_stime
    others = (read_busy_seconds() - busy - cpu) / (whole * os.cpu_count())
    return Run(first_step - started, whole, cpu, others, usage.ru_maxrss / 1000)


def watch(pid: int, metrics: Path) -> tuple[float | None, resource.struct_rusage]:
    """Wait for a run's end. Return the time of the first step's line in metrics.jsonl, and the process's usage."""
    first_step = None
    while True:
        if first_step is None and metrics.is_file() and '"tokens_per_second"' in metrics.read_text():
            first_step = time.perf_counter()
        ended, _, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return first_step, usage
        time.sleep(0.02)


def read_busy_seconds() -> float:
    """Return the busy time of all processors since the machine's start."""
    user, nice, system, _idle, _waiting, *interrupts = Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def measure(num_rows: int) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = LLAMA3_TOKENIZER
        tokenizer = fetch_pypi_file(file)
        write_random_base(TINY, folder / "base", kind="float32", tokenizer_model=tokenizer)
        few, many = make_rows(folder / "few.jsonl", 100), make_rows(folder / "many.jsonl", num_rows)
        runs = {"100 rows": run_one_step(few, folder, "few"), "cold": run_one_step(many, folder, "cold")}
        for repeat in range(1, WARM_REPEATS + 1):
            runs[f"warm {repeat}"] = run_one_step(many, folder, f"warm_{repeat}")
        size = many.stat().st_size / 1e6
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    machine = f"{os.cpu_count()} cores of {processor}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("tune2gguf", "torch", "tokenizers"))
    lines = [
        f"{date.today()}, {machine}, Python {platform.python_version()}",
        f"{packages}; {num_rows} rows, {size:.0f} MB",
        "run       first step  whole run    CPU time others   memory (over 100 rows)",
    ]
    lines += [
        f"{name:<9} {run.first_step:8.1f} s {run.whole:8.1f} s {run.cpu:9.1f} s {run.others:6.0%} {run.memory:6.0f} MB"
        f" ({run.memory - runs['100 rows'].memory:+.0f})"
        for name, run in runs.items()
    ]
    warm = statistics.median(run.first_step for name, run in runs.items() if name.startswith("warm"))
    lines.append(f"first step, median of {WARM_REPEATS} warm runs: {warm:.1f} s; others: their share of the machine")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="default: print only")
    arguments = parser.parse_args()
    result = measure(arguments.rows)
    print(result)
    if arguments.out is not None:
        arguments.out.write_text(result + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
