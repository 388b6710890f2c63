"""runs/ledger.jsonl: what every run of a folder was, how it came out, what was advised, and whether that helped.

Lines are only ever added, under a lock, so that runs that end at the same time do not mix theirs. A run that goes on,
or is extended, adds another line; the latest counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tune2gguf.data.validation_rows import VALIDATION_FILE
from tune2gguf.runs.curves import Validation, read_curves
from tune2gguf.verdict.advice import describe_change
from tune2gguf.verdict.judge import MIN_ROWS

LEDGER_FILE = "ledger.jsonl"
_LOCK_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """A run beside its parent, on the validation rows that both measured; losses of their best adapters.

    Attributes:
        helped: whether the loss fell; None where the rows do not tell
        difference: of the token-weighted mean losses, this run's minus its parent's, in nats; with a 95 % interval
        rows: validation rows compared
        final_difference: the same of the last adapters
        problem: why there is no comparison; the other fields then say nothing
    """

    helped: bool | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int = 0
    final_difference: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        run: folder of the run, relative to the ledger's
        time: when it was judged, ISO 8601
        parent_run: the run whose advice it follows, relative to the ledger's folder
        config: flat, components with dots, resolved
        data: fingerprint of training and validation rows
        base: digest of the base
        heldout: digest of the validation rows that were measured; only runs with the same are ranked together
        best, final: step, loss, low and high of the validation
        advice: command and changes of each
        outcome: beside the parent
    """

    run: str
    time: str
    config: dict[str, Any]
    data: str
    base: str | None
    heldout: str | None
    verdict: str
    best: dict[str, float] | None = None
    final: dict[str, float] | None = None
    advice: list[dict[str, Any]] = field(default_factory=list)
    parent_run: str | None = None
    outcome: Outcome | None = None


def append_entry(folder: Path, entry: Entry) -> None:
    """Add a line to the ledger of a folder of runs.

    Raises:
        ValueError: if another process holds the ledger for a minute
    """
    from filelock import FileLock, Timeout

    path = folder / LEDGER_FILE
    try:
        with FileLock(folder / f".{LEDGER_FILE}.lock", timeout=_LOCK_SECONDS), path.open("a+b") as file:
            # A writer that was killed may have left half a line; it must not swallow this one.
            is_torn = file.tell() > 0 and _read_last_byte(path) != b"\n"
            file.write(b"\n" * is_torn + json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except Timeout:
        raise ValueError(f"{path}: another process holds it; is one hanging?") from None


def read_entries(folder: Path) -> list[Entry]:
    """Return the latest entry of each run, in the order of their first; half a line is left out."""
    path = folder / LEDGER_FILE
    if not path.is_file():
        return []
    entries: dict[str, Entry] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill; the run adds its line again when it goes on
        outcome = record.pop("outcome", None)
        known = {name: value for name, value in record.items() if name in Entry.__dataclass_fields__}
        entries[record["run"]] = Entry(**known, outcome=Outcome(**outcome) if outcome else None)
    return list(entries.values())


def _read_last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def find_family(entries: Sequence[Entry], run: str, parent_run: str | None) -> set[str]:
    """Return a run, the runs whose advice led to it, and all runs that followed advice of one of those."""
    parents = {entry.run: entry.parent_run for entry in entries} | {run: parent_run}
    line = {run}
    while (parent := parents.get(run)) is not None and parent not in line:
        line.add(parent)
        run = parent
    return line | {child for child, parent in parents.items() if parent in line}


def list_tried(entries: Sequence[Entry], family: set[str]) -> frozenset[frozenset[tuple[str, str]]]:
    """Return the changes, by key and direction, that brought no gain to a run of the family over its parent."""
    by_run = {entry.run: entry for entry in entries}
    tried = set()
    for entry in entries:
        parent = by_run.get(entry.parent_run)
        is_known = parent is not None and entry.outcome is not None and entry.outcome.problem is None
        if entry.run in family and is_known and entry.outcome.helped is not True:
            tried.add(describe_change(parent.config, entry.config))
    return frozenset(tried)


def read_row_losses(run_dir: Path, validation: Validation) -> dict[str, tuple[float, int]]:
    """Return summed loss and tokens of each measured validation row, by the digest of its text and tokens."""
    lines = (run_dir / VALIDATION_FILE).read_text(encoding="utf-8").splitlines()
    indices = validation.row_indices or range(len(validation.row_losses))
    found = {}
    for index, loss, tokens in zip(indices, validation.row_losses, validation.row_tokens, strict=True):
        record = json.loads(lines[index])
        content = json.dumps([record["messages"], record["text"], tokens], sort_keys=True)
        found[hashlib.sha256(content.encode()).hexdigest()] = (loss, tokens)
    return found


def digest_validation_rows(run_dir: Path, validation: Validation) -> str:
    """Return one digest of the validation rows that a run measured, whatever their order."""
    return hashlib.sha256("".join(sorted(read_row_losses(run_dir, validation))).encode()).hexdigest()


def compare_with_parent(run_dir: Path, parent_dir: Path) -> Outcome:
    """Compare a run with its parent on the validation rows that both measured, row by row."""
    try:
        mine, theirs = read_curves(run_dir), read_curves(parent_dir)
    except ValueError as error:
        return Outcome(problem=str(error))
    for name, curves in ((run_dir, mine), (parent_dir, theirs)):
        if curves.best is None or not curves.best.row_losses:
            return Outcome(problem=f"{name} has no validation losses row by row")
    best = [read_row_losses(run_dir, mine.best), read_row_losses(parent_dir, theirs.best)]
    final = [read_row_losses(run_dir, mine.final), read_row_losses(parent_dir, theirs.final)]
    common = sorted(best[0].keys() & best[1].keys() & final[0].keys() & final[1].keys())
    if len(common) < MIN_ROWS:
        return Outcome(problem=f"the two have {len(common)} validation rows in common, which is too few to compare")
    return _compare_rows(best, final, common)


def _compare_rows(best: list[Mapping], final: list[Mapping], common: list[str]) -> Outcome:
    import numpy as np

    from tune2gguf.runs.intervals import estimate_ratio

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
    """Return the sentence that a run says of itself beside its parent."""
    if outcome.problem is not None:
        return f"beside {parent_run}: not comparable; {outcome.problem}"
    verdict = {True: "it helped", False: "it did not help", None: "undecided"}[outcome.helped]
    return (
        f"beside {parent_run}: {verdict}; validation loss of the best adapter {outcome.difference:+.4f} nats a token "
        f"(95 % interval {outcome.low:+.4f} to {outcome.high:+.4f}, {outcome.rows} rows), of the last "
        f"{outcome.final_difference:+.4f}"
    )
