"""bfloat16 in numpy, which has no such type: float32 values rounded to it, and their bits."""

from __future__ import annotations

import numpy as np


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 in place to the nearest bfloat16, ties to even, and return it; still float32.

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
    """Return the bits (uint16) of float32 values that are bfloat16 already."""
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
