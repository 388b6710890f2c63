"""The comparison of runs: settings, cost and result. Runs are ranked only on validation rows that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tune2gguf.files.atomic import write_text
from tune2gguf.guide import REFERENCES
from tune2gguf.pages.render import format_interval, format_loss, render_page
from tune2gguf.report.plots import plot_comparison
from tune2gguf.runs.curves import Curves, Validation
from tune2gguf.runs.files import METRICS_FILE, is_run_folder
from tune2gguf.runs.intervals import Estimate, estimate_ratio
from tune2gguf.runs.run import Run
from tune2gguf.runs.validation_rows import read_row_losses
from tune2gguf.verdict.judge import INCONCLUSIVE, MIN_ROWS, judge

# Keys that do not affect a run's result, and keys that take another key's value.
_NOT_COMPARED = {"output_dir", "resume", "parent_run", "save_every_n_steps", "keep_last", *REFERENCES}


@dataclass(frozen=True)
class RankedRun:
    """A run in a comparison.

    Attributes:
        curves: on the group's common validation rows
        behind: best validation loss minus that of the group's first run, paired by row; None for the first
        differences: config key -> value, for the keys that differ between runs of any group
        seconds: duration of the training steps; None if an earlier version did not record it
        is_finished: whether the run has ended; if not, its verdict is provisional
    """

    name: str
    run_dir: Path
    curves: Curves
    differences: dict[str, Any]
    seconds: float | None
    peak_memory_bytes: int | None
    verdict: str
    is_finished: bool
    behind: Estimate | None = None


@dataclass(frozen=True)
class Group:
    """Runs with common validation rows, the lowest loss first."""

    num_rows: int
    runs: list[RankedRun]


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in a folder. Raises ValueError if there are none."""
    found = sorted(path.parent for path in folder.glob(f"*/{METRICS_FILE}") if is_run_folder(path.parent))
    if not found:
        raise ValueError(f"{folder}: no runs here; give the folders of runs, such as runs/NAME")
    return found


def group_runs(run_dirs: Sequence[Path]) -> list[Group]:
    """Read runs, group those that share validation rows, and rank each group on the shared rows."""
    runs = [Run(path) for path in dict.fromkeys(run_dirs)]
    names = _name_runs(runs)
    differences = find_differences([run.flat_config | {"data": run.data["fingerprint"]} for run in runs])
    groups: list[tuple[set[str], list[int]]] = []
    for index, run in enumerate(runs):
        rows = _list_rows(run)
        for number, (common, members) in enumerate(groups):
            if _share_enough(common, rows):
                groups[number] = (common & rows, [*members, index])
                break
        else:
            groups.append((rows, [index]))
    ranked = []
    for common, members in groups:
        rows = sorted(common)
        ranked.append(_rank([_describe_run(runs[i], names[i], differences[i], rows) for i in members], len(rows)))
    return ranked


def find_differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the differing keys with their values for each flat config, without keys that take another key's value."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NOT_COMPARED)
    differing = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    return [{key: config.get(key) for key in differing} for config in configs]


def format_groups(groups: Sequence[Group]) -> str:
    """Return a table of each group, ranked."""
    import pandas

    parts = []
    for group in groups:
        if group.num_rows:
            parts.append(f"on {group.num_rows} validation rows in common:")
        else:
            parts.append("without validation rows, not ranked:")
        heads, rows = _make_table(group.runs)
        parts.append(pandas.DataFrame(rows, columns=heads).to_string(index=False))
    if len(groups) > 1:
        parts.append("runs on other validation rows are listed apart: their losses are not comparable")
    return "\n".join(parts)


def write_comparison(groups: Sequence[Group], path: Path) -> Path:
    """Write the page with a plot of each group's curves; runs without a validation loss are listed apart."""
    runs = [run for group in groups for run in group.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must have different names, got {', '.join(sorted(names))}")
    measured = [[run for run in group.runs if run.curves.best is not None] for group in groups]
    sections = [_describe_measured(number, members) for number, members in enumerate(filter(None, measured))]
    unmeasured = [run for run in runs if run.curves.best is None]
    if unmeasured:
        sections.append({"title": "Without a validation loss", "plot": None, "table": _make_table(unmeasured)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_page("comparison.html", sections=sections, num_runs=len(runs)))
    return path


def _describe_measured(number: int, runs: Sequence[RankedRun]) -> dict[str, Any]:
    rows = runs[0].curves.best.rows
    return {
        "title": f"On {'the same' if number == 0 else 'others,'} {f'{rows:,} ' if rows else ''}validation rows",
        "plot": plot_comparison({run.name: run.curves for run in runs}, name=f"comparison-{number}"),
        "table": _make_table(runs),
    }


def _make_table(runs: Sequence[RankedRun]) -> tuple[list[str], list[list[str]]]:
    """Return the column names and rows of a group's table, for the page and the terminal."""
    keys = list(runs[0].differences)
    is_measured = runs[0].curves.best is not None
    measures = ["validation loss", "95 % interval", "at step", "behind the first"] if is_measured else []
    rows = []
    for run in runs:
        verdict = run.verdict if run.is_finished else f"{run.verdict} (so far)"
        memory = f"{run.peak_memory_bytes / 1e9:.1f} GB" if run.peak_memory_bytes else "–"
        measured = _format_measures(run) if is_measured else []
        values = [str(run.differences[key]) for key in keys]
        rows.append([run.name, *measured, _format_seconds(run.seconds), memory, verdict, *values])
    return ["run", *measures, "time", "memory", "verdict", *keys], rows


def _format_measures(run: RankedRun) -> list[str]:
    best, behind = run.curves.best, run.behind
    if best is None:
        return ["–"] * 4
    gap = "–" if behind is None else f"{behind.value:+.3f} ({behind.low:+.3f} to {behind.high:+.3f})".replace("-", "−")
    return [format_loss(best.loss), format_interval(best.low, best.high), f"{best.step:,}", gap]


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _name_runs(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, or their paths if names are equal."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.run_dir.resolve()) for name, run in zip(names, runs, strict=True)
    ]


def _list_rows(run: Run) -> set[str]:
    best = run.curves.best
    return set(read_row_losses(run.run_dir, best)) if best is not None and best.row_losses else set()


def _share_enough(first: set[str], second: set[str]) -> bool:
    if first == second:
        return True
    common = len(first & second)
    return common >= MIN_ROWS and 2 * common >= min(len(first), len(second))


def _describe_run(run: Run, name: str, differences: dict[str, Any], rows: Sequence[str]) -> RankedRun:
    memory = [step.peak_memory_bytes for step in run.curves.training if step.peak_memory_bytes is not None]
    label, is_finished = _read_label(run)
    return RankedRun(
        name=name,
        run_dir=run.run_dir,
        curves=restrict_curves(run, rows) if rows else run.curves,
        differences=differences,
        seconds=add_up_seconds(run.curves),
        peak_memory_bytes=max(memory, default=None),
        verdict=label,
        is_finished=is_finished,
    )


def _rank(runs: Sequence[RankedRun], num_rows: int) -> Group:
    first, *others = sorted(runs, key=lambda run: run.curves.best.loss if run.curves.best is not None else math.inf)
    compared = [replace(run, behind=_compare(run.curves.best, first.curves.best)) for run in others]
    return Group(num_rows, [first, *compared])


def _compare(mine: Validation | None, first: Validation | None) -> Estimate | None:
    """Return how much higher a loss is than the first run's; None unless both have losses of the same rows."""
    if mine is None or first is None or len(first.row_losses) < 2:
        return None
    gaps = [loss - other for loss, other in zip(mine.row_losses, first.row_losses, strict=True)]
    return estimate_ratio(gaps, first.row_tokens)


def _read_label(run: Run) -> tuple[str, bool]:
    """Return the verdict of verdict.json and True; if it is older than the curves or missing, a new one and False."""
    if run.conclusion is not None:
        verdict = run.conclusion.verdict
        if run.curves.final is None or verdict.figures.get("final_step") == run.curves.final.step:
            return verdict.label, True
    return (judge(run.curves).label if run.curves.final is not None else INCONCLUSIVE), False


def restrict_curves(run: Run, rows: Sequence[str]) -> Curves:
    """Return a run's curves on the validation rows with these digests, in this order."""
    validations = []
    for one in run.curves.validations:
        losses = read_row_losses(run.run_dir, one)
        if not set(rows) <= losses.keys():
            continue  # measured on other rows, before the run was resumed with more
        taken = [losses[row] for row in rows]
        row_losses, row_tokens = (tuple(part) for part in zip(*taken, strict=True))
        is_whole = len(rows) == one.rows
        estimate = None if is_whole or len(rows) < 2 else estimate_ratio(row_losses, row_tokens)
        restricted = replace(
            one,
            loss=sum(row_losses) / sum(row_tokens),
            low=one.low if is_whole else estimate and estimate.low,
            high=one.high if is_whole else estimate and estimate.high,
            rows=len(rows),
            tokens=sum(row_tokens),
            row_losses=row_losses,
            row_tokens=row_tokens,
            row_indices=(),
        )
        validations.append(restricted)
    return Curves(run.curves.training, tuple(validations))


def add_up_seconds(curves: Curves) -> float | None:
    """Return the duration of all training steps; None if one did not record it, as in earlier versions."""
    seconds = [step.seconds for step in curves.training]
    return sum(seconds) if seconds and None not in seconds else None
