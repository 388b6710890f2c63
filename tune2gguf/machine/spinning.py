"""How long OpenMP's threads spin at a barrier: long while this process has its cores for itself, else briefly.

A thread that sleeps must be woken, which on a virtual machine can cost more than the operator that it waits for: with
brief spinning alone an idle machine was a third slower. A thread that spins holds its core while the thread that it
waits for has none: beside two busy processes PEFT's step took up to nine times as long (results/busy_cpu.txt).

GNU's library reads its setting once, but always spins briefly while it manages more threads than there are CPUs
(gomp_throttled_spin_count_var in gcc's libgomp/config/linux/wait.h). A pool of threads that does nothing makes it so.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from pathlib import Path

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SECONDS_BETWEEN_LOOKS = 0.25
# Seconds a second that the threads together wait for a core. They waited up to 0.12 with two cores to themselves, about
# 0.2 beside two busy processes of lower priority, where long spinning is faster, too, and 0.5 to 1.1 beside one or two
# of equal priority.
CONTENDED = 0.35
LOOKS_BEFORE_LONG_SPINS, MOST_LOOKS = 4, 256
TASKS = Path("/proc/self/task")

_watch: SpinWatch | None = None
_lock = threading.Lock()


def share_cores(num_threads: int) -> None:
    """Watch from now on whether other programs want this process's cores, and let OpenMP's threads spin accordingly.

    Results do not depend on it. It does nothing for one thread, where the user has set one of SETTINGS, and without
    GNU's OpenMP; where the system does not count the waits, threads spin briefly.

    Args:
        num_threads: threads of the computation
    """
    global _watch
    if num_threads == 1 or any(name in os.environ for name in SETTINGS):
        return
    with _lock:
        if _watch is None and find_openmp():
            _watch = SpinWatch(num_threads)
            _watch.start()


def find_openmp() -> set[str]:
    """Return the files of GNU's OpenMP that this process has loaded: packages bring copies of their own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return set()
    return {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line}


def read_waits() -> dict[str, int]:
    """Return how long each thread of this process has been ready and without a core, nanoseconds.

    Raises:
        FileNotFoundError: if the system does not count this
    """
    waits, own = {}, str(threading.get_native_id())
    for task in os.listdir(TASKS):
        try:
            waits[task] = int((TASKS / task / "schedstat").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            if task == own:
                raise
    return waits


class SpinWatch(threading.Thread):
    """Keeps an idle pool of OpenMP's threads while other programs want the cores."""

    def __init__(self, num_threads: int) -> None:
        super().__init__(name="spin watch", daemon=True)
        self._num_threads = num_threads
        self._end_of_pools: threading.Event | None = None
        self._patience = LOOKS_BEFORE_LONG_SPINS
        self._shares: deque[float] = deque(maxlen=2 * MOST_LOOKS)  # since the last change

    @property
    def is_brief(self) -> bool:
        """Whether threads spin briefly."""
        return self._end_of_pools is not None

    def run(self) -> None:
        """Look at the waits for as long as the process lives; begin with brief spinning."""
        self._spin_briefly()
        try:
            before, then = read_waits(), time.monotonic()
            while True:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                waits, now = read_waits(), time.monotonic()
                waited = sum(wait - before.get(task, wait) for task, wait in waits.items())
                self._decide(waited / 1e9 / (now - then))
                before, then = waits, now
        except FileNotFoundError:
            self._spin_briefly()

    def _decide(self, share: float) -> None:
        self._shares.append(share)
        if self.is_brief:
            latest = list(self._shares)[-LOOKS_BEFORE_LONG_SPINS:]
            if len(self._shares) >= self._patience and sum(latest) / len(latest) < CONTENDED:
                self._end_of_pools.set()
                self._end_of_pools = None
                self._shares.clear()
        elif share > CONTENDED:
            # The sooner long spinning has failed, the later it is tried again.
            failed = len(self._shares) < 2 * self._patience
            self._patience = min(2 * self._patience, MOST_LOOKS) if failed else LOOKS_BEFORE_LONG_SPINS
            self._spin_briefly()
            self._shares.clear()

    def _spin_briefly(self) -> None:
        if self.is_brief:
            return
        self._end_of_pools = threading.Event()
        for path in find_openmp():
            started = threading.Event()
            arguments = (ctypes.CDLL(path), started, self._end_of_pools)
            threading.Thread(target=self._keep_pool, args=arguments, name="idle OpenMP pool", daemon=True).start()
            started.wait()

    def _keep_pool(self, library: ctypes.CDLL, started: threading.Event, end: threading.Event) -> None:
        """Start a pool that belongs to this thread, and end it with this thread."""
        # One more than the CPUs, together with the computation's threads.
        num_threads = max(2, library.omp_get_num_procs() - self._num_threads + 2)
        free = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # does nothing with a null pointer
        library.GOMP_parallel(free, None, ctypes.c_uint(num_threads), ctypes.c_uint(0))
        started.set()
        end.wait()
