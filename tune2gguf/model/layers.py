"""torchtune's norm, MLP and rotary embeddings, with fewer passes over memory and less kept on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import FeedForward, RMSNorm, RotaryPositionalEmbeddings


class FrozenRMSNorm(RMSNorm):
    """torchtune's RMSNorm, computed in float32, of which the scale gets no gradient.

    For backward it keeps its input as it came; autograd would keep a float32 copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to the same shape and dtype."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return _NormalizedProduct.apply(x, self.scale, self.eps)


class _NormalizedProduct(torch.autograd.Function):
    """y = x r scale with r = 1 / sqrt(mean(x^2) + eps), and dx = r (g - n mean(g n)) with g = dy scale, n = x r."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        product = x.to(torch.float32, copy=True)
        r = torch.linalg.vector_norm(product, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, r)
        return product.mul_(r).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        x, scale, r = ctx.saved_tensors
        gradient, normalized = upstream * scale.float(), x * r
        mean = (gradient * normalized).mean(-1, keepdim=True)
        return gradient.addcmul_(normalized, mean, value=-1).mul_(r).to(x.dtype), None, None


class GatedMLP(FeedForward):
    """torchtune's SwiGLU MLP, which keeps gate and up for backward, not the activation between them as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to the same."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return self.w2(_GatedProduct.apply(self.w1(x), self.w3(x)))


class _GatedProduct(torch.autograd.Function):
    """y = silu(gate) up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        up_gradient = functional.silu(gate).mul_(upstream)
        return torch.ops.aten.silu_backward(upstream * up, gate), up_gradient


class _ComplexRotation:
    """Rotates pairs of channels as complex numbers: one product where torchtune has four and puts them together."""

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotate x, [batch, seq, heads, head_dim], by the angles of its positions, [batch, seq], or 0, 1, 2 …"""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x, input_pos=input_pos)
        turns = torch.view_as_complex(self.cache)
        turns = turns[: x.shape[1]] if input_pos is None else turns[input_pos]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).type_as(x)


class RoPE(_ComplexRotation, RotaryPositionalEmbeddings):
    """torchtune's rotary embeddings."""


class ScaledRoPE(_ComplexRotation, Llama3ScaledRoPE):
    """torchtune's rotary embeddings with Llama 3's scaling of frequencies."""
