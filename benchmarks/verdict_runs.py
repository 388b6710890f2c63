"""Does the verdict tell over- from underfitting on real runs? What each run must come out as is written down in KINDS.

    python benchmarks/verdict_runs.py --out runs/verdict --device cuda --jobs 6 [--only TEXT] [--pack FILE.tar.gz]
    python benchmarks/verdict_runs.py --out runs/verdict --judge [--record benchmarks/results/verdict_runs.jsonl]
    python benchmarks/verdict_runs.py --recorded benchmarks/results/verdict_runs.jsonl

SmolLM2-135M-Instruct on three data sets: the quickstart's conversations, orders as JSON, unit conversions. Finished
runs are not repeated, one that was stopped goes on. Runs are judged anew each time, by the verdict as it is now;
--pack keeps the runs without their weights, anew after each that ends; unpacked elsewhere they can be judged and
reported. --record keeps what the verdict reads of them, and --recorded judges that.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tune2gguf.curves import Curves, TrainingStep, Validation, read_curves
from tune2gguf.verdict import GOOD_FIT, INCONCLUSIVE, OVERFITTING, UNDERFITTING, Verdict, judge

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_SETS = {"quickstart": "examples/quickstart", "orders": "benchmarks/data/orders", "units": "benchmarks/data/units"}
BATCH_SIZE = 8
# Written last, when a run has ended.
END_FILE = "verdict.json"
PACKED = ("config.yaml", "environment.json", "data.json", "plan.json", "heldout.jsonl", "metrics.jsonl", END_FILE)


@dataclass(frozen=True)
class Kind:
    """A way to train, and the label that it is made to earn.

    Attributes:
        num_rows: to train on, drawn by the seed; None takes all
        num_heldout: held-out rows measured; None takes all
    """

    expected: str
    seeds: tuple[int, ...]
    settings: dict[str, float | int | str]
    num_rows: int | None = None
    num_heldout: int | None = None


# Written before the first run. The rate that suits this model is 1e-3 (see the quickstart's config).
BALANCED = {"epochs": 4, "learning_rate": 1.0e-3, "warmup_steps": 10, "lora_dropout": 0.1, "weight_decay": 0.01}
KINDS = {
    # Few rows, seen often, at a high rate, with nothing to hold it back.
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
    "few-heldout": Kind(INCONCLUSIVE, (1, 2), BALANCED | {"epochs": 2}, num_heldout=4),
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
    """Return all runs whose names hold the text, the longest first, so that none is left alone at the end."""
    runs = [Run(data, name, seed) for name, kind in KINDS.items() for data in DATA_SETS for seed in kind.seeds]
    return sorted((run for run in runs if only in run.name), key=count_steps, reverse=True)


def read_rows(run: Run, split: str) -> list[str]:
    """Return the lines of a run's data set."""
    return (REPOSITORY / DATA_SETS[run.data_set] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()


def count_steps(run: Run) -> int:
    settings, num_rows = run.kind.settings, run.kind.num_rows or len(read_rows(run, "train"))
    steps_per_epoch = -(-num_rows // BATCH_SIZE)
    return settings["epochs"] * min(steps_per_epoch, settings.get("max_steps_per_epoch", steps_per_epoch))


def make_command(run: Run, *, out: Path, base_dir: str, device: str) -> list[str]:
    """Write the run's own training rows where it has fewer, and return its command."""
    folder, kind = REPOSITORY / DATA_SETS[run.data_set], run.kind
    train = folder / "train.jsonl"
    if kind.num_rows is not None:
        train = out / "data" / f"{run.name}.jsonl"
        train.parent.mkdir(parents=True, exist_ok=True)
        picked = random.Random(run.seed).sample(read_rows(run, "train"), kind.num_rows)
        train.write_text("".join(f"{line}\n" for line in picked), encoding="utf-8")
    settings = {
        "device": device,
        "base_dir": base_dir,
        "batch_size": BATCH_SIZE,
        "seed": run.seed,
        "dataset.files": f"[{train}]",
        "dataset.validation_files": f"[{folder / 'heldout.jsonl'}]",
        "max_val_rows": kind.num_heldout or len(read_rows(run, "heldout")),
        "eval_every_n_steps": -(-count_steps(run) // 10),
        "num_samples": 0,
        "keep_last": 1,
        "output_dir": out / run.name,
        "resume": "auto",
        **kind.settings,
    }
    recipe = [sys.executable, str(REPOSITORY / "recipes/lora_finetune.py")]
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [*recipe, "--config", str(REPOSITORY / "examples/quickstart/lora.yaml"), *overrides]


def train(run: Run, *, out: Path, base_dir: str, device: str, threads: int) -> float | None:
    """Make the run, unless it is finished; return its seconds, None where it failed."""
    if is_finished(run, out):
        return 0.0
    command = make_command(run, out=out, base_dir=base_dir, device=device)
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    with (out / f"{run.name}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    print(f"{run.name}: {'done' if done.returncode == 0 else f'FAILED ({log.name})'} in {seconds:.0f} s", flush=True)
    return seconds if done.returncode == 0 else None


def is_finished(run: Run, out: Path) -> bool:
    return (out / run.name / END_FILE).is_file()


def pack(runs: list[Run], *, out: Path, path: Path, lock: threading.Lock) -> None:
    """Write the files and logs of all runs so far, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with lock:
        with tarfile.open(unfinished, "w:gz") as archive:
            for run in runs:
                files = [out / run.name / name for name in PACKED] if is_finished(run, out) else []
                for file in (*files, out / f"{run.name}.log"):
                    if file.is_file():
                        archive.add(file, file.relative_to(out))
        unfinished.replace(path)


def record(run: Run, curves: Curves) -> str:
    """Return what the verdict reads of a run, as a line of JSON; losses to 4 digits after the point."""
    first = curves.validations[0]
    return json.dumps(
        {
            "run": run.name,
            "loss": [step.loss and round(step.loss, 4) for step in curves.training],
            "lr": [step.lr and float(f"{step.lr:.4g}") for step in curves.training],
            "row_tokens": first.row_tokens,
            "validations": [
                {**{key: asdict(one)[key] for key in ("step", "epoch")}, "rows": [round(x, 4) for x in one.row_losses]}
                for one in curves.validations
            ],
        },
        separators=(",", ":"),
    )


def read_recorded(path: Path) -> Iterator[tuple[Run, Curves]]:
    """Yield the runs of a file that --record wrote."""
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        match = re.fullmatch(rf"({'|'.join(DATA_SETS)})-({'|'.join(KINDS)})-(\d+)", data["run"])
        tokens = tuple(data["row_tokens"])
        training = [
            TrainingStep(step=number, epoch=0, loss=loss, lr=lr)
            for number, (loss, lr) in enumerate(zip(data["loss"], data["lr"], strict=True), start=1)
        ]
        validations = [
            Validation(
                step=one["step"],
                epoch=one["epoch"],
                loss=sum(one["rows"]) / sum(tokens),
                rows=len(tokens),
                tokens=sum(tokens),
                row_losses=tuple(one["rows"]),
                row_tokens=tokens,
            )
            for one in data["validations"]
        ]
        yield Run(match[1], match[2], int(match[3])), Curves(tuple(training), tuple(validations))


def format_table(judged: list[tuple[Run, Curves, Verdict]]) -> str:
    """Return the runs as a Markdown table, and below it how many are right, and how many are taken for the reverse."""
    lines = [
        "| run | made to be | judged | base | best (step) | final (step) | rise, % of gain | further gain, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    right = reversed_ = 0
    for run, curves, verdict in judged:
        is_right = verdict.label == run.kind.expected
        right += is_right
        reversed_ += {run.kind.expected, verdict.label} == {OVERFITTING, UNDERFITTING}
        base, best, final = curves.base, curves.best, curves.final
        shares = [format_share(verdict.figures, name) for name in ("rise", "further_gain")]
        lines.append(
            f"| {run.name} | {run.kind.expected} | {'' if is_right else '**'}{verdict.label}{'' if is_right else '**'} "
            f"| {base.loss:.3f} | {best.loss:.3f} ({best.step}) | {final.loss:.3f} ({final.step}) "
            f"| {' | '.join(shares)} |"
        )
    summary = f"\n{right} of {len(judged)} right; {reversed_} taken for the reverse (over- for underfitting or back)"
    return "\n".join([*lines, summary])


def format_share(figures: dict[str, float], name: str) -> str:
    """Return a share with its interval, in percent; a dash where the verdict did not come to it."""
    if name not in figures:
        return "–"
    return "{:.1f} ({:.1f} … {:.1f})".format(*(100 * figures[key] for key in (name, f"{name}_low", f"{name}_high")))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make runs of known kinds, and judge them.")
    parser.add_argument("--out", type=Path, default=Path("runs/verdict"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base-dir", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds this")
    parser.add_argument("--judge", action="store_true", help="train nothing; judge what is there")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="keep the runs without weights in a .tar.gz")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep what the verdict reads of the runs")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="judge the runs of such a file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.recorded is not None:
        print(format_table([(run, curves, judge(curves)) for run, curves in read_recorded(arguments.recorded)]))
        return
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runs = list_runs(arguments.only)
    if not arguments.judge:
        threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        options = {"out": out, "base_dir": arguments.base_dir, "device": arguments.device, "threads": threads}
        lock = threading.Lock()

        def train_and_pack(run: Run) -> None:
            train(run, **options)
            if arguments.pack is not None:
                pack(runs, out=out, path=arguments.pack, lock=lock)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(train_and_pack, runs))
    finished = [(run, read_curves(out / run.name)) for run in runs if is_finished(run, out)]
    missing = len(runs) - len(finished)
    table = format_table([(run, curves, judge(curves)) for run, curves in finished])
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    if arguments.record is not None:
        arguments.record.write_text("".join(record(*one) + "\n" for one in finished), encoding="utf-8")
    print(f"\n{table}\n\nwrote {out / 'table.md'}")
    if missing:
        sys.exit(f"error: {missing} of {len(runs)} runs are not finished; their logs are beside their folders")


if __name__ == "__main__":
    main()
