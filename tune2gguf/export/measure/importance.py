"""Measure an importance matrix: the squared inputs of every layer matrix, summed over rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from tune2gguf.base.layout import get_gguf_name, list_tensors
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix
from tune2gguf.export.measure.layerwise import WeightSource, compute_hidden

TOKENS_PER_SUM = 256


def measure_importance(
    source: WeightSource,
    rows: Sequence[np.ndarray],
    *,
    name: str,
    dataset: str,
    report: Callable[[int], None] = lambda count: None,
) -> ImportanceMatrix:
    """Run the rows through the model layer by layer, and sum the squared inputs of each column of each matrix.

    The sums are float64, rounded once to float32. llama-imatrix sums token by token in float32.

    Args:
        source: the weights to quantize
        rows: token ids of each row
        name: file name of the matrix
        dataset: name of the rows, for the file
        report: called with the number of layers done
    """
    # Allocated before the first layer: arrays that are kept between freed activations would make the heap grow.
    specs = list_tensors(source.architecture)
    sums = {get_gguf_name(spec.tune_name): np.zeros(spec.shape[1], np.float32) for spec in specs if spec.is_linear}

    def add(tune_name: str, x: Tensor) -> None:
        sums[get_gguf_name(tune_name)][:] = sum(part.double().square_().sum(0) for part in x.split(TOKENS_PER_SUM))

    compute_hidden(replace(source, observe=add), rows, report=report)
    num_tokens = sum(map(len, rows))
    chunk_size = max(map(len, rows))
    return ImportanceMatrix(
        name=name,
        sums=sums,
        counts=dict.fromkeys(sums, num_tokens),
        datasets=(dataset,),
        num_chunks=num_tokens // chunk_size,
        chunk_size=chunk_size,
    )
