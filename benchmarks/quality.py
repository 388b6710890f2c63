"""What is learned: held-out loss of this package, PEFT and torchtune at equal rows a step and hyperparameters.

    python benchmarks/quality.py --out benchmarks/results/quality.txt                          # one GPU
    python benchmarks/quality.py --devices 0 1 2 3 --jobs 3 --out benchmarks/results/quality.txt   # four, 12 workers
    python benchmarks/quality.py --devices cpu --sets units --seeds 1 --rows 40 --out /tmp/quality.txt

SmolLM2-135M-Instruct (the quickstart's; `python scripts/download.py --config examples/quickstart/lora.yaml`), three
data sets of 240 training rows and 80 held-out rows, ten seeds: the last adapter's loss on the held-out rows. `ours` is
the recipe by its own entry point, `peft` transformers and PEFT in a plain loop, `stock` torchtune's model, loss,
collation and order of rows in bf16. All take the same token ids and labels, 8 rows a step, three epochs, rank 16 on
all linear layers, dropout 0.1, AdamW at 1e-3 with warm-up and cosine; rows are shuffled, each side by its own rule.

One judge measures all: transformers in float32 on the merged weights. Sides are compared by the paired difference over
seeds, with its 95 % interval (Student's t). Exit code 1 where ours is worse by more than the noise of seeds: where the
interval of a difference lies above 0. Results go to a .jsonl beside --out as they come; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import make_rows
import make_verdict_data

REPOSITORY = Path(__file__).resolve().parents[1]
SIDES = ("ours", "peft", "stock")
NUM_TRAIN, NUM_HELD_OUT = 240, 80


def make_orders(count: int) -> list[dict]:
    return [json.loads(row) for row in make_verdict_data.make_rows(make_verdict_data.make_order, count)]


def make_units(count: int) -> list[dict]:
    return [json.loads(row) for row in make_verdict_data.make_rows(make_verdict_data.make_conversion, count)]


def make_chats(count: int) -> list[dict]:
    generator = random.Random(make_verdict_data.SEED)
    return [make_rows.make_row(generator, max_exchanges=1) for _ in range(count)]


# Orders as JSON, unit conversions with their step, and conversations of log-normal length.
SETS = {"orders": make_orders, "units": make_units, "chats": make_chats}


def work(arguments: argparse.Namespace) -> None:
    """Be a worker: run this process's share of what is to do, a line of JSON to the records for each."""
    import torch
    from quality_sides import TRAINERS, Judge, Task, tokenize, write_rows

    if arguments.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.jobs))
    judge = Judge(arguments.base_dir, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        for name in arguments.sets:
            rows = SETS[name](NUM_TRAIN + NUM_HELD_OUT)
            files = [Path(folder) / f"{name}-train.jsonl", Path(folder) / f"{name}-heldout.jsonl"]
            for file, part in zip(files, (rows[:NUM_TRAIN], rows[NUM_TRAIN:]), strict=True):
                write_rows(file, part[: arguments.rows])
            sets[name] = files[0], *(tokenize(arguments.base_dir, file) for file in files)
            record(arguments.records, name, "base", None, judge.measure(sets[name][2]), 0.0)
        for name, seed, side in json.loads(arguments.work):
            file, train, held_out = sets[name]
            started, run = time.perf_counter(), Path(folder) / "side"
            run.mkdir()
            task = Task(arguments.base_dir, file, train, seed, arguments.device, run)
            adapter = TRAINERS[side](task)
            seconds = time.perf_counter() - started
            record(arguments.records, name, side, seed, judge.measure(held_out, adapter), seconds)
            shutil.rmtree(run)
            if arguments.device != "cpu":
                torch.cuda.empty_cache()


def record(path: Path, name: str, side: str, seed: int | None, loss: float, seconds: float) -> None:
    line = json.dumps({"set": name, "side": side, "seed": seed, "loss": loss, "seconds": round(seconds, 1)})
    with path.open("a") as file:  # one write: workers share the file
        file.write(line + "\n")


def read_records(path: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Return the losses by seed of each set and side."""
    losses: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            losses[one["set"], one["side"]][one["seed"]] = one["loss"]
    return losses


def start_workers(arguments: argparse.Namespace) -> None:
    """Share out what is not recorded yet; raise if a worker fails."""
    done = read_records(arguments.records)
    # A side's runs cost unequally: dealt out one by one, every worker has its share of each.
    todo = [
        (name, seed, side)
        for side in arguments.sides
        for name in arguments.sets
        for seed in range(1, arguments.seeds + 1)
        if seed not in done[name, side]
    ]
    devices = [device for device in arguments.devices for _ in range(arguments.jobs)]
    processes = []
    for number, device in enumerate(devices):
        share = todo[number :: len(devices)]
        if not share:
            continue
        command = [sys.executable, __file__, "--work", json.dumps(share), "--records", str(arguments.records)]
        command += ["--base-dir", str(arguments.base_dir), "--rows", str(arguments.rows), "--jobs", str(len(devices))]
        command += ["--device", "cpu" if device == "cpu" else "cuda", "--sets", *arguments.sets]
        environment = dict(os.environ)
        if device != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = device
        log = arguments.records.with_suffix(f".{number}.log")
        processes.append(
            (log, subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment))
        )
    failed = [log for log, process in processes if process.wait() != 0]
    if failed:
        sys.exit("\n".join(f"a worker failed: {log}\n{log.read_text()[-2000:]}" for log in failed))


def compare(ours: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Return the mean of ours - other over the seeds that both have, and half its 95 % interval, infinite for one."""
    from scipy import stats

    differences = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
    if len(differences) < 2:
        return statistics.mean(differences), math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(stats.t.ppf(0.975, len(differences) - 1)) * error


def tabulate(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the table's lines, and the comparisons in which ours is worse."""
    losses, worse = read_records(arguments.records), []
    lines = [f"{'':<8}{'base':>8}" + "".join(f"{side + ' (sd over seeds)':>24}" for side in arguments.sides)]
    for name in arguments.sets:
        line = f"{name:<8}{losses[name, 'base'][None]:>8.4f}"
        for side in arguments.sides:
            values = list(losses[name, side].values())
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            line += f"{statistics.mean(values):>16.4f} ({spread:.4f})"
        lines.append(line)
    lines += ["", "ours - other, mean over seeds and 95 % interval; below 0 ours is better"]
    for name in arguments.sets if "ours" in arguments.sides else []:
        for side in arguments.sides[1:]:
            difference, half = compare(losses[name, "ours"], losses[name, side])
            low, high = difference - half, difference + half
            lines.append(f"{name:<8}{side:<8}{difference:>+9.4f}   {low:+.4f} … {high:+.4f}")
            if low > 0:
                worse.append(f"{name}: ours is worse than {side} by {difference:.4f}, more than the noise of seeds")
    return lines, worse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["0"], help="numbers of GPUs, or cpu")
    parser.add_argument("--jobs", type=int, default=1, help="workers on each device")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=NUM_TRAIN, help="at most so many rows to train on and held out")
    parser.add_argument("--base-dir", type=Path, default=REPOSITORY / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--records", type=Path, help="used by the script itself")
    parser.add_argument("--work", help="used by the script itself: runs as JSON")
    parser.add_argument("--device", help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.work is None and arguments.out is None:
        parser.error("--out is missing")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.work is not None:
        work(arguments)
        return
    if not arguments.base_dir.is_dir():
        sys.exit(f"{arguments.base_dir} is missing: python scripts/download.py --config examples/quickstart/lora.yaml")
    import gpu

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.records = arguments.out.with_suffix(".jsonl").resolve()
    arguments.base_dir = arguments.base_dir.resolve()
    started = time.perf_counter()
    start_workers(arguments)
    lines, worse = tabulate(arguments)
    head = [gpu.describe_machine(), "command: python benchmarks/quality.py " + " ".join(sys.argv[1:])]
    count = f"{min(arguments.rows, NUM_TRAIN)} rows to train on, {min(arguments.rows, NUM_HELD_OUT)} held out, "
    count += f"{arguments.seeds} seeds; loss in nats per supervised token; {time.perf_counter() - started:.0f} s"
    text = "\n".join([*head, count, "", *lines, *worse]) + "\n"
    print(text)
    arguments.out.write_text(text)
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
