"""The adapters of a layer, by what they take: projections of the same input have their A side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tune2gguf.model.fused import launch
from tune2gguf.model.fused.launch import Adapted, Dropout

if TYPE_CHECKING:
    from torchtune.modules import TransformerSelfAttentionLayer

# Projections that take the same input, in the order in which their adapters lie side by side.
QKV, OUTPUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("output_proj",), ("w1", "w3"), ("w2",)
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)


def get_projections(layer: TransformerSelfAttentionLayer) -> dict[str, nn.Module]:
    """Return a layer's linear modules by name, in the order of GROUPS."""
    attention = {name: getattr(layer.attn, name) for name in (*QKV, *OUTPUT)}
    return attention | {name: getattr(layer.mlp, name) for name in (*GATE_UP, *DOWN)}


@dataclass
class Group:
    """The adapters of projections that take the same input; in the activations' dtype, A below each other."""

    names: list[str]
    stacked_a: Tensor | None  # [n * rank, in]
    b: dict[str, Tensor]  # [out, rank]
    dropouts: dict[str, Dropout]
    scaling: float
    rank: int
    low_rank: Tensor | None = None  # [rows, n * rank], the first product of a forward pass

    def get_slice(self, low_rank: Tensor, name: str) -> Tensor:
        """Return one adapter's columns of [rows, n * rank]."""
        start = self.names.index(name) * self.rank
        return low_rank[:, start : start + self.rank]

    def add_to(self, name: str) -> Adapted | None:
        """Return what a projection's adapter adds in forward."""
        if name not in self.names:
            return None
        return Adapted(self.get_slice(self.low_rank, name), self.b[name])

    @property
    def draws(self) -> tuple[Dropout, ...]:
        """What each adapter drops, in the order of names; none where nothing is dropped."""
        return tuple(self.dropouts[name] for name in self.names if name in self.dropouts)

    def reduce(self, x: Tensor) -> None:
        """Compute the first products from what the projections take, [rows, in]."""
        if not self.names:
            return
        if self.dropouts:
            self.low_rank = launch.reduce_dropped(x, self.stacked_a, self.draws)
        else:
            self.low_rank = x @ self.stacked_a.T
        if self.scaling != 1.0:
            self.low_rank *= self.scaling

    def reduce_gradients(self, upstream: dict[str, Tensor], gradients: dict[str, list[Tensor]]) -> Tensor | None:
        """Return the gradient of the first products, [rows, n * rank]; note the gradient of every B."""
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
        """Note the gradient of every A, from that of the first products and what the projections take.

        Args:
            x: [rows, in]; with rstd and weight they take its norm
            is_dropped: what the only adapter drops of x is zero in it
        """
        if not self.names:
            return
        if self.dropouts and not is_dropped:
            whole = launch.compute_dropped_gradient(low_rank, x, self.draws, rstd=rstd, weight=weight)
        else:
            taken = x if rstd is None else launch.apply_norm(x, rstd, weight)
            whole = multiply_in_float32(low_rank.T, taken)
        for number, name in enumerate(self.names):
            gradients[name][0] = whole[number * self.rank : (number + 1) * self.rank]


def multiply_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32: sums over all tokens, which are not to be rounded to bf16."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def collect_groups(
    linears: dict[str, nn.Module], adapters: dict[str, tuple[Tensor, Tensor]], *, dtype: torch.dtype, drops: bool
) -> dict[tuple[str, ...], Group]:
    """Return a layer's adapters by group, cast to dtype in one kernel, with fresh seeds where inputs are dropped."""
    order = [adapters[name][0] for name in adapters] + [adapters[name][1] for name in adapters]
    sizes = [weight.numel() for weight in order]
    flat = torch.empty(sum(sizes), dtype=dtype, device=order[0].device)
    views = [part.view(weight.shape) for part, weight in zip(flat.split(sizes), order, strict=True)]
    torch._foreach_copy_(views, [weight.detach() for weight in order])
    num, names, groups, start = len(adapters), list(adapters), {}, 0
    seeds = torch.randint(2**31 - 1, (num,)).tolist() if drops else []
    for members in GROUPS:
        own = [name for name in members if name in adapters]
        rank = linears[own[0]].rank if own else 0
        numel = sum(adapters[name][0].numel() for name in own)
        groups[members] = Group(
            names=own,
            stacked_a=flat[start : start + numel].view(len(own) * rank, -1) if own else None,
            b={name: views[num + names.index(name)] for name in own},
            dropouts={name: Dropout(seeds[names.index(name)], linears[name].dropout) for name in own} if drops else {},
            scaling=linears[own[0]].scaling if own else 1.0,
            rank=rank,
        )
        start += numel
    return groups
