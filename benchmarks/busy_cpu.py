"""Training steps beside other programs: this package, an older one, torchtune's recipe and PEFT, each against itself.

    python benchmarks/busy_cpu.py --folder /tmp/busy --out benchmarks/results/busy_cpu.txt
    python benchmarks/busy_cpu.py --folder /tmp/busy --before /tmp/older_checkout --sides ours before
    python benchmarks/busy_cpu.py --folder /tmp/spins --sides --spin-counts 0 100 1000 10000

A side trains the quickstart's rows in a process of its own (the case of train.py). Once it takes steps, it is stopped.
Busy processes come and go in turns: none, then 1, 2 and 4 of the same priority, then 2 of lower priority (nice 10), so
many rounds. In each turn every side runs for so long, one after the other: what a machine's other users do changes
within minutes. Given are the medians over the rounds: the steps a second that lie wholly in a turn, their share of the
side's own without busy processes, and their ratio to the first side's. A round is a line of FOLDER/busy.jsonl, and the
table is made of all lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
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
SETTLING_SECONDS, LONGEST_STEP_SECONDS = 1.5, 120
EPOCHS = 60  # more steps than any side takes meanwhile


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
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    if side == "stock":
        command += [f"epochs={EPOCHS}"]
    if side in ("stock", "peft"):
        output_dir.mkdir(parents=True)
    log = (output_dir.parent / f"{side}.log").open("wb")
    return subprocess.Popen(
        command, cwd=root if side == "before" else cwd, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


@dataclass
class Running:
    """A side's process, stopped but for its turns, and its log of steps."""

    name: str
    process: subprocess.Popen
    log: Log

    def wait_for(self, count: int, limit: float) -> int:
        """Return how many steps are done when there are so many, or the time is over."""
        until = time.monotonic() + limit
        while len(self.log.read()) < count and time.monotonic() < until:
            time.sleep(0.02)
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended early: see {self.log.output_dir.parent}")
        return len(self.log.losses)

    def measure(self, seconds: float) -> float:
        """Let the side run for so long, and return its steps a second."""
        self.process.send_signal(signal.SIGCONT)
        time.sleep(SETTLING_SECONDS)  # the threads get used to what is beside them
        # The step at hand belongs to two turns.
        first = self.wait_for(len(self.log.read()) + 1, LONGEST_STEP_SECONDS)
        started = time.monotonic()
        last = self.wait_for(first + 1_000_000, seconds)
        last = self.wait_for(last + 1, LONGEST_STEP_SECONDS)
        speed = (last - first) / (time.monotonic() - started)
        self.process.send_signal(signal.SIGSTOP)
        return speed


def start_sides(prepared: Prepared, folder: Path, arguments: argparse.Namespace) -> list[Running]:
    """Start every side, and stop it once it takes steps."""
    runs = [(side, side, None) for side in arguments.sides]
    runs += [(f"spins {count}", "ours", count) for count in arguments.spin_counts]
    started = []
    for name, side, spin_count in runs:
        output_dir = folder / name.replace(" ", "_") / "run"
        shutil.rmtree(output_dir.parent, ignore_errors=True)
        output_dir.parent.mkdir()
        process = start_side(side, prepared, output_dir, before=arguments.before, spin_count=spin_count)
        running = Running(name, process, Log("ours" if side == "before" else side, output_dir))
        started.append(running)
        running.wait_for(3, 600)
        process.send_signal(signal.SIGSTOP)
    return started


def run_round(started: list[Running], seconds: float) -> dict[str, dict[str, float]]:
    """Return the steps a second of each side in each turn; the sides take turns beside the same processes."""
    speeds: dict[str, dict[str, float]] = defaultdict(dict)
    for turn in TURNS:
        busy = start_busy(turn)
        try:
            for running in started:
                speeds[running.name][str(turn)] = running.measure(seconds)
        finally:
            for one in busy:
                one.kill()
                one.wait()
    return speeds


def merge(lines: Iterable[dict]) -> dict[str, dict[str, list[float]]]:
    """Return the speeds of each side and turn, of all lines of busy.jsonl."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for side, speeds in line["speeds"].items():
            for turn, speed in speeds.items():
                found[side][turn].append(speed)
    return found


def make_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the lines of all sides: steps a second in each turn, share of the first turn's, first side's ratio."""
    turns, first = [str(turn) for turn in TURNS], next(iter(found))
    lines = [f"{'busy processes':22}" + "".join(f"{turn:>12}" for turn in turns)]
    for side, speeds in found.items():
        medians = {turn: statistics.median(speeds[turn]) for turn in turns}
        lines.append(f"{side + ', steps/s':22}" + "".join(f"{medians[turn]:12.3f}" for turn in turns))
        shares = [medians[turn] / medians[turns[0]] for turn in turns]
        lines.append(f"{'  of its own at 0':22}" + "".join(f"{share:12.2f}" for share in shares))
        if side != first:
            pairs = [zip(found[first][turn], speeds[turn], strict=True) for turn in turns]
            ratios = [statistics.median(one / other if other else math.inf for one, other in pair) for pair in pairs]
            lines.append(f"{'  ' + first + ' over it':22}" + "".join(f"{ratio:12.2f}" for ratio in ratios))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--before", type=Path, help="checkout of an older version, with the base in its models/")
    parser.add_argument("--sides", nargs="*", default=["ours", "stock", "peft"], choices=SIDES)
    parser.add_argument("--spin-counts", nargs="*", default=[], help="GOMP_SPINCOUNT with which ours is measured, too")
    parser.add_argument("--seconds", type=float, default=8, help="of a side in a turn")
    parser.add_argument("--rounds", type=int, default=5)
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
    started: list[Running] = []
    try:
        started += start_sides(prepared, folder, arguments)
        for number in range(arguments.rounds):
            line = {"load": round(os.getloadavg()[0], 1)}
            line |= {"speeds": run_round(started[:: -1 if number % 2 else 1], arguments.seconds)}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    finally:
        for running in started:
            running.process.kill()
            running.process.wait()
    done = list(read_json_lines(results))
    lines = [
        *describe_machine(),
        f"{CASES[CASE].batch} rows a step, {len(done)} rounds, the load at the start of each:",
    ]
    lines += [", ".join(str(line["load"]) for line in done), "", *make_table(merge(done))]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
