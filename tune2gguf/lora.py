"""The LoRA linear layer: a frozen base weight in bf16, float32 or NF4, and a float32 adapter beside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class LoRALinear(nn.Module):
    """y = x W^T + alpha / rank * dropout(x) A^T B^T, with W frozen.

    The adapter is float32 because AdamW's small updates vanish in bf16; it is cast to the activations' dtype for the
    products, so that the activations are never upcast.
    """

    def __init__(self, in_dim: int, out_dim: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=False)
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
        dropped = functional.dropout(x, self.dropout, self.training)
        # The scaling goes to the [..., rank] product, the smallest of the tensors.
        low_rank = functional.linear(dropped, self.lora_a.weight.to(x.dtype)) * self.scaling
        return functional.linear(x, self.weight) + functional.linear(low_rank, self.lora_b.weight.to(x.dtype))


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
