"""Launchers of the kernels: they allocate results, choose tiles and launch.

A low-rank product is passed as an `Adapted`: the first product [rows, rank] and the second product's factor. Tensors
are contiguous unless stated otherwise; a row is a token, [rows, width].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tune2gguf.model.fp8 import CODES, LARGEST_CODE, LEAST_MAGNITUDE
from tune2gguf.model.fused import adapters, kernels

# Rows (tokens) and columns of a tile, and warps: the fastest tried on an H200 at the width of Llama-3.1-8B.
TILE = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
SWIGLU_BACKWARD_TILE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
NORM_TILE = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}  # tl.dot needs at least 16 rows
REDUCE_TILE = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
GRADIENT_TILE = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}
ROWS_PER_PART = 1024
HEAD_ROWS = 32
CROSS_ENTROPY_BLOCK = 8192
CODES_PER_PROGRAM = 2048


@dataclass(frozen=True)
class Dropout:
    """Dropout of the input of one or more adapters; equal seeds drop equal elements.

    Seeds are on the device: a captured graph reads new ones at each replay.

    Attributes:
        seeds: int32 [n or more], one per adapter of the input
        share: dropout probability
    """

    seeds: Tensor
    share: float

    @property
    def threshold(self) -> int:
        return round(self.share * 2**31)

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.share)


@dataclass(frozen=True)
class Adapted:
    """The term that an adapter adds to a product: low_rank times factor.

    Attributes:
        low_rank: [rows, rank]; rows may be strided
        factor: B [out, rank] in forward, A [rank, in] in backward
        dropout: dropout of the adapter's input, which backward applies to the added term; None: no dropout
    """

    low_rank: Tensor
    factor: Tensor
    dropout: Dropout | None = None

    @property
    def rank(self) -> int:
        return self.low_rank.shape[1]


@dataclass(frozen=True)
class KeptInputs:
    """Gate and up, adapters included, kept for backward in FP8.

    Attributes:
        codes: float8_e4m3fn [2, rows, width]
        scales: float32 [2, blocks, rows], one per 128 columns of a row
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def make(cls, gate: Tensor) -> KeptInputs:
        """Allocate the tensors that `swiglu` fills."""
        num_rows, width = gate.shape
        num_blocks = triton.cdiv(width, TILE["COLUMNS"])
        return cls(
            torch.empty(2, num_rows, width, dtype=CODES, device=gate.device),
            torch.empty(2, num_blocks, num_rows, dtype=torch.float32, device=gate.device),
        )

    def list_parts(self) -> list[Tensor]:
        return [self.codes[0], self.scales[0], self.codes[1], self.scales[1]]


def pad_rank(*ranks: int) -> int:
    """Return the inner dimension of a tile's product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(max(ranks)))


def _draw(dropout: Dropout | None, stand_in: Tensor) -> tuple[Tensor, int, float]:
    """Return a kernel's dropout arguments; without dropout `stand_in`, which is not read."""
    return (stand_in, 0, 1.0) if dropout is None else (dropout.seeds, dropout.threshold, dropout.keep_scale)


def _cover(num_rows: int, width: int, tile: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(width, tile["COLUMNS"]), triton.cdiv(num_rows, tile["ROWS"])


def norm(
    x: Tensor, weight: Tensor, eps: float, *, delta: Tensor | None = None, adapted: Adapted | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum x + delta + the adapter's term, its RMS norm, and 1 / its root mean square, float32 [rows].

    Without delta the sum is x itself.
    """
    num_rows, dim = x.shape
    summed = x if delta is None else torch.empty_like(x)
    out, rstd = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rank = 0 if adapted is None else adapted.rank
    kernels._norm_kernel[(triton.cdiv(num_rows, NORM_TILE["ROWS"]),)](
        x, x if delta is None else delta,
        x if adapted is None else adapted.low_rank, x if adapted is None else adapted.factor,
        weight, summed, out, rstd, num_rows, 0 if adapted is None else adapted.low_rank.stride(0), eps,
        DIM=dim, HAS_DELTA=delta is not None, RANK=rank, RANK_BLOCK=pad_rank(rank),
        **NORM_TILE,
    )  # fmt: skip
    return summed, out, rstd


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    low_rank: Tensor | None = None,
    factor: Tensor | None = None,
    dropout: Dropout | None = None,
    rank: int = 0,
) -> Tensor:
    """Return residual + the gradient of the norm's input; `gradient` is overwritten.

    Args:
        gradient: gradient of the norm's output, [rows, dim], without the adapters' terms
        low_rank: first products of up to three adapters of the norm's output, [rows, n * rank]
        factor: their stacked A, [n * rank, dim]
    """
    num_rows, dim = x.shape
    out = torch.empty_like(x)
    num_adapters = 0 if low_rank is None else low_rank.shape[1] // rank
    kernels._norm_backward_kernel[(triton.cdiv(num_rows, NORM_TILE["ROWS"]),)](
        gradient, x, rstd, weight, residual, out, x if low_rank is None else low_rank, x if factor is None else factor,
        *_draw(dropout, x), num_rows, 0 if low_rank is None else low_rank.stride(0),
        DIM=dim, NUM_ADAPTERS=num_adapters, DROPS=dropout is not None, RANK=rank, RANK_BLOCK=pad_rank(rank),
        **NORM_TILE,
    )  # fmt: skip
    return out


def rotate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor,
    positions: Tensor,
    *,
    head_dim: int,
    adapted: tuple[Adapted | None, Adapted | None, Adapted | None] = (None, None, None),
    inverse: bool = False,
) -> None:
    """Add the adapters' terms to q, k and v, then apply RoPE to q and k, in place.

    Args:
        q: [rows, heads * head_dim]
        k, v: [rows, kv heads * head_dim]
        rope: cosines and sines, float32 [places, head_dim / 2, 2]
        positions: int64 [rows]
        inverse: rotate back
    """
    num_rows = q.shape[0]
    q_heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    ranks = [0 if one is None else one.rank for one in adapted]
    strides = {one.low_rank.stride(0) for one in adapted if one is not None} or {0}
    (stride,) = strides
    # Programs per tile of rows: q's heads in parts of kv_heads, one for k, and one for v if it has an adapter.
    num_parts = q_heads // kv_heads + 1 + (adapted[2] is not None)
    kernels._rotate_kernel[(triton.cdiv(num_rows, HEAD_ROWS), num_parts)](
        q, k, v, *(q if one is None else one.low_rank for one in adapted),
        *(q if one is None else one.factor for one in adapted), rope, positions,
        num_rows, stride, Q_HEADS=q_heads, KV_HEADS=kv_heads,
        HEAD_DIM=head_dim, RANK_Q=ranks[0], RANK_K=ranks[1], RANK_V=ranks[2], RANK_BLOCK=pad_rank(*ranks),
        INVERSE=inverse, ROWS=HEAD_ROWS, num_warps=4,
    )  # fmt: skip


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    adapted_gate: Adapted | None,
    adapted_up: Adapted | None,
    kept: KeptInputs | None = None,
) -> Tensor:
    """Return silu(gate) * up, [rows, width], after adding the adapters' terms to both.

    Args:
        kept: receives gate and up in FP8; None: they are not kept
    """
    num_rows, width = gate.shape
    out = torch.empty_like(gate)
    pair = (adapted_gate, adapted_up)
    ranks = [0 if one is None else one.rank for one in pair]
    stride = next((one.low_rank.stride(0) for one in pair if one is not None), 0)
    kernels._swiglu_kernel[_cover(num_rows, width, TILE)](
        gate, up, out, *(gate if one is None else one.low_rank for one in pair),
        *(gate if one is None else one.factor for one in pair), *(4 * [gate] if kept is None else kept.list_parts()),
        num_rows, width, stride, KEEPS=kept is not None, LARGEST=LARGEST_CODE, LEAST=LEAST_MAGNITUDE,
        RANK_GATE=ranks[0], RANK_UP=ranks[1], RANK_BLOCK=pad_rank(*ranks),
        **TILE,
    )  # fmt: skip
    return out


def swiglu_backward(
    gradient: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    adapted_gate: Adapted | None,
    adapted_up: Adapted | None,
    adapted_down: Adapted | None,
    kept: KeptInputs | None = None,
) -> None:
    """Overwrite `gradient` with the product silu(gate) * up, and gate and up with their gradients.

    Args:
        gradient: gradient of the product, [rows, width], without the term of the down projection's adapter
        gate, up: [rows, width], without their adapters' terms; with `kept` they are not read
        adapted_down: the down projection's term, with A; its dropout zeroes elements of the product in `gradient`
        kept: FP8 copies of gate and up from `swiglu`
    """
    num_rows, width = gate.shape
    pair = (adapted_gate, adapted_up)
    ranks = [0 if one is None else one.rank for one in pair]
    stride = next((one.low_rank.stride(0) for one in pair if one is not None), 0)
    down_rank = 0 if adapted_down is None else adapted_down.rank
    dropout = None if adapted_down is None else adapted_down.dropout
    kernels._swiglu_backward_kernel[_cover(num_rows, width, SWIGLU_BACKWARD_TILE)](
        gradient, gate, up, *(gate if one is None else one.low_rank for one in pair),
        *(gate if one is None else one.factor for one in pair),
        gate if adapted_down is None else adapted_down.low_rank, gate if adapted_down is None else adapted_down.factor,
        *(4 * [gate] if kept is None else kept.list_parts()),
        *_draw(dropout, gate), num_rows, width, stride, KEPT=kept is not None, DROPS=dropout is not None,
        RANK_GATE=ranks[0], RANK_UP=ranks[1], RANK_DOWN=down_rank, RANK_BLOCK=pad_rank(*ranks, down_rank),
        **SWIGLU_BACKWARD_TILE,
    )  # fmt: skip


def add(base: Tensor, adapted: Adapted | None, *, residual: Tensor | None = None, factor_is_a: bool = False) -> Tensor:
    """Return base + residual + the adapter's term, [rows, width]; `base` is overwritten.

    Args:
        factor_is_a: the factor is A [rank, width]; else B [width, rank]
    """
    num_rows, width = base.shape
    rank = 0 if adapted is None else adapted.rank
    strides = (1, width) if factor_is_a else (rank, 1)
    dropout = None if adapted is None else adapted.dropout
    kernels._add_kernel[_cover(num_rows, width, TILE)](
        base, base if residual is None else residual, base if adapted is None else adapted.low_rank,
        base if adapted is None else adapted.factor, base, *_draw(dropout, base), num_rows, width, *strides,
        HAS_RESIDUAL=residual is not None, DROPS=dropout is not None, RANK=rank, RANK_BLOCK=pad_rank(rank),
        **TILE,
    )  # fmt: skip
    return base


def apply_norm(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Recompute the norm of x [rows, width] from rstd, 1 / its root mean square, [rows]."""
    num_rows, width = x.shape
    out = torch.empty_like(x)
    kernels._apply_norm_kernel[_cover(num_rows, width, TILE)](x, rstd, weight, out, num_rows, width, **TILE)
    return out


def reduce_dropped(x: Tensor, factor: Tensor, dropout: Dropout, *, rank: int) -> Tensor:
    """Return the first products of up to three adapters, [rows, n * rank], each with its own dropout of x.

    Args:
        factor: their stacked A, [n * rank, width]
    """
    num_rows, width = x.shape
    out = torch.empty(num_rows, factor.shape[0], dtype=x.dtype, device=x.device)
    adapters._reduce_dropped_kernel[(triton.cdiv(num_rows, REDUCE_TILE["ROWS"]),)](
        x, factor, out, *_draw(dropout, x), num_rows,
        WIDTH=width, NUM_ADAPTERS=factor.shape[0] // rank, RANK=rank, RANK_BLOCK=pad_rank(rank), **REDUCE_TILE,
    )  # fmt: skip
    return out


def compute_dropped_gradient(
    low_rank: Tensor,
    x: Tensor,
    dropout: Dropout,
    *,
    rank: int,
    rstd: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the stacked gradients of up to three adapters' A, float32 [n * rank, width].

    Parts of the rows are summed in a fixed order: the result is deterministic.

    Args:
        low_rank: gradients of the first products, [rows, n * rank]
        x: the adapters' input before dropout; with rstd and weight the input is x's norm
    """
    num_rows, width = x.shape
    num_parts, total_rank = triton.cdiv(num_rows, ROWS_PER_PART), low_rank.shape[1]
    parts = torch.empty(num_parts, total_rank, width, dtype=torch.float32, device=x.device)
    adapters._dropped_gradient_kernel[(triton.cdiv(width, GRADIENT_TILE["COLUMNS"]), num_parts)](
        low_rank, x, x if rstd is None else rstd, x if weight is None else weight, parts, *_draw(dropout, x),
        num_rows, WIDTH=width, ROWS_PER_PART=ROWS_PER_PART, NORMS=rstd is not None, NUM_ADAPTERS=total_rank // rank,
        RANK=rank, RANK_BLOCK=pad_rank(rank), **GRADIENT_TILE,
    )  # fmt: skip
    return parts.sum(dim=0)


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, *, with_gradient: bool) -> None:
    """Write each row's cross entropy into `losses`, float32 [rows].

    Args:
        logits: [rows, vocab]; with_gradient overwrites them with their gradient
    """
    num_rows, vocab = logits.shape
    kernels._cross_entropy_kernel[(num_rows,)](
        logits, targets, losses, VOCAB=vocab, GRADIENT=with_gradient, BLOCK=CROSS_ENTROPY_BLOCK, num_warps=16
    )


def dequantize_nf4(
    codes: Tensor, scales: Tensor, factors: Tensor, mean: Tensor, table: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Return the flat dense weight of an Nf4Tensor's parts."""
    num_codes = codes.numel()
    out = torch.empty(2 * num_codes, dtype=dtype, device=codes.device)
    kernels._dequantize_nf4_kernel[(triton.cdiv(num_codes, CODES_PER_PROGRAM),)](
        codes, scales, factors, mean, table, out, num_codes, CODES_PER_SCALE=num_codes // scales.numel(),
        SCALES_PER_FACTOR=scales.numel() // factors.numel(), BLOCK=CODES_PER_PROGRAM, num_warps=8,
    )  # fmt: skip
    return out
