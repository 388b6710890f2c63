"""The files of a run's folder: their names, the version of their form, and JSON in and out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
PLAN_FILE = "plan.json"
VALIDATION_FILE = "heldout.jsonl"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
VERDICT_FILE = "verdict.json"
PROOF_FILE = "proof.json"  # in the export folder
LEDGER_FILE = "ledger.jsonl"  # beside the run folders

# Stands in environment.json. 1 had none; 2 has the components' new names and `system_prompt` in data.json.
FOLDER_VERSION = 2


def is_run_folder(path: Path) -> bool:
    """Whether a folder is that of a run: it has a config.yaml from its first moment on."""
    return (path / CONFIG_FILE).is_file()


def read_json(path: Path, *, required: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing, is not a JSON object, or lacks one of the keys; it names the file
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    return content


def split_lines(path: Path) -> list[str]:
    """Return the lines of a JSONL file: they end with \\n only, while JSON text may hold every other line separator."""
    return path.read_bytes().decode("utf-8", errors="replace").split("\n")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, also while it is written: a last line without its end is left for later.

    Raises:
        ValueError: if the file is missing, or another line than the last is not JSON
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found; is {path.parent} the folder of a run?")
    lines = split_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            # Whole lines end with a line break, so that what is after the last one is still being written.
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


class JsonLinesFile:
    """metrics.jsonl or samples.jsonl: one JSON object a line, on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> int:
        """Return the size in bytes when all of it is on the disk."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def cut(self, num_bytes: int) -> None:
        """Forget what was written after the first bytes.

        Raises:
            ValueError: if the file is shorter
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < num_bytes:
            raise ValueError(f"{self.path} has {size} bytes, but had {num_bytes} at the checkpoint; bring it back")
        if size > num_bytes:
            os.truncate(self.path, num_bytes)
