"""The sha256 of a file, kept in the cache folder while the file stays the same."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from tune2gguf.files.atomic import write_text
from tune2gguf.files.cache import get_cache_dir


def digest_file(path: Path) -> str:
    """Return a file's sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_file_once(path: Path) -> str:
    """Return a file's sha256 in hex, from the cache folder where the file has not changed since it was computed."""
    path = path.resolve()
    status = path.stat()
    identity = f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}"
    entry = get_cache_dir() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    if entry.exists():
        return entry.read_text(encoding="ascii")
    digest = digest_file(path)
    with suppress(OSError):  # a cache that cannot be written to costs time only
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, digest)
    return digest
