"""Make real runs with known verdicts (KINDS), for judge_runs.py.

    python benchmarks/verdict_runs.py --out runs/verdict --devices 0 --jobs 6 [--only TEXT] [--pack FILE.tar.gz]
    python benchmarks/verdict_runs.py --out runs/verdict --no-training --record benchmarks/results/verdict_runs.jsonl

SmolLM2-135M-Instruct on three data sets: the quickstart's conversations, orders as JSON, unit conversions. Finished
runs are not repeated; a stopped run resumes. --pack writes all runs without weights to an archive after each run; they
can be unpacked and used elsewhere. --record writes the verdict's inputs of each run.
"""

import argparse
import json
import random
import sys
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runs import END_FILE, REPOSITORY, add_arguments, count_threads, do_side_by_side, is_finished, train

from tune2gguf.runs.curves import read_curves
from tune2gguf.runs.files import split_lines
from tune2gguf.verdict.judge import GOOD_FIT, INCONCLUSIVE, OVERFITTING, UNDERFITTING, judge

DATA_SETS = {"quickstart": "examples/quickstart", "orders": "benchmarks/data/orders", "units": "benchmarks/data/units"}
BATCH_SIZE = 8
PACKED = ("config.yaml", "environment.json", "data.json", "plan.json", "heldout.jsonl", "metrics.jsonl", END_FILE)


@dataclass(frozen=True)
class Kind:
    """Settings of a run, and its expected label.

    Attributes:
        num_rows: training rows, drawn by the seed; None takes all
        num_validation_rows: None takes all
    """

    expected: str
    seeds: tuple[int, ...]
    settings: dict[str, float | int | str]
    num_rows: int | None = None
    num_validation_rows: int | None = None


# The labels were written down before the first run. The rate that suits this model is 1e-3.
BALANCED = {"epochs": 4, "learning_rate": 1.0e-3, "warmup_steps": 10, "lora_dropout": 0.1, "weight_decay": 0.01}
KINDS = {
    # Few rows, many epochs, a high learning rate, no regularization.
    "overfit": Kind(
        OVERFITTING,
        (1, 2, 3),
        BALANCED
        | {"epochs": 30, "learning_rate": 2.0e-3, "scheduler": "constant", "lora_dropout": 0, "weight_decay": 0},
        num_rows=24,
    ),
    "tiny-rate": Kind(UNDERFITTING, (1, 2), BALANCED | {"epochs": 1, "learning_rate": 2.0e-6}),
    "few-steps": Kind(UNDERFITTING, (1, 2), BALANCED | {"epochs": 1, "max_steps_per_epoch": 10, "warmup_steps": 5}),
    "balanced": Kind(GOOD_FIT, (1, 2, 3), BALANCED),
    "few-heldout": Kind(INCONCLUSIVE, (1, 2), BALANCED | {"epochs": 2}, num_validation_rows=4),
}


@dataclass(frozen=True)
class Run:
    """One run of one kind on one data set."""

    data_set: str
    kind_name: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data_set}-{self.kind_name}-{self.seed}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.kind_name]


def list_runs(only: str) -> list[Run]:
    """Return all runs with the text in their names. The longest come first, to keep the devices busy to the end."""
    runs = [Run(data, name, seed) for name, kind in KINDS.items() for data in DATA_SETS for seed in kind.seeds]
    return sorted((run for run in runs if only in run.name), key=count_steps, reverse=True)


def read_rows(run: Run, split: str) -> list[str]:
    """Return the lines of a run's data set."""
    return [line for line in split_lines(REPOSITORY / DATA_SETS[run.data_set] / f"{split}.jsonl") if line.strip()]


def count_steps(run: Run) -> int:
    settings, num_rows = run.kind.settings, run.kind.num_rows or len(read_rows(run, "train"))
    steps_per_epoch = -(-num_rows // BATCH_SIZE)
    return settings["epochs"] * min(steps_per_epoch, settings.get("max_steps_per_epoch", steps_per_epoch))


def make_settings(run: Run, out: Path) -> dict[str, Any]:
    """Return the run's settings. Write its own training rows if it has fewer than all."""
    folder, kind = REPOSITORY / DATA_SETS[run.data_set], run.kind
    train = folder / "train.jsonl"
    if kind.num_rows is not None:
        train = out / "data" / f"{run.name}.jsonl"
        train.parent.mkdir(parents=True, exist_ok=True)
        picked = random.Random(run.seed).sample(read_rows(run, "train"), kind.num_rows)
        train.write_text("".join(f"{line}\n" for line in picked), encoding="utf-8")
    return {
        "batch_size": BATCH_SIZE,
        "seed": run.seed,
        "dataset.files": [str(train)],
        "dataset.validation_files": [str(folder / "heldout.jsonl")],
        "max_val_rows": kind.num_validation_rows or len(read_rows(run, "heldout")),
        "eval_every_n_steps": -(-count_steps(run) // 10),
        **kind.settings,
    }


def pack(runs: list[Run], *, out: Path, path: Path, lock: threading.Lock) -> None:
    """Write the files and logs of all runs so far, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with lock:
        with tarfile.open(unfinished, "w:gz") as archive:
            for run in runs:
                files = [out / run.name / name for name in PACKED] if is_finished(out / run.name) else []
                for file in (*files, out / f"{run.name}.log"):
                    if file.is_file():
                        archive.add(file, file.relative_to(out))
        unfinished.replace(path)


def describe_run(run_dir: Path) -> dict[str, Any]:
    """Return the verdict's inputs of a run, its device and torch. Losses have 4 digits."""
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    curves = read_curves(run_dir)
    return {
        "started": environment["started"],
        "device": environment["device"],
        "torch": environment["packages"]["torch"],
        "loss": [step.loss and round(step.loss, 4) for step in curves.training],
        "lr": [step.lr and float(f"{step.lr:.4g}") for step in curves.training],
        "row_tokens": curves.validations[0].row_tokens,
        "validations": [
            {"step": one.step, "epoch": one.epoch, "rows": [round(x, 4) for x in one.row_losses]}
            for one in curves.validations
        ],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make runs of known kinds.")
    add_arguments(parser, out=Path("runs/verdict"))
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their names")
    parser.add_argument("--no-training", action="store_true", help="use finished runs only")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the runs without weights to a .tar.gz")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the verdict's inputs of the runs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runs = list_runs(arguments.only)
    if not arguments.no_training:
        lock = threading.Lock()
        options = {
            "precision": arguments.precision,
            "threads": count_threads(arguments.devices, arguments.jobs),
        }

        def train_and_pack(run: Run, device: str) -> None:
            train(out / run.name, make_settings(run, out), device=device, **options)
            if arguments.pack is not None:
                pack(runs, out=out, path=arguments.pack, lock=lock)

        do_side_by_side(train_and_pack, runs, devices=arguments.devices, jobs=arguments.jobs)
    finished = [(run, read_curves(out / run.name)) for run in runs if is_finished(out / run.name)]
    for run, curves in finished:
        print(f"{run.name}: made to be {run.kind.expected}, judged {judge(curves).label}")
    if arguments.record is not None:
        records = [{"run": run.name, **describe_run(out / run.name)} for run, _ in finished]
        lines = sorted(json.dumps(one, separators=(",", ":")) for one in records)
        arguments.record.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"wrote {arguments.record}")
    missing = len(runs) - len(finished)
    if missing:
        sys.exit(f"error: {missing} of {len(runs)} runs are not finished; their logs are beside their folders")


if __name__ == "__main__":
    main()
