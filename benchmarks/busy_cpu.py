"""Training steps beside other programs: this package, an older one, torchtune's recipe and PEFT, each against itself.

    python benchmarks/busy_cpu.py --folder /tmp/busy --out benchmarks/results/busy_cpu.txt
    python benchmarks/busy_cpu.py --folder /tmp/busy --before /tmp/older_checkout --sides ours before --rounds 1
    python benchmarks/busy_cpu.py --folder /tmp/spins --sides --spin-counts 0 100 1000 10000

A side trains the quickstart's rows in a process of its own (the case of train.py). Once it takes steps, busy processes
come and go in turns: none, then 1, 2 and 4 of the same priority, then 2 of lower priority (nice 10), so many rounds.
Given is each side's speed in a turn as a share of its own without them, and of ours: tokens of the steps that lie
wholly in a turn over their time. A machine that is busy already says so in its load. The other sides are given back
the default of their OpenMP, which tune2gguf's start bounds for every Python in its environment. What a side has done is
a line of FOLDER/busy.jsonl, and the table is made of all lines, so that rounds and sides can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.train import Log, describe_machine
from benchmarks.train_cases import CASES, REPOSITORY, Prepared, make_command, prepare_case
from tune2gguf.runs.files import read_json_lines

CASE = "smollm2 quickstart"
SIDES = ("ours", "before", "stock", "peft")
OPENMP_DEFAULT = "300000"  # GOMP_SPINCOUNT where nothing is said
EPOCHS = 40  # more steps than any side takes meanwhile


@dataclass(frozen=True)
class Turn:
    """Busy processes beside a side, and how nice they are."""

    num_busy: int
    niceness: int = 0

    def __str__(self) -> str:
        return f"{self.num_busy} nice {self.niceness}" if self.niceness else f"{self.num_busy}"


TURNS = (Turn(0), Turn(1), Turn(2), Turn(4), Turn(2, niceness=10))


def start_busy(turn: Turn) -> list[subprocess.Popen]:
    command = ["nice", "-n", str(turn.niceness), sys.executable, "-S", "-c", "while True: pass"]
    return [subprocess.Popen(command) for _ in range(turn.num_busy)]


def start_side(
    side: str, prepared: Prepared, output_dir: Path, *, before: Path | None, spin_count: str | None
) -> subprocess.Popen:
    """Start a side on so many epochs that it is still training after all turns."""
    prepared = replace(prepared, arguments=[*prepared.arguments, f"epochs={EPOCHS}", "save_every_n_steps=100000"])
    command, cwd = make_command("ours" if side == "before" else side, prepared, output_dir)
    root = before if side == "before" else REPOSITORY
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    environment.pop("GOMP_SPINCOUNT", None)
    if side != "ours":
        environment["GOMP_SPINCOUNT"] = OPENMP_DEFAULT
    elif spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    if side == "stock":
        command += [f"epochs={EPOCHS}"]
    if side in ("stock", "peft"):
        output_dir.mkdir(parents=True)
    log = (output_dir.parent / f"{side}.log").open("wb")
    return subprocess.Popen(
        command, cwd=root if side == "before" else cwd, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def measure(
    side: str, prepared: Prepared, folder: Path, arguments: argparse.Namespace, spin_count: str | None = None
) -> dict[str, list[float]]:
    """Return the steps a second of a side in each turn, a value a round."""
    output_dir = folder / "run"
    shutil.rmtree(output_dir, ignore_errors=True)
    process = start_side(side, prepared, output_dir, before=arguments.before, spin_count=spin_count)
    log = Log("ours" if side == "before" else side, output_dir)
    speeds, busy = defaultdict(list), []

    def wait_for(count: int, limit: float) -> int:
        """Return how many steps are done when there are so many, or the time is over."""
        until = time.monotonic() + limit
        while len(log.read()) < count and time.monotonic() < until:
            time.sleep(0.02)
            if process.poll() is not None:
                sys.exit(f"{side} ended early: {folder / f'{side}.log'}")
        return len(log.losses)

    try:
        wait_for(3, 600)
        for _ in range(arguments.rounds):
            for turn in TURNS:
                busy = start_busy(turn)
                # The step at hand belongs to two turns.
                first = wait_for(len(log.read()) + 1, arguments.seconds)
                started = time.monotonic()
                last = wait_for(first + 1_000_000, arguments.seconds)
                if last > first:
                    last = wait_for(last + 1, arguments.seconds)
                speeds[str(turn)].append((last - first) / (time.monotonic() - started))
                for one in busy:
                    one.kill()
                    one.wait()
    finally:
        for one in [process, *busy]:
            one.kill()
            one.wait()
    return dict(speeds)


def merge(lines: Iterable[dict]) -> dict[str, dict[str, list[float]]]:
    """Return the speeds of each side and turn, of all lines of busy.jsonl."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for turn, speeds in line["speeds"].items():
            found[line["side"]][turn] += speeds
    return found


def make_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the lines of all sides: steps a second without busy processes, and each turn's share of them."""
    turns = [str(turn) for turn in TURNS]
    lines = [f"{'busy processes':22}" + "".join(f"{turn:>12}" for turn in turns)]
    for side, speeds in found.items():
        medians = {turn: statistics.median(speeds[turn]) for turn in turns}
        lines.append(f"{side + ', steps/s':22}" + "".join(f"{medians[turn]:12.3f}" for turn in turns))
        shares = [
            statistics.median(now / alone for now, alone in zip(speeds[turn], speeds[turns[0]], strict=True))
            for turn in turns
        ]
        lines.append(f"{'  of its own at 0':22}" + "".join(f"{share:12.2f}" for share in shares))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--before", type=Path, help="checkout of an older version, with the base in its models/")
    parser.add_argument("--sides", nargs="*", default=["ours", "stock", "peft"], choices=SIDES)
    parser.add_argument("--spin-counts", nargs="*", default=[], help="GOMP_SPINCOUNT with which ours is measured, too")
    parser.add_argument("--seconds", type=float, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: print only")
    arguments = parser.parse_args()
    if "before" in arguments.sides and arguments.before is None:
        parser.error("the side `before` needs --before")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare_case(CASE, folder)
    # The other sides take the same rows again and again.
    batches = json.loads(prepared.batches_path.read_text())
    prepared.batches_path.write_text(json.dumps(batches * EPOCHS))
    results = folder / "busy.jsonl"
    runs = [(side, side, None) for side in arguments.sides]
    runs += [(f"spins {count}", "ours", count) for count in arguments.spin_counts]
    for name, side, spin_count in runs:
        line = {"side": name, "load": round(os.getloadavg()[0], 1)}
        line |= {"speeds": measure(side, prepared, folder, arguments, spin_count)}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
    lines = [*describe_machine(), f"{CASES[CASE].batch} rows a step; each side's load at its start:"]
    done = list(read_json_lines(results))
    lines += [", ".join(f"{line['side']} {line['load']}" for line in done), "", *make_table(merge(done))]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
