"""FP8: weights, activations and upstream gradients as float8_e4m3 with a scale for each row, and products of them.

A frozen weight [out, in] is quantized once, with a scale for each output row. Activations and gradients are quantized
as they come, with a scale for each token. Forward contracts over `in`, so that the weight's scales are factors of the
result's columns. Backward contracts over `out`: there they go into the gradient before that is quantized, and the same
codes serve both products.

GPUs that multiply 8-bit numbers do so with `torch._scaled_mm`. Everywhere else the codes are multiplied in the
activations' dtype, which holds them exactly: the result differs by its rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

CODES = torch.float8_e4m3fn
LARGEST_CODE = 448.0
LEAST_MAGNITUDE = 1e-30  # of a row: below it float32 has no inverse of the scale
DIVISOR = 16  # of a weight's shape: what the GPU's product takes
SCALES_PER_OCTAVE = 8  # that a weight's row tries; the format repeats itself at every power of two
# That become codes at a time: on a CPU temporaries stay in the cache of a core, on a GPU they are small beside a layer.
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class Fp8Weight:
    """A weight as codes float8_e4m3fn [out, in] and scales float32 [out]."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight: value of the code times scale, computed in float32 and rounded once to dtype."""
        return decode(self.codes, torch.float32).mul_(self.scales.unsqueeze(1)).to(dtype)


def is_fp8(weight: Tensor) -> bool:
    """Return whether a base weight is one of 8-bit codes."""
    return weight.dtype == CODES


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a device has 8-bit products: an NVIDIA GPU of the Ada or Hopper generation, or a later one.

    Triton has to be there as well, whose kernels make the codes.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _list_values(codes: torch.dtype, dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(codes).to(dtype)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of codes, which every wider dtype holds exactly."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    # A CPU converts one by one, at a fifth of the speed.
    flat, values = codes.view(torch.uint8).flatten(), _list_values(codes.dtype, dtype)
    out = torch.empty(codes.numel(), dtype=dtype)
    for begin in range(0, len(out), CHUNK_VALUES["cpu"]):
        chunk = slice(begin, begin + CHUNK_VALUES["cpu"])
        torch.index_select(values, 0, flat[chunk].int(), out=out[chunk])
    return out.view(codes.shape)


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """Quantize a weight [out, in], each row with that scale of SCALES_PER_OCTAVE which leaves the least squared error.

    The first scale makes the largest magnitude 448; the others make it smaller, down to 224.
    """
    codes = torch.empty(weight.shape, dtype=CODES, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _cut_rows(*weight.shape, weight.device):
        codes[rows], scales[rows] = _quantize_with_best_scales(weight[rows].float())
    return Fp8Weight(codes, scales)


def _cut_rows(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Yield parts of rows as large as a device computes best."""
    chunk = max(1, CHUNK_VALUES[device.type] // num_columns)
    yield from (slice(begin, begin + chunk) for begin in range(0, num_rows, chunk))


def _quantize_with_best_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_(min=LEAST_MAGNITUDE)
    best = largest / LARGEST_CODE
    least = torch.full_like(largest, torch.inf)
    for number in range(SCALES_PER_OCTAVE):
        scales = largest * (2 ** (number / SCALES_PER_OCTAVE) / LARGEST_CODE)
        errors = (
            decode((weight / scales).to(CODES), torch.float32)
            .mul_(scales)
            .sub_(weight)
            .square_()
            .sum(dim=1, keepdim=True)
        )
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return (weight / best).to(CODES), best.squeeze(1)


def quantize_rows(parts: list[Tensor], factors: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantize rows of tensors side by side: codes [rows, sum of widths] and their scales, float32 [rows, 1].

    The largest magnitude of a row becomes 448.

    Args:
        parts: [rows, width] each
        factors: of each part's columns, float32 [width], multiplied in before
    """
    if multiplies_fp8(parts[0].device):
        from tune2gguf.model.fused.eight_bit import quantize_rows as quantize_in_one_kernel

        return quantize_in_one_kernel(parts, factors)
    return quantize_rows_plainly(parts, factors)


def quantize_rows_plainly(parts: list[Tensor], factors: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """The same in torch's operations."""
    num_rows, device = len(parts[0]), parts[0].device
    codes = torch.empty(num_rows, sum(part.shape[1] for part in parts), dtype=CODES, device=device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=device)
    for chunk in _cut_rows(*codes.shape, device):
        rows = torch.cat([part[chunk] for part in parts], dim=1).float()
        if factors is not None:
            rows *= torch.cat(factors)
        largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True).clamp_(min=LEAST_MAGNITUDE)
        # Of two tensors: by or of a number torch divides with one more rounding.
        top_code = torch.full_like(largest, LARGEST_CODE)
        codes[chunk] = rows.mul_(top_code / largest).to(CODES)
        scales[chunk] = largest / top_code
    return codes, scales


def multiply_fp8(x: Tensor, weights: list[Fp8Weight]) -> list[Tensor]:
    """Return x W^T for weights that take the same x, [rows, out] each in x's dtype.

    Args:
        x: [rows, in]
    """
    return multiply_codes(*quantize_rows([x]), weights, dtype=x.dtype)


def multiply_codes(codes: Tensor, scales: Tensor, weights: list[Fp8Weight], *, dtype: torch.dtype) -> list[Tensor]:
    """Return the products of what `quantize_rows` returned, [rows, out] each."""
    return [_multiply(codes, scales, weight, dtype) for weight in weights]


def multiply_fp8_back(gradients: list[Tensor], weights: list[Fp8Weight]) -> Tensor:
    """Return the sum of each gradient [rows, out] times its weight, [rows, in] in the gradients' dtype.

    The list is emptied as soon as the gradients are quantized, so that they need not stay in memory.
    """
    dtype = gradients[0].dtype
    codes, scales = quantize_rows(gradients, [weight.scales for weight in weights])
    gradients.clear()
    if not _uses_units(codes, dtype):
        return _multiply_back_plainly(codes, scales, weights, dtype)
    from tune2gguf.model.fused.eight_bit import transpose_codes

    # The GPU's product wants both operands contiguous along what it contracts.
    transposed = transpose_codes([weight.codes for weight in weights])
    return torch._scaled_mm(
        codes, transposed.t(), scales, scales.new_ones(1, len(transposed)), out_dtype=dtype, use_fast_accum=True
    )


def _uses_units(codes: Tensor, dtype: torch.dtype) -> bool:
    # With a scale for each row torch's product gives bf16 only.
    return dtype == torch.bfloat16 and multiplies_fp8(codes.device)


def _multiply(codes: Tensor, scales: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    columns = weight.scales.unsqueeze(0)
    if _uses_units(codes, dtype):
        return torch._scaled_mm(codes, weight.codes.t(), scales, columns, out_dtype=dtype, use_fast_accum=True)
    return _scale(decode(codes, dtype) @ decode(weight.codes, dtype).T, scales, columns)


def _multiply_back_plainly(codes: Tensor, scales: Tensor, weights: list[Fp8Weight], dtype: torch.dtype) -> Tensor:
    parts = codes.split([len(weight.codes) for weight in weights], dim=1)
    product = decode(parts[0], dtype) @ decode(weights[0].codes, dtype)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        product.addmm_(decode(part, dtype), decode(weight.codes, dtype))
    return _scale(product, scales, scales.new_ones(1))


def _scale(product: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply a product of codes, [rows, columns], by its scales, in place."""
    for chunk in _cut_rows(*product.shape, product.device):
        product[chunk] = (product[chunk] * rows[chunk]).mul_(columns)
    return product


def describe_products(device: torch.device) -> str:
    """Return what a run with an 8-bit base says of its products."""
    if multiplies_fp8(device):
        return "products: of 8-bit numbers, where dtype is bf16"
    return (
        f"products: of 8-bit numbers as of others, {device} has none for them; base_weights=bf16 is as fast or faster"
    )


def get_fp8_weight(linear: nn.Module) -> Fp8Weight:
    """Return the base weight of a linear module that `load_base` has filled with 8-bit codes."""
    return Fp8Weight(linear.weight, linear.weight_scales)


class FrozenLinear(nn.Linear):
    """A linear layer without bias or adapter, with a frozen weight in any of the base's kinds."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.register_buffer("weight_scales", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        if not is_fp8(self.weight):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        return _Fp8Product.apply(rows, self.weight, self.weight_scales).view(*x.shape[:-1], -1)


class _Fp8Product(torch.autograd.Function):
    """y = x W^T of which only x gets a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return multiply_fp8(x, [Fp8Weight(codes, scales)])[0]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        return multiply_fp8_back([upstream], [Fp8Weight(*ctx.saved_tensors)]), None, None
