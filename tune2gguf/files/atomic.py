"""Atomic writes: files and folders appear whole or not at all.

Content is written beside its place as `.NAME.XXXXXXXX.unfinished`, synced to disk, and renamed. A block that fails
removes it. What a killed process left is removed when the same name is written a day later, or at once by
`clear_leftovers`.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ABANDONED_SECONDS = 86_400  # no living writer pauses for a day


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a free path beside `path`; the file written there replaces `path` when the block ends without an error.

    Raises:
        OSError: with the file's name, which Python omits for a full disk
    """
    try:
        with _reserve(path) as unfinished:
            yield unfinished
            publish(unfinished, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(unfinished)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def write_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path` that is renamed to `path` when the block ends without an error.

    If the block removes the folder, nothing is written.

    Raises:
        ValueError: if `path` exists and is not to be overwritten
    """
    if not overwrite:
        refuse_existing(path)
    with _reserve(path) as unfinished:
        unfinished.mkdir(parents=True)
        yield unfinished
        if not unfinished.exists():
            return
        if not overwrite:
            refuse_existing(path)
        replaced = path.with_name(f".{path.name}.replaced")
        if path.exists():
            # Two folders cannot be swapped in one rename; clear_leftovers undoes the first of the two.
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)
        publish(unfinished, path)
        shutil.rmtree(replaced, ignore_errors=True)


def publish(unfinished: Path, path: Path) -> None:
    """Sync a file or folder to disk, then rename it to `path`."""
    for written in [*unfinished.rglob("*"), unfinished]:
        _sync(written)
    os.replace(unfinished, path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with write_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, record: Any) -> None:
    """Write an indented JSON file whole or not at all."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def refuse_existing(path: Path) -> None:
    """Raise ValueError if `path` exists."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already and is not overwritten; remove it or choose another folder")


def check_name(path: Path) -> None:
    """Raise ValueError if a name in `path` is too long for the file system."""
    whole = path.absolute()
    nearest = next(parent for parent in whole.parents if os.path.lexists(parent))
    unfinished = _name_unfinished(whole, "0" * 8)
    for probe in (
        unfinished,
        nearest / unfinished.name,
        *map(nearest.joinpath, whole.parent.relative_to(nearest).parts),
    ):
        try:
            os.lstat(probe)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ValueError(f"{path}: the name is too long for this file system; shorten {probe.name}") from None


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder without other writers; restore what they had moved aside."""
    for replaced in folder.glob(".*.replaced"):
        original = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if not original.exists():
            os.replace(replaced, original)
        _remove(replaced)
    for unfinished in folder.glob(".*.unfinished"):
        _remove(unfinished)


@contextmanager
def _reserve(path: Path) -> Iterator[Path]:
    """Yield a free path beside `path`, and remove what is left there when the block ends."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
        with suppress(OSError):  # its writer has removed it
            if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                _remove(left)
    unfinished = _name_unfinished(path, secrets.token_hex(4))
    try:
        yield unfinished
    finally:
        _remove(unfinished)


def _name_unfinished(path: Path, mark: str) -> Path:
    return path.with_name(f".{path.name}.{mark}.unfinished")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and syncs only files that are open for writing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
