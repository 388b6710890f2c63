"""From the command to the first step on 100 000 rows, cold and warm: tokenizing, its cache, and the memory it takes.

    python benchmarks/first_step.py --out benchmarks/results/first_step.txt

The rows are those of make_rows.py, the tokenizer is Llama 3's, the model has a few random weights, so that what is
timed is the way to the first step. Each run is the whole recipe in a process of its own: start, config check, data,
model, one step, save. Memory is the peak of the process, and what it is over that of the same run on 100 rows.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tune2gguf.architectures import Architecture, RopeScaling
from tune2gguf.pypi import LLAMA3_TOKENIZER, fetch_pypi_file
from tune2gguf.random_base import write_random_base

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_SEQ_LEN = 2048
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


def run_one_step(rows: Path, folder: Path, name: str) -> tuple[float, float]:
    """Return the seconds of a run of one step, and the peak of its memory in MB."""
    options = {
        "base_dir": folder / "base",
        "base_source": "null",
        "model.architecture": "null",
        "device": "cpu",
        "dtype": "fp32",
        "base_weights": "fp32",
        "max_seq_len": MAX_SEQ_LEN,
        "dataset.files": f"[{rows}]",
        "dataset.validation_split": "null",
        "epochs": 1,
        "max_steps_per_epoch": 1,
        "warmup_steps": 0,
        "output_dir": folder / name,
    }
    config = str(REPOSITORY / "configs/llama3_2_1b/lora.yaml")
    command = [sys.executable, "recipes/lora_finetune.py", "--config", config]
    command += [f"{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "TUNE2GGUF_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"error: {' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def measure(num_rows: int) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = LLAMA3_TOKENIZER
        tokenizer = fetch_pypi_file(file.package, file.version, file.member, file.sha256)
        write_random_base(TINY, folder / "base", kind="float32", tokenizer_model=tokenizer)
        few, many = make_rows(folder / "few.jsonl", 100), make_rows(folder / "many.jsonl", num_rows)
        _, base_memory = run_one_step(few, folder, "base_memory")
        load = os.getloadavg()[0]
        runs = {name: run_one_step(many, folder, name) for name in ("cold", "warm")}
        size = many.stat().st_size / 1e6
    packages = ", ".join(f"{name} {version(name)}" for name in ("tune2gguf", "torch", "tokenizers"))
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, load {load:.1f} before, Python {platform.python_version()}",
        f"{packages}; {num_rows} rows, {size:.0f} MB",
    ]
    for name, (seconds, memory) in runs.items():
        lines.append(f"{name}: {seconds:6.1f} s, memory {memory:.0f} MB ({memory - base_memory:+.0f})")
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
