"""The record of a run: metrics, samples and report, written as they come. Only the main process has one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tune2gguf.distributed.world import describe_error
from tune2gguf.report import write_report
from tune2gguf.runs.curves import TrainingStep, Validation, read_curves
from tune2gguf.runs.files import METRICS_FILE, SAMPLES_FILE, JsonLinesFile
from tune2gguf.runs.forgetting import Forgetting, write_forgetting
from tune2gguf.runs.samples import Sample
from tune2gguf.verdict.conclude import conclude_run
from tune2gguf.verdict.early import foresee, is_due

if TYPE_CHECKING:
    from torchtune.training.metric_logging import MetricLoggerInterface

NOTHING_RECORDED = {METRICS_FILE: 0, SAMPLES_FILE: 0}
MAX_REPORT_SHARE = 0.05  # of the time of a run


def check_learned(run_dir: Path) -> None:
    """Raise ValueError if every step of a run was skipped."""
    steps = read_curves(run_dir).training
    if steps and all(step.skipped is not None for step in steps):
        raise ValueError(f"all {len(steps)} steps were skipped, so nothing was learned; the last: {steps[-1].skipped}")


class RunRecord:
    """The metrics.jsonl and samples.jsonl of a run folder, and the metric logger, if there is one."""

    def __init__(self, folder: Path, *, metric_logger: MetricLoggerInterface | None = None) -> None:
        self.folder = folder
        self.files = {name: JsonLinesFile(folder / name) for name in NOTHING_RECORDED}
        self.metric_logger = metric_logger
        self._next_report = 0.0

    def write_step(self, step: TrainingStep, bar: tqdm) -> None:
        """Write the line of an optimizer step and show it on the progress bar."""
        self._write(step.to_record())
        if step.skipped is not None:
            bar.write(f"note: {step.skipped}")
        loss = "skipped" if step.loss is None else f"loss {step.loss:.3f}"
        bar.set_postfix_str(f"{loss}, {step.tokens_per_second:.0f} tokens/s")
        bar.update()

    def write_validation(self, validation: Validation) -> None:
        """Write the line of a validation and print it above the progress bar."""
        self._write(validation.to_record())
        tqdm.write(validation.describe())

    def show_outlook(self, *, num_steps: int, learned: float) -> None:
        """Print the likely verdict, at the first validation that allows one.

        Args:
            learned: share of the run's learning rate, summed over steps, that is used so far
        """
        curves = read_curves(self.folder)
        outlook = foresee(curves, learned=learned) if is_due(curves, num_steps) else None
        if outlook is not None:
            tqdm.write(outlook.describe(curves.final.step, num_steps))

    def write_samples(self, samples: Iterable[Sample]) -> None:
        """Write a line for each sample reply."""
        for sample in samples:
            self.files[SAMPLES_FILE].write(vars(sample))

    def write_forgetting(self, forgetting: Forgetting) -> None:
        """Write forgetting.json."""
        write_forgetting(self.folder, forgetting)

    def write_report(self) -> None:
        """Write report.html, as often as MAX_REPORT_SHARE of the run's time allows. No file depends on it."""
        started = time.monotonic()
        if started < self._next_report:
            return
        try:
            write_report(self.folder, is_finished=False)
        except Exception as error:  # must not end the run
            tqdm.write(f"note: report.html could not be written; the run continues: {type(error).__name__}: {error}")
        ended = time.monotonic()
        self._next_report = ended + (ended - started) / MAX_REPORT_SHARE

    def conclude(self) -> list[str]:
        """Judge the run and advise the next, in verdict.json, ledger and report. Return the lines to print."""
        try:
            lines = conclude_run(self.folder)
        except (ValueError, OSError) as error:  # must not fail a run whose adapters are written
            lines = [f"note: there is no verdict: {describe_error(error)}"]
        try:
            return [*lines, f"report: {write_report(self.folder, is_finished=True)}"]
        except Exception as error:  # likewise
            return [*lines, f"warning: the report could not be written: {type(error).__name__}: {error}"]

    def sync(self) -> dict[str, int]:
        """Flush all files to disk and return their sizes in bytes."""
        return {name: file.sync() for name, file in self.files.items()}

    def close(self) -> None:
        """Close the metric logger."""
        self._hand_on(lambda logger: logger.close())

    def _write(self, record: dict[str, Any]) -> None:
        self.files[METRICS_FILE].write(record)
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        step = numbers.pop("step")
        self._hand_on(lambda logger: logger.log_dict(numbers, step=step))

    def _hand_on(self, use: Callable[[MetricLoggerInterface], None]) -> None:
        """Use the metric logger until it fails once: the run does not depend on it, and each try may take minutes."""
        if self.metric_logger is None:
            return
        try:
            use(self.metric_logger)
        except Exception as error:  # of a service, its client or a disk
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            name = type(self.metric_logger).__name__
            self.metric_logger = None
            tqdm.write(
                f"warning: metric_logger: {name} failed and is switched off; {METRICS_FILE} has everything: {reason}"
            )
