"""One digest for "is it the same base"."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tune2gguf.base.checkpoint import find_weight_files
from tune2gguf.files.digest import digest_file_once

RECORD_FILE = "base.json"  # where a base came from; written by what made it
# What decides the model and its tokens, beside the weights.
SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "original/tokenizer.model")


def digest_base(base_dir: str | Path) -> str:
    """Return the sha256, in hex, over names and sha256 of the weight files, config.json and the tokenizer.

    Every byte counts. A file's own digest is remembered in the cache folder under its path, size, modification time and
    inode, so that an unchanged base costs a few `stat` calls; the first time it costs about a second for 1 to 2 GB.

    Raises:
        ValueError: if the weight files cannot be found
    """
    base_dir = Path(base_dir)
    paths = [base_dir / name for name in SMALL_FILES if (base_dir / name).is_file()] + find_weight_files(base_dir)
    digests = {path.relative_to(base_dir).as_posix(): digest_file_once(path) for path in paths}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def check_recorded_digests(base_dir: str | Path) -> None:
    """Compare the files of a base with the sha256 that its base.json has of them; other bases pass.

    Raises:
        ValueError: if a file is missing or not what was downloaded, naming all such files
    """
    base_dir = Path(base_dir)
    path = base_dir / RECORD_FILE
    recorded = json.loads(path.read_text(encoding="utf-8")).get("sha256", {}) if path.is_file() else {}
    damaged = [
        name
        for name, sha256 in recorded.items()
        if not (base_dir / name).is_file() or digest_file_once(base_dir / name) != sha256
    ]
    if damaged:
        raise ValueError(f"{base_dir}: missing or changed since they were written: {', '.join(damaged)}")
