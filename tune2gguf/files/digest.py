"""SHA-256 digests of files, kept in the cache folder while a file is unchanged."""

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
    """Return a file's sha256 in hex, from the cache if path, size, modification time and inode are unchanged."""
    path = path.resolve()
    status = path.stat()
    identity = f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}"
    entry = get_cache_dir() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError, ValueError):  # no entry, or an unreadable one
        digest, check = entry.read_text(encoding="ascii").split()
        if check == _make_check(identity, digest):
            return digest
    digest = digest_file(path)
    with suppress(OSError):  # without a writable cache, the digest is computed each time
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, f"{digest} {_make_check(identity, digest)}\n")
    return digest


def _make_check(identity: str, digest: str) -> str:
    """Return a checksum of a cache entry: a flipped bit would make it the digest of another file."""
    return hashlib.sha256(f"{identity}\n{digest}".encode()).hexdigest()
