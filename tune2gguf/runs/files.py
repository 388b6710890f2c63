"""The files of a run folder: names, format version, JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tune2gguf.files.json_files import parse_object, parse_text

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DATA_FILE = "data.json"
PLAN_FILE = "plan.json"
VALIDATION_FILE = "heldout.jsonl"
CALIBRATION_FILE = "calibration.jsonl"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
VERDICT_FILE = "verdict.json"
FORGETTING_FILE = "forgetting.json"
PROOF_FILE = "proof.json"  # in the export folder
GENERAL_FILE = "general.jsonl"
LEDGER_FILE = "ledger.jsonl"  # beside the run folders

# Recorded in environment.json from version 2 on. 2: today's component names, `system_prompt` in data.json.
# 3: a step's rows are drawn at random, plan.json has the keys of a pass (LAYOUT_KEYS).
FOLDER_VERSION = 3

T = TypeVar("T")


def is_run_folder(path: Path) -> bool:
    """Whether a folder is a run folder: it has a config.yaml from the start."""
    return (path / CONFIG_FILE).is_file()


def shorten_path(path: Path) -> str:
    """Return a path relative to the working directory if it is below it, else absolute."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def split_lines(path: Path) -> list[str]:
    """Return the lines of a JSONL file; only \\n ends a line, since JSON text may contain other line separators."""
    return path.read_bytes().decode("utf-8", errors="replace").split("\n")


def read_json_lines(path: Path, parse: Callable[[Any], T] = parse_object) -> Iterator[T]:
    """Yield each parsed object of a JSONL file, also while it is being written.

    Raises:
        ValueError: if the file is missing, or a line is no JSON object or `parse` refuses it; an incomplete last line
            is skipped
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found; check that {path.parent} is the folder of a run")
    lines = split_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_text(line, parse, place=f"{path}, line {number}")
        except ValueError:
            # Complete lines end with a line break: text after the last one is still being written.
            if number < len(lines):
                raise
            continue
        yield record


class JsonLinesFile:
    """An append-only JSONL file (metrics.jsonl, samples.jsonl): one JSON object per line, written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> int:
        """Flush the file to disk and return its size in bytes."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def cut(self, num_bytes: int) -> None:
        """Truncate the file to `num_bytes`.

        Raises:
            ValueError: if the file is shorter
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < num_bytes:
            raise ValueError(f"{self.path} has {size} bytes, but had {num_bytes} at the checkpoint; restore the file")
        if size > num_bytes:
            os.truncate(self.path, num_bytes)
