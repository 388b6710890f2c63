"""llama.cpp's quantization kernels, called with ctypes from the library in `xllamacpp`.

Its symbols are no public API, so pyproject.toml pins xllamacpp. Kernels run without the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tune2gguf.ggml.types import get_block


@dataclass(frozen=True)
class Kernels:
    """The kernels of a loaded library."""

    library: ctypes.CDLL

    def quantize(self, rows: np.ndarray, ggml_type: str, importance: np.ndarray | None = None) -> np.ndarray:
        """Quantize float32 rows [num_rows, columns] to bytes [num_rows, bytes per row]; columns fill whole blocks.

        Args:
            importance: float32 [columns], the weight of a squared error in each column
        """
        for given in (rows, *(() if importance is None else (importance,))):
            assert given.dtype == np.float32 and given.flags.c_contiguous, "the kernels read contiguous float32"
        num_rows, columns = rows.shape
        assert importance is None or importance.shape == (columns,), "each column has one weight"
        elements, block_bytes = get_block(ggml_type)
        quantized = np.empty((num_rows, columns // elements * block_bytes), np.uint8)
        written = self.library.ggml_quantize_chunk(
            GGMLQuantizationType[ggml_type],
            rows.ctypes.data,
            quantized.ctypes.data,
            0,
            num_rows,
            columns,
            None if importance is None else importance.ctypes.data,
        )
        assert written == quantized.nbytes, f"ggml_quantize_chunk wrote {written} of {quantized.nbytes} bytes"
        return quantized

    def can_dequantize(self, ggml_type: str) -> bool:
        """Return whether `dequantize` knows a type."""
        return ggml_type == "F32" or hasattr(self.library, _name_dequantizer(ggml_type))

    def dequantize(self, quantized: np.ndarray, ggml_type: str) -> np.ndarray:
        """Return the float32 rows [num_rows, columns] of quantized bytes [num_rows, bytes per row]."""
        assert quantized.dtype == np.uint8 and quantized.flags.c_contiguous, "the kernels read contiguous bytes"
        elements, block_bytes = get_block(ggml_type)
        if ggml_type == "F32":
            return quantized.view(np.float32)
        rows = np.empty((quantized.shape[0], quantized.shape[1] // block_bytes * elements), np.float32)
        function = getattr(self.library, _name_dequantizer(ggml_type))
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(quantized.ctypes.data, rows.ctypes.data, rows.size)
        return rows


def _name_dequantizer(ggml_type: str) -> str:
    names = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    return names.get(ggml_type, f"dequantize_row_{ggml_type.lower().replace('_k', '_K')}")


def load_kernels() -> Kernels:
    """Load llama.cpp's kernels from the shared library inside the xllamacpp package.

    Raises:
        ValueError: if the package is not installed, or its library lacks the kernels
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ValueError(
            "xllamacpp, which contains llama.cpp's kernels, is not installed. Get it with:\n  pip install -e ."
        )
    folder = Path(spec.origin).parent
    candidates = sorted(path for path in folder.iterdir() if path.suffix in (".so", ".pyd", ".dylib"))
    if not candidates:
        raise ValueError(f"{folder}: no shared library; reinstall xllamacpp")
    library = ctypes.CDLL(str(candidates[0]))
    try:
        quantize_chunk = library.ggml_quantize_chunk
    except AttributeError:
        raise ValueError(
            "the installed xllamacpp does not export ggml_quantize_chunk; install the release that pyproject.toml pins"
        ) from None
    quantize_chunk.restype = ctypes.c_size_t
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    return Kernels(library)
