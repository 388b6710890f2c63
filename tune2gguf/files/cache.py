"""The cache folder, which keeps downloads, digests and tokenized files between runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def get_cache_dir() -> Path:
    """Return `$TUNE2GGUF_CACHE`, or `~/.cache/tune2gguf` if it is not set."""
    configured = os.environ.get("TUNE2GGUF_CACHE", "")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "tune2gguf"


@contextmanager
def explain_cache_errors(what: str) -> Iterator[None]:
    """Turn an error of writing `what` to the cache folder into one line.

    Raises:
        ValueError: instead of an OSError about a file in the cache folder or a full disk
    """
    try:
        yield
    except OSError as error:
        is_there = str(error.filename or "").startswith(str(get_cache_dir()))
        if not is_there and error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise
        raise ValueError(
            f"{get_cache_dir()}: {what} cannot be kept there ({error.strerror}); "
            "name another folder in the environment variable TUNE2GGUF_CACHE"
        ) from None
