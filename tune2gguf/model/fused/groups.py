"""Groups of a layer's adapters: projections of the same input share one stacked A."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tune2gguf.model.fused import launch
from tune2gguf.model.fused.launch import Adapted, Dropout
from tune2gguf.model.lora import LoRALinear

if TYPE_CHECKING:
    from torchtune.modules import TransformerSelfAttentionLayer

# Projections of the same input, in the order in which their adapters are stacked.
QKV, OUTPUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("output_proj",), ("w1", "w3"), ("w2",)
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)
# Aligns a group's seeds to 16 bytes: Triton recompiles a kernel for unaligned pointers.
SEEDS_PER_GROUP = 4


def get_projections(layer: TransformerSelfAttentionLayer) -> dict[str, nn.Module]:
    """Return a layer's linear modules by name, in the order of GROUPS."""
    attention = {name: getattr(layer.attn, name) for name in (*QKV, *OUTPUT)}
    return attention | {name: getattr(layer.mlp, name) for name in (*GATE_UP, *DOWN)}


def list_adapted(linears: dict[str, nn.Module]) -> list[str]:
    """Return the names of projections with an adapter, in the order of GROUPS."""
    return [name for name, linear in linears.items() if isinstance(linear, LoRALinear)]


def list_weights(linears: dict[str, nn.Module]) -> list[Tensor]:
    """Return A and B of each adapter of a layer, in the order of GROUPS."""
    adapted = [linears[name] for name in list_adapted(linears)]
    return [weight for linear in adapted for weight in (linear.lora_a.weight, linear.lora_b.weight)]


@dataclass
class Group:
    """The adapters of projections of one input, in the activations' dtype."""

    names: list[str]
    stacked_a: Tensor | None  # [n * rank, in]
    b: dict[str, Tensor]  # [out, rank]
    scaling: float
    rank: int
    dropout: Dropout | None = None  # of this pass, with one seed per name
    low_rank: Tensor | None = None  # first products of this pass, [rows, n * rank]

    def get_slice(self, low_rank: Tensor, name: str) -> Tensor:
        """Return one adapter's columns of [rows, n * rank]."""
        start = self.names.index(name) * self.rank
        return low_rank[:, start : start + self.rank]

    def add_to(self, name: str) -> Adapted | None:
        """Return the term that a projection's adapter adds in forward; None without an adapter."""
        if name not in self.names:
            return None
        return Adapted(self.get_slice(self.low_rank, name), self.b[name])

    def reduce(self, x: Tensor) -> None:
        """Compute the first products from the projections' input x, [rows, in]."""
        if not self.names:
            return
        if self.dropout is not None:
            self.low_rank = launch.reduce_dropped(x, self.stacked_a, self.dropout, rank=self.rank)
        else:
            self.low_rank = x @ self.stacked_a.T
        if self.scaling != 1.0:
            self.low_rank *= self.scaling

    def reduce_gradients(self, upstream: dict[str, Tensor], gradients: dict[str, list[Tensor]]) -> Tensor | None:
        """Return the gradient of the first products, [rows, n * rank]; store every B's gradient in `gradients`."""
        if not self.names:
            return None
        parts = []
        for name in self.names:
            gradients[name][1] = multiply_in_float32(upstream[name].T, self.get_slice(self.low_rank, name))
            parts.append(upstream[name] @ self.b[name])
        low_rank = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return low_rank if self.scaling == 1.0 else low_rank.mul_(self.scaling)

    def finish_gradients(
        self,
        low_rank: Tensor | None,
        gradients: dict[str, list[Tensor]],
        x: Tensor,
        *,
        rstd: Tensor | None = None,
        weight: Tensor | None = None,
        is_dropped: bool = False,
    ) -> None:
        """Store every A's gradient in `gradients`.

        Args:
            low_rank: gradient of the first products, [rows, n * rank]
            x: the projections' input, [rows, in]; with rstd and weight the input is x's norm
            is_dropped: x already has zeros where the only adapter dropped it
        """
        if not self.names:
            return
        if self.dropout is not None and not is_dropped:
            whole = launch.compute_dropped_gradient(low_rank, x, self.dropout, rank=self.rank, rstd=rstd, weight=weight)
        else:
            taken = x if rstd is None else launch.apply_norm(x, rstd, weight)
            whole = multiply_in_float32(low_rank.T, taken)
        for number, name in enumerate(self.names):
            gradients[name][0] = whole[number * self.rank : (number + 1) * self.rank]


def multiply_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32: sums over all tokens must not be rounded to bf16."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


Groups = dict[tuple[str, ...], Group]


def lay_out_groups(
    linears: dict[str, nn.Module], *, dtype: torch.dtype, device: torch.device
) -> tuple[Groups, list[Tensor]]:
    """Allocate a layer's adapters by group; return them and their views in the order of list_weights."""
    names, weights = list_adapted(linears), list_weights(linears)
    order = [*weights[::2], *weights[1::2]]
    sizes = [weight.numel() for weight in order]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    views = [part.view(weight.shape) for part, weight in zip(flat.split(sizes), order, strict=True)]
    a, b = (dict(zip(names, half, strict=True)) for half in (views[: len(names)], views[len(names) :]))
    groups, start = {}, 0
    for members in GROUPS:
        own = [name for name in members if name in names]
        rank = linears[own[0]].rank if own else 0
        numel = sum(a[name].numel() for name in own)
        groups[members] = Group(
            names=own,
            stacked_a=flat[start : start + numel].view(len(own) * rank, -1) if own else None,
            b={name: b[name] for name in own},
            scaling=linears[own[0]].scaling if own else 1.0,
            rank=rank,
        )
        start += numel
    return groups, [part for name in names for part in (a[name], b[name])]


def begin_pass(groups: Groups, seeds: Tensor | None, *, share: float) -> Groups:
    """Return a layer's groups for one pass.

    Args:
        seeds: the layer's dropout seeds, int32 [groups, adapters]; None: no dropout
        share: dropout probability
    """
    return {
        members: replace(group, dropout=None if seeds is None else Dropout(seeds[number], share))
        for number, (members, group) in enumerate(groups.items())
    }
