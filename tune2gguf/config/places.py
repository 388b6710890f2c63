"""The check of a config against this machine: device, base folder, data files and run folder."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tune2gguf.base.bnb4bit import StoredNf4
from tune2gguf.base.checkpoint import BaseCheckpoint, open_base
from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.base.gguf_rounding import GGUF_SCHEME, make_gguf_kinds
from tune2gguf.base.layout import list_tensors
from tune2gguf.base.safetensors_file import StoredTensor
from tune2gguf.base.source import parse_base_source, read_source
from tune2gguf.commands import format_script
from tune2gguf.config.plan import find_plan_problems
from tune2gguf.data import check_files
from tune2gguf.data.rows import is_hub, read_rows
from tune2gguf.data.select import Share
from tune2gguf.data.sources import list_sources
from tune2gguf.export.pipeline import check_room, find_export_problems
from tune2gguf.files.atomic import check_name
from tune2gguf.files.json_files import read_json
from tune2gguf.model.architectures import ARCHITECTURES, check_architecture
from tune2gguf.model.nf4 import BLOCK_SIZE
from tune2gguf.runs.files import is_run_folder
from tune2gguf.runs.folder import find_path_problems
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES
from tune2gguf.tokenizer.tokenizer import find_tokenizer_file

FP8_DIVISOR = 16  # the GPU's fp8 products need weight dimensions divisible by this
MAX_COUNTED_BYTES = 20_000_000  # larger data files have enough rows for any step


def find_device_problems(valid: Mapping[str, Any], *, num_processes: int) -> Iterator[str]:
    """Yield why the device cannot be used, or not in this dtype or by so many processes."""
    import torch

    device, dtype = valid.get("device"), valid.get("dtype")
    if device is None:
        return
    name = re.fullmatch(r"cpu|mps|cuda(:\d+)?", device)
    if name is None:
        yield f"device={device!r} is not one of cpu, cuda, cuda:0, cuda:1, …, mps"
        return
    if device == "cpu":
        yield from _find_compiler_problems(valid)
        return
    if device == "mps":
        yield from _find_mps_problems(valid, num_processes=num_processes)
        return
    num_devices = torch.cuda.device_count()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    index = int(device.partition(":")[2]) if ":" in device else None
    if num_devices == 0:
        yield f"device={device}: torch finds no CUDA device on this machine; use device=cpu"
    elif index is not None and index >= num_devices:
        yield f"device={device}: this machine has {num_devices} CUDA devices, counted from 0"
    elif index is not None and num_processes > 1:
        yield f"device={device} with {num_processes} processes: each needs its own device; use device=cuda"
    elif index is None and num_local_processes > num_devices:
        yield f"{num_local_processes} processes on this machine, but {num_devices} CUDA devices; start fewer"
    elif dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield f"dtype=bf16: {torch.cuda.get_device_name(index or 0)} cannot compute in bf16; use dtype=fp32"


def _find_mps_problems(valid: Mapping[str, Any], *, num_processes: int) -> Iterator[str]:
    """Yield why a run cannot use Apple's GPU, which has no float64 and none of this package's kernels."""
    import torch

    if not torch.backends.mps.is_available():
        yield "device=mps: torch finds no Apple GPU on this machine; use device=cpu"
    if num_processes > 1:
        yield f"device=mps with {num_processes} processes: there is one device; start one process"
    if valid.get("base_weights") not in (None, "bf16", "fp32"):
        yield f"base_weights={valid['base_weights']} with device=mps: not supported; use base_weights=bf16 or fp32"
    for key in ("compile", "enable_activation_offloading"):
        if valid.get(key):
            yield f"{key}=true with device=mps: not supported; use {key}=false"


def _find_compiler_problems(valid: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem if torch.compile finds no C++ compiler, which it needs on a CPU."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if valid.get("compile") and shutil.which(compiler) is None:
        yield f"compile=true with device=cpu: C++ compiler {compiler} not found; install it or use compile=false"


def find_output_problems(valid: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the run folder cannot be created or resumed."""
    if "output_dir" not in valid or "resume" not in valid:
        return
    folder = Path(valid["output_dir"])
    yield from _find_error(check_name, folder)
    yield from find_path_problems(valid["resume"], folder)
    parent_run = valid.get("parent_run")
    if parent_run is not None and not is_run_folder(Path(parent_run)):
        yield f"parent_run={parent_run} is not the folder of a run (config.yaml is missing); give runs/NAME or null"
    if os.path.lexists(folder):
        return
    nearest = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
    try:
        # Permissions do not show a read-only disk. The file has no name and is removed at once.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        yield f"output_dir={folder} cannot be created in {nearest}: {error.strerror}"


def find_base_problems(valid: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of the base folder, from its config.json and the headers of its weights."""
    if valid.get("base_source") is not None:
        yield from _find_error(parse_base_source, valid["base_source"])
    if "base_dir" not in valid:
        return
    base_dir = Path(valid["base_dir"])
    if not base_dir.is_dir():
        command = f"{format_script('download')} --config … (and your overrides)"
        yield f"no base model in {base_dir}. Get it with:\n  {command}"
        return
    yield from _find_error(find_tokenizer_file, base_dir)
    yield from _find_error(read_source, base_dir)
    try:
        base = open_base(base_dir)
    except ValueError as error:
        yield str(error)
        return
    if any(spec.num_heads is not None and _has_ragged_rows(base.stored[name]) for name, spec in base.specs.items()):
        yield (
            f"{base_dir}: rows of its 4-bit query and key weights share blocks and cannot be permuted; "
            "use an unquantized base"
        )
    if base.gguf_path is not None:
        yield from _find_gguf_problems(valid, base)
    yield from _find_architecture_problems(valid, model.get("architecture"), base_dir, base.architecture)
    if {"output_dir", "quantization", "chat_template", "max_seq_len"} <= valid.keys():
        yield from find_export_problems(
            base,
            Path(valid["output_dir"]),
            quantization=valid["quantization"],
            chat_template=CHAT_TEMPLATES[valid["chat_template"]],
            max_seq_len=valid["max_seq_len"],
        )


def _find_error(check: Callable, *arguments: Any) -> Iterator[str]:
    try:
        check(*arguments)
    except ValueError as error:
        yield str(error)


def _has_ragged_rows(stored: StoredTensor | StoredNf4) -> bool:
    return isinstance(stored, StoredNf4) and not stored.has_whole_rows


def _find_gguf_problems(valid: Mapping[str, Any], base: BaseCheckpoint) -> Iterator[str]:
    """Yield a problem if the run is not to be served with the GGUF that the base folder holds."""
    try:
        kind = f"{GGUF_SCHEME}{base.gguf_type}"
    except ValueError as error:
        yield str(error)
        return
    if kind not in make_gguf_kinds():
        kinds = ", ".join(make_gguf_kinds())
        yield f"{base.gguf_path} holds {base.gguf_type}; train over the model's safetensors, or over one of {kinds}"
    elif valid.get("base_weights") != kind:
        yield (
            f"base_weights={valid.get('base_weights')}: {base.gguf_path} holds {base.gguf_type}; "
            f"use base_weights={kind} quantization={base.gguf_type}"
        )


def _find_architecture_problems(valid, name, base_dir, architecture) -> Iterator[str]:
    if isinstance(name, str) and name in ARCHITECTURES:
        yield from _find_error(check_architecture, name, architecture, base_dir)
    limit = architecture.max_position_embeddings
    if valid.get("max_seq_len", 0) > limit:
        yield f"max_seq_len={valid['max_seq_len']}: the model in {base_dir} takes at most {limit} tokens"
    if valid.get("base_weights") == "nf4":
        ragged = [spec for spec in list_tensors(architecture) if spec.is_linear and math.prod(spec.shape) % BLOCK_SIZE]
        if ragged:
            shape = " x ".join(map(str, ragged[0].shape))
            yield (
                f"base_weights=nf4: {ragged[0].hf_name} has {shape} weights, not a multiple of "
                f"{BLOCK_SIZE}; use base_weights=bf16"
            )
    if valid.get("base_weights") == "fp8":
        linear = (spec for spec in list_tensors(architecture) if spec.is_linear)
        odd = next((spec for spec in linear if any(size % FP8_DIVISOR for size in spec.shape)), None)
        if odd is not None:
            yield (
                f"base_weights=fp8: {odd.hf_name} is {list(odd.shape)}, fp8 products need multiples of {FP8_DIVISOR}; "
                "use base_weights=bf16"
            )


def find_base_warnings(valid: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings about a base folder without problems: what is legal but probably unintended."""
    base_dir, source = Path(valid["base_dir"]), valid.get("base_source")
    for error in _find_error(check_room, open_base(base_dir), Path(valid["output_dir"]), valid["quantization"]):
        yield f"the export does not fit on the disk now: {error}"
    held = read_source(base_dir)
    if source is not None and held is None:
        yield (
            f"{base_dir} has no {RECORD_FILE} that confirms base_source={source}; adapter and export will "
            "name the folder as their base"
        )
    elif source is not None and held != source.partition("@")[0]:
        yield f"{base_dir} holds {held}, not base_source={source}; adapter and export will name what it holds"
    is_4bit = read_json(base_dir / "config.json").get("quantization_config") is not None
    if is_4bit and valid["base_weights"] != "nf4":
        yield (
            f"base_weights={valid['base_weights']}: {base_dir} has 4 bits per weight; more bits cost memory "
            "and add no precision; use base_weights=nf4"
        )
    if is_4bit and valid["quantization"] in ("F32", "F16", "BF16"):
        yield f"quantization={valid['quantization']}: {base_dir} has 4 bits per weight; a larger GGUF is no better"


def find_data_problems(
    valid: Mapping[str, Any], dataset: Mapping[str, Any] | None, *, num_processes: int
) -> Iterator[str]:
    """Yield the problems of the data files, among them too few rows for a step or the warm-up."""
    if dataset is None:
        return
    problems = check_files(dataset)
    yield from problems
    needed = ("batch_size", "gradient_accumulation_steps", "epochs", "warmup_steps", "max_steps_per_epoch")
    if problems or any(name not in valid for name in needed):
        return
    try:
        num_rows = _count_rows(dataset)
    except ValueError as error:
        yield str(error)
        return
    if num_rows is None:
        return
    rows_per_step = valid["batch_size"] * valid["gradient_accumulation_steps"] * num_processes
    steps = -(-num_rows // rows_per_step)
    if valid["max_steps_per_epoch"] is not None:
        steps = min(steps, valid["max_steps_per_epoch"])
    yield from find_plan_problems(
        num_rows=num_rows,
        unit="packs" if dataset.get("packing") else "rows",
        rows_per_step=rows_per_step,
        num_training_steps=valid["epochs"] * steps,
        warmup_steps=valid["warmup_steps"],
    )


def _count_rows(dataset: Mapping[str, Any]) -> int | None:
    """Return an upper bound of the rows of small files, None for other data, which the recipe counts later.

    Raises:
        ValueError: if a file cannot be read completely
    """
    sources = list_sources(dataset)
    if dataset.get("on_long_row") == "split" or any(source.share != Share() for source in sources):
        return None
    names = [name for source in sources for name in source.files]
    if any(is_hub(name) for name in names) or sum(Path(name).stat().st_size for name in names) > MAX_COUNTED_BYTES:
        return None
    return sum(1 for name in names for _ in read_rows(name))
