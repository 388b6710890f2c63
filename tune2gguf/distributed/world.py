"""The world: the processes of a run. A single process is world size 1; its reductions are the identity."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tune2gguf.machine.cpu import prepare_cpu

# Machines load the same programs from disks of different speed before their processes can meet.
MEETING_TIME = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """This process's rank and device among the processes of a run; `local_…` counts those of this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class AgreedError(ValueError):
    """An error that every process raises for the same reason; one of them prints it."""


def join_processes() -> None:
    """Join the process group of torchrun's processes; do nothing without torchrun.

    Raises:
        ConnectionError: if the processes do not find each other
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    rank = os.environ["RANK"]
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING_TIME))
        start = agree_on_start(store, rank=rank, size=size)
        # Messages other than gradients stay on the CPU: no GPU waits for them.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore(start, store), rank=rank, world_size=size)
    except (RuntimeError, TimeoutError) as error:
        reason = f"the processes of the run do not find each other: {join_lines(error)}"
        raise ConnectionError(f"process {rank}: {reason}") from error


def agree_on_start(store: dist.Store, *, rank: int, size: int) -> str:
    """Return a unique name of this start, the same in every process.

    torchrun's store survives restarts, so it may hold stale addresses. Rank 0 therefore draws a name; every other rank
    asks for it under a random word of its own.

    Raises:
        TimeoutError: in rank 0, if a process has not asked within MEETING_TIME
        RuntimeError: in the others, if rank 0 has not answered within MEETING_TIME
    """
    if rank != 0:
        word = uuid.uuid4().hex
        store.set(f"tune2gguf/word/{rank}", word)
        store.wait([f"tune2gguf/start/{word}"], MEETING_TIME)
        start = store.get(f"tune2gguf/start/{word}").decode()
        store.set(f"{start}/heard/{rank}", "")
        return start
    start, waiting = f"tune2gguf/{uuid.uuid4().hex}", set(range(1, size))
    deadline = time.monotonic() + MEETING_TIME.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{start}/heard/{other}"]):
                waiting.remove(other)
            elif store.check([f"tune2gguf/word/{other}"]):
                store.set(f"tune2gguf/start/{store.get(f'tune2gguf/word/{other}').decode()}", start)
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {min(waiting)} has not joined within {MEETING_TIME.total_seconds():.0f} s")
        time.sleep(0.01)
    return start


def is_main_process() -> bool:
    """Whether this process is rank 0, the only one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def start_world(device: str) -> World:
    """Join the processes and set up this one's device; on a CPU also its share of the cores.

    Args:
        device: cpu or cuda; with several GPUs each process uses that of its local rank
    """
    join_processes()
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch_device = torch.device(device)
    if torch_device.type == "cuda" and torch_device.index is None:
        torch_device = torch.device("cuda", local_rank)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch_device.type == "cpu":
        prepare_cpu(local_size)
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=torch_device)


def stop_world() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum of a tensor over all processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def max_over_ranks(number: int) -> int:
    """Return the maximum of a number over all processes."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather_counts(counts: list[int]) -> Tensor:
    """All-gather the counts: return int64 [processes, counts] on every process."""
    own = torch.tensor([counts])
    if not dist.is_initialized():
        return own
    of_all = own.new_empty(dist.get_world_size(), len(counts))
    dist.all_gather_into_tensor(of_all, own)
    return of_all


def gather_over_ranks(record: Any) -> list[Any]:
    """All-gather a record: return the list of all, by process rank, on every process."""
    if not dist.is_initialized():
        return [record]
    records: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(records, record)
    return records


def broadcast_from_main(record: Any) -> Any:
    """Return rank 0's record on every process."""
    if not dist.is_initialized():
        return record
    records = [record]
    dist.broadcast_object_list(records, src=0)
    return records[0]


def wait_for_all() -> None:
    """Wait until every process has called this."""
    max_over_ranks(0)


@contextmanager
def agree_on_errors() -> Iterator[None]:
    """Leave the block together: if one process raises, all raise, and none waits for another.

    Raises:
        AgreedError: if any process raised a ValueError or an OSError; it has the message of the lowest such rank
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    messages = gather_over_ranks(None if own is None else describe_error(own))
    found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if found:
        rank, message = found[0]
        is_shared = len(found) == len(messages)
        raise AgreedError(message if is_shared or rank == 0 else f"process {rank}: {message}") from own


def describe_error(error: Exception) -> str:
    """Return an error's message; for an OSError, `FILE: REASON`."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def join_lines(error: Exception) -> str:
    """Return the message of a library's error as one line, without C++ frames; NCCL's last line has the cause."""
    message = str(error).partition("\nException raised from")[0].partition("\nframe #")[0]
    return " ".join(message.split()) or type(error).__name__
