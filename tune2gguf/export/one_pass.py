"""One reading of the base into one or more GGUF files: rows are merged, rounded, quantized in threads, and written."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tune2gguf.checkpoints.base import BaseCheckpoint
from tune2gguf.export.adapter import Adapter
from tune2gguf.export.base_rows import read_gguf_rows
from tune2gguf.export.gguf_llama import ALIGNMENT, GGUFTensor, compute_rope_factors
from tune2gguf.export.kernels import Kernels
from tune2gguf.export.merge import merge_rows, round_to_bfloat16, widen_bfloat16

# Elements a thread works on at a time: large enough to hide Python's cost, small enough for many threads in 0.5 GB.
# Fixed, because the matrix product of other slabs may round in another way.
SLAB_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Output:
    """A file to write: its metadata is there, tensors are appended; `types` is the ggml type by tensor name."""

    path: Path
    types: dict[str, str]


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
        return (self.end - self.begin) * (self.tensor.shape[1] if len(self.tensor.shape) == 2 else 1)


def append_tensors(
    outputs: list[Output],
    tensors: list[GGUFTensor],
    *,
    base: BaseCheckpoint,
    adapter: Adapter | None,
    kernels: Kernels,
    num_threads: int,
    report: Callable[[int], None],
) -> None:
    """Append all tensors to all outputs, each base row read once.

    Args:
        num_threads: threads that merge and quantize
        report: called with the number of elements done

    Raises:
        ValueError: if a merged weight is not finite, or a base file has become shorter
    """

    def convert(slab: Slab) -> dict[str, np.ndarray]:
        types = {output.types[slab.tensor.name] for output in outputs}
        return convert_slab(slab, types, base=base, adapter=adapter, kernels=kernels)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        files = [stack.enter_context(output.path.open("ab")) for output in outputs]
        for slab, converted in _map_in_order(pool, convert, iterate_slabs(tensors), max_pending=2 * num_threads):
            for output, file in zip(outputs, files, strict=True):
                file.write(memoryview(converted[output.types[slab.tensor.name]]).cast("B"))
                if slab.is_last:
                    file.write(bytes(-file.tell() % ALIGNMENT))
            report(slab.num_elements)
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def _map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Slab], dict], slabs: Iterator[Slab], *, max_pending: int
) -> Iterator[tuple[Slab, dict]]:
    """Like `pool.map`, but never more than `max_pending` results in memory."""
    pending: deque[tuple[Slab, Future]] = deque()
    try:
        for slab in slabs:
            pending.append((slab, pool.submit(function, slab)))
            if len(pending) >= max_pending:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def iterate_slabs(tensors: list[GGUFTensor]) -> Iterator[Slab]:
    """Cut the tensors into slabs of whole rows; query and key into whole heads, because rows move within their head."""
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


def convert_slab(
    slab: Slab, types: set[str], *, base: BaseCheckpoint, adapter: Adapter | None, kernels: Kernels
) -> dict[str, np.ndarray]:
    """Return the slab's bytes in each of the types."""
    spec = slab.tensor.spec
    if spec is None:
        return {"F32": compute_rope_factors(base.architecture)}
    rows = read_gguf_rows(base.stored[spec.tune_name], spec, slab.begin, slab.end)
    pair = None if adapter is None else adapter.pairs.get(spec.tune_name)
    if pair is not None:
        lora_b_rows = pair.lora_b[slab.begin : slab.end]
        rows = merge_rows(rows, pair.lora_a, lora_b_rows, rank=adapter.rank, alpha=adapter.alpha)
    if not np.isfinite(rows).all():
        raise ValueError(f"{slab.tensor.name}: holds NaN or infinity in rows {slab.begin} to {slab.end - 1}")
    if rows.ndim == 1:
        return {"F32": rows}
    bits = round_to_bfloat16(rows)
    rounded = widen_bfloat16(bits)
    return {ggml_type: _convert_rows(bits, rounded, ggml_type, kernels) for ggml_type in types}


def _convert_rows(bits: np.ndarray, rows: np.ndarray, ggml_type: str, kernels: Kernels) -> np.ndarray:
    if ggml_type == "BF16":
        return bits
    if ggml_type == "F32":
        return rows
    return kernels.quantize(rows, ggml_type)
