"""What a run measures, written and shown as it comes; the main process alone has a record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tune2gguf.runs.curves import METRICS_FILE, SAMPLES_FILE
from tune2gguf.runs.folder import JsonLinesFile

if TYPE_CHECKING:
    from tqdm import tqdm

NOTHING_RECORDED = {METRICS_FILE: 0, SAMPLES_FILE: 0}
MAX_REPORT_SHARE = 0.05  # of the time of a run


class MetricLogger(Protocol):
    """The part of torchtune's MetricLoggerInterface that is used here."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class RunRecord:
    """metrics.jsonl and samples.jsonl of a run folder, and the metric logger beside them, if there is one."""

    def __init__(self, folder: Path, *, metric_logger: MetricLogger | None = None) -> None:
        self.folder = folder
        self.files = {name: JsonLinesFile(folder / name) for name in NOTHING_RECORDED}
        self.metric_logger = metric_logger
        self._next_report = 0.0

    def write_step(self, record: dict[str, Any], bar: tqdm) -> None:
        """Write the line of an optimizer step, and show it on the progress bar."""
        from tune2gguf.train.steps import describe_speed

        self.write_metrics(record)
        if "skipped" in record:
            bar.write(f"note: {record['skipped']}")
        bar.set_postfix_str(describe_speed(record))
        bar.update()

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Write the line of a step or a validation; its numbers go to the metric logger, too."""
        self.files[METRICS_FILE].write(record)
        if self.metric_logger is not None:
            numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            self.metric_logger.log_dict(numbers, step=numbers.pop("step"))

    def write_samples(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the lines of the answers after a step."""
        for record in records:
            self.files[SAMPLES_FILE].write(record)

    def write_report(self) -> None:
        """Write report.html, unless the time since the last one is short beside what it took; no file depends on it."""
        from tqdm import tqdm

        from tune2gguf.report import write_report

        started = time.monotonic()
        if started < self._next_report:
            return
        try:
            write_report(self.folder)
        except Exception as error:  # a page about the run is not worth the run
            tqdm.write(f"note: report.html is not written, and the run goes on: {type(error).__name__}: {error}")
        ended = time.monotonic()
        self._next_report = ended + (ended - started) / MAX_REPORT_SHARE

    def conclude(self) -> list[str]:
        """Judge the run that has ended and advise the next, in verdict.json, ledger and report; return what to say."""
        from tune2gguf.distributed.world import describe_error
        from tune2gguf.verdict.conclude import conclude_run

        try:
            return conclude_run(self.folder)
        except (ValueError, OSError) as error:  # the adapters are written, whatever is said of them
            return [f"note: there is no verdict: {describe_error(error)}"]

    def sync(self) -> dict[str, int]:
        """Return the size of each file in bytes when all of it is on the disk."""
        return {name: file.sync() for name, file in self.files.items()}

    def close(self) -> None:
        """End the metric logger."""
        if self.metric_logger is not None:
            self.metric_logger.close()
