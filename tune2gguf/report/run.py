"""report.html: verdict and next command, curves, data, samples, config and environment of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tune2gguf.commands import format_run
from tune2gguf.data.ledger import locate_row
from tune2gguf.files.atomic import write_text
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.pages.render import format_interval, format_loss, render_page
from tune2gguf.report.plots import plot_losses, plot_training
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.files import METRICS_FILE
from tune2gguf.runs.forgetting import Forgetting
from tune2gguf.runs.run import LAST, Run
from tune2gguf.runs.samples import Sample
from tune2gguf.verdict.lineage import describe_outcome

REPORT_FILE = "report.html"
MAX_LISTED = 50  # rows per list; the page names the file that has all
MAX_COLUMNS = 4  # of replies, side by side


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        step: optimizer steps taken or skipped
        num_steps: steps of the whole run; None if plan.json is missing
        epoch: the current or last epoch, counted from 1
        measured_at: time of the last measurement; None if there is none
        is_finished: whether the run has ended, also if early
    """

    step: int
    num_steps: int | None
    epoch: int
    measured_at: str | None
    is_finished: bool

    @property
    def label(self) -> str:
        if self.is_finished:
            return "Stopped early" if self.num_steps is not None and self.step < self.num_steps else "Finished"
        return "Not finished" if self.step else "Starting"


def write_report(run_dir: str | Path, *, is_finished: bool | None = None) -> Path:
    """Write report.html of a run from the current files in its folder, atomically.

    A part that is missing or unreadable becomes a note on the page, never an exception.

    Args:
        is_finished: whether the run has ended, also if early; None: as its folder says

    Raises:
        ValueError: if the folder is not a run's
    """
    run = Run(Path(run_dir), problems=[])
    if not run.run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such folder; give the folder of a run, such as runs/quickstart")
    if not run.config and not run.curves.training and not run.curves.validations:
        raise ValueError(f"{run_dir} is not the folder of a run: it has neither config.yaml nor metrics.jsonl")
    path = run.run_dir / REPORT_FILE
    write_text(path, _make_report(run, _find_progress(run, is_finished=is_finished)))
    return path


def _make_report(run: Run, progress: Progress) -> str:
    curves, num_steps, is_finished = run.curves, progress.num_steps, progress.is_finished
    verdict = run.conclusion.verdict if run.conclusion else None
    figures = verdict.figures if verdict else {}
    outcome = run.conclusion.outcome if run.conclusion else None
    clip = run.config.get("clip_grad_norm")
    content = {
        "progress": progress,
        "verdict": verdict,
        "figures": [(name.replace("_", " "), f"{value:.4g}") for name, value in figures.items() if is_number(value)],
        "next_steps": [*_list_next_steps(run, is_finished=is_finished)],
        "parent_run": run.config.get("parent_run"),
        "outcome": describe_outcome(outcome, str(run.config.get("parent_run"))) if outcome else "",
        "tiles": [*_list_tiles(run)],
        "losses": plot_losses(curves, num_steps=num_steps),
        "training_plots": plot_training(curves, num_steps=num_steps, clip_grad_norm=clip if is_number(clip) else None),
        "validations": [_format_validation(line, curves.base) for line in curves.validations],
        "skipped": [(line.step, line.skipped) for line in curves.training if line.skipped],
        "max_listed": MAX_LISTED,
        "lost": _describe_forgetting(run.forgetting),
        "prompts": [*_group_samples(run.samples, is_finished=is_finished)],
        "run_command": _make_command(run),
        **_describe_ledger(run.data),
        **_describe_config(run),
        **_describe_environment(run.environment),
    }
    return render_page("report.html", run=run, **content)


def is_number(value: float | None) -> bool:
    """Whether there is a finite value."""
    return value is not None and math.isfinite(value)


def _find_progress(run: Run, *, is_finished: bool | None) -> Progress:
    curves, num_steps = run.curves, run.plan.get("num_steps")
    step = max([line.step for line in (*curves.training, *curves.validations)], default=0)
    path, measured_at = run.run_dir / METRICS_FILE, None
    if path.is_file():
        measured_at = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Progress(
        step=step,
        num_steps=num_steps,
        epoch=1 + max((line.epoch for line in curves.training), default=0),
        measured_at=measured_at,
        is_finished=_looks_finished(run, step, num_steps) if is_finished is None else is_finished,
    )


def _looks_finished(run: Run, step: int, num_steps: int | None) -> bool:
    """Whether a run has ended. last/ is not enough: a run resumed with more epochs has it from its earlier end."""
    best, patience = run.curves.best, run.config.get("early_stopping_patience")
    has_stopped_early = (
        bool(patience and best) and sum(line.step > best.step for line in run.curves.trained) >= patience
    )
    return (run.run_dir / LAST).is_dir() and (num_steps is None or step >= num_steps or has_stopped_early)


def _list_next_steps(run: Run, *, is_finished: bool) -> Iterator[dict[str, Any]]:
    config = run.flat_config
    if not is_finished:
        command = _make_command(run, "resume=auto")
        if command:
            yield {"command": command, "changes": [], "reason": "Resumes a stopped run.", "guide_section": ""}
        return
    for step in run.conclusion.advice if run.conclusion else ():
        changes = [f"{key}: {_show(config[key])} → {_show(new)}" if key in config else f"{key}={_show(new)}"
                   for key, new in step.changes.items()]  # fmt: skip
        yield {**vars(step), "changes": changes}


def _make_command(run: Run, *more: str) -> str:
    """Return the command that started the run, on one machine, with another `resume=`; empty if unknown."""
    _, *arguments = map(str, run.environment.get("command") or [""])
    if not arguments:
        return ""
    kept = [argument for argument in arguments if not argument.startswith("resume=")]
    return format_run(*kept, *more, num_processes=run.num_processes)


def _list_tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield the key figures: name, value, note."""
    curves = run.curves
    base, best, final = curves.base, curves.best, curves.final
    if best is not None:
        interval = "" if best.low is None else f"95 %: {format_interval(best.low, best.high)}"
        rows = f"{best.rows:,} rows" if best.rows else ""
        yield "Best validation loss", format_loss(best.loss), ", ".join(filter(None, (interval, rows)))
        if base is not None and base.loss:
            change = _format_change(best.loss / base.loss - 1, digits=0)
            yield "Against the base", change, f"whose loss is {format_loss(base.loss)}"
        last = "the last one" if best is final else f"last: {format_loss(final.loss)} at step {final.step:,}"
        yield "Best at step", f"{best.step:,}", last
    elif base is not None:
        interval = "" if base.low is None else format_interval(base.low, base.high)
        yield "Validation loss of the base", format_loss(base.loss), interval
    memory = [line.peak_memory_bytes for line in curves.training if line.peak_memory_bytes]
    if memory:
        yield "Peak memory", f"{max(memory) / 1e9:.1f} GB", ""
    speeds = sorted(line.tokens_per_second for line in curves.training if is_number(line.tokens_per_second))
    if speeds:
        yield "Speed", f"{speeds[len(speeds) // 2]:,.0f}", "tokens per second, median step"


def _format_validation(line: Validation, base: Validation | None) -> tuple[int | str, ...]:
    has_change = base is not None and line is not base and base.loss
    change = _format_change(line.loss / base.loss - 1, digits=1) if has_change else "–"
    return line.step, line.epoch, f"{line.loss:.4f}", format_interval(line.low, line.high), change, line.rows


def _format_change(share: float, *, digits: int) -> str:
    return f"{share:+.{digits}%}".replace("-", "−")


def _group_samples(samples: Sequence[Sample], *, is_finished: bool) -> Iterator[dict[str, Any]]:
    """Yield each prompt with its replies, ordered by step."""
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
            "row": row + 1,
            "messages": of_row[0].prompt,
            "reference": of_row[0].reference,
            "replies": replies,
            "columns": _choose_columns(len(replies) + 1),
        }


def _describe_forgetting(forgetting: Forgetting | None) -> dict[str, Any]:
    if forgetting is None:
        return {}
    worst_first = sorted(forgetting.answers, key=lambda one: -one.divergence / len(one.answer_ids))
    return {
        "sentence": forgetting.describe().removeprefix("forgetting: "),
        "adapter": forgetting.adapter,
        "asked": [one for one in worst_first if one.adapter_answer is not None],
        "rows": [
            (
                one.prompt,
                one.answer,
                f"{(one.adapter_loss - one.base_loss) / len(one.answer_ids):+.3f}".replace("-", "−"),
                f"{one.divergence / len(one.answer_ids):.3f}",
            )
            for one in worst_first
        ],
    }


def _choose_columns(count: int) -> int:
    """Return the number of columns that leaves the fewest cells empty, the larger one if equal."""
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
        return {}
    counts = ("rows", "tokens", "supervised_tokens", "longest_row")
    kinds = {"truncated": "split", "dropped": "kind"}
    parts = ("trained", "validated", "truncated", "dropped", *(["not_drawn"] if ledger.get("not_drawn") else []))
    return {
        "ledger_parts": {name: ledger[name] for name in parts},
        "ledger_sides": [(side, *(ledger[side][count] for count in counts)) for side in ("training", "validation")],
        "ledger_files": [(file["file"], file["read"], len(file["validation_lines"])) for file in ledger["files"]],
        "ledger_lists": {
            name: [(locate_row(ledger, row), row[kind], row["reason"]) for row in ledger[f"rows_{name}"]]
            for name, kind in kinds.items()
        },
    }


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
        (entry.get("started"), entry["step"], entry.get("device"), entry.get("git_revision") or "unknown")
        for entry in environment.get("resumed", [])
    ]
    return {"environment_rows": rows, "resumed_rows": resumed}


def _show(value: Any) -> str:
    """Return a value as in YAML, without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
