"""Read an adapter in the PEFT layout and check that it fits the base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tune2gguf.base.layout import TensorSpec, to_tune_rows
from tune2gguf.base.safetensors_file import StoredTensor, read_float32_rows, read_header
from tune2gguf.files.json_files import read_json
from tune2gguf.runs.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LoraPair:
    """One module's float32 matrices: lora_a [rank, in], and lora_b [out, rank] with rows in GGUF's order."""

    lora_a: np.ndarray
    lora_b: np.ndarray


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its base; `pairs` is keyed by torchtune's name of the base weight."""

    rank: int
    alpha: float
    pairs: dict[str, LoraPair]


def read_adapter(folder: str | Path, specs: dict[str, TensorSpec]) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors; `specs` are the base's tensors by torchtune's names.

    Raises:
        ValueError: if a file is missing or damaged, the adapter is of an unsupported kind, or it does not fit the base
    """
    folder = Path(folder)
    config = _read_config(folder / ADAPTER_CONFIG)
    rank, alpha = config["r"], config["lora_alpha"]
    sides = _find_sides(folder / ADAPTER_WEIGHTS)
    by_hf_name = {spec.hf_name: spec for spec in specs.values()}
    problems = _find_problems(sides, by_hf_name, rank)
    if problems:
        listed = "\n  ".join(problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else []))
        raise ValueError(f"{folder}: the adapter does not fit the base:\n  {listed}")
    pairs = {}
    for module, stored in sides.items():
        spec = by_hf_name[f"{module}.weight"]
        lora_a, lora_b = (read_float32_rows(stored[side], 0, stored[side].shape[0]) for side in "AB")
        if not (np.isfinite(lora_a).all() and np.isfinite(lora_b).all()):
            raise ValueError(f"{folder}: {module} holds NaN or infinity; its training diverged")
        if spec.num_heads is not None:
            lora_b = to_tune_rows(lora_b, spec.num_heads)
        pairs[spec.tune_name] = LoraPair(lora_a, np.ascontiguousarray(lora_b))
    return Adapter(rank=rank, alpha=alpha, pairs=pairs)


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no adapter here ({path.name} is missing)")
    config = read_json(path)
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    changing = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
    unsupported = [key for key in changing if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise ValueError(f"{path}: uses {', '.join(unsupported)}; only plain LoRA can be exported")
    return config


def _find_sides(path: Path) -> dict[str, dict[str, StoredTensor]]:
    """Return module -> {"A": tensor, "B": tensor}."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: no adapter here ({path.name} is missing)")
    sides: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in read_header(path).items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{path}: tensor {name!r} is not part of a plain LoRA adapter in the PEFT layout")
        sides.setdefault(match["module"], {})[match["side"]] = stored
    if not sides:
        raise ValueError(f"{path}: holds no tensors")
    return sides


def _find_problems(sides: dict[str, dict[str, StoredTensor]], specs: dict[str, TensorSpec], rank: int) -> list[str]:
    problems = []
    for module, stored in sides.items():
        spec = specs.get(f"{module}.weight")
        if spec is None:
            problems.append(f"{module}: the base has no such module")
        elif len(spec.shape) != 2 or not spec.is_linear:
            problems.append(f"{module}: adapters on this module are not supported")
        elif set(stored) != {"A", "B"}:
            problems.append(f"{module}: lora_A or lora_B is missing")
        else:
            expected = {"A": (rank, spec.shape[1]), "B": (spec.shape[0], rank)}
            problems += [
                f"{module}: lora_{side} is {list(stored[side].shape)}, the base and rank {rank} need {list(shape)}"
                for side, shape in expected.items()
                if stored[side].shape != shape
            ]
    return problems
