"""Gathers of a sharded base: copies from GPU to GPU, or all-gather collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from tune2gguf.distributed.world import AgreedError, World, agree_on_errors, gather_over_ranks
from tune2gguf.model.sharding import Gather


def connect(parts: list[Tensor], *, world: World) -> Gather:
    """Return the way to gather units: peer copies if all GPUs can read each other, else a collective.

    Args:
        parts: this rank's shard of each unit, uint8
    """
    opened = _open_parts_of_others(parts, world) if world.device.type == "cuda" else None
    return Collective(parts) if opened is None else PeerCopies(opened, world)


class Collective:
    """All-gather by all processes; on a GPU it follows earlier computation and overlaps later computation.

    CUDA graphs could hold NCCL's kernels, but all processes would have to capture and replay the same graphs.
    """

    can_be_captured = False

    def __init__(self, parts: list[Tensor]) -> None:
        self._parts = parts

    def start(self, number: int, buffer: Tensor) -> Callable[[], None]:
        """Start to gather a unit; every process must call it."""
        return dist.all_gather_into_tensor(buffer, self._parts[number], async_op=True).wait


class PeerCopies:
    """Copies of shards from the other GPUs' memory, by this GPU's copy engines.

    Unlike NCCL's kernels they occupy no multiprocessor. Shards never change, so no process waits for another.
    """

    can_be_captured = True

    def __init__(self, parts: list[list[Tensor]], world: World) -> None:
        """Prepare the copies.

        Args:
            parts: shards of all processes, by process rank and unit
        """
        self._parts, self._stream = parts, torch.cuda.Stream(world.device)
        # Each rank starts with its own shard: no two read from the same GPU at a time.
        self._order = [(world.rank + step) % world.size for step in range(world.size)]

    def start(self, number: int, buffer: Tensor) -> Callable[[], None]:
        """Start to gather a unit, after all computation so far."""
        places = buffer.view(len(self._parts), -1)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for rank in self._order:
                places[rank].copy_(self._parts[rank][number])
            done = torch.cuda.Event()
            done.record()
        return lambda: torch.cuda.current_stream().wait_event(done)


def _open_parts_of_others(parts: list[Tensor], world: World) -> list[list[Tensor]] | None:
    """Return every process's shards as tensors that this GPU can read; None across machines or without a link.

    Every process must call it.
    """
    devices = gather_over_ranks(world.device.index)
    can_read = world.local_size == world.size and len(set(devices)) == world.size
    can_read = can_read and all(
        torch.cuda.can_device_access_peer(world.device.index, other) for other in devices if other != world.device.index
    )
    if not all(gather_over_ranks(can_read)):
        return None
    torch.cuda.synchronize(world.device)  # the others are about to read this rank's shards
    try:
        with _agree_on_obstacles():
            own = [reduce_tensor(part)[1] for part in parts]
        handles = gather_over_ranks(own)
        with _agree_on_obstacles():
            return [
                parts if rank == world.rank else [_open(handle, world.device) for handle in theirs]
                for rank, theirs in enumerate(handles)
            ]
    except AgreedError as obstacle:
        if world.is_main:
            print(f"note: the GPUs cannot read each other's memory ({obstacle}); NCCL gathers the base, more slowly")
        return None


@contextmanager
def _agree_on_obstacles() -> Iterator[None]:
    """Leave the block together: a CUDA error in one process is an error in all."""
    with agree_on_errors():
        try:
            yield
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from error


def _open(handle: tuple, device: torch.device) -> Tensor:
    """Open another process's tensor at an address of this process's GPU.

    torch would open it on the other GPU: that costs a CUDA context of some hundred MB there, and the other GPU would
    copy, in its stream's order. No event is needed: all ranks have synchronized.
    """
    arguments = signature(rebuild_cuda_tensor).bind(*handle).arguments
    return rebuild_cuda_tensor(**arguments | {"storage_device": device.index, "event_sync_required": False})
