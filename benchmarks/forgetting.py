"""Forgetting by learning rate and epochs, and the effect of the advice against it, with the held-out loss of each run.

python benchmarks/forgetting.py [--devices 0 --jobs 5] --result benchmarks/results/forgetting_cpu.txt

Runs on the quickstart's conversations with SmolLM2-135M-Instruct. `mixed` adds general rows, as the advice of the run
with RATE and EPOCHS says; `half rate` and `fewer epochs` are its other advice. Finished runs are not repeated.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recipe_runs import REPOSITORY, add_arguments, count_threads, do_side_by_side, train

from tune2gguf.runs.files import split_lines
from tune2gguf.runs.run import Run
from tune2gguf.verdict.advice import GENERAL_SHARE

RATE, EPOCHS = 1e-3, 3


@dataclass(frozen=True)
class Point:
    name: str
    rate: float
    epochs: int
    is_mixed: bool = False


GRID = [Point(f"rate {rate:g}, {epochs} epochs", rate, epochs) for epochs in (1, 3) for rate in (2e-4, 1e-3, 3e-3)]
ADVICE = [
    Point("half rate", RATE / 2, EPOCHS),
    Point("fewer epochs", RATE, EPOCHS - 1),
    Point("mixed", RATE, EPOCHS, is_mixed=True),
]


def get_run_dir(point: Point, out: Path) -> Path:
    return out / point.name.replace(", ", "-").replace(" ", "-")


def make_settings(point: Point, *, out: Path, num_rows: int) -> dict:
    files = REPOSITORY / "examples/quickstart"
    train_path = out / "train.jsonl"
    train_path.write_text("\n".join(split_lines(files / "train.jsonl")[:num_rows]) + "\n", encoding="utf-8")
    held_out = str(files / "heldout.jsonl")
    settings = {
        "learning_rate": point.rate,
        "epochs": point.epochs,
        "score_general_prompts": True,
        "max_val_rows": 40,
        "eval_every_n_steps": 1000,
    }
    if not point.is_mixed:
        return {**settings, "dataset.files": [str(train_path)], "dataset.validation_files": [held_out]}
    start = get_run_dir(Point(f"rate {RATE:g}, {EPOCHS} epochs", RATE, EPOCHS), out)
    make_rows = [sys.executable, str(REPOSITORY / "scripts/make_general_rows.py"), str(start)]
    print(subprocess.run(make_rows, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)
    own = {"files": [str(train_path)], "validation_files": [held_out]}
    rows = round(GENERAL_SHARE * num_rows)
    general = {"files": [str(start / "general.jsonl")], "format": "openai", "validation_split": 0, "rows": rows}
    return settings | {"dataset.files": None, "dataset.validation_files": None, "dataset.sources": [own, general]}


def describe(point: Point, out: Path) -> str:
    run = Run(get_run_dir(point, out))
    lost, best = run.forgetting, run.curves.best
    increase, divergence = lost.loss_increase, lost.divergence
    return (
        f"{point.name:<24}{best.loss:>9.3f} ({best.low:.3f} … {best.high:.3f})"
        f"{increase.value:>9.3f} ({increase.low:.3f} … {increase.high:.3f})"
        f"{divergence.value:>9.3f} ({divergence.low:.3f} … {divergence.high:.3f}){lost.agreement:>8.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out=Path("runs/forgetting"))
    parser.add_argument("--rows", type=int, default=259, help="training rows")
    parser.add_argument("--result", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    options = {"precision": arguments.precision, "threads": count_threads(arguments.devices, arguments.jobs)}

    def make(point: Point, device: str) -> None:
        settings = make_settings(point, out=out, num_rows=arguments.rows)
        train(get_run_dir(point, out), settings, device=device, **options)

    for points in (GRID[::-1], ADVICE):  # general rows come from a run of the grid
        do_side_by_side(make, points, devices=arguments.devices, jobs=arguments.jobs)
    points = [*GRID, *ADVICE]
    base = Run(get_run_dir(points[0], out))
    lines = [
        f"SmolLM2-135M-Instruct, {arguments.rows} rows of the quickstart, {base.environment['device']}, torch "
        f"{base.environment['packages']['torch']}; base's held-out loss {base.curves.base.loss:.3f}",
        f"{len(base.forgetting.answers)} general prompts; nats a token with 95 % intervals; kept: tokens of the base's "
        "answers that stay the likeliest",
        "",
        f"{'':<24}{'held-out loss':>27}{'loss increase':>27}{'KL':>27}{'kept':>8}",
        *(describe(point, out) for point in points),
    ]
    print("\n".join(lines))
    if arguments.result is not None:
        arguments.result.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
