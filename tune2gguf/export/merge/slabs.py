"""Slabs, a thread's unit of work: rows of a tensor, read from the base and merged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.base.layout import TensorSpec
from tune2gguf.export.gguf_file.llama import GGUFTensor
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.merge.arithmetic import merge_rows

# Elements per slab: large enough to hide Python's overhead, small enough for many threads in 0.5 GB.
# Fixed, because matrix products of other sizes may round differently.
SLAB_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Slab:
    """Rows [begin, end) of a tensor."""

    tensor: GGUFTensor
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.tensor.shape[0]

    @property
    def num_elements(self) -> int:
        return (self.end - self.begin) * math.prod(self.tensor.shape[1:])


def iterate_slabs(tensors: list[GGUFTensor]) -> Iterator[Slab]:
    """Cut the tensors into slabs of whole rows; query and key into whole heads, whose rows change places."""
    for tensor in tensors:
        num_rows = tensor.shape[0]
        step = num_rows
        if len(tensor.shape) == 2:
            step = max(1, SLAB_ELEMENTS // tensor.shape[1])
        if tensor.spec is not None and tensor.spec.num_heads is not None:
            head_dim = num_rows // tensor.spec.num_heads
            step = max(head_dim, step // head_dim * head_dim)
        for begin in range(0, num_rows, step):
            yield Slab(tensor, begin, min(begin + step, num_rows))


def read_merged_rows(
    spec: TensorSpec, begin: int, end: int, *, base: BaseCheckpoint, adapter: Adapter | None
) -> np.ndarray:
    """Return rows [begin, end) in GGUF's order, with the adapter merged, as the caller's own float32 array.

    Raises:
        ValueError: if a weight is not finite, or a base file was truncated
    """
    rows = base.read_rows(spec.tune_name, begin, end)
    pair = None if adapter is None else adapter.pairs.get(spec.tune_name)
    if pair is not None:
        rows = merge_rows(rows, pair.lora_a, pair.lora_b[begin:end], rank=adapter.rank, alpha=adapter.alpha)
    if not np.isfinite(rows).all():
        raise ValueError(f"{spec.hf_name}: holds NaN or infinity between rows {begin} and {end - 1}")
    return rows
