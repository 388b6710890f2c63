"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends without an error.

    Raises:
        ValueError: if `path` exists
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        # mkdtemp makes the folder private; the result is an ordinary one.
        temporary.chmod(0o777 & ~_get_umask())
        yield temporary
        refuse_existing(path)
        os.rename(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def refuse_existing(path: Path) -> None:
    """Raise ValueError if `path` exists."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already and is not overwritten; remove it or choose another folder")


def _get_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Write a file in one move, so that a reader never sees half of it.

    Raises:
        OSError: with the file's name
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    write_durably(unfinished, text.encode())
    os.replace(unfinished, path)


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
