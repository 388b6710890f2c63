"""CUDA graphs of all layers of a pass: one launch forward and one backward replace thousands.

A graph has fixed addresses and one length. Passes are therefore padded to few lengths and few numbers of rows. The
first pass of a kind runs without a graph, which compiles and loads its kernels; the second is captured. Kernels, order
and inputs equal those of an ungraphed pass, so results are bit-identical.

All graphs share one memory pool: each pass runs backward before the next one starts. The pool stays allocated at the
size of the longest captured pass. Freed blocks serve only requests that are not larger, so a longer pass than any
before resets the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from tune2gguf.model.fused import MAX_GRAPHED_TOKENS
from tune2gguf.model.fused.attention import Layout
from tune2gguf.model.fused.groups import GROUPS, SEEDS_PER_GROUP
from tune2gguf.model.recording import record_graph

if TYPE_CHECKING:
    from tune2gguf.model.fused.layer import Pass
    from tune2gguf.model.fused.stack import FusedStack
    from tune2gguf.model.sharding import ShardedBase

MAX_GRAPHED_ROWS = 257
MAX_GRAPHS = 64  # kinds of passes; each graph takes some MB of GPU memory for its list of kernels


def pad_rows(num_rows: int, *, has_padding: bool) -> int:
    """Return the padded number of rows of a pass: a power of two, plus one for padding tokens."""
    return (1 << (num_rows - 1).bit_length()) + has_padding


@dataclass(frozen=True)
class Kind:
    """The properties that passes must share to share a graph."""

    length: int
    num_starts: int
    longest: int  # upper bound on the tokens of a row
    is_long: bool
    trains: bool
    drops: bool


@dataclass
class Captured:
    """The graphs of one kind; `backward` is None without gradients."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph | None


class LayerGraphs:
    """The graphs of a stack's layers by kind of pass, and the input and output tensors that all graphs share."""

    def __init__(self, stack: FusedStack) -> None:
        self.stack = stack
        self.captured: dict[Kind, Captured] = {}
        self._met: set[Kind] = set()
        self._pool = None
        self._pool_bytes = 0
        self._longest = 0
        self._passes: list[tuple[Tensor, Pass]] = []
        self._sharded: ShardedBase | None = None
        self._hidden: Tensor | None = None  # the layers' input, [longest, dim]
        self._out: Tensor | None = None  # the layers' output, later its gradient
        self._positions: Tensor | None = None
        self.number_of_passes = 0  # only the newest pass can still run backward

    def run(
        self,
        hidden: Tensor,
        layout: Layout,
        seeds: Tensor | None,
        weights: list[Tensor],
        *,
        sharded: ShardedBase | None = None,
    ) -> Tensor | None:
        """Return the last layer's output, or None if the pass must run without a graph.

        Args:
            hidden: the first layer's input, [tokens, dim]
            weights: the adapters' weights, which get gradients
            sharded: gathers the layers' weights; the graphs contain all gathers but those of their first two layers
        """
        self._sharded = sharded
        if len(hidden) > MAX_GRAPHED_TOKENS:
            self._leave_room(len(hidden))
            return None
        kind = Kind(
            len(hidden),
            len(layout.starts),
            layout.longest,
            layout.is_long,
            trains=torch.is_grad_enabled(),
            drops=seeds is not None,
        )
        if kind not in self._met or hidden.requires_grad or kind.num_starts > MAX_GRAPHED_ROWS + 1:
            self._met.add(kind)
            self._leave_room(kind.length)
            return None
        if kind not in self.captured:
            self._capture(kind, hidden, weights)
        self._hidden[: kind.length].copy_(hidden.detach())
        self._positions[: kind.length].copy_(layout.positions)
        self._starts[: kind.num_starts].copy_(layout.starts)
        if seeds is not None:
            self._seeds.copy_(seeds)
        return _GraphedLayers.apply(self, self.captured[kind], kind.length, *weights)

    def replay_forward(self, captured: Captured, length: int) -> Tensor:
        """Run the forward graph on the shared input tensors and return the last layer's output."""
        self.number_of_passes += 1
        self._replay(captured.forward, backward=False)
        return self._out[:length].clone()

    def replay_backward(self, captured: Captured, upstream: Tensor) -> list[Tensor]:
        """Run the backward graph and return the weights' gradients, float32, from the output's gradient."""
        self.number_of_passes += 1
        self._out[: len(upstream)].copy_(upstream)
        self._replay(captured.backward, backward=True)
        # Clone: autograd may keep the tensors that it gets as .grad.
        return list(_unflatten_dense_tensors(self._gradient.clone(), self._gradients))

    def _replay(self, graph: torch.cuda.CUDAGraph, *, backward: bool) -> None:
        if self._sharded is None:
            graph.replay()
            return
        self._sharded.begin_graph(backward=backward)
        graph.replay()
        self._sharded.end_graph(backward=backward)

    @torch.no_grad()
    def _capture(self, kind: Kind, hidden: Tensor, weights: list[Tensor]) -> None:
        if self._pool is None:
            self._allocate(hidden, weights)
        if kind.length > self._longest or len(self.captured) >= MAX_GRAPHS:
            self.drop()
            self._longest = kind.length
            self._hidden, self._out = torch.zeros(2, *hidden.shape, dtype=hidden.dtype, device=hidden.device)
            self._positions = torch.zeros(kind.length, dtype=torch.int64, device=hidden.device)
        layout = Layout(self._positions[: kind.length], self._starts[: kind.num_starts], kind.longest, kind.is_long)
        if self._sharded is not None:
            self._sharded.begin_graph(backward=False)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        try:
            forward = record_graph(lambda: self._run_forward(layout, kind), pool=self._pool)
            backward = None
            if kind.trains:
                backward = record_graph(lambda: self._run_backward(kind.length), pool=self._pool)
        finally:
            self._passes.clear()
        if self._sharded is not None:
            self._sharded.end_graph(backward=True)  # capture computes nothing: the first layers are still gathered
        self.captured[kind] = Captured(forward, backward)
        self._pool_bytes += torch.cuda.memory_reserved() - before

    def _allocate(self, hidden: Tensor, weights: list[Tensor]) -> None:
        """Allocate the tensors that graphs of all lengths share."""
        device = hidden.device
        self._starts = torch.zeros(MAX_GRAPHED_ROWS + 1, dtype=torch.int32, device=device)
        shape = (len(self.stack.layers), len(GROUPS), SEEDS_PER_GROUP)
        self._seeds = torch.zeros(shape, dtype=torch.int32, device=device)
        self._gradient = torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.float32, device=device)
        self._gradients = _unflatten_dense_tensors(self._gradient, weights)
        self._pool = torch.cuda.graph_pool_handle()

    def _run_forward(self, layout: Layout, kind: Kind) -> None:
        x = self._hidden[: kind.length]
        for number in range(len(self.stack.layers)):
            if self._sharded is not None:
                self._sharded.go_forward(number)
            one = self.stack.make_pass(number, layout, self._seeds if kind.drops else None)
            out = one.forward(x)
            if kind.trains:
                self._passes.append((x, one))
            x = out
        self._out[: kind.length].copy_(x)

    def _run_backward(self, length: int) -> None:
        upstream, names = self._out[:length], self.stack.names
        while self._passes:
            x, one = self._passes.pop()
            number = len(self._passes)
            if self._sharded is not None:
                self._sharded.go_back(number)
            upstream, gradients = one.backward(x, upstream, needs_input=number > 0)
            found = [part for name in names for part in gradients[name]]
            torch._foreach_copy_(self._gradients[number * len(found) : (number + 1) * len(found)], found)

    def _leave_room(self, num_tokens: int) -> None:
        """Free the pool if an ungraphed pass might not fit beside it."""
        if not self.captured:
            return
        free = torch.cuda.mem_get_info()[0] - self._pool_bytes  # the next line counts the pool as free, too
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if free < 1.2 * self._pool_bytes * num_tokens / self._longest:
            self.drop()

    def drop(self) -> None:
        """Drop all graphs and free their memory; kinds that recur are captured again."""
        torch.cuda.synchronize()
        self.captured.clear()
        self._hidden = self._out = self._positions = None
        self._pool, self._pool_bytes, self._longest = torch.cuda.graph_pool_handle(), 0, 0
        torch.cuda.empty_cache()


class _GraphedLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs: LayerGraphs, captured: Captured, length: int, *weights: Tensor) -> Tensor:
        out = graphs.replay_forward(captured, length)
        ctx.graphs, ctx.captured, ctx.number = graphs, captured, graphs.number_of_passes
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        assert ctx.number == ctx.graphs.number_of_passes, "a graphed pass runs backward once, before the next pass"
        captured, ctx.captured = ctx.captured, None  # else a loss that outlives backward would keep the graphs
        return None, None, None, *ctx.graphs.replay_backward(captured, upstream)
