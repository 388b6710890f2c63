"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from tune2gguf.distributed.world import max_over_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Slurm signals torchrun and its processes, and torchrun passes its own on: within this time it is one request.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequested(Exception):
    """The run was asked to stop and has done so at the same point in every process."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """Within this context a signal is remembered, for the run to stop at a point of its own choice."""

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
        """Raise StopRequested in every process if any of them got a signal; all of them have to ask."""
        signum = max_over_ranks(self.received)
        if signum:
            raise StopRequested(signum)

    def request(self, signum: int) -> None:
        """Ask the run to stop, as if the signal had come."""
        self.received, self._received_at = signum, time.monotonic()

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if not self.received:
            self.request(signum)
            if self._show:
                # print is not safe inside a handler: the signal may have come in the middle of another print.
                os.write(2, b"\nstopping: the run is saved first; a second signal ends it at once\n")
            return
        if _is_launched() and time.monotonic() - self._received_at < SECONDS_OF_ONE_REQUEST:
            return
        os._exit(128 + signum)

    def _watch_launcher(self, launcher: int) -> None:
        """A launcher that was killed leaves its processes behind; they take it for SIGTERM."""
        while not self._is_over.wait(timeout=1.0):
            if os.getppid() != launcher:
                self.request(signal.SIGTERM)
                return


def _is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
