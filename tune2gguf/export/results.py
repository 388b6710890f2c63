"""An export folder's lock, disk checks and write errors, and the progress bar."""

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
    """Lock a folder against other exports, and delete a killed export's leftovers.

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
        # Keep leftovers: they may be another export's.
        print(
            f"warning: {folder} is on a file system that cannot lock: let no other export write there", file=sys.stderr
        )
    try:
        yield
    finally:
        lock.release()


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ValueError if the folder's disk has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"the files need {num_bytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free")


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a ValueError of one sentence.

    Raises:
        ValueError: instead of OSError
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"writing to {folder} failed: {reason}; no unfinished file was left there") from None


def open_bar(label: str, *, total: int, show: bool, unit: str = "") -> tqdm:
    """Return a progress bar that vanishes when closed; it is drawn only if standard error is a terminal."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=not unit, disable=None if show else True, leave=False)
