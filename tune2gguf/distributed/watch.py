"""A watch on the other processes of a run: a failed process reports itself, a lost machine falls silent.

Reports and heartbeats go through torchrun's store. Gloo and NCCL would wait half an hour for a machine without power or
network, because nobody closes its connections.
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
# Polls, not time: a suspended run that continues must not count its suspension as silence.
MAX_SILENT_POLLS = 48  # 24 seconds


class Watch:
    """Threads that end this process when another has failed or is lost, even inside a collective."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Unique per start: torchrun's store survives restarts.
        self._key = f"tune2gguf/failed/{broadcast_from_main(time.time_ns())}"
        self._store = _connect()
        self._is_over = threading.Event()
        self._unanswered_polls = 0
        # Last heartbeat of each process that this one monitors, and the polls since it changed.
        heard = {0: range(1, self.size), 1: range(1)}.get(self.rank, ())
        self._beats = {rank: (b"", 0) for rank in heard}
        self._threads = [
            threading.Thread(target=target, name="watch", daemon=True)
            for target in (self._talk, self._wait_for_answers)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads: one that is inside the store at Python's exit can block the exit."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def claim_failure(self) -> bool:
        """Report this process's failure to all; return whether it is the first."""
        own = str(self.rank)
        try:
            return self._store.compare_set(self._key, "", own).decode() == own
        except RuntimeError:
            return True  # the store is gone with its process: nobody else can report

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
                # The store is on process 0's machine. One line per machine: without the store the processes cannot
                # choose one to print it.
                _end_without(0, speaks=os.environ.get("LOCAL_RANK") == "0")


def _end_without(rank: int, *, speaks: bool) -> None:
    if speaks:
        seconds = MAX_SILENT_POLLS * POLL_SECONDS
        reason = f"process {rank} has been silent for {seconds:.0f} s; check its machine and the network"
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _connect() -> dist.TCPStore:
    """Return a new connection to the store of the rendezvous."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )
