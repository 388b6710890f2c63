"""Ctrl-C and SIGTERM: the first one saves and stops the run, the second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from tune2gguf.distributed.world import max_over_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Slurm signals torchrun and its processes, and torchrun forwards its own: signals within this time are one request.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequested(Exception):
    """The run has stopped on request, at the same step in every process."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """A context that records stop signals; the run checks for them between steps."""

    def __init__(self, *, show: bool) -> None:
        self.received = 0
        self._show = show
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        self._is_over = threading.Event()

    def __enter__(self) -> StopSignals:
        self._previous = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        if _is_launched():
            threading.Thread(target=self._watch_launcher, args=(os.getppid(),), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def raise_if_requested(self) -> None:
        """Raise StopRequested in every process if any process got a signal; all processes must call it."""
        signum = max_over_ranks(self.received)
        if signum:
            raise StopRequested(signum)

    def request(self, signum: int) -> None:
        """Record a stop request, as if the signal had arrived."""
        self.received, self._received_at = signum, time.monotonic()

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if not self.received:
            self.request(signum)
            if self._show:
                # print is not reentrant: the signal may interrupt another print.
                os.write(2, b"\nstopping after the run is saved; a second signal ends it at once\n")
            return
        if _is_launched() and time.monotonic() - self._received_at < SECONDS_OF_ONE_REQUEST:
            return
        os._exit(128 + signum)

    def _watch_launcher(self, launcher: int) -> None:
        """Treat the launcher's death as SIGTERM: a killed launcher leaves its processes running."""
        while not self._is_over.wait(timeout=1.0):
            if os.getppid() != launcher:
                self.request(signal.SIGTERM)
                return


def _is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
