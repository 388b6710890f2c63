"""The importance matrix: how much an error in each column of a matrix counts; llama.cpp's GGUF of it.

A column's importance is the mean square of what it is multiplied with. Keys and tensors are those of llama.cpp's
llama-imatrix (tools/imatrix, MIT), so that each reads the other's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

_SUMS, _COUNT = ".in_sum2", ".counts"
_DATASETS, _NUM_CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAX_STRING_BYTES = 127  # of llama-quantize's keys


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs.

    Attributes:
        name: of the file
        sums: GGUF's tensor name -> float32 [columns], over `counts` tokens
        counts: GGUF's tensor name -> number of tokens
        datasets: where the tokens come from
        num_chunks, chunk_size: of the text, in tokens
    """

    name: str
    sums: dict[str, np.ndarray]
    counts: dict[str, int]
    datasets: tuple[str, ...]
    num_chunks: int
    chunk_size: int

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Each tensor's mean squared inputs, float32 [columns]: what the kernels take."""
        return {
            name: sums / np.float32(self.counts[name]) if self.counts[name] else np.ones_like(sums)
            for name, sums in self.sums.items()
        }

    def list_keys(self) -> dict[str, str | int]:
        """Return what llama-quantize says of the matrix in a file that is quantized with it."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": _cut(self.name)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = _cut(self.datasets[0])
        keys["quantize.imatrix.entries_count"] = len(self.sums)
        return keys | ({"quantize.imatrix.chunks_count": self.num_chunks} if self.num_chunks > 0 else {})

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every matrix of a layer has its importance; `shapes` are by GGUF's tensor names."""
        for name, shape in shapes.items():
            if len(shape) == 2 and name.startswith("blk.") and name not in self.sums:
                raise ValueError(f"{self.name}: has no importance of {name}; it is the matrix of another model")
            if name in self.sums and self.sums[name].size != shape[-1]:
                raise ValueError(
                    f"{self.name}: {name} has {self.sums[name].size} columns there, but {shape[-1]} in the model; it "
                    "is the matrix of another model"
                )


def _cut(text: str) -> str:
    return text.encode()[:MAX_STRING_BYTES].decode(errors="ignore")


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write the matrix as llama-imatrix does."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # a matrix is of no architecture
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
    """Read an importance matrix that llama-imatrix, or write_imatrix, wrote as GGUF.

    Raises:
        ValueError: if it is no such file, or a value is not finite or negative
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(
            f"{path}: cannot be read as GGUF ({error}); llama-imatrix writes one with --output-format gguf"
        ) from None
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    missing = [key for key in (_DATASETS, _NUM_CHUNKS, _CHUNK_SIZE) if key not in keys]
    if keys.get("general.type") != "imatrix" or missing:
        raise ValueError(f"{path}: is no importance matrix ({', '.join(missing) or 'general.type'})")
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
            raise ValueError(f"{path}: {name} has not one number of tokens; matrices of experts are not read")
        if values.dtype != np.float32 or not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{path}: {key} is not all finite numbers of 0 and more")
        yield name, np.ascontiguousarray(values.reshape(-1))
