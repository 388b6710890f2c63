"""Processes that meet through a store that others have used before them."""

import os
import time

import pytest
import torch.distributed as dist

from tests.recipes.launch import CONTEXT
from tune2gguf import distributed
from tune2gguf.distributed import agree_on_start, join_processes, max_over_ranks


def join(rank: int, port: int, delay: float, *, is_named: bool) -> None:
    """Be a process of two that torchrun has started; the exit code is 0 if they found each other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    time.sleep(delay)
    if is_named:
        join_processes()
    else:
        dist.init_process_group("gloo")
    os._exit(0 if max_over_ranks(rank) == 1 else 2)


def start_twice(*, is_named: bool, delay: float) -> list[int | None]:
    """Start two processes twice over one store, as torchrun does, rank 0 late; return the last exit codes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for seconds in ((0.0, 0.0), (delay, 0.0)):
        processes = [
            CONTEXT.Process(target=join, args=(rank, store.port, seconds[rank]), kwargs={"is_named": is_named})
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        processes[1].join(30)
        if processes[1].exitcode != 0:
            processes[0].kill()  # it would wait for half an hour
        processes[0].join(30)
    return [process.exitcode for process in processes]


def test_restarted_processes_do_not_call_those_before_them():
    assert start_twice(is_named=True, delay=1.0) == [0, 0]


def test_negative_control_without_a_name_of_the_start_the_address_of_a_process_that_is_gone_is_called():
    assert start_twice(is_named=False, delay=20.0)[1] == 1


def test_missing_process_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "MEETING_TIME", distributed.timedelta(seconds=0.2))
    store = dist.HashStore()
    store.set("tune2gguf/word/1", "asked in a start before this one")
    with pytest.raises(TimeoutError, match="process 1 has not come in 0 s"):
        agree_on_start(store, rank=0, size=3)


def test_processes_that_cannot_meet_say_so_in_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "MEETING_TIME", distributed.timedelta(seconds=1))
    with pytest.raises(ConnectionError, match="process 1: the processes of the run do not find each other: ") as raised:
        join_processes()
    assert "\n" not in str(raised.value)
    assert not dist.is_initialized()
