"""The LoRA linear layer: a frozen base weight (fp32, bf16, fp8 or nf4) and a float32 adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor, nn
from torch.nn import functional

from tune2gguf.model.fp8 import Fp8Weight, multiply_fp8, multiply_fp8_back
from tune2gguf.model.nf4_tensor import Nf4Tensor, multiply_nf4

# Integer dtype by size in bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class LoRALinear(nn.Module):
    """A linear layer with LoRA: y = x W^T + alpha / rank * dropout(x) A^T B^T, with W frozen.

    The adapter is float32 because AdamW's small updates vanish in bf16. It is cast to the activations' dtype for the
    products; activations are never upcast.
    """

    def __init__(self, in_dim: int, out_dim: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=False)
        self.register_buffer("weight_scales", None, persistent=False)  # scales of FP8 codes, float32 [out_dim]
        self.lora_a = nn.Linear(in_dim, rank, bias=False, dtype=torch.float32)
        self.lora_b = nn.Linear(rank, out_dim, bias=False, dtype=torch.float32)
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = dropout

    def adapter_params(self) -> list[str]:
        """Return the names of the trainable parameters, for torchtune's adapter helpers."""
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        if torch.compiler.is_compiling():
            return self._compute_plainly(x)
        (out,) = apply_linears(x.reshape(-1, x.shape[-1]), (self,))
        return out.view(*x.shape[:-1], out.shape[-1])

    def _compute_plainly(self, x: Tensor) -> Tensor:
        """Same as forward, in plain torch operations: the compiler itself plans what backward keeps."""
        dropped = functional.dropout(x, self.dropout, self.training)
        low_rank = functional.linear(dropped, self.lora_a.weight.to(x.dtype)) * self.scaling
        return _apply_frozen(x, self.weight) + functional.linear(low_rank, self.lora_b.weight.to(x.dtype))


def _apply_frozen(x: Tensor, weight: Tensor) -> Tensor:
    return multiply_nf4(x, weight) if isinstance(weight, Nf4Tensor) else functional.linear(x, weight)


class _TorchsSeed(ISeedSequence):
    """A seed for a generator of numpy's from torch's generator, whose state a checkpoint holds."""

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        """Return random words of a dtype, as numpy's interface wants it."""
        num_bytes = n_words * np.dtype(dtype).itemsize
        return torch.empty(num_bytes, dtype=torch.uint8).random_().numpy().view(dtype)


def draw_keep_mask(x: Tensor, dropout: float) -> Tensor:
    """Draw dropout's mask for x [rows, in_dim], int8: -1 with probability 1 - dropout, else 0.

    On a CPU torch draws a double per element, which costs more than the adapter's products. Here it is 16 bits, which
    put the probability within 2^-17, from numpy's fastest generator; torch's own gives the seed.
    """
    if x.device.type != "cpu":
        return (torch.rand_like(x, dtype=torch.float32) >= dropout).to(torch.int8).neg_()
    words = torch.from_numpy(np.random.SFC64(_TorchsSeed()).random_raw(-(-x.numel() // 4)).view(np.int16))
    # A comparison that returns bool takes four to eight times as long.
    keep = torch.ge(words[: x.numel()].view(x.shape), round(dropout * 2**16) - 2**15, out=words.new_empty(x.shape))
    return keep.neg_().to(torch.int8)


def drop(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return x [rows, in_dim] with zeros where `keep` from draw_keep_mask is 0; None keeps all.

    It masks the bits: torch.where takes three to five times as long.
    """
    return x if keep is None else (x.view(_INTEGERS[x.element_size()]) & keep).view(x.dtype)


def to_dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a base weight if it is NF4; return any other unchanged."""
    return weight.dequantize(dtype) if isinstance(weight, Nf4Tensor) else weight


def apply_linears(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input, [rows, in_dim]; their adapters share one dropout mask.

    One mask and one product with all A take half the time of separate ones.
    """
    adapted = [linear for linear in linears if isinstance(linear, LoRALinear)]
    if not adapted:
        return tuple(linear(x) for linear in linears)
    first = adapted[0]
    keep = draw_keep_mask(x, first.dropout) if first.training and first.dropout > 0 else None
    # Scale kept inputs up to preserve the expected product.
    scale = first.scaling if keep is None else first.scaling / (1.0 - first.dropout)
    factors = [factor for linear in adapted for factor in (linear.lora_a.weight, linear.lora_b.weight)]
    has_adapter = [isinstance(linear, LoRALinear) for linear in linears]
    frozen = [weight for linear in linears for weight in (linear.weight, linear.weight_scales)]
    return _LoRAProducts.apply(x, keep, scale, has_adapter, *frozen, *factors)


class _LoRAProducts(torch.autograd.Function):
    """Base and adapter products of one input. Backward keeps the input, the mask, low_rank and the factors.

    Autograd would keep a dropped copy of x per layer and add two full-size temporaries to each pass.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, keep: Tensor | None, scale: float, has_adapter: list[bool], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        frozen, factors = weights[: 2 * len(has_adapter)], weights[2 * len(has_adapter) :]
        a = (factors[0] if len(factors) == 2 else torch.cat(factors[::2])).to(x.dtype)
        b = [factor.to(x.dtype) for factor in factors[1::2]]
        low_rank = drop(x, keep) @ a.T
        if scale != 1.0:
            low_rank *= scale
        outs = _multiply_frozen(x, frozen)
        adapted = [out for out, adds in zip(outs, has_adapter, strict=True) if adds]
        for out, part, factor in zip(adapted, low_rank.chunk(len(b), dim=1), b, strict=True):
            out.addmm_(part, factor.T)
        ctx.save_for_backward(x, keep, low_rank, a, *b, *frozen)
        ctx.scale, ctx.has_adapter, ctx.factor_dtype = scale, has_adapter, factors[0].dtype
        return outs

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple:
        x, keep, low_rank, a, *rest = ctx.saved_tensors
        num_adapters = sum(ctx.has_adapter)
        b, frozen = rest[:num_adapters], rest[num_adapters:]
        adapted = [gradient for gradient, adds in zip(upstream, ctx.has_adapter, strict=True) if adds]
        low_rank_gradient = torch.cat([gradient @ factor for gradient, factor in zip(adapted, b, strict=True)], dim=1)
        if ctx.scale != 1.0:
            low_rank_gradient *= ctx.scale
        a_gradient = low_rank_gradient.T @ drop(x, keep)
        parts = zip(a_gradient.chunk(num_adapters), adapted, low_rank.chunk(num_adapters, dim=1), strict=True)
        factor_gradients = [
            factor.to(ctx.factor_dtype) for of_a, gradient, part in parts for factor in (of_a, gradient.T @ part)
        ]
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _multiply_frozen_back(upstream, frozen)
            if keep is None:
                x_gradient.addmm_(low_rank_gradient, a)
            else:
                x_gradient.add_(drop(low_rank_gradient @ a, keep))
        return x_gradient, None, None, None, *(None for _ in frozen), *factor_gradients


def _multiply_frozen(x: Tensor, frozen: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return x W^T for each weight.

    Args:
        frozen: weight, then the scales of its FP8 codes (else None), for each weight in turn
    """
    weights, scales = frozen[::2], frozen[1::2]
    if scales[0] is None:
        return tuple(x @ to_dense(weight, x.dtype).T for weight in weights)
    return tuple(multiply_fp8(x, [Fp8Weight(*pair) for pair in zip(weights, scales, strict=True)]))


def _multiply_frozen_back(upstream: Sequence[Tensor], frozen: Sequence[Tensor | None]) -> Tensor:
    """Return the sum of each gradient times its weight; `frozen` as in _multiply_frozen."""
    weights, scales = frozen[::2], frozen[1::2]
    if scales[0] is not None:
        return multiply_fp8_back(list(upstream), [Fp8Weight(*pair) for pair in zip(weights, scales, strict=True)])
    x_gradient = upstream[0] @ to_dense(weights[0], upstream[0].dtype)
    for gradient, weight in zip(upstream[1:], weights[1:], strict=True):
        x_gradient.addmm_(gradient, to_dense(weight, gradient.dtype))
    return x_gradient


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """Set every A to Kaiming uniform with a = sqrt(5), and every B to zero.

    The draws are made on the CPU in module order: every device and process starts from the same adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = 1.0 / math.sqrt(module.weight.shape[1])
            draw = torch.empty(module.lora_a.weight.shape, dtype=torch.float32)
            module.lora_a.weight.copy_(draw.uniform_(-bound, bound, generator=generator))
            module.lora_b.weight.zero_()
