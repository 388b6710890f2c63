"""The frozen base split over processes: each keeps a part of every layer, and a layer is whole only while it computes.

Frozen weights never change, so that nothing has to be reduced, and a part that was gathered stays true. All layers
with an even number are gathered into one buffer, those with an odd number into another: while a layer computes, the
one after it arrives, in forward as in backward. Token embedding and head share a third buffer. A weight is a view of
its buffer; it has the same address whenever its layer computes, as autograd and compiled code ask for.

FSDP2 would copy each weight into a buffer before it is sent and out of one after it has arrived, gather again what has
not changed, and reduce the adapters' gradients layer by layer, pass by pass. Adapters are small: every process has them
whole, as where the base is replicated.
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

# A weight begins at a multiple of so many bytes: kernels read 16 at a time.
ALIGNMENT = 256


class Gather(Protocol):
    """How the parts of a unit come together."""

    can_be_captured: bool  # in a CUDA graph

    def start(self, number: int, buffer: Tensor) -> Callable[[], None]:
        """Begin to fill a unit's buffer; what is returned lets the computation wait for the end."""


@dataclass(eq=False)
class Unit:
    """Weights that are gathered together: the matrices of a layer, the token embedding, or the head.

    Attributes:
        places: module and parameter's name of each
        buffer: number of the buffer that it is gathered into
        part: this process's bytes of it, uint8 [bytes / processes]; None until all of its weights are there
    """

    number: int
    places: list[tuple[nn.Module, str]]
    buffer: int
    part: Tensor | None = None

    def is_filled(self) -> bool:
        """Whether all weights are there, and whole."""
        return self.part is None and not any(getattr(module, name).is_meta for module, name in self.places)


class ShardedBase:
    """A decoder's matrices, split by their bytes; `run_layer` and `hold` make them whole for the time of a computation.

    Norms stay whole. Every process has to run the same layers in the same order.
    """

    EVEN, ODD, EDGE = range(3)  # buffers

    def __init__(
        self, decoder: TransformerDecoder, *, rank: int, size: int, connect: Callable[[list[Tensor]], Gather]
    ) -> None:
        """Take a decoder whose weights are not there yet.

        Args:
            connect: called once, with the parts of all units; returns how they are gathered
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
        self._waits: dict[int, Callable[[], None]] = {}  # for what is on its way into a buffer
        self._gather: Gather | None = None

    @property
    def parts(self) -> list[Tensor]:
        """This process's bytes of every unit, by the unit's number."""
        return [unit.part for unit in self._units]

    @torch.no_grad()
    def split_filled(self) -> None:
        """Keep a part only of each unit whose weights have all come."""
        for unit in self._units:
            if unit.is_filled():
                self._split(unit)

    def run_layer(self, number: int, layer: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
        """Return layer(hidden, **arguments), with whole weights now and in backward."""
        self.go_forward(number)
        # Backward begins with the last two layers, which are here then; another forward pass does not.
        if number == len(self._layers) - 1 and not torch.is_grad_enabled():
            self._prefetch_layer(0, beside=number)
        out = layer(hidden, **arguments)
        if out.requires_grad:
            out.register_hook(lambda _: self.go_back(number))
        return out

    @contextmanager
    def hold(self, unit: Unit, *, then: Unit) -> Iterator[None]:
        """Have a unit whole in this context; the one that the same buffer is needed for next follows it."""
        self._need(unit)
        yield
        self._prefetch(then)

    def go_forward(self, number: int) -> None:
        """Make a layer whole that computes next, after those before it."""
        self._need(self._layers[number])
        self._prefetch_layer(number + 1, beside=number)

    def go_back(self, number: int) -> None:
        """Make a layer whole whose output has its gradient: those after it have given theirs back."""
        self._need(self._layers[number])
        self._prefetch_layer(number - 1, beside=number)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph may hold the gathers; not before the first of them."""
        return self._gather is not None and self._gather.can_be_captured

    def begin_graph(self, *, backward: bool) -> None:
        """Have the two layers whole that a graph of all layers begins with: the first, or in backward the last."""
        for unit in self._layers[-2:] if backward else self._layers[:2]:
            self._need(unit)

    def end_graph(self, *, backward: bool) -> None:
        """Note which two layers a graph of all layers has left in the buffers."""
        for unit in self._layers[:2] if backward else self._layers[-2:]:
            self._held[unit.buffer] = unit

    def _prefetch_layer(self, number: int, *, beside: int) -> None:
        if 0 <= number < len(self._layers) and number % 2 != beside % 2:
            self._prefetch(self._layers[number])

    def _prefetch(self, unit: Unit) -> None:
        """Begin to gather a unit. What has been computed with its buffer so far comes first."""
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
        assert buffer.numel() == num_bytes, "units of a buffer are alike"
        unit.part = torch.zeros(share, dtype=torch.uint8, device=device)
        views = []
        for piece, end in zip(pieces, ends, strict=True):
            data = piece.contiguous().reshape(-1).view(torch.uint8)
            start = end - data.numel()
            first, last = max(start, self._rank * share), min(end, (self._rank + 1) * share)
            if first < last:
                unit.part[first - self._rank * share : last - self._rank * share] = data[first - start : last - start]
            # .data has a version counter of its own: autograd must not take the next layer's arrival for a change.
            views.append(buffer[start:end].view(piece.dtype).view(piece.shape).data)
        for (module, name), weight in zip(unit.places, weights, strict=True):
            own, views = views[: len(_list_pieces(weight))], views[len(_list_pieces(weight)) :]
            setattr(module, name, nn.Parameter(_put_together(weight, own), requires_grad=False))


def run_layer(sharded: ShardedBase | None, number: int, layer: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
    """Return layer(hidden, **arguments) of a base that may be sharded."""
    if sharded is None:
        return layer(hidden, **arguments)
    return sharded.run_layer(number, layer, hidden, **arguments)


def _list_matrices(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (part, name)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if not parameter.requires_grad and parameter.dim() > 1
    ]


def _list_pieces(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors that a weight consists of; a quantized one has several."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _put_together(weight: Tensor, pieces: list[Tensor]) -> Tensor:
    """Return a weight like another one with its plain tensors replaced."""
    if not hasattr(weight, "__tensor_flatten__"):
        return pieces[0]
    names, context = weight.__tensor_flatten__()
    by_name = dict(zip(names, pieces, strict=True))
    return type(weight).__tensor_unflatten__(by_name, context, weight.size(), weight.stride())


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def copy_to_cpu(value: Any) -> Any:
    """Return a nested structure with every tensor copied to the CPU."""
    if isinstance(value, dict):
        return {key: copy_to_cpu(element) for key, element in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
