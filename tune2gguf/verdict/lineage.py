"""The lineage of a run: its comparison with the parent run, and the changes that its family tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tune2gguf.runs.curves import read_curves
from tune2gguf.runs.intervals import estimate_ratio
from tune2gguf.runs.ledger import Entry
from tune2gguf.runs.validation_rows import read_row_losses
from tune2gguf.runs.verdict_file import Outcome
from tune2gguf.verdict.advice import describe_change
from tune2gguf.verdict.judge import MIN_ROWS


def find_family(entries: Sequence[Entry], run: str, parent_run: str | None) -> set[str]:
    """Return a run, its ancestors by parent_run, and the children of all of these."""
    parents = {entry.run: entry.parent_run for entry in entries} | {run: parent_run}
    line = {run}
    while (parent := parents.get(run)) is not None and parent not in line:
        line.add(parent)
        run = parent
    return line | {child for child, parent in parents.items() if parent in line}


def list_tried(entries: Sequence[Entry], family: set[str]) -> frozenset[frozenset[tuple[str, str]]]:
    """Return the changes, by key and direction, that did not help a run of the family over its parent."""
    by_run = {entry.run: entry for entry in entries}
    tried = set()
    for entry in entries:
        parent = by_run.get(entry.parent_run)
        is_known = parent is not None and entry.outcome is not None and entry.outcome.problem is None
        if entry.run in family and is_known and entry.outcome.helped is not True:
            tried.add(describe_change(parent.config, entry.config))
    return frozenset(tried)


def compare_with_parent(run_dir: Path, parent_dir: Path) -> Outcome:
    """Compare a run with its parent, row by row, on the validation rows that both measured."""
    try:
        mine, theirs = read_curves(run_dir), read_curves(parent_dir)
    except ValueError as error:
        return Outcome(problem=str(error))
    for name, curves in ((run_dir, mine), (parent_dir, theirs)):
        if curves.best is None or not curves.best.row_losses:
            return Outcome(problem=f"{name} has no validation losses of single rows")
    best = [read_row_losses(run_dir, mine.best), read_row_losses(parent_dir, theirs.best)]
    final = [read_row_losses(run_dir, mine.final), read_row_losses(parent_dir, theirs.final)]
    common = sorted(best[0].keys() & best[1].keys() & final[0].keys() & final[1].keys())
    if len(common) < MIN_ROWS:
        return Outcome(problem=f"the two have {len(common)} validation rows in common, too few to compare")
    return _compare_rows(best, final, common)


def _compare_rows(best: list[Mapping], final: list[Mapping], common: list[str]) -> Outcome:
    tokens = np.array([best[0][row][1] for row in common], np.float64)
    differences = np.array([best[0][row][0] - best[1][row][0] for row in common])
    estimate = estimate_ratio(differences, tokens)
    last = sum(final[0][row][0] - final[1][row][0] for row in common) / tokens.sum()
    return Outcome(
        helped=True if estimate.high < 0 else False if estimate.low > 0 else None,
        difference=estimate.value,
        low=estimate.low,
        high=estimate.high,
        rows=len(common),
        final_difference=float(last),
    )


def describe_outcome(outcome: Outcome, parent_run: str) -> str:
    """Return the line that compares a run with its parent."""
    if outcome.problem is not None:
        return f"beside {parent_run}: not comparable; {outcome.problem}"
    verdict = {True: "it helped", False: "it did not help", None: "undecided"}[outcome.helped]
    return (
        f"beside {parent_run}: {verdict}; validation loss of the best adapter {outcome.difference:+.4f} nats a token "
        f"(95 % interval {outcome.low:+.4f} to {outcome.high:+.4f}, {outcome.rows} rows), of the last "
        f"{outcome.final_difference:+.4f}"
    )
