"""An NF4 weight as a torch tensor, with 8-bit scales (QLoRA's double quantization)."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tune2gguf.model.nf4 import Nf4Weight, dequantize_codes, get_nf4_table

SCALES_PER_FACTOR = 256
_PARTS = ("codes", "scales", "factors", "offset", "table")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Nf4Tensor(Tensor):
    """A frozen NF4 weight [out, in] with nominal dtype float32; it can only be moved, dequantized and multiplied.

    A block's scale is scales / factors + offset.

    Attributes:
        codes: uint8 [out * in / 2], two codes per byte, the first in the high nibble
        scales: int8 [blocks]
        factors: float32 [blocks / scales per factor]
        offset: float32 []
        table: float32 [16], the values of the codes
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, factors: Tensor, offset: Tensor, table: Tensor, shape: torch.Size
    ) -> Nf4Tensor:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=codes.device)

    def __init__(
        self, codes: Tensor, scales: Tensor, factors: Tensor, offset: Tensor, table: Tensor, shape: torch.Size
    ) -> None:
        self.codes, self.scales, self.factors, self.offset, self.table = codes, scales, factors, offset, table

    def __repr__(self) -> str:
        return f"Nf4Tensor({list(self.shape)}, device={str(self.device)!r})"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight, computed in float32 and rounded once to dtype."""
        # The compiler may call this with fake codes instead of tracing it; a kernel cannot read those.
        if torch.compiler.is_compiling() or type(self.codes) is not Tensor:
            return self._dequantize_plainly(dtype)
        if self.codes.is_cuda and find_spec("triton") is not None:
            from tune2gguf.model.fused.launch import dequantize_nf4

            parts = (self.codes, self.scales, self.factors, self.offset, self.table)
            return dequantize_nf4(*parts, dtype=dtype).view(self.shape)
        return dequantize_codes(self.codes, self._compute_scales(), self.table, tuple(self.shape), dtype)

    def _dequantize_plainly(self, dtype: torch.dtype) -> Tensor:
        """Same as dequantize, in plain torch operations, for the compiler."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], dim=1).view(self.scales.numel(), -1)
        return (self.table[codes.int()] * self._compute_scales().unsqueeze(1)).to(dtype).view(self.shape)

    def _compute_scales(self) -> Tensor:
        deviations = self.scales.view(self.factors.numel(), -1) / self.factors.unsqueeze(1)
        return deviations.flatten() + self.offset

    def _map(self, function: Callable[[Tensor], Tensor]) -> Nf4Tensor:
        return Nf4Tensor(*(function(getattr(self, name)) for name in _PARTS), self.shape)

    def __tensor_flatten__(self) -> tuple[list[str], torch.Size]:
        return list(_PARTS), self.shape

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], shape: torch.Size, outer_size: torch.Size, outer_stride: tuple[int, ...]
    ) -> Nf4Tensor:
        return Nf4Tensor(*(parts[name] for name in _PARTS), shape)

    def _stable_hash_for_caching(self) -> str:
        """Return torch's cache key for compiled code: shapes, strides, dtypes and devices, not values."""
        parts = [getattr(self, name) for name in _PARTS]
        return repr([self.shape, *((part.shape, part.stride(), part.dtype, part.device) for part in parts)])

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple, kwargs: dict | None = None) -> Nf4Tensor:
        kwargs = kwargs or {}
        if operator not in _MOVES or kwargs.pop("dtype", torch.float32) != torch.float32:
            raise NotImplementedError(f"{operator} is not supported for an NF4 weight; dequantize it first")
        return args[0]._map(lambda part: operator(part, **kwargs))


def pack_nf4(weight: Nf4Weight) -> Nf4Tensor:
    """Quantize the scales of an NF4 weight to 8 bits; the codes stay.

    For normal weights this adds an error of 0.14 % of the weights' root mean square to NF4's own 9.2 %; rounding to
    bfloat16 costs 0.15 %.
    """
    # Weights smaller than those of real models need fewer scales per factor.
    num_scales = math.gcd(weight.scales.numel(), SCALES_PER_FACTOR)
    offset = weight.scales.double().mean().float()  # float64: the same bits in any order of summation
    deviations = (weight.scales - offset).view(-1, num_scales)
    largest = deviations.abs().amax(dim=1)
    # 127: with 128 the largest deviation would overflow int8. Without deviations the factor is 1.
    factors = torch.where(largest > 0, 127 / largest, torch.ones_like(largest))
    scales = (deviations * factors.unsqueeze(1)).round_().to(torch.int8).flatten()
    return Nf4Tensor(
        weight.codes, scales, factors, offset, get_nf4_table(weight.codes.device), torch.Size(weight.shape)
    )


def multiply_nf4(x: Tensor, weight: Nf4Tensor) -> Tensor:
    """Return x W^T, [..., out]; backward dequantizes the weight again instead of keeping it dense."""
    return _Nf4Product.apply(x, weight)


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Nf4Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return upstream @ weight.dequantize(upstream.dtype), None
