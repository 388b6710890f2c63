"""runs/ledger.jsonl: config, verdict, advice and outcome of every run of a folder.

Lines are only appended, under a lock: runs may end at the same time. A resumed or extended run appends another line;
its latest line counts.
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
        run: run folder, relative to the ledger's folder
        time: time of the verdict, ISO 8601
        parent_run: run whose advice this one follows, relative to the ledger's folder
        config: resolved and flat, nested keys joined with dots
        data: fingerprint of training and validation rows
        base: digest of the base
        heldout: digest of the measured validation rows; only runs with equal digests are ranked together
        best, final: step, loss, low and high of the validation
        advice: command and changes of each advice
        outcome: comparison with the parent run
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
    """Append a line to the ledger in a folder of runs.

    Raises:
        ValueError: if another process holds the ledger's lock for 60 s
    """
    path = folder / LEDGER_FILE
    try:
        with FileLock(folder / f".{LEDGER_FILE}.lock", timeout=_LOCK_SECONDS), path.open("a+b") as file:
            if file.tell() > 0:
                # End half a line of a killed writer first.
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read() == b"\n" else b"\n")
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except Timeout:
        raise ValueError(
            f"{path}: locked by another process for more than {_LOCK_SECONDS} s; end that process and try again"
        ) from None


def read_entries(folder: Path) -> tuple[list[Entry], list[str]]:
    """Return the latest entry of each run, in the order of first entries, and the problems of skipped lines.

    A line may be cut by a kill, or come from another program or version; the run appends its line when it ends again.
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
