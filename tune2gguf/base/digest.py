"""The digest of a base: equal digests mean the same base."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tune2gguf.base.checkpoint import find_weight_files
from tune2gguf.files.digest import digest_file_once
from tune2gguf.tokenizer.tokenizer import TOKENIZER_FILES

RECORD_FILE = "base.json"  # a base's source; written by the download or conversion
# Files that determine model and tokens, besides the weights.
SMALL_FILES = ("config.json", *TOKENIZER_FILES)


def digest_base(base_dir: str | Path) -> str:
    """Return the sha256, in hex, over names and sha256 of weight files, config.json and tokenizer.

    The cache folder keeps each file's digest under its path, size, modification time and inode: an unchanged base
    costs a few `stat` calls. The first time, all files are read in parallel, each at 1 to 2 GB a second.

    Raises:
        ValueError: if the weight files cannot be found
    """
    base_dir = Path(base_dir)
    paths = [base_dir / name for name in SMALL_FILES if (base_dir / name).is_file()] + find_weight_files(base_dir)
    names = [path.relative_to(base_dir).as_posix() for path in paths]
    with ThreadPoolExecutor() as threads:
        digests = dict(zip(names, threads.map(digest_file_once, paths), strict=True))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
