"""Rendezvous of processes through a store with stale entries, and errors between processes."""

import os
import time
from inspect import signature

import pytest
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from tests.recipes.launch import CONTEXT
from tune2gguf.distributed import world as distributed
from tune2gguf.distributed.failures import describe_unexpected
from tune2gguf.distributed.world import agree_on_start, join_processes, max_over_ranks


def join(rank: int, port: int, delay: float, *, is_named: bool) -> None:
    """Act as one of two processes of torchrun; exit with 0 if they find each other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    time.sleep(delay)
    if is_named:
        join_processes()
    else:
        dist.init_process_group("gloo")
    os._exit(0 if max_over_ranks(rank) == 1 else 2)


def start(store: dist.TCPStore, *ranks: int, is_named: bool, delay: float = 0.0) -> list:
    """Start processes that meet at a store, as torchrun does; rank 0 starts late by the delay."""
    processes = [
        CONTEXT.Process(
            target=join, args=(rank, store.port, delay if rank == 0 else 0.0), kwargs={"is_named": is_named}
        )
        for rank in ranks
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list, *, seconds: float) -> list[int]:
    """Return the exit codes; kill processes that still run after the time limit."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def list_addresses(store: dist.TCPStore) -> set[str]:
    """Return the keys under which gloo stores the processes' addresses."""
    return {key for key in store.list_keys() if "//cpu//" in key}


def test_torch_opens_other_processes_tensors_by_the_arguments_that_are_replaced():
    """A GPU must read other shards at its own addresses; torch would open them on their own device."""
    assert {"storage_device", "event_sync_required"} <= signature(rebuild_cuda_tensor).parameters.keys()


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.slow
def test_restarted_processes_do_not_find_the_addresses_of_those_before_them(store):
    assert end(start(store, 0, 1, is_named=True), seconds=60) == [0, 0]
    before = list_addresses(store)
    assert end(start(store, 0, 1, is_named=True, delay=1.0), seconds=60) == [0, 0]
    assert len(before) == 2 and len(list_addresses(store) - before) == 2


@pytest.mark.slow
def test_negative_control_without_a_name_of_the_start_they_find_the_address_of_a_process_that_is_gone(store):
    assert end(start(store, 0, 1, is_named=False), seconds=60) == [0, 0]
    before = list_addresses(store)
    own, of_gone = sorted(before, reverse=True)
    address = store.get(own)
    processes = start(store, 1, is_named=False)
    wait_until(lambda: store.get(own) != address)
    end(processes, seconds=0)
    assert list_addresses(store) == before and store.get(of_gone) != b""


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_missing_process_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "MEETING_TIME", distributed.timedelta(seconds=0.2))
    store = dist.HashStore()
    store.set("tune2gguf/word/1", "asked in a start before this one")
    with pytest.raises(TimeoutError, match="process 1 has not joined within 0 s"):
        agree_on_start(store, rank=0, size=3)


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n"
FRAMES = "\nException raised from throw at /pytorch/c10/x.cpp:1 (most recent call first):\nframe #0: 0x1 in libc10.so"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            NCCL.format("invalid usage (run with NCCL_DEBUG=WARN for details)")
            + "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
            + "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000",
            "error: process 1: NCCL error in: ",
        ),
        (
            NCCL.format("unhandled cuda error") + "ncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'",
            "error: process 1: NCCL error in: ",
        ),
        (
            NCCL.format("remote process exited or there was a network error") + "ncclRemoteError: A call failed.\n"
            "Last error:\nsocketProgress: peer 10.0.0.2<4000> closed",
            "error: another process of the run is gone; ",
        ),
        (
            "\n[c10/gloo.cc:534]\n Connection closed by peer [10.0.0.2]:4000",
            "error: another process of the run is gone; ",
        ),
    ],
    ids=["usage", "memory", "remote", "gloo"],
)
def test_errors_between_processes_are_one_line_that_keeps_their_cause(text, said):
    """Some errors have the cause in the last line, others in the first."""
    message = describe_unexpected(dist.DistBackendError(text + FRAMES), "process 1: ")
    assert message.startswith(said)
    assert all(line in message for line in text.split("\n"))
    assert "\n" not in message and "frame" not in message


def test_other_errors_keep_their_traceback():
    assert describe_unexpected(RuntimeError("shape '[2]' is invalid"), "process 1: ") == (
        "process 1: RuntimeError: shape '[2]' is invalid"
    )


def test_processes_that_cannot_meet_say_so_in_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "MEETING_TIME", distributed.timedelta(seconds=1))
    with pytest.raises(ConnectionError, match="process 1: the processes of the run do not find each other: ") as raised:
        join_processes()
    assert "\n" not in str(raised.value)
    assert not dist.is_initialized()
