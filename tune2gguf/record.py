"""What a run measures, written as it comes: metrics.jsonl and samples.jsonl. The main process alone has a record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tune2gguf.curves import METRICS_FILE, SAMPLES_FILE
from tune2gguf.runs import JsonLinesFile

NOTHING_RECORDED = {METRICS_FILE: 0, SAMPLES_FILE: 0}


class RunRecord:
    """The files of a run's measurements."""

    def __init__(self, folder: Path) -> None:
        self.files = {name: JsonLinesFile(folder / name) for name in NOTHING_RECORDED}

    def write_metrics(self, record: dict) -> None:
        """Write the line of a step or a validation."""
        self.files[METRICS_FILE].write(record)

    def write_samples(self, records: Iterable[dict]) -> None:
        """Write the lines of the answers after a step."""
        for record in records:
            self.files[SAMPLES_FILE].write(record)

    def sync(self) -> dict[str, int]:
        """Return the size of each file in bytes when all of it is on the disk."""
        return {name: file.sync() for name, file in self.files.items()}
