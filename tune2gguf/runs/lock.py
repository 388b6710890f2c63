"""The lock of a run folder: one writer, from before the folder exists until the run ends."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tune2gguf.files.atomic import write_text


@contextmanager
def hold_run_folder(run_dir: str | Path, *, timeout: float = 1.0) -> Iterator[None]:
    """Lock a run folder against other writers; the lock ends with its process, even after a kill.

    Args:
        timeout: seconds to wait for another writer; -1: without limit

    Raises:
        ValueError: if another process holds the lock; it names that process
    """
    folder = Path(run_dir).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    holder = folder.with_name(f".{folder.name}.holder")  # not in the lock file: acquiring it may truncate it
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        writer = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise ValueError(
            f"{run_dir}: {writer} writes to it; wait until it has ended, or give another output_dir"
        ) from None
    except NotImplementedError:
        print(
            f"warning: {folder.parent} is on a file system that cannot lock: let no other run write there",
            file=sys.stderr,
        )
    try:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
