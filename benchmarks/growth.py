"""Cost of a training step on this CPU by length of the rows, number of rows, and rank.

    python benchmarks/growth.py --out benchmarks/results/growth_cpu.txt

Each point is a process of its own: a few layers of the 1B model with the whole head, random weights, bf16, half of the
tokens supervised. Time is the median of its steps. Memory is its peak less the peak of a step on 8 tokens, which
excludes weights, adapters and optimizer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.profile_step import Case, describe_machine, make_model, make_step, time_steps
from tune2gguf.model.architectures import ARCHITECTURES

LENGTHS = (256, 512, 1024, 2048, 4096)
TABLES = (
    ("length of the rows, batch 1, rank 16", "seq", LENGTHS, {}),
    ("rows of 256 tokens, rank 16", "batch", (1, 2, 4, 8, 16), {}),
    ("rank, 2 rows of 256 tokens", "rank", (8, 16, 32, 64), {"batch": 2}),
    ("length of the rows with activation checkpointing", "seq", LENGTHS, {"checkpointing": True}),
)


def measure_here(options: dict) -> dict[str, float]:
    """Return the seconds of a step, and its memory in MB without the model's, in this process."""
    from tune2gguf.machine.devices import measure_peak

    case = make_case(options)
    model = make_model(case)
    time_steps(make_step(replace(case, lengths=(8,)), model), 1)
    before = measure_peak(model.head_weight.device)
    seconds = time_steps(make_step(case, model), options["steps"])
    return {"seconds": seconds, "megabytes": (measure_peak(model.head_weight.device) - before) / 1e6}


def make_case(options: dict) -> Case:
    architecture = replace(ARCHITECTURES["llama3_2_1b"], num_layers=options["layers"])
    lengths = (options["seq"],) * options["batch"]
    return Case(architecture, lengths=lengths, rank=options["rank"], checkpointing=options["checkpointing"])


def measure(options: dict) -> dict[str, float]:
    """Measure a point in a process of its own, whose peak is that of this point only."""
    command = [sys.executable, __file__, "--point", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_table(title: str, name: str, values: tuple[int, ...], options: dict) -> list[str]:
    """Measure every value of one option. Return the lines of its table, with multiples of the first value."""
    lines = [f"{title}", f"{name:>8}{'s a step':>12}{'x':>8}{'tokens/s':>12}{'MB beside':>12}{'x':>8}"]
    first = None
    for value in values:
        point = options | {name: value}
        found = measure(point)
        first = first or found
        lines.append(
            f"{value:8}{found['seconds']:12.2f}{found['seconds'] / first['seconds']:8.2f}"
            f"{point['batch'] * point['seq'] / found['seconds']:12.1f}"
            f"{found['megabytes']:12.0f}{found['megabytes'] / first['megabytes']:8.2f}"
        )
        print("\n".join(lines if value == values[0] else lines[-1:]), flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--out", type=Path, help="default: print only")
    parser.add_argument("--point", help="measure one point, given as JSON, in this process (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure_here(json.loads(arguments.point))))
        return
    options = {"layers": arguments.layers, "steps": arguments.steps, "batch": 1, "seq": 256, "rank": 16}
    options |= {"checkpointing": False}
    lines = [describe_machine(), f"command: python benchmarks/growth.py {' '.join(sys.argv[1:])}"]
    lines += [f"{arguments.layers} of the 1B model's 16 layers and its head; bf16, 50% supervised", ""]
    for title, name, values, changed in TABLES:
        lines += make_table(title, name, values, options | changed)
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines), encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
