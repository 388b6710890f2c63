"""Rounding of base weights to a GGUF type: an adapter then trains over the weights that llama.cpp serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tune2gguf.base.bfloat16 import round_to_bfloat16
from tune2gguf.base.layout import TensorSpec, get_gguf_name
from tune2gguf.ggml.kernels import load_kernels
from tune2gguf.ggml.types import QUANTIZATIONS, choose_tensor_type
from tune2gguf.model.architectures import Architecture

GGUF_SCHEME = "gguf:"


def make_gguf_kinds() -> tuple[str, ...]:
    """Return the values of base_weights that name a GGUF type: gguf:Q8_0, gguf:Q4_K_M …"""
    return tuple(f"{GGUF_SCHEME}{name}" for name, quantization in QUANTIZATIONS.items() if quantization.is_trainable)


def get_gguf_type(base_weights: str) -> str | None:
    """Return TYPE of base_weights gguf:TYPE; None for other base weights."""
    return base_weights.removeprefix(GGUF_SCHEME) if base_weights.startswith(GGUF_SCHEME) else None


def make_rounding(
    specs: Mapping[str, TensorSpec], architecture: Architecture, type_name: str
) -> Callable[[str, np.ndarray], np.ndarray]:
    """Return a function (torchtune's tensor name, rows) -> rows rounded to a GGUF of this type, float32.

    The rounding is the export's: from bfloat16, by the same kernels, row by row.
    """
    kernels = load_kernels()
    types = {
        name: choose_tensor_type(
            get_gguf_name(name),
            spec.shape,
            QUANTIZATIONS[type_name],
            num_layers=architecture.num_layers,
            queries_per_key=architecture.num_heads // architecture.num_kv_heads,
            is_tied=architecture.tied,
        )
        for name, spec in specs.items()
    }

    def round_rows(name: str, rows: np.ndarray) -> np.ndarray:
        if rows.ndim == 1:
            return rows
        rows = round_to_bfloat16(np.array(rows, np.float32, order="C"))
        return kernels.dequantize(kernels.quantize(rows, types[name]), types[name])

    return round_rows
