"""A GGUF file as a base's weights: its keys and the rows of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, Keys

from tune2gguf.base.layout import ROPE_FACTORS
from tune2gguf.ggml.kernels import load_kernels
from tune2gguf.ggml.types import QUANTIZATIONS, Quantization
from tune2gguf.model.architectures import Architecture


@dataclass(frozen=True)
class StoredGguf:
    """A tensor of a GGUF file, mapped. Rows are in torchtune's order, which is GGUF's.

    Attributes:
        begin: offset in the file, in bytes
        data: [rows, bytes per row] or [length]
        dtype: of the values that are read
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    begin: int
    ggml_type: str
    data: np.ndarray
    dtype: str = "F32"

    def read_rows(self, begin: int, end: int) -> np.ndarray:
        """Read rows [begin, end), dequantized to float32."""
        if len(self.shape) == 1:
            return np.array(self.data[begin:end], np.float32)
        rows = np.array(self.data[begin:end]).view(np.uint8).reshape(end - begin, -1)
        return load_kernels().dequantize(rows, self.ggml_type)


def open_gguf(path: str | Path) -> GGUFReader:
    """Open a GGUF; the last two are kept open, because reading a vocabulary takes seconds.

    Raises:
        ValueError: if the file cannot be read as GGUF
    """
    path = Path(path)
    try:
        status = path.stat()
        return _open_unchanged(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as GGUF ({error})") from None


@lru_cache(maxsize=2)
def _open_unchanged(path: Path, size: int, mtime: int) -> GGUFReader:
    return GGUFReader(path)


def read_keys(path: Path) -> dict[str, Any]:
    """Return a GGUF's keys and values, without the header's own."""
    fields = open_gguf(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def list_stored(path: Path) -> dict[str, StoredGguf]:
    """Return a GGUF's tensors by their GGUF names.

    Raises:
        ValueError: if the file cannot be read as GGUF, or a tensor's type cannot be dequantized
    """
    tensors, kernels = open_gguf(path).tensors, load_kernels()
    unknown = {tensor.tensor_type.name: tensor.name for tensor in tensors}
    unknown = {ggml_type: name for ggml_type, name in unknown.items() if not kernels.can_dequantize(ggml_type)}
    if unknown:
        found = ", ".join(f"{ggml_type} ({name})" for ggml_type, name in unknown.items())
        raise ValueError(f"{path}: has tensors of unreadable types: {found}; llama-quantize writes others")
    return {
        # GGUF lists the fastest dimension first.
        tensor.name: StoredGguf(
            path=path,
            name=tensor.name,
            shape=tuple(int(length) for length in reversed(tensor.shape)),
            begin=int(tensor.data_offset),
            ggml_type=tensor.tensor_type.name,
            data=tensor.data,
        )
        for tensor in tensors
    }


def read_quantization(path: Path) -> Quantization:
    """Return the quantization of a GGUF file.

    Raises:
        ValueError: if the file is no GGUF, or its file type is not one of QUANTIZATIONS
    """
    field = open_gguf(path).get_field(Keys.General.FILE_TYPE)
    found = None if field is None else field.contents()
    for quantization in QUANTIZATIONS.values():
        if quantization.file_type == found:
            return quantization
    raise ValueError(f"{path}: its file type {found} is none of {', '.join(QUANTIZATIONS)}")


def read_gguf_architecture(path: Path) -> Architecture:
    """Return the architecture that a GGUF's keys describe; they lack the parameters of RoPE scaling.

    Raises:
        ValueError: if it is not Llama's, or a key is missing
    """
    keys, names = read_keys(path), {tensor.name for tensor in open_gguf(path).tensors}
    if keys.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: general.architecture is {keys.get('general.architecture')!r}; only 'llama' is supported"
        )
    try:
        num_heads, embed_dim = keys["llama.attention.head_count"], keys["llama.embedding_length"]
        return Architecture(
            vocab_size=len(keys["tokenizer.ggml.tokens"]),
            num_layers=keys["llama.block_count"],
            num_heads=num_heads,
            num_kv_heads=keys.get("llama.attention.head_count_kv", num_heads),
            embed_dim=embed_dim,
            intermediate_dim=keys["llama.feed_forward_length"],
            head_dim=keys.get("llama.attention.key_length", embed_dim // num_heads),
            max_position_embeddings=keys["llama.context_length"],
            tied="output.weight" not in names,
            norm_eps=_restore_decimal(keys["llama.attention.layer_norm_rms_epsilon"]),
            rope_base=_restore_decimal(keys.get("llama.rope.freq_base", 10_000.0)),  # llama.cpp's default
        )
    except KeyError as error:
        raise ValueError(f"{path}: lacks the key {error}") from None


def _restore_decimal(value: float) -> float:
    """Return the decimal that a GGUF's float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def list_differences(path: Path, architecture: Architecture) -> list[str]:
    """Return what a GGUF's keys say otherwise than an architecture; the context length may differ."""
    found, wanted = vars(read_gguf_architecture(path)), vars(architecture)
    names = [name for name in wanted if name not in ("rope_scaling", "max_position_embeddings")]
    differences = [f"{name} is {found[name]}, expected {wanted[name]}" for name in names if found[name] != wanted[name]]
    is_scaled = any(tensor.name == ROPE_FACTORS for tensor in open_gguf(path).tensors)
    if is_scaled != (architecture.rope_scaling is not None):
        differences.append(f"{ROPE_FACTORS} is {'unexpected' if is_scaled else 'missing'}")
    return differences
