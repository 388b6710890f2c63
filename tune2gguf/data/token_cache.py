"""Cache of tokenized files. The next run on the same file starts at once, and tokens are memory-mapped.

Files unused for KEPT_DAYS are deleted when another one is added.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from tune2gguf.data import columns, content, messages, rows, tokenize, tools
from tune2gguf.data.columns import RowReader
from tune2gguf.data.rows import Block, compute_content_digest, is_hub, measure_file, read_blocks
from tune2gguf.data.tokenize import (
    TOKEN_DTYPE,
    BlockTokenizer,
    Part,
    TokenIndex,
    TokenizedFile,
    decide_format,
    join_indices,
    tokenize_file,
)
from tune2gguf.data.workers import count_workers, tokenize_blocks
from tune2gguf.files.atomic import write_folder
from tune2gguf.files.cache import explain_cache_errors, get_cache_dir
from tune2gguf.files.digest import digest_file
from tune2gguf.tokenizer import conversation
from tune2gguf.tokenizer import tokenizer as tokenizers
from tune2gguf.tokenizer import tools as tool_formats

if TYPE_CHECKING:
    from tune2gguf.tokenizer.tokenizer import ChatTokenizer

# Smaller files are tokenized in less than a second and are not cached.
MIN_CACHED_BYTES = 2**20
KEPT_DAYS = 30
LOG_SECONDS = 30
DIGESTS_FILE = "sha256.json"
_CODE = (columns, content, conversation, messages, rows, tokenize, tools, tokenizers, tool_formats)


def tokenize_once(
    name: str,
    tokenizer: ChatTokenizer,
    *,
    reader: RowReader,
    stop_at_problem: bool,
    min_cached_bytes: int = MIN_CACHED_BYTES,
    num_workers: int | None = None,
) -> TokenizedFile:
    """Return tokenize_file's result, from the cache if the same content was tokenized before.

    The cache is `tokens/` in cache.get_cache_dir(), and its tokens are memory-mapped. The key covers the file's
    content, the tokenizer, the chat template, the reader and the tokenizing code. A file with bad rows that stop the
    run is not cached. If several processes need the same file, one tokenizes it and the others wait.

    Args:
        num_workers: worker processes; None: see count_workers

    Raises:
        ValueError: as tokenize_file, if the file changes meanwhile, or if the cache cannot be written
    """
    if not is_hub(name) and Path(name).stat().st_size < min_cached_bytes:
        return tokenize_file(name, tokenizer, reader=reader, stop_at_problem=stop_at_problem)
    before = _identify(name)
    folder = get_cache_dir() / "tokens" / _compute_key(name, tokenizer, reader)
    found = _load(folder, name, reader)
    if found is not None:
        with contextlib.suppress(OSError):  # a read-only cache works, too
            os.utime(folder)
        return found
    with _hold(folder):
        found = _load(folder, name, reader)  # another process was faster
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # a damaged entry
        index = _fill(
            folder, name, tokenizer, before, reader=reader, stop_at_problem=stop_at_problem, num_workers=num_workers
        )
    if index.problems and stop_at_problem:
        return TokenizedFile(name, reader, np.empty(0, TOKEN_DTYPE), np.empty(0, bool), index)
    _delete_old(folder.parent)
    found = _load(folder, name, reader)
    assert found is not None, "it has just been written"
    return found


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes. Raises ValueError if the cache cannot be written."""
    with explain_cache_errors("tokenized files"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(get_cache_dir() / "locks" / f"{folder.name}.lock")
        Path(lock.lock_file).parent.mkdir(exist_ok=True)
        with lock:
            yield


def _delete_old(cache: Path) -> None:
    """Delete files unused for KEPT_DAYS. A run that has one mapped can still read it."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                shutil.rmtree(folder)


def _identify(name: str) -> tuple[int, ...]:
    """Return inode, size and modification time of a file, () for a hub data set."""
    if is_hub(name):
        return ()
    status = Path(name).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _compute_key(name: str, tokenizer: ChatTokenizer, reader: RowReader) -> str:
    code = b"".join(Path(module.__file__).read_bytes() for module in _CODE)
    parts = [
        compute_content_digest(name),
        tokenizer.fingerprint,
        repr(reader),
        hashlib.sha256(code).hexdigest(),
        version("tokenizers"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _fill(
    folder: Path,
    name: str,
    tokenizer: ChatTokenizer,
    before: tuple[int, ...],
    *,
    reader: RowReader,
    stop_at_problem: bool,
    num_workers: int | None,
) -> TokenIndex:
    """Tokenize the file into the folder, which appears when it is complete. A file that stops the run leaves none.

    Args:
        before: what _identify returned before the key was computed
    """
    if num_workers is None:
        num_workers = count_workers(0 if is_hub(name) else Path(name).stat().st_size)
    block_tokenizer = BlockTokenizer(tokenizer, reader, decide_format(name, reader))
    with write_folder(folder) as unfinished:
        with (unfinished / "tokens.bin").open("wb") as tokens, (unfinished / "supervised.bin").open("wb") as supervised:
            indices = []
            parts = tokenize_blocks(
                read_blocks(name), block_tokenizer, num_workers=num_workers, stop_at_problem=stop_at_problem
            )
            with contextlib.closing(parts):
                for part in _show_progress(name, parts):
                    part.tokens.tofile(tokens)
                    part.supervised.tofile(supervised)
                    indices.append(part.index)
        index = join_indices(indices)
        if _identify(name) != before:
            raise ValueError(f"{name}: changed while it was read; do not write data files while a run starts")
        if index.problems and stop_at_problem:
            shutil.rmtree(unfinished)
        else:
            _save_index(unfinished, index)
    return index


def _show_progress(name: str, parts: Iterator[tuple[Block, Part]]) -> Iterator[Part]:
    """Yield the parts and show the progress: share of the file, rows, remaining time."""
    total, unit = measure_file(name)
    is_bytes = unit == "B"
    with tqdm(
        desc=f"tokenizing {Path(name).name}",
        total=total,
        unit=unit if is_bytes else f" {unit}s",
        unit_scale=is_bytes,
        # A log gets a line every LOG_SECONDS, and none for a short file.
        mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
        delay=0 if sys.stderr.isatty() else LOG_SECONDS,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        num_rows = 0
        for block, part in parts:
            num_rows += part.index.num_read
            bar.set_postfix_str(f"{num_rows} rows", refresh=False)
            bar.update(block.position - bar.n)
            yield part


def _save_index(folder: Path, index: TokenIndex) -> None:
    values = vars(index)
    others = {key: value for key, value in values.items() if not isinstance(value, np.ndarray)}
    for key in values.keys() - others.keys():
        np.save(folder / f"{key}.npy", values[key], allow_pickle=False)
    (folder / "index.json").write_text(json.dumps(others), encoding="utf-8")
    digests = {path.name: digest_file(path) for path in folder.iterdir()}
    (folder / DIGESTS_FILE).write_text(json.dumps(digests), encoding="utf-8")


def _load(folder: Path, name: str, reader: RowReader) -> TokenizedFile | None:
    """Return the cached file; None if there is none, or if a byte is not as it was written.

    A crash can lose the end of a file, a disk can flip a bit; either would be trained on.
    """
    try:
        digests = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
        if any(digest_file(folder / name) != digest for name, digest in digests.items()):
            return None
        others = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        others["problems"] = [(line, reason) for line, reason in others["problems"]]
        arrays = {path.stem: _load_array(path) for path in folder.glob("*.npy")}
        index = TokenIndex(**arrays, **others)
        tokens = _map(folder / "tokens.bin", TOKEN_DTYPE)
        supervised = _map(folder / "supervised.bin", np.dtype(bool))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return TokenizedFile(name, reader, tokens, supervised, index)


def _load_array(path: Path) -> np.ndarray:
    """Memory-map an array; read an empty one, which cannot be mapped."""
    found = np.load(path, allow_pickle=False, mmap_mode="r")
    return found if found.size else np.array(found)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map a file read-only; return an empty array for an empty one, which cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
