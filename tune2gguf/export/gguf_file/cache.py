"""Quantized slabs of base tensors that no adapter touches, kept between exports.

A key names everything that decides the bytes: the base file's content, the place in it, the order of rows, the type,
and the kernels. An entry carries its own digest, so that a damaged one is quantized again instead of used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import threading
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tune2gguf.base.layout import TensorSpec
from tune2gguf.base.safetensors_file import StoredTensor
from tune2gguf.files.digest import digest_file, digest_file_once

# Raised when the way from a base file's bytes to quantized ones changes.
FORMAT = 1
DEFAULT_MAX_BYTES = 10_000_000_000
DIGEST_BYTES = 32
# The others are quantized about as fast as an entry is read.
CACHED_TYPES = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})


@dataclass
class QuantizedCache:
    """A folder of entries. When it cannot be written to, it says so once and the export goes on without it."""

    folder: Path
    max_bytes: int = DEFAULT_MAX_BYTES
    is_writable: bool = field(default=True, init=False)
    file_digests: dict[Path, str] = field(default_factory=dict, init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def make_key(self, stored: StoredTensor, spec: TensorSpec, begin: int, end: int, ggml_type: str) -> str:
        """Return the key of rows [begin, end) of a base tensor in this type."""
        parts = (
            FORMAT,
            self._digest_file(stored.path),
            (stored.name, stored.dtype, stored.shape, stored.begin),
            (spec.num_heads, begin, end, ggml_type),
            # Other processors' kernels may round in another way.
            (version("xllamacpp"), platform.machine(), sys.byteorder),
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _digest_file(self, path: Path) -> str:
        # The first thread that asks reads the file; the others wait instead of reading it, too.
        with self.lock:
            if path not in self.file_digests:
                try:
                    self.file_digests[path] = digest_file_once(path)
                except OSError:  # it remembers the digest in the same cache folder
                    self.file_digests[path] = digest_file(path)
            return self.file_digests[path]

    def read(self, key: str) -> np.ndarray | None:
        """Return an entry's bytes, or None where there is none or it is damaged."""
        path = self._get_path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # what is used stays
        except OSError:
            return None
        payload = memoryview(content)[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != content[:DIGEST_BYTES]:
            return None
        return np.frombuffer(payload, np.uint8)

    def write(self, key: str, quantized: np.ndarray) -> None:
        """Keep an entry, in one move."""
        if not self.is_writable:
            return
        path, payload = self._get_path(key), memoryview(quantized).cast("B")
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(hashlib.sha256(payload).digest())
                file.write(payload)
            os.replace(unfinished, path)
        except OSError as error:
            self.is_writable = False
            with contextlib.suppress(OSError):
                unfinished.unlink()
            print(f"quantized tensors are not kept in {self.folder}: {error.strerror or error}", file=sys.stderr)

    def _get_path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def remove_oldest(self) -> None:
        """Remove the entries that were used least recently, until the rest fits into `max_bytes`."""
        entries = []
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # removed by another export meanwhile
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size
