"""Write GGUF files of several types in one pass over the base.

Threads merge, round and quantize the rows. All files get their final names together, at the end.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tune2gguf.base.bfloat16 import narrow_to_bfloat16, round_to_bfloat16
from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix
from tune2gguf.export.gguf_file.llama import (
    ALIGNMENT,
    GGUFTensor,
    choose_types,
    compute_rope_factors,
    list_gguf_tensors,
    write_metadata,
)
from tune2gguf.export.gguf_file.vocabulary import read_if_there, read_sampling, read_vocabulary
from tune2gguf.export.importance_choice import ImportanceChoice
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.merge.arithmetic import keep_products_on_their_thread
from tune2gguf.export.merge.slabs import Slab, iterate_slabs, read_merged_rows
from tune2gguf.export.results import explain_write_errors, open_bar
from tune2gguf.files.atomic import write_file
from tune2gguf.ggml.kernels import Kernels, load_kernels
from tune2gguf.ggml.types import Quantization, count_bytes
from tune2gguf.machine.cpu import count_cores
from tune2gguf.tokenizer.templates import ChatTemplate

Kind = tuple[str, bool]  # ggml type, and whether it is quantized with the importance matrix
AS_STORED = ("stored", False)  # the bytes of the base's GGUF


def write_gguf_files(
    paths: dict[Quantization, Path],
    *,
    base: BaseCheckpoint,
    adapter: Adapter | None,
    name: str,
    chat_template: ChatTemplate,
    importance: ImportanceChoice,
    num_threads: int | None,
    show: bool,
) -> None:
    """Write one file per type; existing files are replaced.

    A base that is a GGUF of the type keeps its tensors' types and bytes; the keys are this run's.

    Args:
        adapter: None writes the base as it is
        name: general.name of the files
        importance: the importance matrix, and the types that are quantized with it
        num_threads: threads that merge and quantize; None takes all cores

    Raises:
        ValueError: if the tokenizer cannot be written, the disk is full, or a weight is not finite; no file is then
            written or replaced
    """
    tensors = list_gguf_tensors(base.specs, base.architecture)
    vocabulary = read_vocabulary(base.base_dir, vocab_size=base.architecture.vocab_size, chat_template=chat_template)
    kernels, types = load_kernels(), {}
    with explain_write_errors(next(iter(paths.values())).parent), ExitStack() as stack:
        for quantization, path in paths.items():
            unfinished = stack.enter_context(write_file(path))
            taken = importance.get(quantization)
            if adapter is None and base.gguf_type == quantization.name:
                chosen = {tensor.name: _get_stored_type(base, tensor) for tensor in tensors}
                types[unfinished] = dict.fromkeys(chosen, AS_STORED)
            else:
                chosen = choose_types(tensors, base.architecture, quantization, has_importance=taken is not None)
                types[unfinished] = {tensor: (ggml_type, taken is not None) for tensor, ggml_type in chosen.items()}
            write_metadata(
                unfinished,
                tensors,
                chosen,
                name=name,
                architecture=base.architecture,
                quantization=quantization,
                vocabulary=vocabulary,
                jinja_template=chat_template.jinja_template,
                hf_config=read_if_there(base.base_dir / "config.json"),
                sampling=read_sampling(base.base_dir),
                importance=taken,
            )
        label = "exporting " + (next(iter(paths)).name if len(paths) == 1 else f"{len(paths)} types")
        with open_bar(label, total=sum(math.prod(tensor.shape) for tensor in tensors), show=show) as bar:
            _append_tensors(
                types,
                tensors,
                convert=lambda slab, wanted: _convert(
                    slab, wanted, base=base, adapter=adapter, kernels=kernels, importance=importance.matrix
                ),
                num_threads=count_cores() if num_threads is None else num_threads,
                report=bar.update,
            )


def _get_stored_type(base: BaseCheckpoint, tensor: GGUFTensor) -> str:
    return base.stored[tensor.spec.tune_name].ggml_type if len(tensor.shape) > 1 else "F32"


def _convert(
    slab: Slab,
    kinds: set[Kind],
    *,
    base: BaseCheckpoint,
    adapter: Adapter | None,
    kernels: Kernels,
    importance: ImportanceMatrix | None,
) -> dict[Kind, np.ndarray]:
    """Return the slab's bytes in each kind."""
    if slab.tensor.spec is None:
        return dict.fromkeys(kinds, compute_rope_factors(base.architecture))
    rows = read_merged_rows(slab.tensor.spec, slab.begin, slab.end, base=base, adapter=adapter)
    if rows.ndim == 1:
        return dict.fromkeys(kinds, rows)
    if kinds == {AS_STORED}:
        return {AS_STORED: base.stored[slab.tensor.spec.tune_name].data[slab.begin : slab.end]}
    rounded = round_to_bfloat16(rows)
    ready = {"F32": lambda: rounded, "BF16": lambda: narrow_to_bfloat16(rounded)}
    weights = None if importance is None else importance.weights.get(slab.tensor.name)

    def convert(ggml_type: str, is_weighted: bool) -> np.ndarray:
        if ggml_type in ready:
            return ready[ggml_type]()
        return kernels.quantize(rounded, ggml_type, weights if is_weighted else None)

    return {kind: convert(*kind) for kind in kinds}


def _append_tensors(
    types: dict[Path, dict[str, Kind]],
    tensors: list[GGUFTensor],
    *,
    convert: Callable[[Slab, set[Kind]], dict[Kind, np.ndarray]],
    num_threads: int,
    report: Callable[[int], None],
) -> None:
    """Append all tensors to all files; each base row is read once.

    Args:
        types: file -> tensor name -> kind
        report: called with the number of elements done
    """

    def convert_for_files(slab: Slab) -> dict[Kind, np.ndarray]:
        return convert(slab, {of_file[slab.tensor.name] for of_file in types.values()})

    with keep_products_on_their_thread(), ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        files = {stack.enter_context(path.open("ab")): of_file for path, of_file in types.items()}
        slabs = iterate_slabs(tensors)
        for slab, converted in _map_in_order(pool, convert_for_files, slabs, max_pending=2 * num_threads):
            for file, of_file in files.items():
                file.write(memoryview(converted[of_file[slab.tensor.name]]).cast("B"))
                if slab.is_last:
                    file.write(bytes(-file.tell() % ALIGNMENT))
            report(slab.num_elements)
        # Sync all files before the first gets its final name.
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


def count_file_bytes(base: BaseCheckpoint, quantization: Quantization, *, has_importance: bool = False) -> int:
    """Return the size in bytes of all tensors in a file of this type."""
    tensors = list_gguf_tensors(base.specs, base.architecture)
    is_taken = has_importance and quantization.takes_importance
    types = choose_types(tensors, base.architecture, quantization, has_importance=is_taken)
    return sum(count_bytes(types[tensor.name], tensor.shape) for tensor in tensors)
