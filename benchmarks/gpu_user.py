"""A user's own run on one GPU: the recipe with a shipped config on rows of real length, and torchtune's own beside it.

    python benchmarks/gpu_user.py --out benchmarks/results/gpu_user.txt
    python benchmarks/gpu_user.py --models 8b --kinds lora --sides ours   # a part of it

One epoch of the same conversations (one exchange, log-normal lengths, made by make_rows.py) with 8 rows a step, rank
16, alpha 16, all linear layers, bf16; the bases hold random weights in the true shapes. `ours` is the shipped config as
it stands; `stock` is torchtune's shipped config with those values (no dropout), `stock best` the same compiled and
without activation checkpointing. Seconds of an epoch include the start, the load and the first compile. Tokens per
second: tokens of an average step over the median seconds between two steps, as the runs wrote them to their logs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gpu
from make_rows import make_row

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = {"1b": "llama3_2_1b", "3b": "llama3_2_3b", "8b": "llama3_1_8b"}
STOCK_CONFIGS = {"1b": "llama3_2/1B", "3b": "llama3_2/3B", "8b": "llama3_1/8B"}
KINDS = gpu.BASES
SIDES = ("ours", "stock", "stock best")
ROWS_PER_STEP = 8
SECONDS_BETWEEN_LOOKS = 0.002


def write_rows(path: Path, count: int) -> Path:
    generator = random.Random(0)
    path.write_text("".join(json.dumps(make_row(generator, max_exchanges=1)) + "\n" for _ in range(count)))
    return path


def make_our_command(model: str, kind: str, base_dir: Path, rows: Path, out: Path) -> tuple[list[str], Path]:
    options = {
        "base_dir": base_dir,
        "base_weights": KINDS[kind],
        "dataset.files": f"[{rows}]",
        "dataset.validation_split": "null",
        "epochs": 1,
        "num_samples": 0,
        "save_every_n_steps": 100_000,
        "output_dir": out,
    }
    command = ["tune", "run", "recipes/lora_finetune.py", "--config", f"configs/{MODELS[model]}/lora.yaml"]
    return [*command, *(f"{key}={value}" for key, value in options.items())], out / "metrics.jsonl"


def make_stock_command(
    model: str, kind: str, base_dir: Path, rows: Path, out: Path, *, best: bool
) -> tuple[list[str], Path]:
    options = {
        "output_dir": out,
        "model.lora_attn_modules": "[q_proj,k_proj,v_proj,output_proj]",
        "model.lora_rank": gpu.RANK,
        "model.lora_alpha": gpu.ALPHA,
        "tokenizer.path": base_dir / "original/tokenizer.model",
        "checkpointer.checkpoint_dir": base_dir,
        "checkpointer.checkpoint_files": f"[{','.join(sorted(path.name for path in base_dir.glob('*.safetensors')))}]",
        "save_adapter_weights_only": True,
        "dataset._component_": "torchtune.datasets.chat_dataset",
        "dataset.source": "json",
        "dataset.data_files": rows,
        "dataset.split": "train",
        "dataset.conversation_column": "messages",
        "dataset.conversation_style": "openai",
        "seed": 42,
        "batch_size": 2,
        "gradient_accumulation_steps": ROWS_PER_STEP // 2,
        "epochs": 1,
        "optimizer.lr": 1e-4,
        "lr_scheduler.num_warmup_steps": 10,
        "compile": best,
        "enable_activation_checkpointing": not best,
        "metric_logger.filename": "log.txt",
    }
    command = ["tune", "run", "lora_finetune_single_device", "--config", f"{STOCK_CONFIGS[model]}_{kind}_single_device"]
    return [*command, *(f"{key}={value}" for key, value in options.items())], out / "logs/log.txt"


def watch(command: list[str], log: Path, out: Path, cwd: Path) -> tuple[float, list[float]]:
    """Run the command; return its seconds, and the moments at which steps were logged."""
    started, moments, seen = time.perf_counter(), [], 0
    output = out.with_suffix(".output.txt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])}
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            lines = log.read_bytes().count(b"\n") if log.exists() else 0
            if lines > seen:
                seen = lines
                moments.append(time.perf_counter() - started)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.read_text()[-3000:]}")
    return time.perf_counter() - started, moments


def measure(side: str, model: str, kind: str, base_dir: Path, rows: Path, tokens: int, folder: Path) -> str:
    out = folder / f"{side}-{model}-{kind}".replace(" ", "-")
    if side == "ours":
        (command, log), cwd = make_our_command(model, kind, base_dir, rows, out), REPOSITORY
    else:  # Not from the repository's root, where `tune` would find our recipes first.
        command, log = make_stock_command(model, kind, base_dir, rows, out, best=side == "stock best")
        cwd = folder
    seconds, moments = watch(command, log, out, cwd)
    steps = [after - before for before, after in itertools.pairwise(moments)]
    median = statistics.median(steps[len(steps) // 3 :])
    loss, peak = read_last(log)
    case = f"{model:<4}{kind:<7}{side:<12}"
    return f"{case}{tokens / median:>9,.0f}{moments[0]:>9.1f}{seconds:>9.1f}{peak:>8.1f}{loss:>8.3f}"


def read_last(log: Path) -> tuple[float, float]:
    """Return the mean loss of the last eight steps, and the peak of memory in GiB."""
    if log.suffix == ".jsonl":
        records = [json.loads(line) for line in log.read_text().splitlines()]
        records = [record for record in records if "loss" in record]
        peak = max(record["peak_memory_bytes"] for record in records) / 2**30
    else:
        lines = [line.split(" | ")[1] for line in log.read_text().splitlines() if line.startswith("Step")]
        records = [dict(item.split(":") for item in line.split()) for line in lines]
        peak = max(float(record["peak_memory_active"]) for record in records)
    return statistics.mean(float(record["loss"]) for record in records[-8:]), peak


def count_tokens(model: str, base_dir: Path, rows: Path) -> int:
    from tune2gguf.data import chat_dataset
    from tune2gguf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_dir=base_dir, chat_template="llama3")
    data = chat_dataset(tokenizer=tokenizer, files=[str(rows)], max_seq_len=2048, seed=42)
    return sum(data.sequence_lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["lora", "qlora"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--folder", type=Path, required=True, help="where bases are, MODEL in each, and runs go")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(arguments.folder / "rows.jsonl", arguments.rows)
    lines = [gpu.describe_machine(), "command: python benchmarks/gpu_user.py " + " ".join(sys.argv[1:])]
    for model in arguments.models:
        base_dir = arguments.folder / MODELS[model]
        if not base_dir.exists():
            sys.exit(f"python scripts/make_random_base.py --model {MODELS[model]} --out {base_dir}")
        total = count_tokens(model, base_dir, rows)
        if model == arguments.models[0]:
            lines += [
                f"{arguments.rows} rows of {total / arguments.rows:.0f} tokens on average, {ROWS_PER_STEP} a step",
                "",
            ]
            lines += [f"{'':<23}{'tokens/s':>9}{'step 1':>9}{'epoch s':>9}{'GiB':>8}{'loss':>8}"]
            print("\n".join(lines), flush=True)
        tokens = total * ROWS_PER_STEP // arguments.rows
        for kind in arguments.kinds:
            for side in arguments.sides:
                lines.append(measure(side, model, kind, base_dir, rows, tokens, arguments.folder))
                print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
