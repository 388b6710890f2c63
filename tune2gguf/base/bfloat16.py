"""bfloat16 in numpy, which lacks the dtype: rounding float32 values to it, and their bits."""

from __future__ import annotations

import numpy as np


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values in place to the nearest bfloat16, ties to even; the dtype stays float32.

    Values must be finite: the bits of a NaN could round to infinity.
    """
    bits = values.view(np.uint32)
    carry = bits >> np.uint32(16)
    carry &= np.uint32(1)
    carry += np.uint32(0x7FFF)
    bits += carry
    bits &= np.uint32(0xFFFF0000)
    return values


def narrow_to_bfloat16(rounded: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits (uint16) of float32 values that are already rounded."""
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
