"""What each GGUF type costs in held-out loss: quantized plainly, with an importance matrix, and trained for the file.

    python benchmarks/four_bits.py train --seeds 42 43 44 --kinds bf16 gguf:Q4_K_M   # the quickstart, to runs/four_bits
    python benchmarks/four_bits.py measure --seeds 42 43 44 --types Q4_K_M Q3_K_M    # adds lines to the results
    python benchmarks/four_bits.py calibrate --seeds 42 --tokens 1024 4096 8192      # how many tokens a matrix needs
    python benchmarks/four_bits.py speed --seeds 42 --kinds bf16 gguf:Q4_K_M         # what metrics.jsonl says
    python benchmarks/four_bits.py grid                                              # of the base's own weights
    python benchmarks/four_bits.py table

The model is SmolLM2-135M-Instruct (scripts/download.py) or --base (train_base.py makes one), fine-tuned as
examples/quickstart says. --jobs processes train on each of --devices; as many measure. `plain` and `imatrix`
are the bf16 run merged and quantized. `repaired R` is `plain` and an adapter of rank R that approximates the rounding
errors. `unmerged` is the base in this type with the run's adapter beside it (--adapter-gguf). `beside` is a run with
base_weights=gguf:TYPE, served as that file and the adapter. The increase is over the loss of the bf16 run's unmerged
adapter of the same seed, the divergence (KL) from that model; both in nats per supervised token of the held-out rows,
in torch in float32 over dequantized weights. `beside` is another run, which diverges for other reasons, too. A matrix
is measured on calibration.jsonl, training rows. Ranges are over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import scipy.linalg
from recipe_runs import REPOSITORY, SMOLLM2, add_arguments, count_threads, do_side_by_side, train

from tune2gguf.base.checkpoint import BaseCheckpoint, open_base
from tune2gguf.base.layout import get_gguf_name
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix
from tune2gguf.export.gguf_files import count_file_bytes
from tune2gguf.export.measure.importance import measure_importance
from tune2gguf.export.measure.layerwise import WeightSource
from tune2gguf.export.measure.step_losses import measure_steps
from tune2gguf.export.measure.validation_set import ValidationSet, load_validation_rows
from tune2gguf.export.measure.weight_sources import open_base_source, open_merged_source, open_quantized_source
from tune2gguf.export.merge.adapter import Adapter, LoraPair, read_adapter
from tune2gguf.ggml.kernels import load_kernels
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.runs.calibration import read_calibration_rows
from tune2gguf.runs.run import Run

RESULTS = REPOSITORY / "benchmarks/results/four_bits_smollm2.jsonl"
REFERENCE = "adapter"
REPAIR_RANKS = (16, 32)
WAYS = ("plain", "imatrix", *(f"repaired {rank}" for rank in REPAIR_RANKS), "unmerged", "beside")
TYPES = [name for name, quantization in QUANTIZATIONS.items() if quantization.takes_importance]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "calibrate", "speed", "grid", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--kinds", nargs="+", default=["bf16", "gguf:Q4_K_M"], help="of base weights, for train")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows, the first ones; the proof takes 16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--base", type=Path, default=SMOLLM2, help="for train: the folder of the base")
    add_arguments(parser, out=REPOSITORY / "runs/four_bits")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.what == "train":
        train_all(arguments)
    elif arguments.what == "measure":
        measure_all(arguments)
    elif arguments.what == "calibrate":
        for seed in arguments.seeds:
            subject = Subject(arguments.out / name_run("bf16", seed), num_rows=arguments.rows)
            for name in arguments.types:
                print_calibration(subject, name, arguments.tokens)
    elif arguments.what == "speed":
        for seed in arguments.seeds:
            for kind in arguments.kinds:
                print(format_speed(arguments.out / name_run(kind, seed)))
    elif arguments.what == "grid":
        print("\n".join(compare_grids()))
    else:
        print("\n".join(format_table(arguments.results)))


def name_run(kind: str, seed: int) -> str:
    return f"{kind.removeprefix('gguf:')}-{seed}"


def train_all(arguments: argparse.Namespace) -> None:
    """Train the quickstart over each kind of base with each seed, unless the run is there."""
    threads = count_threads(arguments.devices, arguments.jobs)

    def train_one(task: tuple[int, str], device: str) -> None:
        seed, kind = task
        settings = {"base_dir": str(arguments.base), "seed": seed, "base_weights": kind}
        if arguments.base != SMOLLM2:
            settings["model.architecture"] = None
        if kind.startswith("gguf:"):
            settings["quantization"] = kind.removeprefix("gguf:")
        run_dir = arguments.out / name_run(kind, seed)
        if not train(run_dir, settings, device=device, precision=arguments.precision, threads=threads):
            raise RuntimeError(f"{run_dir} is not finished: see {run_dir}.log")

    tasks = [*product(arguments.seeds, arguments.kinds)]
    do_side_by_side(train_one, tasks, devices=arguments.devices, jobs=arguments.jobs)


def measure_all(arguments: argparse.Namespace) -> None:
    """Measure each type with each seed, and append to the results."""
    # BLAS reads it when it is loaded; torch does, too.
    os.environ["OMP_NUM_THREADS"] = str(count_threads(["cpu"], arguments.jobs))
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(measure_type, arguments.out, name, seed=seed, num_rows=arguments.rows)
            for seed, name in product(arguments.seeds, arguments.types)
        ]
        for future in futures:
            record(arguments.results, future.result())


def format_speed(run_dir: Path) -> str:
    """Return the median speed of a run's last 60 steps, and its peak memory."""
    steps = Run(run_dir).curves.training[-60:]
    speed = statistics.median(step.tokens / step.seconds for step in steps)
    peak = max(step.peak_memory_bytes for step in steps)
    return f"{run_dir.name}: {speed:.0f} tokens/s, {peak / 1e9:.2f} GB"


def compare_grids() -> Iterator[str]:
    """Yield each block type's relative rounding error, without and with equal importance, of the base and of noise.

    A base that was itself rounded to four bits lies on a grid that a type with an importance matrix can find again.
    """
    base, kernels = open_base(SMOLLM2), load_kernels()
    rows = np.ascontiguousarray(base.read_rows("layers.5.mlp.w1.weight", 0, 256))
    noise = np.random.default_rng(0).standard_normal(rows.shape, np.float32)
    yield f"{'type':<8}" + "".join(f"{of:>8}{'weighted':>10}" for of in ("base", "noise"))
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0"):
        errors = []
        for weights in (rows, noise):
            for importance in (None, np.ones(rows.shape[1], np.float32)):
                rounded = kernels.dequantize(kernels.quantize(weights, name, importance), name)
                errors.append(np.sqrt(np.square(rounded - weights).sum() / np.square(weights).sum()))
        yield f"{name:<8}" + "{:8.4f}{:10.4f}{:8.4f}{:10.4f}".format(*errors)


class Subject:
    """The run in bf16 of a seed, opened."""

    def __init__(self, run_dir: Path, *, num_rows: int) -> None:
        self.run = Run(run_dir)
        self.base: BaseCheckpoint = open_base(REPOSITORY / self.run.base_dir)
        self.adapter: Adapter = read_adapter(self.run.adapter_dir, self.base.specs)
        self.validation: ValidationSet = load_validation_rows(self.run, num_rows=num_rows)
        self.kernels = load_kernels()

    def measure_matrix(self, num_tokens: int | None = None) -> tuple[ImportanceMatrix, float]:
        """Return the importance matrix of the merged model, and how long it took, in seconds."""
        rows, left = [], num_tokens
        for row in read_calibration_rows(self.run.run_dir):
            rows.append(row[:left])
            left = None if left is None else left - len(rows[-1])
            if left == 0:
                break
        started = time.perf_counter()
        matrix = measure_importance(open_merged_source(self.base, self.adapter), rows, name="", dataset="")
        return matrix, time.perf_counter() - started

    def quantize(self, name: str, matrix: ImportanceMatrix | None) -> WeightSource:
        quantization = QUANTIZATIONS[name]
        return open_quantized_source(self.base, self.adapter, quantization, self.kernels, importance=matrix)

    def repair(self, quantized: WeightSource, matrix: ImportanceMatrix, rank: int) -> WeightSource:
        """Return the quantized weights with an adapter that approximates what rounding took from the layers.

        It minimizes the squared error of a layer's output for uncorrelated inputs of the matrix's mean squares: the
        best approximation of this rank of the error, its columns scaled by the inputs' root mean squares.
        """
        merged, pairs = open_merged_source(self.base, self.adapter), {}
        for name, spec in self.base.specs.items():
            importance = matrix.weights.get(get_gguf_name(name))
            if importance is None:
                continue
            rows = spec.shape[0]
            scales = np.sqrt(np.maximum(importance, importance.max() * 1e-6))
            error = (merged.read_rows(name, 0, rows) - quantized.read_rows(name, 0, rows)) * scales
            _, vectors = scipy.linalg.eigh(error.T @ error, subset_by_index=(len(scales) - rank, len(scales) - 1))
            lora_a, lora_b = vectors.T / scales, error @ vectors
            pairs[name] = LoraPair(np.ascontiguousarray(lora_a, np.float32), np.ascontiguousarray(lora_b, np.float32))
        adapter = Adapter(rank=rank, alpha=rank, pairs=pairs)
        return WeightSource(self.base.architecture, quantized.read_rows, adapter)

    def measure(self, sources: dict[str, WeightSource]) -> dict[str, dict[str, float]]:
        """Return loss, increase over the unmerged adapter and divergence from it for each source."""
        trained = open_base_source(self.base, adapter=self.adapter)
        steps = measure_steps({REFERENCE: trained, **sources}, self.validation.rows, reference=REFERENCE)
        return {
            way: {"loss": step.loss, "increase": step.increase, "kl": step.divergence, "top1": step.agreement}
            for way, step in steps.items()
        }


MATRICES: dict[Path, ImportanceMatrix] = {}


def measure_type(runs: Path, name: str, *, seed: int, num_rows: int) -> list[dict]:
    """Return a record for each way to this type that there is a run for."""
    run_dir = runs / name_run("bf16", seed)
    subject = Subject(run_dir, num_rows=num_rows)
    if run_dir not in MATRICES:
        MATRICES[run_dir] = subject.measure_matrix()[0]
    sources = {} if QUANTIZATIONS[name].needs_importance else {"plain": subject.quantize(name, None)}
    sources["imatrix"] = subject.quantize(name, MATRICES[run_dir])
    if "plain" in sources:
        for rank in REPAIR_RANKS:
            sources[f"repaired {rank}"] = subject.repair(sources["plain"], MATRICES[run_dir], rank)
        rounded, beside = subject.base.round_to_gguf(name), runs / name_run(f"gguf:{name}", seed)
        sources["unmerged"] = open_base_source(rounded, adapter=subject.adapter)
        if (beside / "best").is_dir():
            adapter = read_adapter(Run(beside).adapter_dir, subject.base.specs)
            sources["beside"] = open_base_source(rounded, adapter=adapter)
    records = []
    for way, found in subject.measure(sources).items():
        size = count_file_bytes(subject.base, QUANTIZATIONS[name], has_importance=way == "imatrix")
        if sources.get(way) is not None and sources[way].adapter is not None:
            # In a file an adapter's numbers have two bytes.
            size += 2 * sum(pair.lora_a.size + pair.lora_b.size for pair in sources[way].adapter.pairs.values())
        records.append({"seed": seed, "type": name, "way": way, "rows": num_rows, "bytes": size, **found})
    return records


def record(results: Path, records: list[dict]) -> None:
    for one in records:
        with results.open("a") as file:
            file.write(json.dumps(one) + "\n")
        print(format_record(one), flush=True)


def format_record(one: dict) -> str:
    return f"{one['seed']} {one['type']:<8} {one['way']:<11} {one['loss']:.4f} {one['increase']:+8.2%} {one['kl']:.4f}"


def print_calibration(subject: Subject, name: str, counts: list[int]) -> None:
    """Print what the number of tokens of a matrix changes."""
    sources, seconds = {"plain": subject.quantize(name, None)}, {}
    for num_tokens in counts:
        matrix, seconds[f"{num_tokens} tokens"] = subject.measure_matrix(num_tokens)
        sources[f"{num_tokens} tokens"] = subject.quantize(name, replace(matrix, name=str(num_tokens)))
    for way, found in subject.measure(sources).items():
        took = f" {seconds[way]:.1f} s" if way in seconds else ""
        print(f"{name:<8} {way:<12} {found['loss']:.4f} {found['increase']:+8.2%} {found['kl']:.4f}{took}", flush=True)


def format_table(results: Path) -> Iterator[str]:
    """Yield a line for each type: size, and increase and divergence of each way, mean and range over seeds."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    yield f"{'type':<8} {'MB':>6}  {'way':<11} {'seeds':>5} {'increase':>9} {'range':>20} {'KL':>8} {'range':>16}"
    for name in QUANTIZATIONS:
        for way in WAYS:
            found = {one["seed"]: one for one in records if (one["type"], one["way"]) == (name, way)}
            if found:
                yield format_line(name, way, list(found.values()))


def format_line(name: str, way: str, found: list[dict]) -> str:
    increases, divergences = ([one[key] for one in found] for key in ("increase", "kl"))
    return (
        f"{name:<8} {found[0]['bytes'] / 1e6:6.1f}  {way:<11} {len(found):5d} {statistics.mean(increases):+9.2%} "
        f"{min(increases):+9.2%} .. {max(increases):+7.2%} {statistics.mean(divergences):8.4f} "
        f"{min(divergences):.4f} .. {max(divergences):.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
