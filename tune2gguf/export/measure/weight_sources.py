"""The weights of each step of an export: base, base with adapter, merged, quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tune2gguf.base.bfloat16 import round_to_bfloat16
from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.base.gguf_weights import list_stored
from tune2gguf.base.layout import get_gguf_name
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix
from tune2gguf.export.gguf_file.llama import choose_types, list_gguf_tensors
from tune2gguf.export.measure.layerwise import WeightSource
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.merge.slabs import read_merged_rows
from tune2gguf.ggml.kernels import Kernels
from tune2gguf.ggml.types import Quantization


def open_base_source(base: BaseCheckpoint, *, adapter: Adapter | None) -> WeightSource:
    """Return the base's weights, with an optional unmerged adapter."""
    return WeightSource(base.architecture, base.read_rows, adapter)


def open_merged_source(base: BaseCheckpoint, adapter: Adapter) -> WeightSource:
    """Return the merged weights, rounded to bfloat16 as for every file."""

    def read_rows(name: str, begin: int, end: int) -> np.ndarray:
        rows = read_merged_rows(base.specs[name], begin, end, base=base, adapter=adapter)
        return rows if rows.ndim == 1 else round_to_bfloat16(rows)

    return WeightSource(base.architecture, read_rows)


def open_quantized_source(
    base: BaseCheckpoint,
    adapter: Adapter,
    quantization: Quantization,
    kernels: Kernels,
    *,
    importance: ImportanceMatrix | None = None,
) -> WeightSource:
    """Return the dequantized weights of a file of this type, without writing it."""
    tensors = list_gguf_tensors(base.specs, base.architecture)
    importance = importance if quantization.takes_importance else None
    types = choose_types(tensors, base.architecture, quantization, has_importance=importance is not None)
    weights = {} if importance is None else importance.weights
    merged = open_merged_source(base, adapter)

    def read_rows(name: str, begin: int, end: int) -> np.ndarray:
        rows, ggml_type = merged.read_rows(name, begin, end), types[get_gguf_name(name)]
        if rows.ndim == 1 or ggml_type in ("F32", "BF16"):
            return rows
        return kernels.dequantize(kernels.quantize(rows, ggml_type, weights.get(get_gguf_name(name))), ggml_type)

    return WeightSource(base.architecture, read_rows)


def open_gguf_source(path: Path, base: BaseCheckpoint, *, adapter: Adapter | None = None) -> WeightSource:
    """Return the dequantized tensors of a GGUF file, with an optional unmerged adapter."""
    tensors = list_stored(path)

    def read_rows(name: str, begin: int, end: int) -> np.ndarray:
        return tensors[get_gguf_name(name)].read_rows(begin, end)

    return WeightSource(base.architecture, read_rows, adapter)
