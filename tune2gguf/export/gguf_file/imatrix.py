"""The importance matrix, in memory and as llama.cpp's GGUF: the weight of an error in each column of a matrix.

A column's importance is the mean square of its inputs. Keys and tensors are those of llama.cpp's llama-imatrix
(tools/imatrix, MIT): each reads the other's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from tune2gguf.base.gguf_weights import open_gguf, read_keys

_SUMS, _COUNT = ".in_sum2", ".counts"
_DATASETS, _NUM_CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAX_STRING_BYTES = 127  # llama-quantize's limit on a string value


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix, as sums of squared inputs.

    Attributes:
        name: file name
        sums: GGUF's tensor name -> float32 [columns], summed over `counts` tokens
        counts: GGUF's tensor name -> number of tokens
        datasets: sources of the tokens
        num_chunks: chunks of the text
        chunk_size: tokens per chunk
    """

    name: str
    sums: dict[str, np.ndarray]
    counts: dict[str, int]
    datasets: tuple[str, ...]
    num_chunks: int
    chunk_size: int

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The mean squared inputs of each tensor, float32 [columns], as the kernels take them."""
        return {
            name: sums / np.float32(self.counts[name]) if self.counts[name] else np.ones_like(sums)
            for name, sums in self.sums.items()
        }

    def list_keys(self) -> dict[str, str | int]:
        """Return the keys that llama-quantize writes into a file quantized with this matrix."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": _cut(self.name)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = _cut(self.datasets[0])
        keys["quantize.imatrix.entries_count"] = len(self.sums)
        return keys | ({"quantize.imatrix.chunks_count": self.num_chunks} if self.num_chunks > 0 else {})

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every layer matrix has an importance; `shapes` has GGUF's tensor names as keys."""
        for name, shape in shapes.items():
            if len(shape) == 2 and name.startswith("blk.") and name not in self.sums:
                raise ValueError(f"{self.name}: lacks {name}; this importance matrix belongs to another model")
            if name in self.sums and self.sums[name].size != shape[-1]:
                raise ValueError(
                    f"{self.name}: {name} has {self.sums[name].size} columns, the model has {shape[-1]}; this "
                    "importance matrix belongs to another model"
                )


def _cut(text: str) -> str:
    return text.encode()[:MAX_STRING_BYTES].decode(errors="ignore")


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write the matrix as llama-imatrix does."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array(_DATASETS, list(matrix.datasets))
    writer.add_uint32(_NUM_CHUNKS, matrix.num_chunks)
    writer.add_uint32(_CHUNK_SIZE, matrix.chunk_size)
    for name in sorted(matrix.sums):
        writer.add_tensor(name + _SUMS, matrix.sums[name])
        writer.add_tensor(name + _COUNT, np.array([matrix.counts[name]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read a GGUF importance matrix from llama-imatrix or write_imatrix.

    Raises:
        ValueError: if the file is missing or no importance matrix, or a value is negative or not finite
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader, keys = open_gguf(path), read_keys(path)
    except ValueError as error:
        raise ValueError(f"{error}; llama-imatrix writes one with --output-format gguf") from None
    missing = [key for key in (_DATASETS, _NUM_CHUNKS, _CHUNK_SIZE) if key not in keys]
    if keys.get("general.type") != "imatrix" or missing:
        raise ValueError(f"{path}: not an importance matrix; missing or wrong: {', '.join(missing) or 'general.type'}")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    sums = dict(_read_sums(path, tensors))
    counts = {name: round(float(tensors[name + _COUNT].max())) for name in sums}
    return ImportanceMatrix(path.name, sums, counts, **_read_text(keys))


def _read_text(keys: Mapping[str, Any]) -> dict[str, Any]:
    datasets = keys[_DATASETS]
    datasets = (datasets,) if isinstance(datasets, str) else tuple(datasets)
    return {"datasets": datasets, "num_chunks": keys[_NUM_CHUNKS], "chunk_size": keys[_CHUNK_SIZE]}


def _read_sums(path: Path, tensors: Mapping[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    for key, values in tensors.items():
        name = key.removesuffix(_SUMS)
        if name == key:
            continue
        if name + _COUNT not in tensors or tensors[name + _COUNT].size != 1:
            raise ValueError(f"{path}: {name} needs one token count; mixtures of experts are not supported")
        if values.dtype != np.float32 or not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{path}: {key} must be float32, finite and at least 0")
        yield name, np.ascontiguousarray(values.reshape(-1))
