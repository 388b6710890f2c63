"""A user's run on one GPU, on rows of real length: the recipe with a shipped config, torchtune, Unsloth.

    python benchmarks/gpu_user.py --folder /dev/shm/bases --unsloth-site DIR --out benchmarks/results/gpu_user.txt
    python benchmarks/gpu_user.py --folder … --models 8b --kinds lora --sides ours     # a part of it
    python benchmarks/gpu_user.py --merge part1.txt part2.txt --out benchmarks/results/gpu_user.txt

One epoch of the same conversations (one exchange, log-normal lengths, made by make_rows.py) with 8 rows per step, rank
16, alpha 16, all linear layers, bf16, no dropout. The bases have true shapes and random weights.

    ours          the shipped config without dropout
    ours shipped  the shipped config unchanged, dropout 0.1
    stock         torchtune's shipped config with these values, 2 x 4 rows
    stock best    compiled, without activation checkpointing, 8 x 1 rows
    unsloth       like its notebooks: 2 x 4 rows without padding, its offloaded checkpointing, 8-bit AdamW
    unsloth best  8 x 1 rows without padding, no checkpointing, torch's fused AdamW

Seconds of an epoch include start, load and first compilation: every run starts without compiled kernels, unless --warm
keeps those of the run before. `step 1` is the seconds until the first step is done, `end` those after the last one.
Tokens per second: tokens of an average step over the median seconds between two steps in the runs' logs. The loss is
the mean of the last eight steps. In warm-up the other sides are a step behind, as their first learning rate is 0;
--warmup-steps 0 gives all sides the same rates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gpu
import train_unsloth
from make_rows import make_row

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = {"1b": "llama3_2_1b", "3b": "llama3_2_3b", "8b": "llama3_1_8b"}
STOCK_CONFIGS = {"1b": "llama3_2/1B", "3b": "llama3_2/3B", "8b": "llama3_1/8B"}
KINDS = gpu.BASES
SIDES = ("ours", "ours shipped", "stock", "stock best", "unsloth", "unsloth best")
ROWS_PER_STEP, MAX_SEQ_LEN, LEARNING_RATE, WARMUP_STEPS = 8, 2048, 1e-4, 10
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(frozen=True)
class Rows:
    """The conversations, and their tokens: a JSON list of {tokens, labels}."""

    path: Path
    tokenized: Path
    count: int
    num_tokens: int

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens * ROWS_PER_STEP / self.count


def write_rows(folder: Path, count: int, base_dir: Path) -> Rows:
    """Write rows to files named after this process: others may write to the same folder."""
    from train_cases import describe_row

    from tune2gguf.data import chat_dataset
    from tune2gguf.tokenizer import load_tokenizer

    generator = random.Random(0)
    path, tokenized = folder / f"rows-{os.getpid()}.jsonl", folder / f"rows-{os.getpid()}.tokens.json"
    path.write_text("".join(json.dumps(make_row(generator, max_exchanges=1)) + "\n" for _ in range(count)))
    tokenizer = load_tokenizer(base_dir=base_dir, chat_template="llama3")
    data = chat_dataset(tokenizer=tokenizer, files=[str(path)], max_seq_len=MAX_SEQ_LEN, seed=42)
    tokenized.write_text(json.dumps([describe_row(row) for row in data.sequences]))
    return Rows(path, tokenized, len(data.sequences), int(sum(data.sequence_lengths)))


def make_our_command(
    model: str, kind: str, base_dir: Path, rows: Path, out: Path, *, warmup_steps: int, shipped: bool
) -> tuple[list[str], Path]:
    options = {
        "base_dir": base_dir,
        "base_weights": KINDS[kind],
        "dataset.files": f"[{rows}]",
        "dataset.validation_split": "null",
        "epochs": 1,
        "num_samples": 0,
        "save_every_n_steps": 100_000,
        "warmup_steps": warmup_steps,
        "output_dir": out,
    }
    if not shipped:
        options["lora_dropout"] = 0.0
    command = ["tune", "run", "recipes/lora_finetune.py", "--config", f"configs/{MODELS[model]}/lora.yaml"]
    return [*command, *(f"{key}={value}" for key, value in options.items())], out / "metrics.jsonl"


def list_stock_options(base_dir: Path, rows: Path, out: Path, *, warmup_steps: int = WARMUP_STEPS) -> dict[str, object]:
    """Return the overrides that give torchtune's recipes our rows, rank, layers and rows per step."""
    return {
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
        "optimizer.lr": LEARNING_RATE,
        "lr_scheduler.num_warmup_steps": warmup_steps,
        "metric_logger.filename": "log.txt",
    }


def make_stock_command(
    model: str, kind: str, base_dir: Path, rows: Path, out: Path, *, warmup_steps: int, best: bool
) -> tuple[list[str], Path]:
    options = list_stock_options(base_dir, rows, out, warmup_steps=warmup_steps) | {"clip_grad_norm": 1.0}
    if best:
        options |= {"batch_size": ROWS_PER_STEP, "gradient_accumulation_steps": 1}
        options |= {"compile": True, "enable_activation_checkpointing": False}
    command = ["tune", "run", "lora_finetune_single_device", "--config", f"{STOCK_CONFIGS[model]}_{kind}_single_device"]
    return [*command, *(f"{key}={value}" for key, value in options.items())], out / "logs/log.txt"


def make_unsloth_command(
    kind: str, base_dir: Path, rows: Path, out: Path, *, warmup_steps: int, best: bool
) -> tuple[list[str], Path]:
    log = out / "log.txt"
    options = {
        "base-dir": base_dir,
        "rows": rows,
        "kind": kind,
        "batch": ROWS_PER_STEP if best else 2,
        "accumulation": 1 if best else ROWS_PER_STEP // 2,
        "checkpointing": "false" if best else "unsloth",
        "optimizer": "adamw_torch_fused" if best else "adamw_8bit",
        "rank": gpu.RANK,
        "alpha": gpu.ALPHA,
        "learning-rate": LEARNING_RATE,
        "warmup-steps": warmup_steps,
        "max-seq-len": MAX_SEQ_LEN,
        "log": log,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, str(REPOSITORY / "benchmarks/train_unsloth.py"), *words], log


def watch(command: list[str], log: Path, output: Path, *, cwd: Path, environment: dict) -> tuple[float, list[float]]:
    """Run the command; return its seconds, and the times of its steps in the log."""
    started, moments, seen = time.perf_counter(), [], 0
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            lines = log.read_bytes().count(b"\n") if log.exists() else 0
            if lines > seen:
                seen = lines
                moments.append(time.perf_counter() - started)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output.read_text()[-3000:]}")
    return time.perf_counter() - started, moments


def make_environment(side: str, cwd: Path, out: Path, *, site: Path | None, warm: bool) -> dict[str, str]:
    """Return the environment of a run with its own folder for compiled kernels."""
    caches = out.with_name(f"{out.name}-caches")
    if not warm:
        shutil.rmtree(caches, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])}
    if side.startswith("unsloth"):
        environment = train_unsloth.make_environment(site, caches)
    return environment | {name: str(caches / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}


def measure(side: str, model: str, kind: str, rows: Rows, arguments: argparse.Namespace) -> str:
    """Run one side; return its line, or the reason why it has none."""
    folder, base_dir = arguments.folder.resolve(), arguments.folder.resolve() / MODELS[model]
    out = folder / f"{side}-{model}-{kind}".replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    cwd = folder  # Not the repository's root: there `tune` finds our recipes first.
    paths, options = (base_dir, rows.path, out), {"warmup_steps": arguments.warmup_steps}
    if side.startswith("ours"):
        command, log = make_our_command(model, kind, *paths, shipped=side == "ours shipped", **options)
        cwd = REPOSITORY
    elif side.startswith("stock"):
        command, log = make_stock_command(model, kind, *paths, best=side == "stock best", **options)
    else:
        paths = base_dir, rows.tokenized, out
        command, log = make_unsloth_command(kind, *paths, best=side == "unsloth best", **options)
    environment = make_environment(side, cwd, out, site=arguments.unsloth_site, warm=arguments.warm)
    case = f"{model:<4}{kind:<7}{side:<14}"
    try:
        seconds, moments = watch(command, log, out.with_suffix(".output.txt"), cwd=cwd, environment=environment)
    except RuntimeError as error:
        return f"{case}{error}"
    steps = [after - before for before, after in itertools.pairwise(moments)]
    median = statistics.median(steps[len(steps) // 3 :])
    loss, peak = read_last(log)
    speed = f"{rows.tokens_per_step / median:>9,.0f}"
    return f"{case}{speed}{moments[0]:>9.1f}{seconds - moments[-1]:>9.1f}{seconds:>9.1f}{peak:>8.1f}{loss:>8.3f}"


def read_last(log: Path) -> tuple[float, float]:
    """Return the mean loss of the last eight steps, and the peak memory in GiB."""
    if log.suffix == ".jsonl":
        records = [json.loads(line) for line in log.read_text().splitlines()]
        records = [record for record in records if "loss" in record]
        peak = max(record["peak_memory_bytes"] for record in records) / 2**30
    else:
        lines = [line.split(" | ")[1] for line in log.read_text().splitlines() if line.startswith("Step")]
        records = [dict(item.split(":") for item in line.split()) for line in lines]
        peak = max(float(record["peak_memory_active"]) for record in records)
    return statistics.mean(float(record["loss"]) for record in records[-8:]), peak


def merge(paths: list[Path]) -> list[str]:
    """Return the parts as one text: the first part's header, every part's command, and the table's lines by case."""
    parts = [path.read_text().splitlines() for path in paths]
    headers = [part[:1] + part[2:5] for part in parts]
    assert all(header == headers[0] for header in headers), "the parts differ in machine, packages or rows"

    def place(line: str) -> tuple[int, ...]:
        model, kind, side = line[:4].strip(), line[4:11].strip(), line[11:25].strip()
        return [*MODELS].index(model), [*KINDS].index(kind), SIDES.index(side)

    lines = sorted((line for part in parts for line in part[5:] if line.startswith(tuple(MODELS))), key=place)
    return [parts[0][0], *(part[1] for part in parts), *parts[0][2:5], *lines]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["lora", "qlora"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS)
    parser.add_argument("--warm", action="store_true", help="keep the compiled kernels of earlier runs")
    parser.add_argument("--folder", type=Path, help="folder of bases and runs")
    parser.add_argument("--unsloth-site", type=Path, help="a folder with Unsloth's packages; see train_unsloth.py")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="merge the texts of several calls")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.merge and arguments.folder is None:
        parser.error("--folder is missing")
    if not arguments.merge and arguments.unsloth_site is None and any("unsloth" in side for side in arguments.sides):
        parser.error("--unsloth-site is missing; Unsloth's sides need it")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.merge:
        text = "\n".join(merge(arguments.merge)) + "\n"
        print(text)
        if arguments.out:
            arguments.out.write_text(text)
        return
    for model in arguments.models:
        if not (arguments.folder / MODELS[model]).exists():
            missing = arguments.folder / MODELS[model]
            sys.exit(f"no base; make it: python scripts/make_random_base.py --model {MODELS[model]} --out {missing}")
    rows = write_rows(arguments.folder, arguments.rows, arguments.folder / MODELS[arguments.models[0]])
    lines = [
        gpu.describe_machine(),
        "command: python benchmarks/gpu_user.py " + " ".join(sys.argv[1:]),
        f"{rows.count} rows of {rows.num_tokens / rows.count:.0f} tokens on average, {ROWS_PER_STEP} a step",
        "",
        f"{'':<25}{'tokens/s':>9}{'step 1':>9}{'end':>9}{'epoch s':>9}{'GiB':>8}{'loss':>8}",
    ]
    print("\n".join(lines), flush=True)
    for model, kind, side in itertools.product(arguments.models, arguments.kinds, arguments.sides):
        lines.append(measure(side, model, kind, rows, arguments))
        print(lines[-1], flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
