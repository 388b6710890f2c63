"""Triton kernels for FP8 products: quantize rows, transpose the codes of weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tune2gguf.model.fp8 import CODES, LARGEST_CODE, LEAST_MAGNITUDE

MAX_PARTS = 3
VALUES_PER_WARP = 1024  # values of a row in a warp's registers: 32 per thread
TRANSPOSE_TILE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}  # in 32-bit words of four codes


@triton.jit
def _read_row(values, factors, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_FACTORS: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(values + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        values *= tl.load(factors + columns, mask=columns < WIDTH, other=0.0)
    return values


@triton.jit
def _write_codes(values, inverse, codes, at, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(codes + at + columns, (values * inverse).to(codes.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _quantize_rows_kernel(
    first, second, third, first_factors, second_factors, third_factors, codes, scales,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    FIRST_BLOCK: tl.constexpr, SECOND_BLOCK: tl.constexpr, THIRD_BLOCK: tl.constexpr, HAS_FACTORS: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Quantize one row per program; the row stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    one = _read_row(first, first_factors, row, FIRST, FIRST_BLOCK, HAS_FACTORS)
    largest = tl.maximum(tl.max(tl.abs(one), axis=0), LEAST)
    if SECOND > 0:
        two = _read_row(second, second_factors, row, SECOND, SECOND_BLOCK, HAS_FACTORS)
        largest = tl.maximum(largest, tl.max(tl.abs(two), axis=0))
    if THIRD > 0:
        three = _read_row(third, third_factors, row, THIRD, THIRD_BLOCK, HAS_FACTORS)
        largest = tl.maximum(largest, tl.max(tl.abs(three), axis=0))
    top_code = tl.full((), LARGEST, tl.float32)
    tl.store(scales + row, tl.div_rn(largest, top_code))
    inverse = tl.div_rn(top_code, largest)
    at = row * (FIRST + SECOND + THIRD)
    _write_codes(one, inverse, codes, at, FIRST, FIRST_BLOCK)
    if SECOND > 0:
        _write_codes(two, inverse, codes, at + FIRST, SECOND, SECOND_BLOCK)
    if THIRD > 0:
        _write_codes(three, inverse, codes, at + FIRST + SECOND, THIRD, THIRD_BLOCK)


def quantize_rows(parts: list[Tensor], factors: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Same as `fp8.quantize_rows_plainly`, in one kernel, for up to three parts."""
    assert len(parts) <= MAX_PARTS
    parts = [part.contiguous() for part in parts]
    num_rows, widths = len(parts[0]), [part.shape[1] for part in parts]
    codes = torch.empty(num_rows, sum(widths), dtype=CODES, device=parts[0].device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=parts[0].device)
    missing = MAX_PARTS - len(parts)
    _quantize_rows_kernel[(num_rows,)](
        *parts, *parts[:1] * missing, *(factors or parts), *(factors or parts)[:1] * missing, codes, scales,
        *widths, *[0] * missing, *map(triton.next_power_of_2, widths), *[0] * missing,
        HAS_FACTORS=factors is not None, LARGEST=LARGEST_CODE, LEAST=LEAST_MAGNITUDE,
        num_warps=min(16, max(4, triton.next_power_of_2(sum(widths)) // VALUES_PER_WARP)),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _decode_rows_kernel(codes, scales, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(codes + row * WIDTH + columns, mask=columns < WIDTH).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * WIDTH + columns, values.to(out.dtype.element_ty), mask=columns < WIDTH)


def decode_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes [rows, width] times their scales, float32 [rows, 1]."""
    num_rows, width = codes.shape
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _decode_rows_kernel[(num_rows,)](codes, scales, out, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4)
    return out


@triton.jit
def _keep_tile(tile, codes, scales, rows, row_mask, at, mask, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """Store a float32 tile [rows, columns] as FP8 codes with one scale per row of the tile."""
    largest = tl.maximum(tl.max(tl.abs(tile), axis=1), LEAST)
    tl.store(scales + rows, largest / LARGEST, mask=row_mask)
    tl.store(codes + at, (tile * (LARGEST / largest)[:, None]).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def _read_tile(codes, scales, rows, row_mask, at, mask):
    """Load a tile that `_keep_tile` stored, as float32."""
    scale = tl.load(scales + rows, mask=row_mask, other=0.0)
    return tl.load(codes + at, mask=mask).to(tl.float32) * scale[:, None]


@triton.jit
def _transpose_kernel(
    source, out, num_rows, num_columns, out_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Transpose bytes: 4 x 4 blocks within words first, then the words, which is faster than byte by byte.

    Sizes are in 32-bit words: a tile has 4 ROWS rows of COLUMNS words.
    """
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = source + 4 * rows[:, None] * num_columns + columns[None, :]
    a = tl.load(at, mask=mask, other=0)
    b = tl.load(at + num_columns, mask=mask, other=0)
    c = tl.load(at + 2 * num_columns, mask=mask, other=0)
    d = tl.load(at + 3 * num_columns, mask=mask, other=0)
    to = out + 4 * columns[:, None] * out_stride + rows[None, :]
    for byte in tl.static_range(4):
        low = ((a >> (8 * byte)) & 255) | (((b >> (8 * byte)) & 255) << 8)
        high = ((c >> (8 * byte)) & 255) | (((d >> (8 * byte)) & 255) << 8)
        tl.store(to + byte * out_stride, tl.trans(low | (high << 16)), mask=tl.trans(mask))


def transpose_codes(weights: list[Tensor]) -> Tensor:
    """Transpose the codes of weights [out, in] and concatenate them, [in, sum of out].

    All dimensions must be multiples of 4.
    """
    heights, width = [len(weight) for weight in weights], weights[0].shape[1]
    out = torch.empty(width, sum(heights), dtype=CODES, device=weights[0].device)
    words, begin = out.view(torch.int32), 0
    for weight in weights:
        num_rows, num_columns = len(weight) // 4, width // 4
        tile = TRANSPOSE_TILE
        grid = (triton.cdiv(num_columns, tile["COLUMNS"]), triton.cdiv(num_rows, tile["ROWS"]))
        _transpose_kernel[grid](
            weight.view(torch.int32), words[:, begin:], num_rows, num_columns, words.shape[1], **tile
        )
        begin += num_rows
    return out
