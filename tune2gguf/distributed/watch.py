"""Keeps an eye on the other processes of a run: one that fails says so, one whose machine is lost falls silent.

Both go through the store where the processes met. Gloo and NCCL would wait for half an hour for a machine that has
lost its power or its network, since nobody closes the connection then.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from tune2gguf.distributed.world import broadcast_from_main

POLL_SECONDS = 0.5
# Counted, not timed: to a run that was suspended and goes on, nobody has been silent.
MAX_SILENT_POLLS = 48  # 24 seconds


class Watch:
    """Ends this process when another has failed or is lost; in a collective it would not hear of it."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Of this start only: torchrun keeps its store over restarts.
        self._key = f"tune2gguf/failed/{broadcast_from_main(time.time_ns())}"
        self._store = _connect()
        self._is_over = threading.Event()
        self._unanswered_polls = 0
        # The last beat of each process that this one listens to, and polls since it changed.
        heard = {0: range(1, self.size), 1: range(1)}.get(self.rank, ())
        self._beats = {rank: (b"", 0) for rank in heard}
        self._threads = [
            threading.Thread(target=target, name="watch", daemon=True)
            for target in (self._talk, self._wait_for_answers)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Look no more. A thread that Python finds inside the store when it ends can keep it from ending."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def claim_failure(self) -> bool:
        """Tell all processes that this one has failed; return whether it is the first."""
        own = str(self.rank)
        try:
            return self._store.compare_set(self._key, "", own).decode() == own
        except RuntimeError:
            return True  # the store is gone with its process, and nobody else can be asked

    def _talk(self) -> None:
        store, number = _connect(), 0
        try:
            while not self._is_over.wait(POLL_SECONDS):
                if store.check([self._key]) and store.get(self._key).decode() != str(self.rank):
                    os._exit(1)
                store.set(f"{self._key}/beat/{self.rank}", str(number))
                self._listen(store)
                number, self._unanswered_polls = number + 1, 0
        except RuntimeError:
            self._is_over.set()  # without the store torchrun ends the process

    def _listen(self, store: dist.Store) -> None:
        for rank, (before, silent_polls) in self._beats.items():
            key = f"{self._key}/beat/{rank}"
            beat = store.get(key) if store.check([key]) else b""
            self._beats[rank] = (beat, 0 if beat != before else silent_polls + 1)
            if silent_polls > MAX_SILENT_POLLS:
                _end_without(rank, speaks=self.claim_failure())

    def _wait_for_answers(self) -> None:
        while not self._is_over.wait(POLL_SECONDS):
            self._unanswered_polls += 1
            if self._unanswered_polls > MAX_SILENT_POLLS:
                # The store is on the machine of process 0. One line a machine: who is cut off cannot ask who speaks.
                _end_without(0, speaks=os.environ.get("LOCAL_RANK") == "0")


def _end_without(rank: int, *, speaks: bool) -> None:
    if speaks:
        seconds = MAX_SILENT_POLLS * POLL_SECONDS
        reason = f"process {rank} has not been heard of for {seconds:.0f} s; its machine or the network to it is lost"
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _connect() -> dist.TCPStore:
    """Return a connection of its own to the store through which the processes found each other."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )
