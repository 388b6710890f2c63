"""Merge an adapter into rows of the base: float32 arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
from threadpoolctl import threadpool_limits


def keep_products_on_their_thread() -> AbstractContextManager:
    """Limit numpy's matrix products to the calling thread within a `with` block, in the whole process.

    Rows are merged in threads anyway. OpenBLAS's threads spin between products, which cost a third of an export's CPU
    time. One thread also sums in the same order on any number of cores.
    """
    return threadpool_limits(limits=1, user_api="blas")


def merge_rows(rows: np.ndarray, lora_a: np.ndarray, lora_b_rows: np.ndarray, *, rank: int, alpha: float) -> np.ndarray:
    """Return rows + alpha / rank * lora_b_rows @ lora_a, computed in float32.

    Args:
        rows: float32 rows of the frozen weight, [num_rows, in]
        lora_a: float32, [rank, in]
        lora_b_rows: float32, the same rows of lora_b, [num_rows, rank]
    """
    merged = lora_b_rows @ lora_a
    merged *= np.float32(alpha / rank)
    merged += rows
    return merged
