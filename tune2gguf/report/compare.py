"""Runs beside each other: what differs, what it cost, how it came out; ranked only on validation rows that all have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tune2gguf.guide import REFERENCES
from tune2gguf.report.comparison import ComparedRun, write_comparison
from tune2gguf.runs.curves import Curves, Validation
from tune2gguf.runs.files import METRICS_FILE, is_run_folder
from tune2gguf.runs.intervals import Estimate, estimate_ratio
from tune2gguf.runs.run import Run
from tune2gguf.runs.validation_rows import read_row_losses
from tune2gguf.verdict.judge import INCONCLUSIVE, MIN_ROWS, judge

# A run's place, and what says nothing of its result.
_NOT_COMPARED = {"output_dir", "resume", "parent_run", "save_every_n_steps", "keep_last", *REFERENCES}


@dataclass(frozen=True)
class RankedRun:
    """A run among others.

    Attributes:
        curves: on the rows that the group has in common
        behind: validation loss of its best adapter over that of the first of the group; None for the first
        differences: config key -> value, of the keys that differ among all runs
        seconds: of its training steps, about
        is_finished: whether it came to its end; its verdict is otherwise one so far
    """

    name: str
    run_dir: Path
    curves: Curves
    behind: Estimate | None
    differences: dict[str, Any]
    seconds: float | None
    peak_memory_bytes: int | None
    verdict: str
    is_finished: bool


@dataclass(frozen=True)
class Group:
    """Runs that measured the same validation rows, the lowest loss first."""

    num_rows: int
    runs: list[RankedRun]


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in a folder.

    Raises:
        ValueError: if there is none
    """
    found = sorted(path.parent for path in folder.glob(f"*/{METRICS_FILE}") if is_run_folder(path.parent))
    if not found:
        raise ValueError(f"{folder}: no runs here; give the folders of runs, such as runs/NAME")
    return found


def group_runs(run_dirs: Sequence[Path]) -> list[Group]:
    """Read runs and rank those that share validation rows, on the rows that they share.

    Raises:
        ValueError: if a folder is not that of a run
    """
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
    return [
        Group(len(common), _rank([(names[index], runs[index], differences[index]) for index in members], common))
        for common, members in groups
    ]


def find_differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each flat config what not all have alike; keys that follow another are left to that one."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NOT_COMPARED)
    differing = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    return [{key: config.get(key) for key in differing} for config in configs]


def write_page(groups: Sequence[Group], path: Path) -> Path:
    """Write the HTML page with the curves over each other."""
    compared = [
        ComparedRun(
            name=run.name,
            curves=run.curves,
            validation_rows=str(number),
            differences={key: str(value) for key, value in run.differences.items()},
            seconds=run.seconds,
            peak_memory_bytes=run.peak_memory_bytes,
            verdict=describe_label(run),
            behind=run.behind,
        )
        for number, group in enumerate(groups)
        for run in group.runs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_comparison(compared, path)


def format_groups(groups: Sequence[Group]) -> str:
    """Return a table of each group, ranked."""
    parts = []
    for group in groups:
        if group.num_rows:
            parts.append(f"on {group.num_rows} validation rows in common:")
        else:
            parts.append("without validation rows, not ranked:")
        parts.append(_format_table(group.runs))
    if len(groups) > 1:
        parts.append("runs on other validation rows are listed apart: their losses say nothing of each other")
    return "\n".join(parts)


def describe_label(run: RankedRun) -> str:
    return run.verdict if run.is_finished else f"{run.verdict} (so far)"


def _format_table(runs: Sequence[RankedRun]) -> str:
    import pandas

    rows = [
        {
            "run": run.name,
            "validation loss (95 %)": _format_loss(run.curves.best),
            "behind the first (95 %)": _format_behind(run.behind),
            "verdict": describe_label(run),
            "minutes": "–" if run.seconds is None else f"{run.seconds / 60:.1f}",
            "GB": "–" if run.peak_memory_bytes is None else f"{run.peak_memory_bytes / 1e9:.1f}",
            **{key: str(value) for key, value in run.differences.items()},
        }
        for run in runs
    ]
    return pandas.DataFrame(rows).to_string(index=False)


def _format_loss(best: Validation | None) -> str:
    if best is None:
        return "–"
    interval = "" if best.low is None else f" ({best.low:.4f} … {best.high:.4f})"
    return f"{best.loss:.4f} at step {best.step}{interval}"


def _format_behind(behind: Estimate | None) -> str:
    return "–" if behind is None else f"{behind.value:+.4f} ({behind.low:+.4f} … {behind.high:+.4f})"


def _name_runs(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, with their folder where two are equal."""
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


def _rank(members: Sequence[tuple[str, Run, dict]], common: set[str]) -> list[RankedRun]:
    ordered = sorted(common)
    restricted = [restrict_curves(run, ordered) if common else run.curves for _, run, _ in members]
    by_loss = sorted(range(len(members)), key=lambda index: _get_best_loss(restricted[index]))
    first = restricted[by_loss[0]].best
    return [
        _describe_run(members[index], restricted[index], first=first if rank > 0 and common else None)
        for rank, index in enumerate(by_loss)
    ]


def _get_best_loss(curves: Curves) -> float:
    return curves.best.loss if curves.best is not None else float("inf")


def _describe_run(member: tuple[str, Run, dict], curves: Curves, *, first: Validation | None) -> RankedRun:
    name, run, differences = member
    memory = [step.peak_memory_bytes for step in run.curves.training if step.peak_memory_bytes is not None]
    label, is_finished = _read_label(run)
    behind = None
    if first is not None and curves.best is not None:
        gaps = [mine - other for mine, other in zip(curves.best.row_losses, first.row_losses, strict=True)]
        behind = estimate_ratio(gaps, first.row_tokens) if len(gaps) > 1 else None
    return RankedRun(
        name=name,
        run_dir=run.run_dir,
        curves=curves,
        behind=behind,
        differences=differences,
        seconds=estimate_seconds(run),
        peak_memory_bytes=max(memory, default=None),
        verdict=label,
        is_finished=is_finished,
    )


def _read_label(run: Run) -> tuple[str, bool]:
    """Return the verdict of verdict.json, or one so far where the run has gone on since or has not ended."""
    if run.conclusion is not None:
        verdict = run.conclusion.verdict
        if run.curves.final is None or verdict.figures.get("final_step") == run.curves.final.step:
            return verdict.label, True
    return (judge(run.curves).label if run.curves.final is not None else INCONCLUSIVE), False


def restrict_curves(run: Run, rows: Sequence[str]) -> Curves:
    """Return the curves of a run on some of its validation rows, in the order given, by their digests."""
    return Curves(run.curves.training, tuple(_restrict(run, rows)))


def _restrict(run: Run, rows: Sequence[str]) -> Iterator[Validation]:
    for one in run.curves.validations:
        losses = read_row_losses(run.run_dir, one)
        if not set(rows) <= losses.keys():
            continue  # measured on other rows, before the run went on with more of them
        taken = [losses[row] for row in rows]
        row_losses, row_tokens = (tuple(part) for part in zip(*taken, strict=True))
        is_whole = len(rows) == one.rows
        estimate = None if is_whole or len(rows) < 2 else estimate_ratio(row_losses, row_tokens)
        yield replace(
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


def estimate_seconds(run: Run) -> float | None:
    """Return about how long the training steps took: tokens of an average step over the speed of each."""
    speeds = [step.tokens_per_second for step in run.curves.training if step.tokens_per_second]
    if not speeds:
        return None
    per_epoch = sum(1 for step in run.curves.training if step.epoch == 0)
    training, config = run.data["training"], run.config
    if config.get("max_steps_per_epoch") is None:
        tokens_per_step = training["tokens"] / per_epoch
    else:
        rows_per_step = config["batch_size"] * config["gradient_accumulation_steps"]
        tokens_per_step = training["tokens"] / training["rows"] * rows_per_step
    return tokens_per_step * sum(1 / speed for speed in speeds)
