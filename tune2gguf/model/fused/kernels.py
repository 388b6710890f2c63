"""Triton kernels for the operations between the large matrix products of a Llama layer.

An adapter's second product, low_rank [rows, rank] times B or A, is bound by writing its result: the inner dimension is
short. It is therefore computed tile by tile where it is used, and never written.

All arithmetic is float32; stored values are rounded to the tensor's dtype. Matrices are row-major.

A projection, base plus adapter, is rounded before its next use, as if it had been stored. The sum of two bf16 numbers
is often a tie between two others, and the smallest adapter would decide all ties: without the rounding an adapter of
1e-6 along the gradient lowered SmolLM2's loss by 0.15, a gain that merging loses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tune2gguf.model.fused.adapters import _keep, _low_rank_tile
from tune2gguf.model.fused.eight_bit import _keep_tile, _read_tile


@triton.jit
def _norm_kernel(
    x, delta, low_rank, factor, weight, summed, out, rstd, num_rows, low_rank_stride, eps,
    DIM: tl.constexpr, HAS_DELTA: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = rows < num_rows
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, DIM, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_mask = columns < DIM
        at = rows[:, None] * DIM + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_DELTA:
            part = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
            if RANK > 0:
                part += _low_rank_tile(
                    low_rank, low_rank_stride, rows, row_mask, factor, RANK, 1, columns, column_mask, RANK, RANK_BLOCK
                )
                part = part.to(delta.dtype.element_ty).to(tl.float32)
            tile += part
            rounded = tile.to(summed.dtype.element_ty)
            tl.store(summed + at, rounded, mask=mask)
            tile = rounded.to(tl.float32)
        squares += tl.sum(tile * tile, axis=1)
    scale = tl.rsqrt(squares / DIM + eps)
    tl.store(rstd + rows, scale, mask=row_mask)
    tl.debug_barrier()
    source = summed if HAS_DELTA else x
    for start in range(0, DIM, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_mask = columns < DIM
        at = rows[:, None] * DIM + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        gains = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
        tl.store(out + at, (tile * scale[:, None] * gains[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _norm_backward_kernel(
    gradient, x, rstd, weight, residual, out, low_rank, factor, seeds, threshold, keep_scale,
    num_rows, low_rank_stride, DIM: tl.constexpr, NUM_ADAPTERS: tl.constexpr, DROPS: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = rows < num_rows
    scale = tl.load(rstd + rows, mask=row_mask, other=0.0)
    products = tl.zeros((ROWS,), tl.float32)
    for start in range(0, DIM, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_mask = columns < DIM
        at = rows[:, None] * DIM + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        for adapter in tl.static_range(NUM_ADAPTERS):
            part = _low_rank_tile(
                low_rank + adapter * RANK, low_rank_stride, rows, row_mask,
                factor + adapter * RANK * DIM, 1, DIM, columns, column_mask, RANK, RANK_BLOCK,
            )  # fmt: skip
            if DROPS:
                part = tl.where(_keep(tl.load(seeds + adapter), at, threshold), part * keep_scale, 0.0)
            tile += part
        if NUM_ADAPTERS > 0:
            rounded = tile.to(gradient.dtype.element_ty)
            tl.store(gradient + at, rounded, mask=mask)
            tile = rounded.to(tl.float32)
        gains = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        products += tl.sum(tile * gains[None, :] * normed, axis=1)
    mean = products / DIM
    tl.debug_barrier()
    for start in range(0, DIM, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_mask = columns < DIM
        at = rows[:, None] * DIM + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        gains = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        tile = (tile * gains[None, :] - normed * mean[:, None]) * scale[:, None]
        tile += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_heads(
    values, width, first_head, rows, row_mask, cos, sin, low_rank, low_rank_stride, factor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    for number in range(HEADS):
        columns = (first_head + number) * HEAD_DIM + tl.arange(0, HEAD_DIM)
        at = rows[:, None] * width + columns[None, :]
        tile = tl.load(values + at, mask=row_mask[:, None], other=0.0).to(tl.float32)
        if RANK > 0:
            tile += _low_rank_tile(
                low_rank, low_rank_stride, rows, row_mask, factor, RANK, 1, columns, columns >= 0, RANK, RANK_BLOCK
            )
            tile = tile.to(values.dtype.element_ty).to(tl.float32)
        if ROPE:
            first, second = tl.split(tl.reshape(tile, (ROWS, HEAD_DIM // 2, 2)))
            tile = tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), (ROWS, HEAD_DIM))
        tl.store(values + at, tile.to(values.dtype.element_ty), mask=row_mask[:, None])


@triton.jit
def _rotate_kernel(
    q, k, v, low_rank_q, low_rank_k, low_rank_v, factor_q, factor_k, factor_v, rope, positions,
    num_rows, low_rank_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, RANK_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate KV_HEADS heads of q or of k per program, or add the adapter's term to v."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = rows < num_rows
    places = tl.load(positions + rows, mask=row_mask, other=0)
    # torchtune's layout: neighbouring channels form a pair; the table is [places, HEAD_DIM / 2, (cos, sin)].
    angles = tl.load(rope + places[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], mask=row_mask[:, None])
    cos, sin = tl.split(tl.reshape(angles, (ROWS, HEAD_DIM // 2, 2)))
    if INVERSE:
        sin = -sin
    part = tl.program_id(1)
    if part < Q_HEADS // KV_HEADS:
        _rotate_heads(
            q, Q_HEADS * HEAD_DIM, part * KV_HEADS, rows, row_mask, cos, sin, low_rank_q, low_rank_stride, factor_q,
            KV_HEADS, HEAD_DIM, RANK_Q, RANK_BLOCK, True, ROWS,
        )  # fmt: skip
    elif part == Q_HEADS // KV_HEADS:
        _rotate_heads(
            k, KV_HEADS * HEAD_DIM, 0, rows, row_mask, cos, sin, low_rank_k, low_rank_stride, factor_k,
            KV_HEADS, HEAD_DIM, RANK_K, RANK_BLOCK, True, ROWS,
        )  # fmt: skip
    else:
        _rotate_heads(
            v, KV_HEADS * HEAD_DIM, 0, rows, row_mask, cos, sin, low_rank_v, low_rank_stride, factor_v,
            KV_HEADS, HEAD_DIM, RANK_V, RANK_BLOCK, False, ROWS,
        )  # fmt: skip


@triton.jit
def _gate_tile(
    values, low_rank, low_rank_stride, factor, rows, row_mask, columns, column_mask, at, mask,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        tile += _low_rank_tile(
            low_rank, low_rank_stride, rows, row_mask, factor, RANK, 1, columns, column_mask, RANK, RANK_BLOCK
        )
        tile = tile.to(values.dtype.element_ty).to(tl.float32)
    return tile


@triton.jit
def _swiglu_kernel(
    gate, up, out, low_rank_gate, low_rank_up, factor_gate, factor_up, gate_codes, gate_scales, up_codes, up_scales,
    num_rows, width, low_rank_stride, KEEPS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < num_rows, columns < width
    at = rows[:, None] * width + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    g = _gate_tile(
        gate, low_rank_gate, low_rank_stride, factor_gate, rows, row_mask, columns, column_mask, at, mask,
        RANK_GATE, RANK_BLOCK,
    )  # fmt: skip
    u = _gate_tile(
        up, low_rank_up, low_rank_stride, factor_up, rows, row_mask, columns, column_mask, at, mask,
        RANK_UP, RANK_BLOCK,
    )  # fmt: skip
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=mask)
    if KEEPS:
        block = tl.program_id(0) * num_rows
        _keep_tile(g, gate_codes, gate_scales + block, rows, row_mask, at, mask, LARGEST, LEAST)
        _keep_tile(u, up_codes, up_scales + block, rows, row_mask, at, mask, LARGEST, LEAST)


@triton.jit(do_not_specialize=["threshold"])
def _swiglu_backward_kernel(
    gradient, gate, up, low_rank_gate, low_rank_up, factor_gate, factor_up, low_rank_down, factor_down,
    gate_codes, gate_scales, up_codes, up_scales,
    seeds, threshold, keep_scale, num_rows, width, low_rank_stride, KEPT: tl.constexpr, DROPS: tl.constexpr,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < num_rows, columns < width
    at = rows[:, None] * width + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if KEPT:
        block = tl.program_id(0) * num_rows
        g = _read_tile(gate_codes, gate_scales + block, rows, row_mask, at, mask)
        u = _read_tile(up_codes, up_scales + block, rows, row_mask, at, mask)
    else:
        g = _gate_tile(
            gate, low_rank_gate, low_rank_stride, factor_gate, rows, row_mask, columns, column_mask, at, mask,
            RANK_GATE, RANK_BLOCK,
        )  # fmt: skip
        u = _gate_tile(
            up, low_rank_up, low_rank_stride, factor_up, rows, row_mask, columns, column_mask, at, mask,
            RANK_UP, RANK_BLOCK,
        )  # fmt: skip
    upstream = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    product = silu * u
    if RANK_DOWN > 0:
        part = _low_rank_tile(
            low_rank_down, RANK_DOWN, rows, row_mask, factor_down, 1, width, columns, column_mask, RANK_DOWN, RANK_BLOCK
        )
        if DROPS:
            keep = _keep(tl.load(seeds), at, threshold)
            part = tl.where(keep, part * keep_scale, 0.0)
            product = tl.where(keep, product * keep_scale, 0.0)
        upstream += part
    tl.store(gradient + at, product.to(gradient.dtype.element_ty), mask=mask)
    tl.store(gate + at, (upstream * u * (sigmoid + silu * (1.0 - sigmoid))).to(gate.dtype.element_ty), mask=mask)
    tl.store(up + at, (upstream * silu).to(up.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _add_kernel(
    base, residual, low_rank, factor, out, seeds, threshold, keep_scale, num_rows, width, column_stride, rank_stride,
    HAS_RESIDUAL: tl.constexpr, DROPS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < num_rows, columns < width
    at = rows[:, None] * width + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tile = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        part = _low_rank_tile(
            low_rank, RANK, rows, row_mask, factor, column_stride, rank_stride, columns, column_mask, RANK, RANK_BLOCK
        )
        if DROPS:
            part = tl.where(_keep(tl.load(seeds), at, threshold), part * keep_scale, 0.0)
        tile += part
        tile = tile.to(base.dtype.element_ty).to(tl.float32)
    if HAS_RESIDUAL:
        tile += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _apply_norm_kernel(
    x, rstd, weight, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < num_rows, columns < width
    at = rows[:, None] * width + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    scale = tl.load(rstd + rows, mask=row_mask, other=0.0)
    gains = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
    tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None] * gains[None, :]
    tl.store(out + at, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, VOCAB: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, VOCAB, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(logits + places, mask=places < VOCAB, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), axis=0)
        highest = higher
    log_total = highest + tl.log(total)
    tl.store(losses + row, log_total - at_target)
    if GRADIENT:
        for start in range(0, VOCAB, BLOCK):
            places = start + tl.arange(0, BLOCK)
            values = tl.load(logits + places, mask=places < VOCAB, other=float("-inf")).to(tl.float32)
            probabilities = tl.exp(values - log_total)
            probabilities = tl.where(places == target, probabilities - 1.0, probabilities)
            tl.store(logits + places, probabilities.to(logits.dtype.element_ty), mask=places < VOCAB)


@triton.jit
def _dequantize_nf4_kernel(
    codes, scales, factors, mean, table, out, num_codes, CODES_PER_SCALE: tl.constexpr, SCALES_PER_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_codes
    pair = tl.load(codes + places, mask=mask, other=0)
    block = places // CODES_PER_SCALE
    deviation = tl.load(scales + block, mask=mask, other=0).to(tl.float32)
    factor = tl.load(factors + block // SCALES_PER_FACTOR, mask=mask, other=1.0)
    scale = tl.div_rn(deviation, factor) + tl.load(mean)
    first = tl.load(table + (pair >> 4)) * scale
    second = tl.load(table + (pair & 15)) * scale
    values = tl.reshape(tl.join(first, second), (2 * BLOCK,))
    at = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < 2 * num_codes)
