"""The LoRA linear layer: a frozen base weight in bf16, float32, FP8 or NF4, and a float32 adapter beside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.dtypes.nf4tensor import NF4Tensor, linear_nf4

from tune2gguf.model.fp8 import Fp8Weight, multiply_fp8, multiply_fp8_back
from tune2gguf.model.nf4 import dequantize_nf4_tensor


class LoRALinear(nn.Module):
    """y = x W^T + alpha / rank * dropout(x) A^T B^T, with W frozen.

    The adapter is float32 because AdamW's small updates vanish in bf16; it is cast to the activations' dtype for the
    products, so that the activations are never upcast.
    """

    def __init__(self, in_dim: int, out_dim: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=False)
        self.register_buffer("weight_scales", None, persistent=False)  # of 8-bit codes, float32 [out_dim]
        self.lora_a = nn.Linear(in_dim, rank, bias=False, dtype=torch.float32)
        self.lora_b = nn.Linear(rank, out_dim, bias=False, dtype=torch.float32)
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = dropout

    def adapter_params(self) -> list[str]:
        """Name the trainable parameters, as torchtune's adapter helpers ask for them."""
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        if torch.compiler.is_compiling():
            return self._compute_plainly(x)
        rows = x.reshape(-1, x.shape[-1])
        keep = draw_keep_mask(rows, self.dropout) if self.training and self.dropout > 0 else None
        out = _LoRAProduct.apply(
            rows,
            self.weight,
            self.weight_scales,
            self.lora_a.weight.to(x.dtype),
            self.lora_b.weight.to(x.dtype),
            keep,
            self.scaling,
            # Dropped inputs are made up for by the others, so that the expected product stays.
            1.0 / (1.0 - self.dropout) if keep is not None else 1.0,
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    def _compute_plainly(self, x: Tensor) -> Tensor:
        """The same in plain operations, for the compiler, which plans itself what to keep for backward."""
        dropped = functional.dropout(x, self.dropout, self.training)
        low_rank = functional.linear(dropped, self.lora_a.weight.to(x.dtype)) * self.scaling
        return _apply_frozen(x, self.weight) + functional.linear(low_rank, self.lora_b.weight.to(x.dtype))


def _apply_frozen(x: Tensor, weight: Tensor) -> Tensor:
    return linear_nf4(x, weight) if isinstance(weight, NF4Tensor) else functional.linear(x, weight)


def draw_keep_mask(x: Tensor, dropout: float) -> Tensor:
    """Draw True with probability 1 - dropout for every element of x, [rows, in_dim].

    On a CPU torch draws a double for each element, which costs more than the adapter's products; 16 bits are enough:
    the drawn fraction is within 2^-17 of `dropout`.
    """
    if x.device.type != "cpu":
        return torch.rand_like(x, dtype=torch.float32) >= dropout
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    return lanes >= round(dropout * 2**16) - 2**15


def to_dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a base weight as a plain tensor: NF4 is dequantized, any other stays as it is."""
    return dequantize_nf4_tensor(weight, dtype) if isinstance(weight, NF4Tensor) else weight


class _LoRAProduct(torch.autograd.Function):
    """Base and adapter product in one; kept for backward are x, which the layers beside share, the mask and low_rank.

    Autograd's own graph would keep a dropped copy of x for every layer, and add two full-size temporaries to each pass.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        weight_scales: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        keep: Tensor | None,
        scaling: float,
        keep_scale: float,
    ) -> Tensor:
        low_rank = (x if keep is None else x * keep) @ lora_a.T * (scaling * keep_scale)
        if weight_scales is None:
            out = x @ to_dense(weight, x.dtype).T
        else:
            (out,) = multiply_fp8(x, [Fp8Weight(weight, weight_scales)])
        ctx.save_for_backward(x, weight, weight_scales, lora_a, lora_b, keep, low_rank)
        ctx.scale = scaling * keep_scale
        return out.addmm_(low_rank, lora_b.T)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        x, weight, weight_scales, lora_a, lora_b, keep, low_rank = ctx.saved_tensors
        low_rank_gradient = upstream @ lora_b * ctx.scale
        b_gradient = upstream.T @ low_rank
        a_gradient = low_rank_gradient.T @ (x if keep is None else x * keep)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            if weight_scales is None:
                x_gradient = upstream @ to_dense(weight, upstream.dtype)
            else:
                x_gradient = multiply_fp8_back([upstream], [Fp8Weight(weight, weight_scales)])
            if keep is None:
                x_gradient.addmm_(low_rank_gradient, lora_a)
            else:
                x_gradient.addcmul_(low_rank_gradient @ lora_a, keep.to(x.dtype))
        return x_gradient, None, None, a_gradient, b_gradient, None, None, None


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """Set every A to Kaiming uniform with a = sqrt(5) and every B to zero, from the seed alone.

    Drawn on the CPU in the order of the modules, so that every device and rank starts from the same adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = 1.0 / math.sqrt(module.weight.shape[1])
            draw = torch.empty(module.lora_a.weight.shape, dtype=torch.float32)
            module.lora_a.weight.copy_(draw.uniform_(-bound, bound, generator=generator))
            module.lora_b.weight.zero_()
