"""Safetensors files, one tensor at a time: checked headers, reads, memory maps, streamed writes.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header,
JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`; the tensors' bytes. A run maps weights that it keeps as
stored. It reads weights that it converts, quantizes or copies: mapped pages count as resident memory until dropped.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from tune2gguf.files.atomic import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OWN_MAPPING_BYTES = 1 << 20

# The format's dtype names, their torch names, and bytes per element.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `dtype` by the format's name, `begin` and `end` in bytes from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write: name, dtype (the format's name) and shape; its bytes come later."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Check a file's header and return its tensors by name.

    Raises:
        ValueError: if the file is no safetensors file, is truncated, or its header does not match its size
    """
    try:
        # The library checks all offsets, but does not return them.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, damaged or no safetensors file ({error}); download it again") from None
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; supported: {', '.join(DTYPES)}")
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), begin, end)
    return tensors


def read_raw(stored: StoredTensor, begin: int = 0, num_bytes: int | None = None) -> np.ndarray:
    """Read bytes of a tensor into fresh memory, from its byte `begin`; all of them by default.

    Raises:
        ValueError: if the file was shortened after its header was read
    """
    buffer = _allocate(stored.end - stored.begin if num_bytes is None else num_bytes)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.begin + begin)
        filled, view = 0, memoryview(buffer)
        # One read returns at most 2 GiB on Linux.
        while filled < len(buffer):
            num_read = file.readinto(view[filled:])
            if not num_read:
                raise ValueError(
                    f"{stored.path}: ends inside tensor {stored.name!r}; the file changed after it was opened"
                )
            filled += num_read
    return buffer


def read_float32_rows(stored: StoredTensor, begin: int, end: int) -> np.ndarray:
    """Read rows [begin, end) of an F32, F16 or BF16 tensor as float32 into fresh memory, without torch."""
    shape = (end - begin, *stored.shape[1:])
    row_bytes = math.prod(stored.shape[1:]) * DTYPES[stored.dtype][1]
    raw = read_raw(stored, begin * row_bytes, (end - begin) * row_bytes)
    if stored.dtype == "BF16":
        return widen_bfloat16(raw.view(np.uint16)).reshape(shape)
    return raw.view(DTYPES[stored.dtype][0]).reshape(shape).astype(np.float32, copy=False)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits (uint16)."""
    return np.left_shift(bits, np.uint32(16), dtype=np.uint32).view(np.float32)


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read a whole tensor into fresh memory."""
    import torch

    return torch.from_numpy(read_raw(stored)).view(get_torch_dtype(stored)).view(stored.shape)


def _allocate(num_bytes: int) -> np.ndarray:
    """Return uninitialized bytes; from OWN_MAPPING_BYTES on they have their own memory mapping.

    malloc does not return memory freed between live blocks, which nearly doubles the peak of quantization on load.
    """
    if num_bytes < OWN_MAPPING_BYTES:
        return np.empty(num_bytes, np.uint8)
    # Private: a child process must not share our writes. On Windows it never does.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, num_bytes, **private), np.uint8)


def map_file(path: Path) -> Tensor:
    """Map a file: return its bytes, uint8; processes that map the same file share the memory.

    Writes are private and never reach the file. Shortening a mapped file kills the process; replacing it with another
    file, as downloads and copies do, is safe.
    """
    import torch

    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def view_tensor(content: Tensor, stored: StoredTensor) -> Tensor:
    """Return a tensor as a view of its mapped file; an unaligned tensor is read into fresh memory.

    Raises:
        ValueError: if the file was shortened after its header was read
    """
    dtype = get_torch_dtype(stored)
    if stored.begin % dtype.itemsize or len(content) < stored.end:
        return read_tensor(stored)
    return content[stored.begin : stored.end].view(dtype).view(stored.shape)


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite], chunks: Iterator[Tensor]) -> None:
    """Write a new file of `tensors` with bytes from `chunks`: one or more whole-row chunks per tensor, in order.

    Only the current chunk is in memory; chunks after the last tensor are not consumed.

    Raises:
        FileExistsError: if the file exists
        ValueError: if a tensor's chunks exceed its size
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            remaining = tensor.num_bytes
            while remaining > 0:
                remaining -= file.write(get_bytes(next(chunks)))
            if remaining < 0:
                raise ValueError(
                    f"tensor {tensor.name!r}: its chunks exceed shape {tensor.shape} by {-remaining} bytes"
                )


def write_shards(
    folder: Path, tensors: Sequence[TensorToWrite], chunks: Iterator[Tensor], *, max_shard_bytes: int
) -> None:
    """Write `model.safetensors`, or shards and their index if the tensors exceed `max_shard_bytes`.

    Tensors keep their order; a tensor larger than `max_shard_bytes` gets its own shard.
    """
    shards: list[list[TensorToWrite]] = [[]]
    for tensor in tensors:
        shard_bytes = sum(member.num_bytes for member in shards[-1])
        if shards[-1] and shard_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    write_files(folder, dict(zip(names if len(shards) > 1 else [SINGLE_FILE], shards, strict=True)), chunks)


def write_files(folder: Path, files: dict[str, list[TensorToWrite]], chunks: Iterator[Tensor]) -> None:
    """Write the files (name -> tensors) in order, and an index if there are several."""
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors, chunks)
    if len(files) > 1:
        weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        total_size = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def get_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes; without a copy if it is contiguous."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def get_torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Return the torch dtype of a stored tensor."""
    import torch

    return getattr(torch, DTYPES[stored.dtype][0])
