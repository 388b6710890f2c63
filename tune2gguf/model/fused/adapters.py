"""Triton kernels of adapters: tiles of low-rank products, dropout, and products over inputs with dropout."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keep(seed, index, threshold):
    """Draw True with probability 1 - threshold / 2^31 from a hash of seed and index (Murmur3's finalizer)."""
    bits = index.to(tl.uint32) ^ seed.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits += seed.to(tl.uint32)
    bits *= 0xC2B2AE35
    bits ^= bits >> 16
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def _low_rank_tile(
    low_rank, low_rank_stride, rows, row_mask, factor, column_stride, rank_stride, columns, column_mask,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return low_rank[rows] times columns of a factor, float32 [rows, columns]."""
    r = tl.arange(0, RANK_BLOCK)
    left = tl.load(
        low_rank + rows[:, None] * low_rank_stride + r[None, :],
        mask=row_mask[:, None] & (r < RANK)[None, :],
        other=0.0,
    )
    right = tl.load(
        factor + columns[None, :] * column_stride + r[:, None] * rank_stride,
        mask=(r < RANK)[:, None] & column_mask[None, :],
        other=0.0,
    )
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["threshold"])
def _reduce_dropped_kernel(
    x, factor, out, seeds, threshold, keep_scale, num_rows,
    WIDTH: tl.constexpr, NUM_ADAPTERS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the first products of up to three adapters, each with its own dropout; x is read once."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = rows < num_rows
    r = tl.arange(0, RANK_BLOCK)
    sums_0 = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    sums_1 = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    sums_2 = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_mask = columns < WIDTH
        at = rows[:, None] * WIDTH + columns[None, :]
        tile = tl.load(x + at, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32) * keep_scale
        for adapter in tl.static_range(NUM_ADAPTERS):
            dropped = tl.where(_keep(tl.load(seeds + adapter), at, threshold), tile, 0.0).to(x.dtype.element_ty)
            right = tl.load(
                factor + (adapter * RANK + r)[None, :] * WIDTH + columns[:, None],
                mask=(r < RANK)[None, :] & column_mask[:, None],
                other=0.0,
            )
            product = tl.dot(dropped, right, input_precision="ieee")
            if adapter == 0:
                sums_0 += product
            elif adapter == 1:
                sums_1 += product
            else:
                sums_2 += product
    at = rows[:, None] * (NUM_ADAPTERS * RANK) + r[None, :]
    mask = row_mask[:, None] & (r < RANK)[None, :]
    tl.store(out + at, sums_0.to(out.dtype.element_ty), mask=mask)
    if NUM_ADAPTERS > 1:
        tl.store(out + at + RANK, sums_1.to(out.dtype.element_ty), mask=mask)
    if NUM_ADAPTERS > 2:
        tl.store(out + at + 2 * RANK, sums_2.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _dropped_gradient_kernel(
    low_rank, x, rstd, weight, out, seeds, threshold, keep_scale, num_rows,
    WIDTH: tl.constexpr, ROWS_PER_PART: tl.constexpr, NORMS: tl.constexpr, NUM_ADAPTERS: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of up to three A over a part of the rows, from x or its norm after dropout."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < WIDTH
    r = tl.arange(0, RANK_BLOCK)
    sums_0 = tl.zeros((RANK_BLOCK, COLUMNS), tl.float32)
    sums_1 = tl.zeros((RANK_BLOCK, COLUMNS), tl.float32)
    sums_2 = tl.zeros((RANK_BLOCK, COLUMNS), tl.float32)
    for start in range(0, ROWS_PER_PART, ROWS):
        rows = (tl.program_id(1) * ROWS_PER_PART + start + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        at = rows[:, None] * WIDTH + columns[None, :]
        tile = tl.load(x + at, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        if NORMS:
            scale = tl.load(rstd + rows, mask=row_mask, other=0.0)
            gains = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
            # Round as in forward.
            tile = (tile * scale[:, None] * gains[None, :]).to(x.dtype.element_ty).to(tl.float32)
        tile *= keep_scale
        for adapter in tl.static_range(NUM_ADAPTERS):
            dropped = tl.where(_keep(tl.load(seeds + adapter), at, threshold), tile, 0.0).to(x.dtype.element_ty)
            left = tl.load(
                low_rank + rows[None, :] * (NUM_ADAPTERS * RANK) + (adapter * RANK + r)[:, None],
                mask=(r < RANK)[:, None] & row_mask[None, :],
                other=0.0,
            )
            product = tl.dot(left, dropped, input_precision="ieee")
            if adapter == 0:
                sums_0 += product
            elif adapter == 1:
                sums_1 += product
            else:
                sums_2 += product
    part = tl.program_id(1).to(tl.int64) * (NUM_ADAPTERS * RANK) * WIDTH
    at = part + r[:, None] * WIDTH + columns[None, :]
    mask = (r < RANK)[:, None] & column_mask[None, :]
    tl.store(out + at, sums_0, mask=mask)
    if NUM_ADAPTERS > 1:
        tl.store(out + at + RANK * WIDTH, sums_1, mask=mask)
    if NUM_ADAPTERS > 2:
        tl.store(out + at + 2 * RANK * WIDTH, sums_2, mask=mask)
