"""Writes that have reached the disk when they return, and that say which file could not be written."""

from __future__ import annotations

import json
import os
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
