"""One pass over the base against llama.cpp's own way, converter and then llama-quantize: CPU time, memory, disk.

    python benchmarks/export.py --model llama3_2_1b --out benchmarks/results/export_1b.txt

The base has random weights of the true shape, the adapter is random. Ours is scripts/export.py without its cache and
without the proof, merging included; the other side starts from the merged folder, which nobody times. Each is a process
of its own. Then: the same export with the cache empty and full, for an adapter on the attention alone. Without
llama-cpp-python and llama.cpp's source (CONTRIBUTING.md) the other side is left out.
"""

import argparse
import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.parity import llama_cpp_oracle as oracle
from tune2gguf.architectures import ARCHITECTURES
from tune2gguf.export.adapter import read_adapter
from tune2gguf.export.merge_base import open_merge_base
from tune2gguf.export.merged_hf import write_merged_hf
from tune2gguf.export.run_folder import read_run
from tune2gguf.pypi import LLAMA3_TOKENIZER, fetch_pypi_file
from tune2gguf.random_base import write_random_base

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
    """Of one command with its children."""

    seconds: float
    cpu_seconds: float
    peak_mb: float

    def __str__(self) -> str:
        return f"{self.seconds:7.1f} s  {self.cpu_seconds:7.1f} CPU-s  {self.peak_mb:6.0f} MB"


def measure(command: list[str], *, cache_dir: Path) -> Cost:
    environment = os.environ | {"TUNE2GGUF_CACHE": str(cache_dir), "PYTHONPATH": _join_python_path()}
    begin = time.perf_counter()
    # A small process in between: on Linux the peak of a child begins with what its parent holds.
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


def write_random_run(base_dir: Path, run_dir: Path, *, modules: tuple[str, ...]) -> Path:
    from safetensors.numpy import save_file

    generator, weights = np.random.default_rng(0), {}
    for spec in open_merge_base(base_dir).specs.values():
        if spec.is_linear and any(module in spec.tune_name for module in modules):
            module = "base_model.model." + spec.hf_name.removesuffix(".weight")
            weights[f"{module}.lora_A.weight"] = generator.normal(0, 0.02, (RANK, spec.shape[1])).astype(np.float32)
            weights[f"{module}.lora_B.weight"] = generator.normal(0, 0.02, (spec.shape[0], RANK)).astype(np.float32)
    (run_dir / "last").mkdir(parents=True)
    save_file(weights, run_dir / "last" / "adapter_model.safetensors")
    (run_dir / "last" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK}))
    config = {"quantization": "Q4_K_M", "max_seq_len": 2048, "base_dir": str(base_dir), "chat_template": "llama3"}
    config["base_weights"] = "bf16"
    (run_dir / "config.yaml").write_text(json.dumps(config))
    return run_dir


def make_export_command(run_dir: Path, quantization: str, *options: str) -> list[str]:
    script = str(REPOSITORY / "scripts/export.py")
    return [sys.executable, script, str(run_dir), "--quantization", quantization, "--proof-rows", "0", *options]


def measure_disk(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def compare_with_llama_cpp(base_dir: Path, folder: Path, quantization: str) -> list[str]:
    run_dir = write_random_run(base_dir, folder / "all-linear", modules=("attn.", "mlp."))
    cache = folder / "no-cache"
    ours = measure(make_export_command(run_dir, quantization, "--no-cache"), cache_dir=cache)
    lines = [f"ours, adapter on all linear layers     {ours}, {measure_disk(run_dir / 'export'):.0f} MB written"]
    missing = oracle.find_missing()
    if missing is not None:
        return [*lines, f"llama.cpp's own way was not run: {missing}"]
    run, base = read_run(run_dir), open_merge_base(base_dir)
    merged_dir, bf16_path = folder / "merged" / run.name, folder / "bf16.gguf"
    adapter = read_adapter(run.adapter_dir, base.specs)
    write_merged_hf(merged_dir, base=base, adapter=adapter, chat_template=run.chat_template, report=lambda count: None)
    convert = measure([sys.executable, "-c", CONVERT.format(str(merged_dir), str(bf16_path))], cache_dir=cache)
    pattern = str(folder / "theirs-{}.gguf")
    quantize = measure(
        [sys.executable, "-c", QUANTIZE.format(str(bf16_path), pattern, quantization, os.cpu_count())], cache_dir=cache
    )
    theirs = Path(pattern.format(quantization))
    is_same = filecmp.cmp(theirs, run.export_dir / f"{run.name}-{quantization}.gguf", shallow=False)
    written = (bf16_path.stat().st_size + theirs.stat().st_size) / 1e6
    ratio = ours.cpu_seconds / (convert.cpu_seconds + quantize.cpu_seconds)
    for path in (bf16_path, theirs):
        path.unlink()
    shutil.rmtree(merged_dir)
    return [
        *lines,
        f"llama.cpp's converter, of merged folder {convert}",
        f"llama-quantize                         {quantize}, {written:.0f} MB written in all",
        f"CPU-seconds, ours / theirs             {ratio:7.2f}; bytes {'equal' if is_same else 'DIFFERENT'}",
    ]


def measure_cache(base_dir: Path, folder: Path, quantization: str) -> list[str]:
    costs = {}
    for name in ("no cache", "empty cache", "full cache"):
        run_dir = write_random_run(base_dir, folder / name.replace(" ", "-") / "attention", modules=("attn.",))
        options = ["--no-cache"] if name == "no cache" else []
        costs[name] = measure(make_export_command(run_dir, quantization, *options), cache_dir=folder / "cache")
    lines = [f"attention only, {name:<23}{cost}" for name, cost in costs.items()]
    speedup = costs["no cache"].seconds / costs["full cache"].seconds
    return [*lines, f"no cache / full cache, wall time       {speedup:7.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama3_2_1b", choices=ARCHITECTURES)
    parser.add_argument("--base", type=Path, help="a base folder of this shape; default: one is made")
    parser.add_argument("--quantization", default="Q4_K_M")
    parser.add_argument("--work", type=Path, help="folder for large temporary files; default: the system's")
    parser.add_argument("--out", type=Path, help="file for the result; default: the terminal only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        base_dir = arguments.base
        if base_dir is None:
            tokenizer = fetch_pypi_file(*vars(LLAMA3_TOKENIZER).values())
            base_dir = write_random_base(ARCHITECTURES[arguments.model], folder / "base", tokenizer_model=tokenizer)
        base_dir = base_dir.resolve()
        header = (
            f"{date.today()}, {platform.platform()}, {os.cpu_count()} cores, which both sides use, "
            f"python {platform.python_version()}, xllamacpp {version('xllamacpp')}\n"
            f"{arguments.model}, {arguments.quantization}; load when it began {os.getloadavg()[0]:.1f}\n"
        )
        begin = time.perf_counter()
        lines = compare_with_llama_cpp(base_dir, folder, arguments.quantization)
        lines += measure_cache(base_dir, folder, arguments.quantization)
        text = "\n".join([header, *lines, "", f"measured in {time.perf_counter() - begin:.0f} s"]) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
