"""NF4: 4-bit codes with one scale per 64 weights (QLoRA, https://arxiv.org/abs/2305.14314).

All arithmetic is float32. Two codes share a byte, the first in the high nibble, as in bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_SIZE = 64  # weights per scale
LOOKUP_CELLS = 4096
CHUNK_WEIGHTS = 1 << 18  # 1 MB of float32: temporaries fit a core's cache
GPU_CHUNK_WEIGHTS = 1 << 24  # 64 MB of float32: few kernel launches

# Quantiles of the normal distribution, as in bitsandbytes' kernels.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Nf4Weight:
    """An NF4 weight [out, in]: `codes` uint8 [out * in / 2], `scales` float32 [out * in / 64], both row by row."""

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, code value times scale, computed in float32 and rounded once to dtype."""
        table = get_nf4_table(self.codes.device)
        return dequantize_codes(
            self.codes, self.scales, table, self.shape, self.scales.dtype if dtype is None else dtype
        )

    def reorder_rows(self, reorder: Callable[[Tensor], Tensor]) -> Nf4Weight:
        """Return the weight with `reorder` applied to its rows.

        Raises:
            ValueError: if a row does not consist of whole blocks
        """
        num_rows, num_columns = self.shape
        if self.scales.numel() % num_rows != 0:
            raise ValueError(
                f"rows of {num_columns} weights cannot be reordered: a row must be a multiple of the block size"
            )
        codes, scales = (reorder(part.view(num_rows, -1)).flatten() for part in (self.codes, self.scales))
        return Nf4Weight(codes, scales, self.shape)


def get_nf4_table(device: torch.device | None = None) -> Tensor:
    """Return the 16 NF4 values, float32 [16], ascending."""
    import torch

    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def quantize_nf4(weight: Tensor) -> Nf4Weight:
    """Quantize a weight [out, in] in blocks of 64; a block's scale is its largest magnitude.

    Codes and scales equal those of bitsandbytes' `quantize_4bit`, bit for bit.

    Raises:
        ValueError: if the number of weights is not divisible by 64
    """
    import torch

    if weight.numel() % BLOCK_SIZE != 0:
        raise ValueError(f"weight of shape {list(weight.shape)}: the number of weights must divide by {BLOCK_SIZE}")
    flat = weight.reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(flat.numel() // BLOCK_SIZE, dtype=torch.float32, device=weight.device)
    lookup = _make_lookup(weight.device)
    chunk = CHUNK_WEIGHTS if weight.device.type == "cpu" else GPU_CHUNK_WEIGHTS
    for begin in range(0, flat.numel(), chunk):
        blocks = flat[begin : begin + chunk].float().view(-1, BLOCK_SIZE)
        largest = blocks.abs().amax(dim=1)
        # The clamp lets a block of zeros have scale 0 and the code of 0.
        scaled = blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)
        nearest = find_nearest_codes(scaled.view(-1), *lookup).view(-1, 2)
        codes[begin // 2 : begin // 2 + len(nearest)] = (nearest[:, 0] << 4) | nearest[:, 1]
        scales[begin // BLOCK_SIZE : begin // BLOCK_SIZE + len(largest)] = largest
    return Nf4Weight(codes, scales, tuple(weight.shape))


def _make_lookup(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table of find_nearest_codes: for each cell, the code at its lower edge and that code's upper bound.

    [-1, 1] is cut into LOOKUP_CELLS equal cells, each so narrow that it holds at most one bound.
    """
    import torch

    table = get_nf4_table()
    bounds = (table[:-1] + table[1:]) / 2
    edges = torch.arange(LOOKUP_CELLS + 1) * (2 / LOOKUP_CELLS) - 1
    # Rounding may put a value just below an edge into the cell above it.
    lower_codes = torch.bucketize(edges - 1e-7, bounds)
    next_bounds = torch.cat([bounds, torch.tensor([torch.inf])])[lower_codes]
    return lower_codes.to(torch.uint8).to(device), next_bounds.to(device)


def find_nearest_codes(scaled: Tensor, lower_codes: Tensor, next_bounds: Tensor) -> Tensor:
    """Return the code nearest to each value in [-1, 1], uint8 [n]; a tie goes to the lower code.

    Equals `torch.bucketize` with the midpoints of the 16 values, but is 10 to 20 times as fast on a CPU.
    """
    import torch

    cells = torch.add(LOOKUP_CELLS / 2, scaled, alpha=LOOKUP_CELLS / 2).int()
    codes = lower_codes.index_select(0, cells)
    return codes.add_((scaled > next_bounds.index_select(0, cells)).view(torch.uint8))


def dequantize_codes(
    codes: Tensor, scales: Tensor, table: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return the dense weight, code value times scale; on a CPU without full-size temporaries."""
    import torch

    dense = torch.empty(math.prod(shape), dtype=dtype, device=codes.device)
    block_size = dense.numel() // scales.numel()
    # One lookup decodes both weights of a byte.
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).view(torch.int64).flatten()
    chunk = CHUNK_WEIGHTS if codes.device.type == "cpu" else dense.numel()
    for begin in range(0, dense.numel(), chunk):
        indices = codes[begin // 2 : (begin + chunk) // 2].int()
        values = pairs.index_select(0, indices).view(torch.float32).view(-1, block_size)
        block_scales = scales[begin // block_size : (begin + chunk) // block_size].unsqueeze(1)
        torch.mul(values, block_scales, out=dense[begin : begin + chunk].view(-1, block_size))
    return dense.view(shape)
