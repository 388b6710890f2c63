"""The fused layers of a decoder: one unpadded pass of rows; seeds and casts for all adapters at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tune2gguf.model.fused import MAX_GRAPHED_TOKENS, pad_length
from tune2gguf.model.fused.attention import Layout
from tune2gguf.model.fused.cudnn import MIN_ROW
from tune2gguf.model.fused.graphs import LayerGraphs, pad_rows
from tune2gguf.model.fused.groups import (
    GROUPS,
    SEEDS_PER_GROUP,
    Groups,
    begin_pass,
    get_projections,
    lay_out_groups,
    list_adapted,
    list_weights,
)
from tune2gguf.model.fused.layer import Pass
from tune2gguf.model.sharding import run_layer

if TYPE_CHECKING:
    from torchtune.modules import TransformerSelfAttentionLayer

    from tune2gguf.model.sharding import ShardedBase


def lay_out_pass(
    tokens: Tensor, *, row_starts: Tensor | None, longest_row: int | None, input_pos: Tensor | None
) -> tuple[Tensor, Layout]:
    """Return a batch's flat tokens, padded at the end to a length that many passes share, and its layout.

    The padding is one unsupervised row; further rows are empty.

    Args:
        tokens: [batch, seq]
        row_starts: first token of each row in the flat batch, then the batch's size, int32 [rows + 1]; None: each
            sequence is one row
        longest_row: tokens of the longest row; None if row_starts is None
        input_pos: position of each token in its row, [batch, seq]; None if each sequence is one row
    """
    batch, seq = tokens.shape
    num_tokens, device = tokens.numel(), tokens.device
    if row_starts is None:
        row_starts = torch.arange(0, num_tokens + 1, seq, dtype=torch.int32, device=device)
        longest_row = seq
    if input_pos is None:
        input_pos = torch.arange(seq, device=device).expand(batch, seq)
    length, num_rows = pad_length(num_tokens), len(row_starts) - 1
    missing, is_long = length - num_tokens, longest_row >= MIN_ROW
    is_graphed = length <= MAX_GRAPHED_TOKENS
    missing_rows = int(missing > 0)
    if is_graphed or is_long:  # few kinds of passes, for few captured graphs and cuDNN plans
        missing_rows = pad_rows(num_rows, has_padding=missing > 0) - num_rows
    layout = Layout(
        positions=functional.pad(input_pos.flatten(), (0, missing)),
        starts=functional.pad(row_starts, (0, missing_rows), value=length),
        longest=_round_longest(length, longest_row, is_long=is_long) if is_graphed else max(longest_row, missing),
        is_long=is_long,
    )
    return functional.pad(tokens.flatten(), (0, missing)), layout


def _round_longest(length: int, longest_row: int, *, is_long: bool) -> int:
    """Return an upper bound on a row's tokens that many passes share; passes of short rows share their length."""
    return min(length, 1 << (longest_row - 1).bit_length()) if is_long else length


class FusedStack:
    """The layers of a decoder, trained with the kernels of this package."""

    def __init__(
        self, layers: Sequence[TransformerSelfAttentionLayer], *, checkpointing: bool, is_graphed: bool
    ) -> None:
        """Prepare layers; their weights may be loaded later.

        Args:
            checkpointing: keep only each layer's input and recompute the layer in backward
            is_graphed: capture short passes on a GPU as CUDA graphs
        """
        self.layers = list(layers)
        self.checkpointing = checkpointing
        self.linears = [get_projections(layer) for layer in self.layers]
        self.names = list_adapted(self.linears[0])
        self.share = self.linears[0][self.names[0]].dropout
        self.slots = [
            number * SEEDS_PER_GROUP + [name for name in members if name in self.names].index(name)
            for number, members in enumerate(GROUPS)
            for name in members
            if name in self.names
        ]
        self.groups: list[Groups] = []  # in the activations' dtype
        self.parts: list[Tensor] = []  # views of the groups, in the order of list_weights
        self.graphs = LayerGraphs(self) if is_graphed else None

    def list_weights(self) -> list[Tensor]:
        """Return the adapters' current weights, layer by layer; they may be replaced until training begins."""
        return [weight for linears in self.linears for weight in list_weights(linears)]

    def make_pass(self, number: int, layout: Layout, seeds: Tensor | None) -> Pass:
        """Return a new pass of one layer; `seeds` from `draw_seeds`."""
        groups = begin_pass(self.groups[number], None if seeds is None else seeds[number], share=self.share)
        return Pass(self.layers[number], self.linears[number], layout, groups, self.checkpointing)

    def run(self, hidden: Tensor, layout: Layout, *, sharded: ShardedBase | None = None) -> Tensor:
        """Return the last layer's output, [tokens, dim], from the first layer's input.

        Args:
            sharded: gathers the layers' weights
        """
        seeds = self.draw_seeds(hidden.device) if self.layers[0].training and self.share > 0 else None
        weights = self.list_weights()
        self._cast(weights, hidden)
        if self.graphs is not None and hidden.is_cuda and (sharded is None or sharded.can_be_captured):
            out = self.graphs.run(hidden, layout, seeds, weights, sharded=sharded)
            if out is not None:
                return out
        for number, layer in enumerate(self.layers):
            own_seeds = None if seeds is None else seeds[number]
            hidden = run_layer(
                sharded, number, layer, hidden, layout=layout, groups=self.groups[number], seeds=own_seeds
            )
        return hidden

    def draw_seeds(self, device: torch.device) -> Tensor:
        """Draw one seed per adapter from torch's CPU generator, layer by layer, int32 [layers, groups, n]."""
        draws = torch.randint(2**31 - 1, (len(self.layers), len(self.names)))
        seeds = torch.zeros(len(self.layers), len(GROUPS) * SEEDS_PER_GROUP, dtype=torch.int32)
        seeds[:, self.slots] = draws.int()
        seeds = seeds.view(len(self.layers), len(GROUPS), SEEDS_PER_GROUP)
        # Pinned memory makes the copy asynchronous.
        return seeds.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else seeds

    @torch.no_grad()
    def _cast(self, weights: list[Tensor], hidden: Tensor) -> None:
        """Copy the adapters into the activations' dtype, at the fixed addresses that graphs read."""
        if not self.groups:
            for linears in self.linears:
                groups, parts = lay_out_groups(linears, dtype=hidden.dtype, device=hidden.device)
                self.groups.append(groups)
                self.parts.extend(parts)
        torch._foreach_copy_(self.parts, weights)
