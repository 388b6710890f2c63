"""How the parts of a base that is split over processes come together: read from the other GPUs, or in a collective."""

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
    """Return how units are gathered: by copies from GPU to GPU where all processes are on one machine.

    Args:
        parts: this process's bytes of each unit, uint8
    """
    opened = _open_parts_of_others(parts, world) if world.device.type == "cuda" else None
    return Collective(parts) if opened is None else PeerCopies(opened, world)


class Collective:
    """Gathers together with the other processes, on a GPU beside what it computes, behind what it has computed.

    Graphs could hold NCCL's kernels, too, but all processes would have to capture and replay the same ones.
    """

    can_be_captured = False

    def __init__(self, parts: list[Tensor]) -> None:
        self._parts = parts

    def start(self, number: int, buffer: Tensor) -> Callable[[], None]:
        """Begin to gather a unit; every process has to."""
        return dist.all_gather_into_tensor(buffer, self._parts[number], async_op=True).wait


class PeerCopies:
    """Reads the parts in the other GPUs' memory by this one's copy engines.

    They take no multiprocessor from the products meanwhile, as NCCL's kernels do, and as parts never change, no
    process waits for another.
    """

    can_be_captured = True

    def __init__(self, parts: list[list[Tensor]], world: World) -> None:
        """Take the parts of all processes, by process and unit."""
        self._parts, self._stream = parts, torch.cuda.Stream(world.device)
        # Each begins with its own part and goes round, so that no two read from the same GPU.
        self._order = [(world.rank + step) % world.size for step in range(world.size)]

    def start(self, number: int, buffer: Tensor) -> Callable[[], None]:
        """Begin to gather a unit, behind what was computed so far."""
        places = buffer.view(len(self._parts), -1)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for rank in self._order:
                places[rank].copy_(self._parts[rank][number])
            done = torch.cuda.Event()
            done.record()
        return lambda: torch.cuda.current_stream().wait_event(done)


def _open_parts_of_others(parts: list[Tensor], world: World) -> list[list[Tensor]] | None:
    """Return every process's parts as tensors that this GPU reads from the others; None where that cannot be.

    It cannot across machines, and not between GPUs without a link. Every process has to ask.
    """
    devices = gather_over_ranks(world.device.index)
    can_read = world.local_size == world.size and len(set(devices)) == world.size
    can_read = can_read and all(
        torch.cuda.can_device_access_peer(world.device.index, other) for other in devices if other != world.device.index
    )
    if not all(gather_over_ranks(can_read)):
        return None
    torch.cuda.synchronize(world.device)  # what others are about to read is there
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
            print(f"note: the GPUs cannot read each other's memory ({obstacle}); the base is gathered by NCCL, slower")
        return None


@contextmanager
def _agree_on_obstacles() -> Iterator[None]:
    """Leave the block together: what CUDA refuses to one process stands in the way of all."""
    with agree_on_errors():
        try:
            yield
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from error


def _open(handle: tuple, device: torch.device) -> Tensor:
    """Return another process's tensor at an address that this process's GPU reads.

    Opened on its own device, as torch would do, it would cost a context of some hundred MB there, and copies would be
    made by the other GPU, in the order of that one's stream. All has been waited for: there is no event to wait for.
    """
    arguments = signature(rebuild_cuda_tensor).bind(*handle).arguments
    return rebuild_cuda_tensor(**arguments | {"storage_device": device.index, "event_sync_required": False})
