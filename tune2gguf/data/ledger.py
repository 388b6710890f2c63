"""data.json, the ledger of a run's rows: read = trained + validated + truncated + dropped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from tune2gguf.data.rows import Source, find_revision
from tune2gguf.data.select import Role, Selection
from tune2gguf.data.sources import DataSource
from tune2gguf.data.tokenize import RAW_TEXT, TokenizedFile, TokenizedRows

MAX_LINES_SHOWN = 5
_OTHERS = "\0"  # for system prompts that a file's index does not list; no row holds a NUL byte


class _RowLedgerOfVersion1(TypedDict):
    read: int
    trained: int
    validated: int
    truncated: int
    dropped: int
    max_seq_len: int
    training: dict[str, int]
    validation: dict[str, int]
    fingerprint: str
    notes: list[str]
    files: list[dict[str, Any]]
    rows_truncated: list[dict[str, Any]]
    rows_dropped: list[dict[str, Any]]


class RowLedger(_RowLedgerOfVersion1, total=False):
    """The content of data.json.

    `read` counts the rows of all files and is the sum of the four counts after it: `trained` and `validated` whole
    rows, `truncated` rows of either split that were cut to max_seq_len, `dropped` rows that are not used.
    `training` and `validation` hold rows, tokens, supervised_tokens and longest_row. `files` has one record per file.
    Truncated and dropped rows are listed with file, line and reason, validation rows with file and line. All others are
    trained on. In files with `unit` row, a line is a row number. `system_prompt` is the one that all training rows
    share, or None. `rows_with_tools` counts training rows that define tools.

    `rows_split` lists raw texts that are split into pieces of max_seq_len. `trained` and `validated` count such a text
    as one row, `training` and `validation` count its pieces. `not_drawn` counts rows that the share of their source
    leaves out; `lines_not_drawn` of a file lists them. With these, read = trained + validated + truncated + dropped +
    not_drawn. `sources` has the counts of each source. A row that an epoch takes twice is two rows of `training`.
    """

    system_prompt: str | None
    rows_with_tools: int
    not_drawn: int
    rows_split: list[dict[str, Any]]
    sources: list[dict[str, Any]]


def make_ledger(
    files: Sequence[TokenizedFile],
    roles: Sequence[Role],
    sources: Sequence[DataSource],
    selection: Selection,
    *,
    train: TokenizedRows,
    validation: TokenizedRows,
) -> RowLedger:
    """Return the content of data.json."""
    cut = Counter(row.split for row in selection.truncated)
    return {
        "read": sum(file.index.num_read for file in files),
        "trained": _count_rows(train) - cut["train"],
        "validated": _count_rows(validation) - cut["validation"],
        "truncated": len(selection.truncated),
        "dropped": len(selection.dropped),
        "not_drawn": sum(map(len, selection.not_drawn.values())),
        "max_seq_len": train.max_seq_len,
        "training": _count_tokens(train),
        "validation": _count_tokens(validation),
        "fingerprint": compute_fingerprint(train, validation),
        "notes": list_notes(files, selection, train=train),
        "sources": [*_describe_sources(files, roles, sources, train=train, validation=validation)],
        "files": [_describe_file(number, file, selection, validation) for number, file in enumerate(files)],
        "rows_truncated": [
            {
                "file": row.source.file,
                "line": row.source.line,
                "split": row.split,
                "tokens": row.num_tokens,
                "reason": f"{row.num_tokens} tokens; the last {row.num_tokens - train.max_seq_len} were cut",
            }
            for row in selection.truncated
        ],
        "rows_split": [
            {
                "file": row.source.file,
                "line": row.source.line,
                "split": row.split,
                "tokens": row.num_tokens,
                "pieces": row.num_pieces,
            }
            for row in selection.pieces
        ],
        "rows_dropped": [
            {"file": row.source.file, "line": row.source.line, "kind": row.kind, "reason": row.reason}
            for row in selection.dropped
        ],
        "system_prompt": _find_system_prompt(train),
        "rows_with_tools": sum(
            int(np.count_nonzero(file.index.has_tools[train.picks[train.picks[:, 0] == number, 1]]))
            for number, file in enumerate(train.files)
        ),
    }


def _count_rows(rows: TokenizedRows) -> int:
    """Return the number of distinct rows. Repeated picks and pieces of a row count once."""
    return len(np.unique(rows.picks[:, :2], axis=0))


def _describe_file(number: int, file: TokenizedFile, selection: Selection, validation: TokenizedRows) -> dict[str, Any]:
    held_out = np.unique(validation.picks[validation.picks[:, 0] == number, 1])
    return {
        "file": file.name,
        "revision": find_revision(file.name),
        "format": file.index.format,
        "unit": file.index.unit,
        "read": file.index.num_read,
        "validation_lines": file.index.lines[held_out].tolist(),
        "lines_not_drawn": file.index.lines[selection.not_drawn.get(number, [])].tolist(),
    }


def _describe_sources(
    files: Sequence[TokenizedFile],
    roles: Sequence[Role],
    sources: Sequence[DataSource],
    *,
    train: TokenizedRows,
    validation: TokenizedRows,
) -> Iterator[dict[str, Any]]:
    source_of = np.array([role.source for role in roles])
    for number, source in enumerate(sources):
        own = train.take(np.flatnonzero(source_of[train.picks[:, 0]] == number))
        held_out = validation.take(np.flatnonzero(source_of[validation.picks[:, 0]] == number))
        yield {
            "files": [*source.files, *source.validation_files],
            "read": sum(file.index.num_read for file, role in zip(files, roles, strict=True) if role.source == number),
            "trained": _count_rows(own),
            "validated": _count_rows(held_out),
            "rows_per_epoch": len(own),
            "tokens_per_epoch": int(own.lengths().sum()),
        }


def _count_system_prompts(train: TokenizedRows) -> Counter[str | None]:
    """Return system prompt (None: without one) -> number of training conversations."""
    counts: Counter[str | None] = Counter()
    for number, file in enumerate(train.files):
        rows = train.picks[train.picks[:, 0] == number, 1]
        prompts = [*file.index.system_prompts, _OTHERS]
        for prompt, count in zip(*np.unique(file.index.system_numbers[rows], return_counts=True), strict=True):
            if prompt != RAW_TEXT:
                counts[prompts[prompt]] += int(count)
    return counts


def _find_system_prompt(train: TokenizedRows) -> str | None:
    counts = _count_system_prompts(train)
    return next(iter(counts)) if len(counts) == 1 and _OTHERS not in counts else None


def _describe_system_prompts(train: TokenizedRows) -> Iterator[str]:
    """Yield a note if the training rows do not share one system prompt."""
    counts = _count_system_prompts(train)
    num_without, num_different = counts.pop(None, 0), len(counts)
    if num_different + bool(num_without) > 1 or _OTHERS in counts:
        at_least, plural = "at least " * (_OTHERS in counts), "s" * (num_different > 1)
        without = f", and {num_without} rows have none" if num_without else ""
        yield (
            f"the training rows have {at_least}{num_different} system prompt{plural}{without}; "
            "the Modelfile gets a system prompt only if all rows share it"
        )


def _count_tokens(rows: TokenizedRows) -> dict[str, int]:
    lengths = rows.lengths()
    return {
        "rows": len(rows),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(rows.supervised_lengths().sum()),
        "longest_row": int(lengths.max(initial=0)),
    }


def locate_row(ledger: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the file and line of a truncated or dropped row of data.json; its row number if the file has no lines."""
    units = {file["file"]: file["unit"] for file in ledger["files"]}
    return str(Source(row["file"], row["line"], units.get(row["file"], "line")))


def list_notes(files: Sequence[TokenizedFile], selection: Selection, *, train: TokenizedRows) -> list[str]:
    """Return the notes to show before training starts."""
    notes = []
    if selection.truncated:
        longest = max(row.num_tokens for row in selection.truncated)
        notes.append(
            f"rows longer than max_seq_len={train.max_seq_len}, truncated: {len(selection.truncated)}; "
            f"max_seq_len={longest} keeps every row whole"
        )
    if selection.pieces:
        pieces = sum(row.num_pieces for row in selection.pieces)
        notes.append(
            f"texts longer than max_seq_len={train.max_seq_len}, split: {len(selection.pieces)}, into "
            f"{pieces} pieces; consecutive pieces overlap by {train.overlap}"
        )
    if selection.dropped:
        reasons = _list_some([f"{row.source}: {row.reason}" for row in selection.dropped], "; ")
        notes.append(f"rows dropped: {len(selection.dropped)} ({reasons}); data.json lists them")
    for file in files:
        if file.index.unused_keys:
            unused = [f"{key} ({count} rows)" for key, count in file.index.unused_keys.items()]
            notes.append(f"{file.name}: read as {file.index.format}; unused keys: {_list_some(unused)}")
        if file.index.absent_columns:
            absent = [f"{name} ({count} rows)" for name, count in file.index.absent_columns.items()]
            notes.append(f"{file.name}: columns left out because empty or missing: {_list_some(absent)}")
        if file.index.num_ended:
            notes.append(
                f"{file.name}: rows with an end-of-turn token at the end of a turn: {file.index.num_ended}; "
                "removed, because the chat template adds its own"
            )
        if file.index.num_stripped:
            notes.append(
                f"{file.name}: rows with white space around a message: {file.index.num_stripped}; "
                "removed, because no template strips it when serving"
            )
        lines = file.index.lines_written_otherwise
        if lines:
            notes.append(
                f"{file.name}: rows with unprintable characters in tools or calls: {len(lines)} "
                f"({file.index.unit}s {_list_some(lines)}); trained as they are, but Ollama's template escapes them"
            )
        lines = file.index.lines_that_spell_special
        if lines:
            notes.append(
                f"{file.name}: rows that spell a special token: {len(lines)} ({file.index.unit}s {_list_some(lines)}); "
                "trained as plain text, but a server reads it as the token"
            )
    notes += _describe_system_prompts(train)
    return notes


def _list_some(values: Sequence[Any], separator: str = ", ") -> str:
    shown = [*map(str, values[:MAX_LINES_SHOWN]), *["…"] * (len(values) > MAX_LINES_SHOWN)]
    return separator.join(shown)


def compute_fingerprint(train: TokenizedRows, validation: TokenizedRows) -> str:
    """Return a digest of the rows' content, order, split and max_seq_len."""
    hasher = hashlib.blake2b(digest_size=16)
    for rows in (train, validation):
        hasher.update(np.int64([len(rows), rows.max_seq_len]).tobytes())
        hasher.update(rows.row_digests().tobytes())
        if rows.picks[:, 2].any():
            hasher.update(rows.picks[:, 2].tobytes())
            hasher.update(np.int64([rows.overlap]).tobytes())
    return hasher.hexdigest()
