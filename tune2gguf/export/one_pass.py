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

from tune2gguf.export.gguf_file.kernels import Kernels
from tune2gguf.export.gguf_file.llama import ALIGNMENT, GGUFTensor, compute_rope_factors
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.merge.arithmetic import keep_products_on_their_thread, narrow_to_bfloat16, round_to_bfloat16
from tune2gguf.export.merge.base import MergeBase
from tune2gguf.export.merge.slabs import Slab, iterate_slabs, read_merged_rows


@dataclass(frozen=True)
class Output:
    """A file to write: its metadata is there, tensors are appended; `types` is the ggml type by tensor name."""

    path: Path
    types: dict[str, str]


@dataclass(frozen=True)
class Converter:
    """Turns slabs into the bytes of the file."""

    base: MergeBase
    adapter: Adapter | None
    kernels: Kernels

    def convert(self, slab: Slab, types: set[str]) -> dict[str, np.ndarray]:
        """Return the slab's bytes in each of the types.

        Raises:
            ValueError: if a merged weight is not finite, or a base file has become shorter
        """
        if slab.tensor.spec is None:
            return {"F32": compute_rope_factors(self.base.architecture)}
        rows = read_merged_rows(slab, base=self.base, adapter=self.adapter)
        if rows.ndim == 1:
            return {"F32": rows}
        rounded = round_to_bfloat16(rows)
        return {ggml_type: self._convert(rounded, ggml_type) for ggml_type in types}

    def _convert(self, rounded: np.ndarray, ggml_type: str) -> np.ndarray:
        if ggml_type == "F32":
            return rounded
        return narrow_to_bfloat16(rounded) if ggml_type == "BF16" else self.kernels.quantize(rounded, ggml_type)


def append_tensors(
    outputs: list[Output],
    tensors: list[GGUFTensor],
    *,
    converter: Converter,
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
        return converter.convert(slab, types)

    with keep_products_on_their_thread(), ExitStack() as stack:
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
