"""FP8 matrix products: weights, activations and gradients as float8_e4m3 codes with one scale per row.

A frozen weight [out, in] is quantized once, with one scale per output row. Activations and gradients are quantized in
every pass, with one scale per token. Forward contracts over `in`: the weight's scales multiply the result's columns.
Backward contracts over `out`: they multiply the gradient before it is quantized. Both products use the same codes.

GPUs with FP8 units use `torch._scaled_mm`. Other devices multiply the codes in the activations' dtype, which holds
them exactly: results differ in rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from tune2gguf.model.nf4_tensor import Nf4Tensor, multiply_nf4

CODES = torch.float8_e4m3fn
LARGEST_CODE = 448.0
LEAST_MAGNITUDE = 1e-30  # lower bound of a row's largest magnitude: below it float32 cannot invert the scale
SCALES_PER_OCTAVE = 8  # scales tried for a weight's row; the format repeats itself at every power of two
# Values quantized at a time: on a CPU temporaries fit a core's cache, on a GPU they are small beside a layer.
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class Fp8Weight:
    """An FP8 weight: codes float8_e4m3fn [out, in], scales float32 [out]."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight, code value times scale, computed in float32 and rounded once to dtype."""
        return decode(self.codes, torch.float32).mul_(self.scales.unsqueeze(1)).to(dtype)


def is_fp8(weight: Tensor) -> bool:
    """Return whether a base weight consists of FP8 codes."""
    return weight.dtype == CODES


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a device multiplies FP8: an NVIDIA GPU, Ada, Hopper or later.

    Triton must be installed too: its kernels compute the codes.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _list_values(codes: torch.dtype, dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(codes).to(dtype)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of codes in a wider dtype; exact."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    # A table lookup: torch's conversion on a CPU is five times slower.
    flat, values = codes.view(torch.uint8).flatten(), _list_values(codes.dtype, dtype)
    out = torch.empty(codes.numel(), dtype=dtype)
    for begin in range(0, len(out), CHUNK_VALUES["cpu"]):
        chunk = slice(begin, begin + CHUNK_VALUES["cpu"])
        torch.index_select(values, 0, flat[chunk].int(), out=out[chunk])
    return out.view(codes.shape)


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """Quantize a weight [out, in]; each row tries SCALES_PER_OCTAVE scales and takes that of least squared error.

    The scales map the row's largest magnitude to 448 (the largest code) or less, always above 224.
    """
    codes = torch.empty(weight.shape, dtype=CODES, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _cut_rows(*weight.shape, weight.device):
        codes[rows], scales[rows] = _quantize_with_best_scales(weight[rows].float())
    return Fp8Weight(codes, scales)


def _cut_rows(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows with about CHUNK_VALUES values each."""
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
    """Quantize concatenated rows: return codes [rows, sum of widths] and scales, float32 [rows, 1].

    A row's largest magnitude becomes 448, the largest code.

    Args:
        parts: tensors [rows, width], concatenated along the columns
        factors: float32 [width] per part; they multiply its columns first
    """
    if multiplies_fp8(parts[0].device):
        from tune2gguf.model.fused.eight_bit import quantize_rows as quantize_in_one_kernel

        return quantize_in_one_kernel(parts, factors)
    return quantize_rows_plainly(parts, factors)


def quantize_rows_plainly(parts: list[Tensor], factors: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Same as `quantize_rows`, in plain torch operations."""
    num_rows, device = len(parts[0]), parts[0].device
    codes = torch.empty(num_rows, sum(part.shape[1] for part in parts), dtype=CODES, device=device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=device)
    for chunk in _cut_rows(*codes.shape, device):
        rows = torch.cat([part[chunk] for part in parts], dim=1).float()
        if factors is not None:
            rows *= torch.cat(factors)
        largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True).clamp_(min=LEAST_MAGNITUDE)
        # Divide tensor by tensor: torch rounds once more if one operand is a number.
        top_code = torch.full_like(largest, LARGEST_CODE)
        codes[chunk] = rows.mul_(top_code / largest).to(CODES)
        scales[chunk] = largest / top_code
    return codes, scales


def multiply_fp8(x: Tensor, weights: list[Fp8Weight]) -> list[Tensor]:
    """Return x W^T for several weights, [rows, out] each, in x's dtype.

    Args:
        x: [rows, in]
    """
    return multiply_codes(*quantize_rows([x]), weights, dtype=x.dtype)


def multiply_codes(codes: Tensor, scales: Tensor, weights: list[Fp8Weight], *, dtype: torch.dtype) -> list[Tensor]:
    """Return the products of quantized rows (from `quantize_rows`) and weights, [rows, out] each."""
    return [_multiply(codes, scales, weight, dtype) for weight in weights]


def multiply_fp8_back(gradients: list[Tensor], weights: list[Fp8Weight]) -> Tensor:
    """Return the sum of each gradient [rows, out] times its weight, [rows, in], in the gradients' dtype.

    Clears the list once the gradients are quantized, to free their memory.
    """
    dtype = gradients[0].dtype
    codes, scales = quantize_rows(gradients, [weight.scales for weight in weights])
    gradients.clear()
    if not _uses_units(codes, dtype):
        return _multiply_back_plainly(codes, scales, weights, dtype)
    from tune2gguf.model.fused.eight_bit import transpose_codes

    # The GPU's product needs both operands contiguous along the contracted dimension.
    transposed = transpose_codes([weight.codes for weight in weights])
    return torch._scaled_mm(
        codes, transposed.t(), scales, scales.new_ones(1, len(transposed)), out_dtype=dtype, use_fast_accum=True
    )


def _uses_units(codes: Tensor, dtype: torch.dtype) -> bool:
    # With one scale per row torch's product returns bf16 only.
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
    """Multiply a product of codes, [rows, columns], by its row and column scales, in place."""
    for chunk in _cut_rows(*product.shape, product.device):
        product[chunk] = (product[chunk] * rows[chunk]).mul_(columns)
    return product


def describe_products(device: torch.device) -> str:
    """Return the line that a run with an FP8 base prints about its matrix products."""
    if multiplies_fp8(device):
        return "matrix products: FP8 if dtype=bf16"
    return f"matrix products: {device} has no FP8 units; base_weights=bf16 is as fast or faster"


def get_fp8_weight(linear: nn.Module) -> Fp8Weight:
    """Return the base weight of a linear module that holds FP8 codes."""
    return Fp8Weight(linear.weight, linear.weight_scales)


class FrozenLinear(nn.Linear):
    """A frozen linear layer without bias or adapter; its base weight is fp32, bf16, fp8 or NF4."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.register_buffer("weight_scales", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        if isinstance(self.weight, Nf4Tensor):
            return multiply_nf4(x, self.weight)
        if not is_fp8(self.weight):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        return _Fp8Product.apply(rows, self.weight, self.weight_scales).view(*x.shape[:-1], -1)


class _Fp8Product(torch.autograd.Function):
    """y = x W^T; only x gets a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return multiply_fp8(x, [Fp8Weight(codes, scales)])[0]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        return multiply_fp8_back([upstream], [Fp8Weight(*ctx.saved_tensors)]), None, None
