"""report.html: verdict and next command, curves, data, samples, config and environment of a run."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tune2gguf.files.atomic import write_text
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.pages import render_page
from tune2gguf.pages.render import format_loss
from tune2gguf.report.plots import plot_losses, plot_training
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.files import METRICS_FILE
from tune2gguf.runs.run import LAST, Run
from tune2gguf.runs.samples import Sample
from tune2gguf.runs.verdict_file import Verdict
from tune2gguf.verdict.lineage import describe_outcome

PARTS_OF_READ = ("trained", "validated", "truncated", "dropped")
REPORT_FILE = "report.html"
MAX_LISTED = 50  # rows of a list; the file that has all of them is named
MAX_COLUMNS = 4  # of replies beside each other


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        step: optimizer steps taken or skipped
        num_steps: of the whole run; None where plan.json is missing
        epoch: the one in progress or the last one, counted from 1
        num_epochs: None where the config is missing
        measured_at: when something was measured last; None before that
    """

    step: int
    num_steps: int | None
    epoch: int
    num_epochs: int | None
    measured_at: str | None


@dataclass(frozen=True)
class State:
    """What is said of a run as a whole; `kind` is a class of the stylesheet."""

    kind: str
    label: str
    progress: str
    num_steps: int | None
    why_no_verdict: str


def write_report(run_dir: str | Path, *, is_finished: bool | None = None) -> Path:
    """Write report.html of a run from what its folder holds by now, in one move.

    A part that is missing or unreadable becomes a note on the page, never an exception.

    Args:
        is_finished: whether the run has come to its end, be it early; None finds out from the folder

    Raises:
        ValueError: if the folder is not that of a run
    """
    run = Run(Path(run_dir), problems=[])
    if not run.run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such folder; give the folder of a run, such as runs/quickstart")
    if not run.config and not run.curves.training and not run.curves.validations:
        raise ValueError(f"{run_dir} is not the folder of a run: it has neither config.yaml nor metrics.jsonl")
    path = run.run_dir / REPORT_FILE
    write_text(path, make_report(run, is_finished=_looks_finished(run) if is_finished is None else is_finished))
    return path


def make_report(run: Run, *, is_finished: bool) -> str:
    """Return the page."""
    position = _find_position(run)
    state, curves = _describe_state(position, is_finished=is_finished), run.curves
    verdict = run.conclusion.verdict if run.conclusion else None
    outcome = run.conclusion.outcome if run.conclusion else None
    clip = run.config.get("clip_grad_norm")
    content = {
        "position": position,
        "state": state,
        "verdict": verdict,
        "figures": [(name.replace("_", " "), f"{value:.4g}") for name, value in _get_figures(verdict)],
        "next_steps": [*_list_next_steps(run, state)],
        "parent_run": run.config.get("parent_run"),
        "outcome": describe_outcome(outcome, str(run.config.get("parent_run"))) if outcome else "",
        "tiles": [*_list_tiles(run)],
        "losses": plot_losses(curves, num_steps=position.num_steps),
        "training_plots": plot_training(
            curves, num_steps=position.num_steps, clip_grad_norm=clip if is_number(clip) else None
        ),
        "validations": [_format_validation(line, curves.base) for line in curves.validations],
        "skipped": [(f"{line.step:,}", line.skipped) for line in curves.training if line.skipped],
        "max_listed": MAX_LISTED,
        "prompts": [*_group_samples(run.samples, is_finished=is_finished)],
        "run_command": _make_command(run),
        **_describe_ledger(run.data),
        **_describe_config(run),
        **_describe_environment(run.environment),
    }
    return render_page("report.html", run=run, **content)


def is_number(value: float | None) -> bool:
    """Whether there is a value that can be drawn."""
    return value is not None and math.isfinite(value)


def _find_position(run: Run) -> Position:
    epochs, curves = run.config.get("epochs"), run.curves
    path = run.run_dir / METRICS_FILE
    measured_at = None
    if path.is_file():
        measured_at = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Position(
        step=max([line.step for line in (*curves.training, *curves.validations)], default=0),
        num_steps=run.plan.get("num_steps"),
        epoch=1 + max((line.epoch for line in curves.training), default=0),
        num_epochs=epochs if isinstance(epochs, int) else None,
        measured_at=measured_at,
    )


def _looks_finished(run: Run) -> bool:
    """Whether a run with a last/ has ended: one that was given more epochs has it from its earlier end."""
    at, patience = _find_position(run), run.config.get("early_stopping_patience")
    best, trained = run.curves.best, run.curves.trained
    has_stopped_early = bool(patience and best) and sum(line.step > best.step for line in trained) >= patience
    return (run.run_dir / LAST).is_dir() and (at.num_steps is None or at.step >= at.num_steps or has_stopped_early)


def _describe_state(at: Position, *, is_finished: bool) -> State:
    is_early = is_finished and at.num_steps is not None and at.step < at.num_steps
    progress = f"step {at.step:,} of {at.num_steps:,}" if at.num_steps else f"step {at.step:,}"
    if at.num_epochs and not is_finished:
        progress += f", in epoch {min(at.epoch, at.num_epochs)} of {at.num_epochs}"
    if is_finished:
        label = "Stopped early" if is_early else "Finished"
        return State("finished", label, progress, at.num_steps, "The run ended without one.")
    return State(
        "unfinished",
        "Not finished" if at.step else "Starting",
        progress,
        at.num_steps,
        "It is given at the end of the run. This page is rewritten at each validation; "
        "if the run is no longer there, it was stopped and can go on from its newest checkpoint.",
    )


def _list_next_steps(run: Run, state: State) -> Iterator[dict[str, Any]]:
    config = run.flat_config
    if state.kind == "unfinished":
        command = _make_command(run, "resume=auto")
        if command:
            yield {"command": command, "changes": [], "reason": "Goes on if it was stopped.", "guide_section": ""}
        return
    for step in run.conclusion.advice if run.conclusion else ():
        changes = [f"{key}: {_show(config[key])} → {_show(new)}" if key in config else f"{key}={_show(new)}"
                   for key, new in step.changes.items()]  # fmt: skip
        yield {**vars(step), "changes": changes}


def _make_command(run: Run, *more: str) -> str:
    """Return the command that began the run, on one machine, with another `resume=`; empty where it is not known."""
    _, *arguments = map(str, run.environment.get("command") or [""])
    if not arguments:
        return ""
    kept = [argument for argument in arguments if not argument.startswith("resume=")]
    processes = ["--nproc_per_node", str(run.num_processes)] if run.num_processes > 1 else []
    return shlex.join(["tune", "run", *processes, "recipes/lora_finetune.py", *kept, *more])


def _get_figures(verdict: Verdict | None) -> list[tuple[str, float]]:
    return [(name, value) for name, value in (verdict.figures if verdict else {}).items() if is_number(value)]


def _list_tiles(run: Run) -> Iterator[dict[str, str]]:
    """Yield the figures that a reader looks for first."""
    curves = run.curves
    base, best, final = curves.base, curves.best, curves.final
    if best is not None:
        interval = _format_interval(best)
        notes = [f"95 %: {interval}" if interval else "", f"{best.rows:,} rows" if best.rows else ""]
        yield {"name": "Best validation loss", "value": format_loss(best.loss), "note": ", ".join(filter(None, notes))}
        if base is not None and base.loss:
            change = _format_change(best.loss / base.loss - 1, digits=0)
            yield {"name": "Against the base", "value": change, "note": f"whose loss is {format_loss(base.loss)}"}
        last = "the last one" if best is final else f"last: {format_loss(final.loss)} at step {final.step:,}"
        yield {"name": "Best at step", "value": f"{best.step:,}", "note": last}
    elif base is not None:
        yield {"name": "Validation loss of the base", "value": format_loss(base.loss), "note": _format_interval(base)}
    memory = [line.peak_memory_bytes for line in curves.training if line.peak_memory_bytes]
    if memory:
        yield {"name": "Peak memory", "value": f"{max(memory) / 1e9:.1f} GB", "note": ""}
    speeds = sorted(line.tokens_per_second for line in curves.training if is_number(line.tokens_per_second))
    if speeds:
        median = speeds[len(speeds) // 2]
        yield {"name": "Speed", "value": f"{median:,.0f}", "note": "tokens a second, median step"}


def _format_interval(line: Validation) -> str:
    if line.low is None or line.high is None:
        return ""
    return f"{format_loss(line.low)} – {format_loss(line.high)}"


def _format_validation(line: Validation, base: Validation | None) -> tuple[str, ...]:
    has_change = base is not None and line is not base and base.loss
    change = _format_change(line.loss / base.loss - 1, digits=1) if has_change else "–"
    loss = f"{line.loss:.4f}"
    return (f"{line.step:,}", f"{line.epoch:,}", loss, _format_interval(line) or "–", change, f"{line.rows:,}")


def _format_change(share: float, *, digits: int) -> str:
    return f"{share:+.{digits}%}".replace("-", "−")


def _group_samples(samples: Sequence[Sample], *, is_finished: bool) -> Iterator[dict[str, Any]]:
    """Yield each prompt with its replies in the order of the steps."""
    last_step = max((sample.step for sample in samples), default=0)
    for row in dict.fromkeys(sample.row for sample in samples):
        of_row = sorted((sample for sample in samples if sample.row == row), key=lambda sample: sample.step)
        replies = [
            {
                "when": _name_stage(sample, is_last=is_finished and sample.step == last_step),
                "text": sample.reply,
                "is_reference": sample.reply.strip() == sample.reference.strip(),
                "ended_by_itself": sample.ended_by_itself,
            }
            for sample in of_row
        ]
        yield {
            "row": f"{row + 1:,}",
            "messages": of_row[0].prompt,
            "reference": of_row[0].reference,
            "replies": replies,
            "columns": _choose_columns(len(replies) + 1),
        }


def _choose_columns(count: int) -> int:
    """Return how many columns fill the rows of a grid best; of equals the most."""
    if count <= MAX_COLUMNS:
        return count
    return max((3, MAX_COLUMNS), key=lambda columns: (-(-count % columns), columns))


def _name_stage(sample: Sample, *, is_last: bool) -> str:
    if sample.step == 0:
        return "Before training"
    name = f"After epoch {sample.epoch}" if sample.epoch else f"After step {sample.step:,}"
    return f"{name}, the end" if is_last else name


def _describe_ledger(ledger: Mapping[str, Any]) -> dict[str, Any]:
    if not ledger:
        return {"ledger_parts": [], "ledger_sides": [], "ledger_files": [], "ledger_lists": []}
    parts = [{"name": name, "count": ledger[name]} for name in PARTS_OF_READ]
    sides = [
        (name, *(f"{ledger[side][key]:,}" for key in ("rows", "tokens", "supervised_tokens", "longest_row")))
        for name, side in (("training", "training"), ("validation", "validation"))
    ]
    lists = [
        _list_rows(ledger["rows_truncated"], "truncated", column="side", key="split"),
        _list_rows(ledger["rows_dropped"], "dropped", column="kind", key="kind"),
    ]
    files = [(file["file"], f"{file['read']:,}", f"{len(file['validation_lines']):,}") for file in ledger["files"]]
    return {
        "ledger_parts": parts,
        "ledger_sides": sides,
        "ledger_files": files,
        "ledger_lists": [listed for listed in lists if listed["count"]],
    }


def _list_rows(rows: list[dict[str, Any]], name: str, *, column: str, key: str) -> dict[str, Any]:
    shown = [(f"{row['file']}, line {row['line']}", row[key], row["reason"]) for row in rows[:MAX_LISTED]]
    return {"name": name, "count": len(rows), "column": column, "rows": shown}


def _describe_config(run: Run) -> dict[str, Any]:
    flat = run.flat_config
    guide = {parameter.key: parameter for parameter in GUIDE_PARAMETERS}
    return {
        "guide_rows": [(key, _show(flat[key]), guide[key].effect) for key in guide if key in flat],
        "other_rows": [(key, _show(value)) for key, value in flat.items() if key not in guide],
    }


def _describe_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    apart = {"command", "packages", "resumed"}
    rows = [(key.replace("_", " "), _show(value)) for key, value in environment.items() if key not in apart]
    rows += [(name, version or "not installed") for name, version in environment.get("packages", {}).items()]
    resumed = [
        (entry.get("started"), f"{entry['step']:,}", entry.get("device"), entry.get("git_revision") or "unknown")
        for entry in environment.get("resumed", [])
    ]
    return {"environment_rows": rows, "resumed_rows": resumed}


def _show(value: Any) -> str:
    """Return a value as a YAML file would have it, but for quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
