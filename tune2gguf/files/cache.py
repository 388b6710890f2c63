"""Where downloads and digests are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def get_cache_dir() -> Path:
    """Return `$TUNE2GGUF_CACHE`, or `~/.cache/tune2gguf` where it is not set."""
    configured = os.environ.get("TUNE2GGUF_CACHE", "")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "tune2gguf"
