"""A sweep: a run for every point of a grid of config values, ranked by validation loss.

The same command continues a stopped sweep: finished runs are kept, a stopped run is resumed.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from omegaconf import OmegaConf

from tune2gguf.commands import RECIPE, find_shipped, format_overrides, format_script
from tune2gguf.config import check_config, read_config
from tune2gguf.data.sources import holds_rows_out
from tune2gguf.report.compare import format_groups, group_runs, write_comparison
from tune2gguf.runs import config_file
from tune2gguf.runs.files import METRICS_FILE, shorten_path
from tune2gguf.runs.lock import hold_run_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: str  # of the swept keys, as "key=value key=value"
    overrides: list[str]
    run_dir: Path


def list_points(overrides: Sequence[str], folder: Path) -> list[Point]:
    """Return the grid of the overrides. key=value,value,… is swept; a list in brackets or quoted text is one value.

    Raises:
        ValueError: if a key is the sweep's own or given twice, or if none is swept
    """
    keys = [override.partition("=")[0] for override in overrides]
    if {"output_dir", "resume"} & {*keys}:
        raise ValueError("output_dir and resume are set by the sweep for each run; choose its folder with --out")
    if len({*keys}) < len(keys):
        raise ValueError(f"{' '.join(overrides)}: a key is given twice; give each key once")
    choices = [_list_choices(override) for override in overrides]
    if all(len(values) == 1 for values in choices):
        raise ValueError("nothing to sweep: give a key several values, such as learning_rate=5e-5,1e-4")
    points = []
    for combination in itertools.product(*choices):
        swept = [one for one, values in zip(combination, choices, strict=True) if len(values) > 1]
        run_dir = folder / re.sub(r"[^\w.+-]+", "-", "-".join(swept))
        own = format_overrides({"output_dir": run_dir, "resume": "auto"})
        points.append(Point(" ".join(swept), [*combination, *own], run_dir))
    return points


def _list_choices(override: str) -> list[str]:
    key, equals, value = override.partition("=")
    values = [value] if value.startswith(("[", "'", '"')) else value.split(",")
    return [f"{key}{equals}{one.strip()}" for one in values]


def run_sweep(config_path: Path, points: Sequence[Point]) -> None:
    """Check all points, then run the unfinished ones. A failed run is reported, and the next one starts.

    Raises:
        ValueError: if a point's config is wrong
        SystemExit: on SIGTERM or Ctrl-C, after the current run has saved itself
    """
    configs = [_check_point(config_path, point) for point in points]
    for number, (point, config) in enumerate(zip(points, configs, strict=True), start=1):
        point.run_dir.parent.mkdir(parents=True, exist_ok=True)
        log_path = point.run_dir.parent / f"{point.run_dir.name}.log"
        with log_path.open("a", encoding="utf-8") as log:
            if _is_finished(point.run_dir, config):
                continue
            print(f"run {number} of {len(points)}: {point.values}", flush=True)
            code = _run_recipe(["--config", str(config_path), *point.overrides], log)
            # Another sweep may have started this run at the same moment, and has finished it.
            if code and not _is_finished(point.run_dir, config):
                print(f"  failed with exit code {code}; see {log_path}", flush=True)


def _check_point(config_path: Path, point: Point) -> DictConfig:
    config = read_config(config_path, point.overrides)
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"{point.values}: {error}") from None
    if not holds_rows_out(OmegaConf.to_container(config.dataset, resolve=True)):
        raise ValueError("no validation rows; a sweep ranks by validation loss, so set dataset.validation_split=0.1")
    return config


def _is_finished(run_dir: Path, config: DictConfig) -> bool:
    """Return whether a run has finished with this config. A run with another one is the recipe's to resume or refuse.

    A killed sweep leaves its current run going: wait for its end.
    """
    with hold_run_folder(run_dir, timeout=-1):
        pass
    if not (run_dir / METRICS_FILE).is_file():
        return False
    if config_file.read_config(run_dir) != config_file.resolve_config(config):
        return False
    return group_runs([run_dir])[0].runs[0].is_finished


def _run_recipe(arguments: Sequence[str], log: TextIO) -> int:
    """Run the recipe and return its exit code. SIGTERM and Ctrl-C go to it, and end the sweep after it has saved."""
    command = [sys.executable, str(find_shipped(RECIPE)), *arguments]
    # In its own session the run gets Ctrl-C once, from here; a second signal would end it unsaved.
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    received: list[int] = []

    def hand_on(signum, frame) -> None:
        received.append(signum)
        if os.name != "nt":  # whose consoles send Ctrl-C to the run themselves
            process.send_signal(signum)

    before = {signum: signal.signal(signum, hand_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    code = process.wait()
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if received:
        print("stopped; the current run has saved itself. Continue with the same command", file=sys.stderr)
        sys.exit(128 + received[0])
    return code


def rank_points(points: Sequence[Point]) -> str:
    """Return the comparison of the runs, the path of its page and the command that exports the best.

    Raises:
        ValueError: if no run has measured a validation loss
    """
    groups = group_runs([point.run_dir for point in points if (point.run_dir / METRICS_FILE).is_file()])
    ranked = [group.runs[0] for group in groups if group.num_rows]
    folder = points[0].run_dir.parent
    if not ranked:
        raise ValueError(f"{folder}: no run has a validation loss; see the logs there")
    page = write_comparison(groups, folder / "comparison.html")
    best = min(ranked, key=lambda run: run.curves.best.loss)
    command = format_script("export", Path(shorten_path(best.run_dir)))
    return f"{format_groups(groups)}\npage: {page}\nbest: {best.name}\nnext: {command}"
