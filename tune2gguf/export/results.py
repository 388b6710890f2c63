"""What an export writes gets its final name when it is whole; what a killed export left is cleared away."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Keep other exports out of a folder, and clear away what a killed one left there.

    Raises:
        ValueError: if another export is writing there
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot lock; what is left there may then be another export's.
        with suppress(OSError):
            if not _lock(descriptor):
                raise ValueError(f"another export is writing to {folder}; wait until it has ended")
            _clear_leftovers(folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear_leftovers(folder: Path) -> None:
    for path in folder.glob(".*.replaced"):
        original = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if original.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, original)
    for path in folder.glob(".*.unfinished*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ValueError if the disk cannot hold that much more."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"the files need {num_bytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free")


@contextmanager
def replace_at_the_end(paths: list[Path]) -> Iterator[dict[Path, Path]]:
    """Yield a temporary path beside each path; they take the final names together, or vanish when the block fails.

    Raises:
        ValueError: if writing fails
    """
    unfinished = {path: path.with_name(f".{path.name}.unfinished") for path in paths}
    try:
        with explain_write_errors(paths[0].parent):
            yield unfinished
            for path, temporary in unfinished.items():
                os.replace(temporary, path)
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)


def replace_folder(path: Path, new_dir: Path) -> None:
    """Give a finished folder its final name; the one that had it goes."""
    old_dir = path.with_name(f".{path.name}.replaced")
    if path.exists():
        os.rename(path, old_dir)
    os.rename(new_dir, path)
    shutil.rmtree(old_dir, ignore_errors=True)


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
