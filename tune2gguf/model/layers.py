"""torchtune's norm, MLP and layer; on a CPU they read memory less often and keep less for backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchtune.modules import FeedForward, RMSNorm, TransformerSelfAttentionLayer

from tune2gguf.model.attention import Rows
from tune2gguf.model.lora import apply_linears


class FrozenRMSNorm(RMSNorm):
    """torchtune's RMSNorm in float32, with a frozen scale.

    It keeps its input for backward; autograd would keep a float32 copy.
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
        gradient, normalized = upstream.to(torch.float32, copy=True).mul_(scale), x.to(torch.float32, copy=True).mul_(r)
        mean = (gradient * normalized).mean(-1, keepdim=True)
        return gradient.addcmul_(normalized, mean, value=-1).mul_(r).to(x.dtype), None, None


class GatedMLP(FeedForward):
    """torchtune's SwiGLU MLP; it keeps gate and up for backward, but not the activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to the same shape."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        gate, up = apply_linears(x.flatten(0, -2), (self.w1, self.w3))
        return self.w2(_GatedProduct.apply(gate, up)).view(x.shape)


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


class DecoderLayer(TransformerSelfAttentionLayer):
    """torchtune's layer; on a CPU it also takes a pass's flat rows."""

    def forward(self, x: Tensor, *, rows: Rows | None = None, **rest) -> Tensor:
        """Map [tokens, dim] to the same shape; without `rows`, call torchtune's forward."""
        if rows is None:
            return super().forward(x, **rest)
        x = x + self.attn.attend_rows(self.sa_norm(x), rows)
        return x + self.mlp(self.mlp_norm(x))
