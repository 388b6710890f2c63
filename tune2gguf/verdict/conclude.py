"""The end of a run: judge it, say what to try next and whether the last advice helped, and keep all that."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tune2gguf.files.atomic import write_text
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.read import (
    VERDICT_FILE,
    RecordedRun,
    _read_mapping,
    flatten_config,
    read_num_processes,
    read_recorded_run,
)
from tune2gguf.verdict.advice import Advice, Situation, advise
from tune2gguf.verdict.judge import GOOD_FIT, Verdict, judge
from tune2gguf.verdict.ledger import (
    LEDGER_FILE,
    Entry,
    Outcome,
    append_entry,
    compare_with_parent,
    describe_outcome,
    digest_validation_rows,
    find_family,
    list_tried,
    read_entries,
)

MAX_ADVICE = 8


def conclude_run(run_dir: str | Path) -> list[str]:
    """Judge and advise; write verdict.json, a line of the ledger and report.html; return what to say of it.

    Raises:
        ValueError: if the folder is not that of a run
    """
    run = read_recorded_run(Path(run_dir))
    verdict = judge(run.curves)
    outcome = None
    if run.parent_run is not None:
        outcome = compare_with_parent(run.run_dir, run.folder / run.parent_run)
    entry = _make_entry(run, verdict, outcome)
    entries = [one for one in read_entries(run.folder) if one.run != entry.run]
    advice = advise(verdict, run.curves, _describe_situation(run, [*entries, entry]))
    entry.advice.extend({"command": one.command, "changes": one.changes} for one in advice)
    _write_verdict(run, verdict, advice, outcome)
    append_entry(run.folder, entry)
    described = "" if outcome is None else describe_outcome(outcome, str(run.config["parent_run"]))
    lines = describe_verdict(verdict, advice, described)
    return [*lines, f"ledger: {os.path.relpath(run.folder / LEDGER_FILE)}", _write_report(run, verdict, advice)]


def recall_verdict(run_dir: str | Path) -> list[str]:
    """Return what a run said at its end of its verdict and the next command; nothing of one that has not ended.

    Raises:
        ValueError: if there is no such folder
    """
    from tune2gguf.report.folder import read_run_folder

    run = read_run_folder(Path(run_dir))
    return [] if run.verdict is None else describe_verdict(run.verdict, run.advice, run.outcome)


def describe_verdict(verdict: Verdict, advice: Sequence[Advice], outcome: str) -> list[str]:
    """Return verdict, how the run came out beside its parent, the reasons and the next command, a line each."""
    lines = [f"verdict: {verdict.label}", *filter(None, [outcome]), *(f"  {reason}" for reason in verdict.reasons)]
    shown = advice if verdict.label == GOOD_FIT else advice[:1]
    for one in shown:
        lines += [f"next: {one.reason} (guide, {one.guide_section})", f"  {one.command}"]
    if len(advice) > len(shown):
        lines.append(f"  {len(advice) - len(shown)} more to try, in this order: see report.html or {VERDICT_FILE}")
    return lines


def _make_entry(run: RecordedRun, verdict: Verdict, outcome: Outcome | None) -> Entry:
    final = run.curves.final
    return Entry(
        run=run.name,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config=flatten_config(run.config),
        data=run.data["fingerprint"],
        base=_digest_base(run.config["base_dir"]),
        heldout=digest_validation_rows(run.run_dir, final) if final is not None and final.row_losses else None,
        verdict=verdict.label,
        best=_describe_validation(run.curves.best),
        final=_describe_validation(final),
        parent_run=run.parent_run,
        outcome=outcome,
    )


def _digest_base(base_dir: str) -> str | None:
    from tune2gguf.base.digest import digest_base

    return digest_base(base_dir) if Path(base_dir).is_dir() else None


def _describe_validation(validation: Validation | None) -> dict[str, Any] | None:
    if validation is None:
        return None
    return {key: getattr(validation, key) for key in ("step", "loss", "low", "high", "rows")}


def _describe_situation(run: RecordedRun, entries: Sequence[Entry]) -> Situation:
    mine = entries[-1]
    family = find_family(entries, run.name, run.parent_run)
    return Situation(
        run_dir=str(run.run_dir),
        config=run.config,
        data=run.data,
        free_dirs=list_free_dirs(run.run_dir),
        num_processes=read_num_processes(run.run_dir),
        tried=list_tried(entries, family),
        past=[entry.config for entry in entries if (entry.data, entry.base) == (mine.data, mine.base)],
    )


def list_free_dirs(run_dir: Path) -> list[str]:
    """Return free folders beside a run's, NAME-2, NAME-3 …, as many as there may be advice."""
    stem, number, found = re.sub(r"-\d+$", "", run_dir.name), 2, []
    while len(found) < MAX_ADVICE:
        candidate = run_dir.with_name(f"{stem}-{number}")
        if not os.path.lexists(candidate):
            found.append(str(candidate))
        number += 1
    return found


def _write_verdict(run: RecordedRun, verdict: Verdict, advice: Sequence[Advice], outcome: Outcome | None) -> None:
    content = {
        "label": verdict.label,
        "reasons": list(verdict.reasons),
        "figures": verdict.figures,
        "advice": [asdict(one) for one in advice],
        "outcome": None if outcome is None else asdict(outcome),
    }
    write_text(run.run_dir / VERDICT_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_report(run: RecordedRun, verdict: Verdict, advice: Sequence[Advice]) -> str:
    try:
        from tune2gguf.report import write_report

        path = write_report(run.run_dir, verdict=verdict, advice=advice, is_finished=True)
    except Exception as error:  # all else of the run is written; a page about it must not make it fail
        return f"warning: the report could not be written: {type(error).__name__}: {error}"
    return f"report: {path}"


def read_verdict(run_dir: Path, config: Mapping[str, Any]) -> tuple[Verdict | None, tuple[Advice, ...], str]:
    """Return what verdict.json holds: verdict, advice, and how the run came out beside its parent.

    A run that has not ended has none.

    Raises:
        ValueError, KeyError, TypeError: if it is not a verdict's
    """
    path = run_dir / VERDICT_FILE
    if not path.is_file():
        return None, (), ""
    record = _read_mapping(path)
    verdict = Verdict(record["label"], tuple(record["reasons"]), record["figures"])
    advice = tuple(Advice(**entry) for entry in record["advice"])
    outcome = record.get("outcome")
    if outcome is None:
        return verdict, advice, ""
    return verdict, advice, describe_outcome(Outcome(**outcome), str(config.get("parent_run")))
