"""Writes that have reached the disk when they return, and that say which file could not be written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file and return when it is on the disk.

    Raises:
        OSError: with the file's name, which Python leaves out when the disk is full
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def create_unfinished(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` for what will be in it; where that fails, the room that it took is free."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(record: dict) -> bytes:
    """Return the content of an indented JSON file."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
