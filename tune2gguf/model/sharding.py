"""The sharded base: each process keeps a shard of every layer and gathers the layer while it computes.

Frozen weights never change: nothing is reduced, and a gathered layer stays valid. Even layers are gathered into one
buffer, odd layers into another: while one layer computes, the next one is prefetched, forward and backward. Token
embedding and head share a third buffer. Each weight is a view of its buffer at a fixed address, as autograd and
compiled code require.

FSDP2 would copy each weight into and out of communication buffers, gather unchanged weights again, and reduce adapter
gradients per layer and pass. Adapters are small and stay replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

# Bytes that each weight is aligned to: kernels read 16 at a time.
ALIGNMENT = 256


class Gather(Protocol):
    """A way to gather the shards of a unit."""

    can_be_captured: bool  # in a CUDA graph

    def start(self, number: int, buffer: Tensor) -> Callable[[], None]:
        """Start to gather a unit into `buffer`; return a function that makes the computation wait for the end."""


@dataclass(eq=False)
class Unit:
    """Weights that are gathered together: a layer's matrices, the token embedding, or the head.

    Attributes:
        places: module and parameter name of each weight
        buffer: number of the buffer that the unit is gathered into
        part: this rank's shard, uint8 [bytes / processes]; None until all weights are loaded
    """

    number: int
    places: list[tuple[nn.Module, str]]
    buffer: int
    part: Tensor | None = None

    def is_filled(self) -> bool:
        """Whether all weights are loaded and not yet split."""
        return self.part is None and not any(getattr(module, name).is_meta for module, name in self.places)


class ShardedBase:
    """A decoder's matrices, sharded by bytes; `run_layer` and `hold` gather them for a computation.

    Norms stay replicated. Every process must run the same layers in the same order.
    """

    EVEN, ODD, EDGE = range(3)  # buffers

    def __init__(
        self, decoder: TransformerDecoder, *, rank: int, size: int, connect: Callable[[list[Tensor]], Gather]
    ) -> None:
        """Prepare a decoder without weights.

        Args:
            connect: called once, with this rank's shards of all units; returns the way to gather them
        """
        self._rank, self._size, self._connect = rank, size, connect
        self._layers = [Unit(number, _list_matrices(layer), number % 2) for number, layer in enumerate(decoder.layers)]
        self.embedding = Unit(len(self._layers), _list_matrices(decoder.tok_embeddings), self.EDGE)
        self.head = self.embedding
        if not isinstance(decoder.output, TiedLinear):
            self.head = Unit(len(self._layers) + 1, _list_matrices(decoder.output), self.EDGE)
        self._units = [*self._layers, *dict.fromkeys([self.embedding, self.head])]
        self._buffers: dict[int, Tensor] = {}
        self._held: dict[int, Unit] = {}  # by buffer
        self._waits: dict[int, Callable[[], None]] = {}  # by buffer, for a gather in flight
        self._gather: Gather | None = None

    @property
    def parts(self) -> list[Tensor]:
        """This rank's shard of every unit, by unit number."""
        return [unit.part for unit in self._units]

    @torch.no_grad()
    def split_filled(self) -> None:
        """Reduce each fully loaded unit to this rank's shard."""
        for unit in self._units:
            if unit.is_filled():
                self._split(unit)

    def run_layer(self, number: int, layer: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
        """Return layer(hidden, **arguments), with gathered weights here and in backward."""
        self.go_forward(number)
        # Backward starts with the last two layers, which are gathered then; without it, forward starts again. A graph
        # cannot end with a gather in flight.
        if number == len(self._layers) - 1 and not torch.is_grad_enabled() and not _is_captured(hidden):
            self._prefetch_layer(0, beside=number)
        out = layer(hidden, **arguments)
        if out.requires_grad:
            out.register_hook(lambda _: self.go_back(number))
        return out

    @contextmanager
    def hold(self, unit: Unit, *, then: Unit) -> Iterator[None]:
        """Keep a unit gathered in this context; then prefetch `then`, which shares its buffer."""
        self._need(unit)
        yield
        self._prefetch(then)

    def go_forward(self, number: int) -> None:
        """Gather a layer for forward and prefetch the one after it."""
        self._need(self._layers[number])
        self._prefetch_layer(number + 1, beside=number)

    def go_back(self, number: int) -> None:
        """Gather a layer for backward and prefetch the one before it."""
        self._need(self._layers[number])
        self._prefetch_layer(number - 1, beside=number)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph may capture the gathers; False before the first gather."""
        return self._gather is not None and self._gather.can_be_captured

    def begin_graph(self, *, backward: bool) -> None:
        """Gather the two layers that a graph of all layers starts with: the first two, in backward the last two."""
        for unit in self._layers[-2:] if backward else self._layers[:2]:
            self._need(unit)

    def end_graph(self, *, backward: bool) -> None:
        """Record which two layers a graph of all layers leaves in the buffers."""
        for unit in self._layers[:2] if backward else self._layers[-2:]:
            self._held[unit.buffer] = unit

    def _prefetch_layer(self, number: int, *, beside: int) -> None:
        if 0 <= number < len(self._layers) and number % 2 != beside % 2:
            self._prefetch(self._layers[number])

    def _prefetch(self, unit: Unit) -> None:
        """Start to gather a unit, after all computation so far that used its buffer."""
        if self._held.get(unit.buffer) is unit:
            return
        if self._gather is None:
            self._gather = self._connect(self.parts)
        self._held[unit.buffer] = unit
        self._waits[unit.buffer] = self._gather.start(unit.number, self._buffers[unit.buffer])

    def _need(self, unit: Unit) -> None:
        self._prefetch(unit)
        wait = self._waits.pop(unit.buffer, None)
        if wait is not None:
            wait()

    def _split(self, unit: Unit) -> None:
        weights = [getattr(module, name).detach() for module, name in unit.places]
        pieces = [piece for weight in weights for piece in _list_pieces(weight)]
        ends, end = [], 0
        for piece in pieces:
            end += piece.numel() * piece.element_size()
            ends.append(end)
            end = _round_up(end, ALIGNMENT)
        num_bytes = _round_up(end, self._size * ALIGNMENT)
        device, share = weights[0].device, num_bytes // self._size
        if unit.buffer not in self._buffers:
            self._buffers[unit.buffer] = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        buffer = self._buffers[unit.buffer]
        assert buffer.numel() == num_bytes, "units of one buffer differ in size"
        unit.part = torch.zeros(share, dtype=torch.uint8, device=device)
        views = []
        for piece, end in zip(pieces, ends, strict=True):
            data = piece.contiguous().reshape(-1).view(torch.uint8)
            start = end - data.numel()
            first, last = max(start, self._rank * share), min(end, (self._rank + 1) * share)
            if first < last:
                unit.part[first - self._rank * share : last - self._rank * share] = data[first - start : last - start]
            # .data has its own version counter: autograd must not see the next gather as an in-place change.
            views.append(buffer[start:end].view(piece.dtype).view(piece.shape).data)
        for (module, name), weight in zip(unit.places, weights, strict=True):
            own, views = views[: len(_list_pieces(weight))], views[len(_list_pieces(weight)) :]
            setattr(module, name, nn.Parameter(_put_together(weight, own), requires_grad=False))


def run_layer(sharded: ShardedBase | None, number: int, layer: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
    """Return layer(hidden, **arguments), gathering the layer first if the base is sharded."""
    if sharded is None:
        return layer(hidden, **arguments)
    return sharded.run_layer(number, layer, hidden, **arguments)


def _is_captured(hidden: Tensor) -> bool:
    return hidden.is_cuda and torch.cuda.is_current_stream_capturing()


def _list_matrices(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (part, name)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if not parameter.requires_grad and parameter.dim() > 1
    ]


def _list_pieces(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors of a weight; a quantized weight has several."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _put_together(weight: Tensor, pieces: list[Tensor]) -> Tensor:
    """Return a weight like `weight`, made of other plain tensors."""
    if not hasattr(weight, "__tensor_flatten__"):
        return pieces[0]
    names, context = weight.__tensor_flatten__()
    by_name = dict(zip(names, pieces, strict=True))
    return type(weight).__tensor_unflatten__(by_name, context, weight.size(), weight.stride())


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def copy_to_cpu(value: Any) -> Any:
    """Copy every tensor of a value or nested dict to the CPU."""
    if isinstance(value, dict):
        return {key: copy_to_cpu(element) for key, element in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
