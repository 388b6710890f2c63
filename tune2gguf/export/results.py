"""One export at a time in a folder, on a disk that has room for it; the bar that it shows."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from tune2gguf.files.atomic import clear_leftovers


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Keep other exports out of a folder, and clear away what a killed one left there.

    Raises:
        ValueError: if another export is writing there
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
        clear_leftovers(folder)
    except Timeout:
        raise ValueError(f"another export is writing to {folder}; wait until it has ended") from None
    except NotImplementedError:
        # What is left there may be another export's, and stays.
        print(
            f"warning: {folder} is on a file system that cannot lock: let no other export write there", file=sys.stderr
        )
    try:
        yield
    finally:
        lock.release()


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ValueError if the disk cannot hold that much more."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"the files need {num_bytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free")


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk and its like into one sentence.

    Raises:
        ValueError: instead of OSError
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"writing to {folder} failed: {reason}; no unfinished file was left there") from None


def open_bar(label: str, *, total: int, show: bool, unit: str = "") -> tqdm:
    """Return a bar that vanishes when it is closed; where standard error is a file, nothing is drawn into it."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=not unit, disable=None if show else True, leave=False)
