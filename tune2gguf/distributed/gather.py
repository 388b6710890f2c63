"""How the parts of a base that is split over processes come together: read from the other GPUs, or in a collective."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from tune2gguf.distributed.world import World, gather_over_ranks, wait_for_all
from tune2gguf.model.sharding import StartGather


def connect(parts: list[Tensor], *, world: World) -> StartGather:
    """Return how units are gathered: by copies from GPU to GPU where all processes are on one machine.

    Args:
        parts: this process's bytes of each unit, uint8
    """
    opened = _open_parts_of_others(parts, world) if world.device.type == "cuda" else None
    return _gather_together(parts) if opened is None else _read_from_others(opened, world)


def _gather_together(parts: list[Tensor]) -> StartGather:
    """Return a gather by a collective, which waits for what was computed before, and which others compute beside."""

    def start(number: int, buffer: Tensor) -> Callable[[], None]:
        return dist.all_gather_into_tensor(buffer, parts[number], async_op=True).wait

    return start


def _read_from_others(parts: list[list[Tensor]], world: World) -> StartGather:
    """Return a gather by the GPU's copy engines.

    They take no multiprocessor from the products meanwhile, as NCCL's kernels do, and as parts never change, no
    process waits for another.

    Args:
        parts: of each process, the bytes of each unit
    """
    stream = torch.cuda.Stream(world.device)
    # Each begins with its own part and goes round, so that no two read from the same GPU.
    order = [(world.rank + step) % world.size for step in range(world.size)]

    def start(number: int, buffer: Tensor) -> Callable[[], None]:
        places = buffer.view(world.size, -1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for rank in order:
                places[rank].copy_(parts[rank][number])
            done = torch.cuda.Event()
            done.record()
        return lambda: torch.cuda.current_stream().wait_event(done)

    return start


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
    handles = gather_over_ranks([reduce_tensor(part)[1] for part in parts])
    torch.cuda.synchronize(world.device)  # what others are about to read is there
    wait_for_all()
    opened, problem = [], None
    try:
        for rank, theirs in enumerate(handles):
            opened.append(parts if rank == world.rank else [_open(handle, world.device) for handle in theirs])
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    problems = [found for found in gather_over_ranks(problem) if found is not None]
    if problems and world.is_main:
        print(f"note: the GPUs cannot read each other's memory ({problems[0]}); the base is gathered by NCCL, slower")
    return None if problems else opened


def _open(handle: tuple, device: torch.device) -> Tensor:
    """Return another process's tensor at an address that this process's GPU reads.

    Opened on its own device, as torch would do, it would cost a context of some hundred MB there, and copies would be
    made by the other GPU, in the order of that one's stream. All has been waited for: there is no event to wait for.
    """
    names = rebuild_cuda_tensor.__code__.co_varnames[: rebuild_cuda_tensor.__code__.co_argcount]
    arguments = dict(zip(names, handle, strict=True))
    return rebuild_cuda_tensor(**arguments | {"storage_device": device.index, "event_sync_required": False})
