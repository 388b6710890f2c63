"""The end of a run that fails: one process says why in one line, and all of them end."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist
from torch import OutOfMemoryError

from tune2gguf.distributed.signals import StopRequested
from tune2gguf.distributed.watch import POLL_SECONDS, Watch
from tune2gguf.distributed.world import (
    AgreedError,
    describe_error,
    is_main_process,
    join_lines,
    join_processes,
    wait_for_all,
)

# What a user can mend, said in one line; anything else is our mistake and shows where it happened.
_ONE_LINE = (ValueError, FloatingPointError, OSError, OutOfMemoryError)
_LOST = re.compile("[Cc]onnection|[Tt]imed out|remote process exited")


@contextmanager
def end_together() -> Iterator[None]:
    """Join the processes, run the block, and turn its failure into one line and an exit code of every process.

    A process that is alone returns when the block succeeds; one of several ends.
    """
    try:
        join_processes()
    except ConnectionError as error:
        sys.exit(f"error: {error}")
    reporter = _Reporter()
    if not is_main_process():
        warnings.simplefilter("ignore")  # the main process has the same, and is the one that talks
    try:
        yield
    except AgreedError as error:
        reporter.leave(f"error: {error}", exit_code=1)
    except StopRequested as stop:
        reporter.leave(str(stop), exit_code=128 + stop.signum)
    except KeyboardInterrupt:
        # While it trains a run takes the signal otherwise; see signals.py.
        reporter.fail("stopped; nothing was lost: the same command with resume=auto goes on", exit_code=130)
    except _ONE_LINE as error:
        reporter.fail(f"error: {reporter.prefix}{describe_error(error)}", exit_code=1)
    except Exception as error:
        # The boundary of the process: alone it shows its traceback as ever, among others only the first to fail does.
        if not dist.is_initialized():
            raise
        reporter.fail(describe_unexpected(error, reporter.prefix), exit_code=1)
    else:
        reporter.end(exit_code=0)
    finally:
        reporter.close()


class _Reporter:
    """Lets the first process that fails speak, and ends this one when it is left waiting for one that is gone."""

    def __init__(self) -> None:
        self.is_alone = not dist.is_initialized()
        self.prefix = "" if self.is_alone else f"process {dist.get_rank()}: "
        if not self.is_alone:
            self._watch = Watch()

    def fail(self, message: str, *, exit_code: int) -> NoReturn:
        """Say why, unless another process was first, and end without waiting for the others."""
        if self.is_alone:
            print(message, file=sys.stderr, flush=True)
            sys.exit(exit_code)
        if self._watch.claim_failure():
            print(message, file=sys.stderr, flush=True)
        if dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(4 * POLL_SECONDS)  # the store ends with this process; the others have to hear of it before
        # Leaving the process group in good order would wait for processes that may be gone.
        _end_now(exit_code)

    def leave(self, message: str, *, exit_code: int) -> NoReturn:
        """End for a reason that every process has; rank 0 says it before any of them is gone."""
        if is_main_process():
            print(message, file=sys.stderr, flush=True)
        wait_for_all()
        self.end(exit_code)
        sys.exit(exit_code)

    def end(self, exit_code: int) -> None:
        """End this process, if it is one of several, now that it needs the others no more."""
        self.close()
        if not self.is_alone:
            _end_now(exit_code)

    def close(self) -> None:
        """Watch the other processes no more; this one is about to end."""
        if not self.is_alone:
            self._watch.close()


def describe_unexpected(error: Exception, prefix: str) -> str:
    """Return the traceback, or one line where processes lost each other or their library says what is wrong."""
    reason = join_lines(error)
    if isinstance(error, RuntimeError) and _LOST.search(reason):
        way_out = "another process of the run is gone; was it killed, or did its machine run out of memory?"
        return f"error: {way_out} ({reason})"
    if isinstance(error, dist.DistError):
        return f"error: {prefix}{reason}"
    return f"{prefix}{''.join(traceback.format_exception(error)).rstrip()}"


def _end_now(exit_code: int) -> NoReturn:
    """End without Python's own way of ending, in which a thread of gloo's that frees its last tensor aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
