"""The conclusion of a run: its verdict, advice for the next and the comparison with its parent, all recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import count, islice
from pathlib import Path
from typing import Any

from tune2gguf.base.digest import digest_base
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.files import LEDGER_FILE, VERDICT_FILE, shorten_path
from tune2gguf.runs.ledger import Entry, append_entry, read_entries
from tune2gguf.runs.run import Run
from tune2gguf.runs.validation_rows import digest_validation_rows
from tune2gguf.runs.verdict_file import Conclusion, Outcome, Verdict, write_conclusion
from tune2gguf.verdict.advice import Situation, advise
from tune2gguf.verdict.judge import GOOD_FIT, judge
from tune2gguf.verdict.lineage import compare_with_parent, describe_outcome, find_family, list_tried

MAX_ADVICE = 8


def conclude_run(run_dir: str | Path) -> list[str]:
    """Judge a run and advise the next. Write verdict.json and a ledger line. Return the lines to print."""
    run = Run(Path(run_dir))
    outcome = None
    if run.parent_run is not None:
        outcome = compare_with_parent(run.run_dir, run.runs_dir / run.parent_run)
    verdict = judge(run.curves)
    entry = _make_entry(run, verdict, outcome)
    entries, problems = read_entries(run.runs_dir)
    entries = [one for one in entries if one.run != entry.run]
    advice = advise(verdict, run.curves, _describe_situation(run, [*entries, entry]))
    entry.advice.extend({"command": one.command, "changes": one.changes} for one in advice)
    conclusion = Conclusion(verdict, tuple(advice), outcome)
    write_conclusion(run.run_dir, conclusion)
    append_entry(run.runs_dir, entry)
    notes = [f"note: {problem}" for problem in problems]
    return [*_describe_conclusion(run, conclusion), *notes, f"ledger: {shorten_path(run.runs_dir / LEDGER_FILE)}"]


def recall_verdict(run_dir: str | Path) -> list[str]:
    """Return the lines that a run printed at its end: verdict and next command. [] for an unfinished run."""
    run = Run(Path(run_dir))
    return [] if run.conclusion is None else _describe_conclusion(run, run.conclusion)


def _describe_conclusion(run: Run, conclusion: Conclusion) -> list[str]:
    """Return the lines of a conclusion: verdict, comparison with the parent, reasons, next command."""
    verdict, advice, outcome = conclusion.verdict, conclusion.advice, conclusion.outcome
    lines = [f"verdict: {verdict.label}"]
    lines += [] if outcome is None else [describe_outcome(outcome, str(run.config.get("parent_run")))]
    lines += [f"  {reason}" for reason in verdict.reasons]
    lines += [] if run.forgetting is None else [run.forgetting.describe()]
    shown = advice if verdict.label == GOOD_FIT else advice[:1]
    for one in shown:
        lines += [f"next: {one.reason} (guide, {one.guide_section})", f"  {one.command}"]
    if len(advice) > len(shown):
        lines.append(f"  {len(advice) - len(shown)} more to try, in this order: see report.html or {VERDICT_FILE}")
    return lines


def _make_entry(run: Run, verdict: Verdict, outcome: Outcome | None) -> Entry:
    final, base_dir = run.curves.final, Path(run.config["base_dir"])
    return Entry(
        run=run.name,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config=run.flat_config,
        data=run.data["fingerprint"],
        base=digest_base(base_dir) if base_dir.is_dir() else None,
        heldout=digest_validation_rows(run.run_dir, final) if final is not None and final.row_losses else None,
        verdict=verdict.label,
        best=_describe_validation(run.curves.best),
        final=_describe_validation(final),
        parent_run=run.parent_run,
        outcome=outcome,
    )


def _describe_validation(validation: Validation | None) -> dict[str, Any] | None:
    if validation is None:
        return None
    return {key: getattr(validation, key) for key in ("step", "loss", "low", "high", "rows")}


def _describe_situation(run: Run, entries: Sequence[Entry]) -> Situation:
    mine = entries[-1]
    family = find_family(entries, run.name, run.parent_run)
    return Situation(
        run_dir=str(run.run_dir),
        config=run.config,
        data=run.data,
        free_dirs=list_free_dirs(run.run_dir),
        num_processes=run.num_processes,
        forgetting=run.forgetting,
        tried=list_tried(entries, family),
        past=[entry.config for entry in entries if (entry.data, entry.base) == (mine.data, mine.base)],
    )


def list_free_dirs(run_dir: Path) -> list[str]:
    """Return MAX_ADVICE free folders beside a run's: NAME-2, NAME-3 …"""
    stem = re.sub(r"-\d+$", "", run_dir.name)
    candidates = (run_dir.with_name(f"{stem}-{number}") for number in count(2))
    return [*islice((str(path) for path in candidates if not os.path.lexists(path)), MAX_ADVICE)]
