"""Training on a CPU: this package, torchtune 0.6.1's own recipe and transformers + PEFT, side by side.

    python benchmarks/train.py --folder /tmp/train --out benchmarks/results/train_cpu.txt
    python benchmarks/train.py --folder /tmp/train --cases "1b bf16 2x256 50%" --sides ours peft --max-runs 3

Every run is a process of its own, started like a user's (ours and torchtune's through `tune run`), with the same base,
rows, order, batches, rank, alpha and dropout, all linear layers, AdamW and one learning rate. The sides take turns.
Measured from outside: the start of the first step (its progress bar appears), the time of each step's line in the log,
and the peak resident memory up to the last step. Then the process is stopped. The first step warms up; tokens per
second are the median of the later steps, without padding. torchtune's recipe takes fewer steps of a large model
(CASES). Each finished run is a line of FOLDER/runs.jsonl and is not repeated, so the script can be stopped and
restarted. The other sides get tokenized rows; ours tokenizes them at its start. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.train_cases import CASES, REPOSITORY, SIDES, Prepared, make_command, prepare_case
from tune2gguf.runs.files import read_json_lines

POLL_SECONDS = 0.02
STOCK_STEP = re.compile(r"^Step (\d+) \| .*?loss:([-\d.e]+)", re.MULTILINE)
PACKAGES = ("torch", "torchtune", "torchao", "transformers", "peft", "bitsandbytes")


class Bar(threading.Thread):
    """Reads a process's output, and notes when the progress bar of its steps first appears."""

    def __init__(self, process: subprocess.Popen, num_steps: int) -> None:
        super().__init__(daemon=True)
        self.process, self.pattern = process, f" 0/{num_steps} [".encode()
        self.began: float | None = None
        self.printed = b""

    def run(self) -> None:
        while part := os.read(self.process.stdout.fileno(), 4096):
            self.printed += part
            if self.began is None and self.pattern in self.printed:
                self.began = time.monotonic()


class Log:
    """A run's logged losses. The file is read only if it has grown, to leave the cores to the run."""

    def __init__(self, side: str, output_dir: Path) -> None:
        self.side, self.output_dir = side, output_dir
        self.path: Path | None = None
        self.size = 0
        self.losses: list[float] = []

    def read(self) -> list[float]:
        """Return the loss of each step until now."""
        if self.path is None:
            names = ("metrics.jsonl", "log.txt", "logs/*.txt")
            self.path = next((path for name in names for path in self.output_dir.glob(name)), None)
        elif self.path.stat().st_size != self.size:
            self.size = self.path.stat().st_size
            text = self.path.read_text()
            if self.side == "ours":
                records = map(json.loads, text.split("\n")[:-1])
                self.losses = [record["loss"] for record in records if "lr" in record]
            else:
                self.losses = [float(loss) for _, loss in STOCK_STEP.findall(text)]
        return self.losses


def read_peak_bytes(pid: int) -> int:
    """Return a process's peak resident memory in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE).group(1)) * 1024


def run_side(side: str, prepared: Prepared, output_dir: Path) -> dict:
    """Start a side, watch its steps, stop it; return seconds, losses and peak memory."""
    num_steps = prepared.case.count_steps(side)
    command, cwd = make_command(side, prepared, output_dir)
    if side != "ours":
        output_dir.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # each side chooses its threads
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    bar = Bar(process, num_steps)
    bar.start()
    ended: list[float] = []
    log, losses = Log(side, output_dir), []
    try:
        while len(losses) < num_steps:
            time.sleep(POLL_SECONDS)
            losses = log.read()
            ended += [time.monotonic()] * (len(losses) - len(ended))
            if process.poll() is not None and len(losses) < num_steps:
                sys.exit(f"{side} ended early:\n{bar.printed.decode(errors='replace')[-3000:]}")
        peak_bytes = read_peak_bytes(process.pid)
    finally:
        process.kill()
        process.wait()
    assert bar.began is not None, bar.printed.decode(errors="replace")[-3000:]
    return {
        "start_s": bar.began - started,
        "step_s": [end - begin for begin, end in zip([bar.began, *ended[:-1]], ended, strict=True)],
        "losses": losses,
        "peak_bytes": peak_bytes,
    }


def list_open_runs(arguments: argparse.Namespace, done: list[dict]) -> Iterable[tuple[str, int, str]]:
    """Yield (case, repeat, side) of the missing runs. The sides take turns."""
    known = {(run["case"], run["repeat"], run["side"]) for run in done}
    for case in arguments.cases:
        for repeat in range(arguments.repeats):
            for side in arguments.sides:
                if (case, repeat, side) not in known:
                    yield case, repeat, side


def summarize(runs: list[dict], last_step: int) -> dict[str, float]:
    """Return the medians of a case and side: speed over the steps of all repeats, other figures over the repeats."""

    def compute_speed(kind: str) -> float:
        speeds = [
            count / seconds for run in runs for count, seconds in zip(run[kind][1:], run["step_s"][1:], strict=True)
        ]
        return statistics.median(speeds)

    return {
        "tokens/s": compute_speed("tokens"),
        "supervised/s": compute_speed("supervised_tokens"),
        "peak GB": statistics.median(run["peak_bytes"] for run in runs) / 1e9,
        "start s": statistics.median(run["start_s"] for run in runs),
        "first loss": statistics.median(run["losses"][0] for run in runs),
        "last loss": statistics.median(run["losses"][last_step - 1] for run in runs),
    }


def make_table(runs: list[dict]) -> list[str]:
    """Return the lines of all cases: one per side, and the ratios of ours to each other side."""
    columns = ("tokens/s", "supervised/s", "peak GB", "start s", "first loss", "last loss")
    lines = []
    for case in dict.fromkeys(run["case"] for run in runs):
        found = {
            side: [run for run in runs if run["case"] == case and run["side"] == side]
            for side in SIDES
            if any(run["case"] == case and run["side"] == side for run in runs)
        }
        sides = {side: summarize(of_side, CASES[case].stock_steps) for side, of_side in found.items()}
        lines += [
            "",
            f"{case}, last loss of step {CASES[case].stock_steps}",
            f"{'':22}" + "".join(f"{name:>14}" for name in columns),
        ]
        for side, summary in sides.items():
            label = f"  {side} ({len(found[side])} runs)"
            lines.append(f"{label:22}" + "".join(f"{summary[name]:14.2f}" for name in columns))
        for side in ("stock", "peft"):
            if "ours" in sides and side in sides:
                label = f"  ours / {side}"
                ratios = (sides["ours"][name] / sides[side][name] for name in columns)
                lines.append(f"{label:22}" + "".join(f"{ratio:14.3f}" for ratio in ratios))
    return lines


def describe_machine() -> list[str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in info if "model name" in line)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [f"{date.today()}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="folder of bases, rows and results of single runs")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-runs", type=int, help="number of runs; default: all missing ones")
    parser.add_argument("--out", type=Path, help="file of the table; default: print only")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "runs.jsonl"
    runs = [*read_json_lines(results)] if results.exists() else []
    for case, repeat, side in list(list_open_runs(arguments, runs))[: arguments.max_runs]:
        prepared = prepare_case(case, folder)
        output_dir = folder / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        tokens, supervised_tokens = zip(*prepared.count_tokens()[: CASES[case].count_steps(side)], strict=True)
        run = {"case": case, "repeat": repeat, "side": side, "load": os.getloadavg()[0]}
        run |= run_side(side, prepared, output_dir) | {"tokens": tokens, "supervised_tokens": supervised_tokens}
        print(json.dumps(run), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(run) + "\n")
        runs.append(run)
    lines = [*describe_machine(), "command: python benchmarks/train.py", *make_table(runs)]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
