"""Rows of stored tensors as float32, in GGUF's order, without torch."""

from __future__ import annotations

import math
import os

import numpy as np

from tune2gguf.base.layout import TensorSpec
from tune2gguf.base.safetensors_file import StoredTensor
from tune2gguf.export.merge.arithmetic import widen_bfloat16

_NUMPY_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}


def read_float32_rows(stored: StoredTensor, begin: int, end: int) -> np.ndarray:
    """Read rows [begin, end) of the first dimension of an F32, F16 or BF16 tensor, as float32 in fresh memory.

    Raises:
        ValueError: if the file has become shorter since its header was read
    """
    dtype = _NUMPY_DTYPES[stored.dtype]
    row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
    buffer = _read_bytes(stored, stored.begin + begin * row_bytes, (end - begin) * row_bytes)
    values = buffer.view(dtype).reshape(end - begin, *stored.shape[1:])
    return widen_bfloat16(values) if stored.dtype == "BF16" else values.astype(np.float32, copy=False)


def _read_bytes(stored: StoredTensor, offset: int, length: int) -> np.ndarray:
    buffer = np.empty(length, np.uint8)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(offset, os.SEEK_SET)
        filled, view = 0, memoryview(buffer)
        while filled < length:
            num_read = file.readinto(view[filled:])
            if not num_read:
                raise ValueError(f"{stored.path}: ended inside tensor {stored.name!r}; it changed after it was opened")
            filled += num_read
    return buffer


def to_gguf_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder query or key rows [num_heads * head_dim, ...] from Hugging Face's order to GGUF's.

    Hugging Face rotates the pair (i, i + head_dim / 2) of a head, llama.cpp the pair (2 i, 2 i + 1).
    """
    head_dim = rows.shape[0] // num_heads
    return rows.reshape(num_heads, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_gguf_rows(stored: StoredTensor, spec: TensorSpec, begin: int, end: int) -> np.ndarray:
    """Read rows [begin, end), counted in GGUF's order, as float32; where rows are permuted, in whole heads."""
    rows = read_float32_rows(stored, begin, end)
    if spec.num_heads is None:
        return rows
    head_dim = spec.shape[0] // spec.num_heads
    assert begin % head_dim == 0 and end % head_dim == 0, "rows change places within their head only"
    return to_gguf_rows(rows, (end - begin) // head_dim)


def to_hf_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder query or key rows [num_heads * head_dim, ...] from GGUF's order to Hugging Face's."""
    head_dim = rows.shape[0] // num_heads
    return rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
