"""Failures of a run: one process prints the reason in one line, and all processes exit."""

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

# Errors that a user can fix get one line; any other is a bug and gets its traceback.
_ONE_LINE = (ValueError, FloatingPointError, OSError, OutOfMemoryError)
_LOST = re.compile("[Cc]onnection|[Tt]imed out|remote process exited")


@contextmanager
def end_together() -> Iterator[None]:
    """Join the processes and run the block; a failure becomes one line and an exit code in every process.

    After success a single process returns; one of several exits.
    """
    try:
        join_processes()
    except ConnectionError as error:
        sys.exit(f"error: {error}")
    reporter = _Reporter()
    if not is_main_process():
        warnings.simplefilter("ignore")  # the main process prints the same warnings
    try:
        yield
    except AgreedError as error:
        reporter.leave(f"error: {error}", exit_code=1)
    except StopRequested as stop:
        reporter.leave(str(stop), exit_code=128 + stop.signum)
    except KeyboardInterrupt:
        # During training signals.py handles Ctrl-C.
        reporter.fail("stopped; nothing was lost: repeat the command with resume=auto to continue", exit_code=130)
    except _ONE_LINE as error:
        reporter.fail(f"error: {reporter.prefix}{describe_error(error)}", exit_code=1)
    except Exception as error:
        # A single process shows Python's traceback; of several only the first to fail prints one.
        if not dist.is_initialized():
            raise
        reporter.fail(describe_unexpected(error, reporter.prefix), exit_code=1)
    else:
        reporter.end(exit_code=0)
    finally:
        reporter.close()


class _Reporter:
    """Print the first process's failure, and end this process if another one fails or is lost."""

    def __init__(self) -> None:
        self.is_alone = not dist.is_initialized()
        self.prefix = "" if self.is_alone else f"process {dist.get_rank()}: "
        if not self.is_alone:
            self._watch = Watch()

    def fail(self, message: str, *, exit_code: int) -> NoReturn:
        """Print the message, unless another process failed first, and exit without waiting."""
        if self.is_alone:
            print(message, file=sys.stderr, flush=True)
            sys.exit(exit_code)
        if self._watch.claim_failure():
            print(message, file=sys.stderr, flush=True)
        if dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(4 * POLL_SECONDS)  # the store ends with this process; the others must poll it before
        # A clean shutdown of the process group would wait for processes that may be gone.
        _end_now(exit_code)

    def leave(self, message: str, *, exit_code: int) -> NoReturn:
        """Exit for a reason that all processes share; rank 0 prints it before any process exits."""
        if is_main_process():
            print(message, file=sys.stderr, flush=True)
        wait_for_all()
        self.end(exit_code)
        sys.exit(exit_code)

    def end(self, exit_code: int) -> None:
        """Exit if this process is one of several."""
        self.close()
        if not self.is_alone:
            _end_now(exit_code)

    def close(self) -> None:
        """Stop watching the other processes, before this one exits."""
        if not self.is_alone:
            self._watch.close()


def describe_unexpected(error: Exception, prefix: str) -> str:
    """Return the traceback of an unexpected error; one line for a lost connection or a torch.distributed error."""
    reason = join_lines(error)
    if isinstance(error, RuntimeError) and _LOST.search(reason):
        lost = "another process of the run is gone; check if it was killed or its machine ran out of memory"
        return f"error: {lost} ({reason})"
    if isinstance(error, dist.DistError):
        return f"error: {prefix}{reason}"
    return f"{prefix}{''.join(traceback.format_exception(error)).rstrip()}"


def _end_now(exit_code: int) -> NoReturn:
    """Exit without Python's shutdown, in which a gloo thread that frees its last tensor aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
