"""Folders that appear whole or not at all."""

from __future__ import annotations

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
