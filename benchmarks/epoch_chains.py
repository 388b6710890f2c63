"""Runs of which twice as long ones are made as well: what more training brings, on rows that no run sees.

    python benchmarks/epoch_chains.py --out runs/chains --devices 0 --jobs 5 --record benchmarks/results/chains.jsonl
    python benchmarks/epoch_chains.py --sets units --seeds 1 --epochs 1 2 --held-out 40 40 --record /tmp/chains.jsonl

A chain is a data set, a model, a rate and a seed; its runs differ in `epochs` alone, each twice the one before. Of the
held-out rows that all of them measure, the first ones are the validation rows, by which the verdict goes; the others
are the test rows, by which judge_chains.py says what was true. Sets: SEEN, which the verdict's rules were made on, and
those of unseen_data.py. Finished runs are not repeated; --record adds those that it does not hold yet.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import quality
from recipe_runs import (
    REPOSITORY,
    SMOLLM2,
    add_arguments,
    count_threads,
    do_side_by_side,
    is_finished,
    train,
)
from unseen_data import UNSEEN, make_unseen
from verdict_runs import describe_run

from tune2gguf.runs.files import read_json_lines, split_lines

BATCH_SIZE, WARMUP_STEPS, TIMES_A_RUN = 8, 3, 4


def read_quickstart(num_rows: int) -> list[str]:
    lines = [
        line for part in ("train", "heldout") for line in split_lines(REPOSITORY / f"examples/quickstart/{part}.jsonl")
    ]
    return [line for line in lines if line.strip()][-num_rows:]


SEEN = {name: lambda count, make=make: [json.dumps(row) for row in make(count)] for name, make in quality.SETS.items()}
SEEN["quickstart"] = read_quickstart


@dataclass(frozen=True)
class ChainRun:
    """One run of a chain."""

    data_set: str
    model: str
    learning_rate: float
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.data_set}-{self.model}-{self.learning_rate:g}-{self.seed}-{self.epochs}"


def list_runs(arguments: argparse.Namespace) -> list[ChainRun]:
    """Return all runs, the longest first, so that none is left alone at the end."""
    return [
        ChainRun(data_set, Path(model).name, rate, seed, epochs)
        for epochs in sorted(arguments.epochs, reverse=True)
        for model in arguments.models
        for data_set in arguments.sets
        for rate in arguments.rates
        for seed in range(1, arguments.seeds + 1)
    ]


def write_data(folder: Path, data_set: str, *, num_rows: int, held_out: int) -> list[Path]:
    """Write training and held-out rows of a set; return the paths."""
    count = num_rows + held_out
    rows = make_unseen(data_set, count) if data_set in UNSEEN else SEEN[data_set](count)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{data_set}-{part}.jsonl" for part in ("train", "heldout")]
    for path, part in zip(paths, (rows[:num_rows], rows[num_rows:]), strict=True):
        path.write_text("".join(f"{row}\n" for row in part), encoding="utf-8")
    return paths


def make_settings(run: ChainRun, base_dir: Path, files: list[Path], *, num_rows: int, held_out: int) -> dict[str, Any]:
    steps = run.epochs * -(-num_rows // BATCH_SIZE)
    return {
        "base_dir": str(base_dir),
        "model.architecture": None if base_dir != SMOLLM2 else "smollm2_135m",
        "dataset.files": [str(files[0])],
        "dataset.validation_files": [str(files[1])],
        "epochs": run.epochs,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "batch_size": BATCH_SIZE,
        "warmup_steps": WARMUP_STEPS,
        "max_val_rows": held_out,
        "eval_every_n_steps": -(-steps // TIMES_A_RUN),
    }


def record(run: ChainRun, run_dir: Path, *, num_validation_rows: int) -> str:
    """Return what is kept of a run: the curves on its validation rows, and the mean loss on its test rows."""
    found, kept = describe_run(run_dir), num_validation_rows
    tokens = found["row_tokens"]
    for one in found["validations"]:
        one["test"] = round(sum(one["rows"][kept:]) / sum(tokens[kept:]), 5)
        one["rows"] = one["rows"][:kept]
    return json.dumps({**asdict(run), **found, "row_tokens": tokens[:kept]}, separators=(",", ":"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out=Path("runs/chains"))
    parser.add_argument("--sets", nargs="+", choices=[*SEEN, *UNSEEN], default=[*UNSEEN])
    parser.add_argument("--models", nargs="+", type=Path, default=[SMOLLM2], help="folders of bases")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=96, help="to train on")
    parser.add_argument("--held-out", nargs=2, type=int, default=[60, 200], help="validation rows and test rows")
    parser.add_argument("--record", type=Path, required=True, metavar="FILE", help="keeps what judge_chains.py reads")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out, record_path = arguments.out.resolve(), arguments.record.resolve()
    bases = {path.name: path.resolve() if path != SMOLLM2 else path for path in arguments.models}
    sizes = {"num_rows": arguments.rows, "held_out": sum(arguments.held_out)}
    files = {name: write_data(out / "data", name, **sizes) for name in arguments.sets}
    held = {ChainRun(*(one[key] for key in ChainRun.__dataclass_fields__)) for one in read_held(record_path)}
    options = {"precision": arguments.precision, "threads": count_threads(arguments.devices, arguments.jobs)}

    def train_and_record(run: ChainRun, device: str) -> None:
        run_dir = out / run.name
        settings = make_settings(run, bases[run.model], files[run.data_set], **sizes)
        if train(run_dir, settings, device=device, **options) and is_finished(run_dir):
            line = record(run, run_dir, num_validation_rows=arguments.held_out[0])
            with record_path.open("a", encoding="utf-8") as file:  # one write: runs side by side share the file
                file.write(f"{line}\n")

    todo = [run for run in list_runs(arguments) if run not in held]
    do_side_by_side(train_and_record, todo, devices=arguments.devices, jobs=arguments.jobs)
    print(f"wrote {arguments.record}: {len([*read_held(record_path)])} runs")


def read_held(path: Path) -> list[dict[str, Any]]:
    """Return what a file of records holds; nothing where there is none."""
    return [*read_json_lines(path)] if path.is_file() else []


if __name__ == "__main__":
    main()
