"""The page that compares runs: validation curves over each other, and what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune2gguf.files.atomic import write_text
from tune2gguf.pages import render_page
from tune2gguf.pages.render import format_loss
from tune2gguf.report.plots import plot_comparison
from tune2gguf.runs.curves import Curves
from tune2gguf.runs.intervals import Estimate


@dataclass(frozen=True)
class ComparedRun:
    """A run as the comparison shows it.

    Attributes:
        name: unique among the runs
        validation_rows: what the validation loss was measured on, such as a digest of the rows; equal means comparable
        differences: config key -> value, as text, of the keys that differ between the runs
        seconds: that the run took
        verdict: its label; None for a run that has not ended
        behind: best validation loss over that of the first of the group, row by row; None for the first
    """

    name: str
    curves: Curves
    validation_rows: str
    differences: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    verdict: str | None = None
    behind: Estimate | None = None


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> Path:
    """Write the page in one move; runs on the same validation rows are ranked together, the lowest best loss first.

    Raises:
        ValueError: if two runs have the same name
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs are told apart by their names, but some are equal: {', '.join(sorted(names))}")
    groups = [*_group(runs)]
    write_text(path, render_page("comparison.html", groups=groups, num_runs=len(runs)))
    return path


def _group(runs: Sequence[ComparedRun]) -> Iterator[dict[str, Any]]:
    by_rows: dict[str, list[ComparedRun]] = {}
    unmeasured = []
    for run in runs:
        if run.curves.best is None:
            unmeasured.append(run)
        else:
            by_rows.setdefault(run.validation_rows, []).append(run)
    for number, members in enumerate(by_rows.values()):
        ranked = sorted(members, key=lambda run: run.curves.best.loss)
        rows = ranked[0].curves.best.rows
        yield {
            "title": f"On {'the same' if number == 0 else 'others,'} {f'{rows:,} ' if rows else ''}validation rows",
            "plot": plot_comparison({run.name: run.curves for run in ranked}, name=f"comparison-{number}"),
            **_make_table(ranked, is_ranked=True),
        }
    if unmeasured:
        yield {"title": "Without a validation loss", "plot": None, **_make_table(unmeasured, is_ranked=False)}


def _make_table(runs: Sequence[ComparedRun], *, is_ranked: bool) -> dict[str, Any]:
    keys = [*dict.fromkeys(key for run in runs for key in run.differences)]
    measures = ["validation loss", "95 % interval", "at step", "behind the first"] if is_ranked else []
    heads = ["run", *measures, "verdict", *keys, "time", "memory"]
    rows = []
    for run in runs:
        memory = f"{run.peak_memory_bytes / 1e9:.1f} GB" if run.peak_memory_bytes else "–"
        values = [run.differences.get(key, "–") for key in keys]
        measured = _format_measures(run) if is_ranked else []
        rows.append([run.name, *measured, run.verdict or "–", *values, _format_seconds(run.seconds), memory])
    numeric = [*range(1, 1 + len(measures)), len(heads) - 2, len(heads) - 1]
    return {"heads": heads, "rows": rows, "numeric": numeric, "is_ranked": is_ranked}


def _format_measures(run: ComparedRun) -> list[str]:
    best, behind = run.curves.best, run.behind
    interval = "–" if best.low is None or best.high is None else f"{format_loss(best.low)} – {format_loss(best.high)}"
    gap = "–" if behind is None else f"{behind.value:+.3f} ({behind.low:+.3f} to {behind.high:+.3f})".replace("-", "−")
    return [format_loss(best.loss), interval, f"{best.step:,}", gap]


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
