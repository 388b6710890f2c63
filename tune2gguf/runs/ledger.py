"""runs/ledger.jsonl: what every run of a folder was, how it came out, what was advised, and whether that helped.

Lines are only ever added, under a lock, so that runs that end at the same time do not mix theirs. A run that goes on,
or is extended, adds another line; the latest counts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tune2gguf.files.records import AnyRecord, make_record
from tune2gguf.runs.config_file import rename_components
from tune2gguf.runs.files import LEDGER_FILE, parse_text, split_lines
from tune2gguf.runs.verdict_file import Outcome, parse_outcome

_LOCK_SECONDS = 60


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
    best: dict[str, float | None] | None = None
    final: dict[str, float | None] | None = None
    advice: list[dict[str, Any]] = field(default_factory=list)
    parent_run: str | None = None
    outcome: Outcome | None = None


def append_entry(folder: Path, entry: Entry) -> None:
    """Add a line to the ledger of a folder of runs.

    Raises:
        ValueError: if another process holds the ledger for a minute
    """
    path = folder / LEDGER_FILE
    try:
        with FileLock(folder / f".{LEDGER_FILE}.lock", timeout=_LOCK_SECONDS), path.open("a+b") as file:
            if file.tell() > 0:
                # A writer that was killed may have left half a line; it must not swallow this one.
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read() == b"\n" else b"\n")
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except Timeout:
        raise ValueError(f"{path}: another process holds it; is one hanging?") from None


def read_entries(folder: Path) -> tuple[list[Entry], list[str]]:
    """Return the latest entry of each run, in the order of their first, and why lines were skipped.

    A line may be torn by a kill, or written by another program or version; the run adds its line when it ends again.
    """
    path = folder / LEDGER_FILE
    if not path.is_file():
        return [], []
    entries: dict[str, Entry] = {}
    problems = []
    for number, line in enumerate(split_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_text(line, _parse_entry, place="not an entry of a run")
        except ValueError as error:
            problems.append(f"{path}, line {number}: skipped, {error}")
            continue
        entries[entry.run] = entry
    return list(entries.values()), problems


def _parse_entry(values: Any) -> Entry:
    outcome = parse_outcome(make_record(AnyRecord, values).get("outcome"))
    entry = make_record(Entry, {**values, "outcome": outcome})
    return replace(entry, config=rename_components(entry.config))
