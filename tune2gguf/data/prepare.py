"""Data preparation: find, read, check, tokenize and split the rows of a run, and account for them in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from tune2gguf.data.ledger import RowLedger, make_ledger
from tune2gguf.data.packing import PackedRows, pack_rows
from tune2gguf.data.select import Dropped, Limits, Role, Selection, find_smallest_split, select_rows
from tune2gguf.data.sources import DataSource, find_source_problems, list_sources
from tune2gguf.data.token_cache import tokenize_once
from tune2gguf.data.tokenize import TokenizedFile, TokenizedRows

if TYPE_CHECKING:
    from tune2gguf.tokenizer.tokenizer import ChatTokenizer

MAX_PROBLEMS_SHOWN = 20
MAX_FILES_SHOWN = 5


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run. `ledger` is the content of data.json; the user sees its `notes` before training."""

    train: TokenizedRows
    validation: TokenizedRows
    ledger: RowLedger
    sequences: TokenizedRows | PackedRows  # what a step takes: the training rows, or packs of them

    @property
    def unit(self) -> str:
        """The name of a sequence: rows or packs."""
        return "rows" if self.sequences is self.train else "packs"

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, [sequences]."""
        lengths = self.train.lengths()
        if self.sequences is self.train:
            return lengths
        return np.array([lengths[pack].sum() for pack in self.sequences.packs])


def chat_dataset(
    files: str | Sequence[str] | None = None,
    *,
    tokenizer: ChatTokenizer,
    max_seq_len: int,
    seed: int,
    validation_files: str | Sequence[str] | None = None,
    validation_split: float | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    sources: Sequence[Mapping[str, Any]] | None = None,
    on_bad_row: str = "error",
    on_long_row: str = "truncate",
    long_row_overlap: int = 1,
    packing: bool = False,
) -> PreparedData:
    """Prepare the rows of a run. This is the `dataset` component of the configs.

    An epoch takes every training row once, or as often as the weight of its source says.

    Args:
        files: paths, globs, or hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]
        max_seq_len: tokens kept per row
        seed: selects the rows that validation_split holds out and that an epoch takes of a source
        validation_files: all of their rows are for validation; a row of `files` that repeats one is a bad row
        validation_split: fraction of the rows to hold out. A row's content decides: adding rows moves no other row
        format: row format, one of messages.FORMATS, or auto
        columns: part of the format -> its column, if their names differ
        prompt: template of the user's message, with columns in braces: "{instruction}\\n\\n{context}". A missing or
            empty column is left out with the text before it
        sources: instead of files, a list of mappings, each with its own files, validation_files, validation_split,
            format, columns and prompt, and with `weight` (how often an epoch takes each row) or `rows` (how many rows
            an epoch takes). Missing options are taken from above
        on_bad_row: error | drop, for rows that cannot be trained on and for repeated rows
        on_long_row: truncate | split | drop | error, for rows of more than max_seq_len tokens; split cuts raw texts
            into pieces of max_seq_len, and truncates conversations
        long_row_overlap: tokens that a piece repeats from the piece before; they are not trained again. With 1, the
            same tokens are trained as if the text fitted
        packing: train on sequences of max_seq_len with several rows each, without attention between rows

    Raises:
        ValueError: lists every problem, those of rows with file and line
    """
    options = {
        "files": files,
        "validation_files": validation_files,
        "validation_split": validation_split,
        "format": format,
        "columns": columns,
        "prompt": prompt,
        "sources": sources,
        "on_bad_row": on_bad_row,
        "on_long_row": on_long_row,
        "long_row_overlap": long_row_overlap,
        "packing": packing,
    }
    problems = check_files(options)
    if not problems and long_row_overlap >= max_seq_len:
        problems = [f"dataset.long_row_overlap={long_row_overlap} must be below max_seq_len={max_seq_len}"]
    if problems:
        raise ValueError("\n".join(problems))
    found = list_sources(options)
    tokenized, roles, problems = _tokenize_sources(found, tokenizer, stop_at_problem=on_bad_row == "error")
    # For on_long_row=error, long rows are dropped here and reported by _require_good_rows.
    limits = Limits(max_seq_len, "drop" if on_long_row == "error" else on_long_row, long_row_overlap)
    selection = select_rows(tokenized, roles, [source.share for source in found], seed=seed, limits=limits)
    _require_good_rows(selection, problems, on_bad_row=on_bad_row, on_long_row=on_long_row)
    _require_columns(tokenized)
    _require_rows(selection, tokenized, roles, seed=seed)
    train, validation = (
        TokenizedRows(tokenized, picks, max_seq_len, long_row_overlap)
        for picks in (selection.train, selection.validation)
    )
    ledger = make_ledger(tokenized, roles, found, selection, train=train, validation=validation)
    return PreparedData(train, validation, ledger, pack_rows(train, seed=seed) if packing else train)


def _tokenize_sources(
    sources: Sequence[DataSource], tokenizer: ChatTokenizer, *, stop_at_problem: bool
) -> tuple[list[TokenizedFile], list[Role], list[str]]:
    """Return the readable files, validation files first, their roles, and the problems of the other files."""
    tokenized, roles, problems = [], [], []
    for is_validation in (True, False):
        for number, source in enumerate(sources):
            role = Role(number, is_validation, 0.0 if is_validation else source.validation_split)
            for name in source.validation_files if is_validation else source.files:
                try:
                    file = tokenize_once(name, tokenizer, reader=source.reader, stop_at_problem=stop_at_problem)
                except ValueError as error:
                    problems.append(str(error))
                else:
                    tokenized.append(file)
                    roles.append(role)
    return tokenized, roles, problems


def check_files(dataset: Mapping[str, Any]) -> list[str]:
    """Return the problems of a `dataset` component's options and files. No row and no tokenizer is read."""
    return [*_find_option_problems(dataset), *find_source_problems(dataset)]


def _find_option_problems(dataset: Mapping[str, Any]) -> Iterator[str]:
    choices = {"on_bad_row": ("error", "drop"), "on_long_row": ("truncate", "split", "drop", "error")}
    for key, known in choices.items():
        value = dataset.get(key, known[0])
        if value not in known:
            yield f"dataset.{key}={value} is not one of {', '.join(known)}"
    if not isinstance(dataset.get("packing", False), bool):
        yield f"dataset.packing={dataset['packing']} must be true or false"
    overlap = dataset.get("long_row_overlap", 1)
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 1:
        yield (
            f"dataset.long_row_overlap={overlap} must be a whole number of at least 1: the first token of a piece is "
            "not trained, so the piece before must train it"
        )
    elif overlap > 1 and dataset.get("on_long_row") != "split":
        yield f"dataset.long_row_overlap={overlap} has no effect without dataset.on_long_row=split"


def _require_good_rows(selection: Selection, file_problems: list[str], *, on_bad_row: str, on_long_row: str) -> None:
    faulty = [row for row in selection.dropped if (on_long_row if row.kind == "long" else on_bad_row) == "error"]
    if not faulty and not file_problems:
        return
    groups = [list(rows) for _, rows in groupby(faulty, key=lambda row: (row.source.file, row.reason))]
    lines = [*file_problems, *(_describe_faulty(rows) for rows in groups[:MAX_PROBLEMS_SHOWN])]
    if len(groups) > MAX_PROBLEMS_SHOWN:
        lines.append(f"and {sum(map(len, groups[MAX_PROBLEMS_SHOWN:]))} more rows")
    if any(row.kind != "long" for row in faulty):
        lines.append("Correct these rows, or drop them with dataset.on_bad_row=drop")
    if any(row.kind == "nothing supervised" for row in faulty):
        lines.append("Raise max_seq_len to reach the replies beyond it")
    if any(row.kind == "long" for row in faulty):
        lines.append("Raise max_seq_len, or set dataset.on_long_row=truncate or drop (raw texts: split)")
    raise ValueError("\n".join(lines))


def _require_columns(files: Sequence[TokenizedFile]) -> None:
    """Raise ValueError for a column that no row of a file has: it is misspelled, or another file's."""
    problems = [
        f"{file.name}: column {name!r} of dataset.columns or dataset.prompt is empty or missing in every row"
        + (f"; unused columns are {', '.join(file.index.unused_keys)}" if file.index.unused_keys else "")
        for file in files
        for name, count in file.index.absent_columns.items()
        if count == len(file.index.lines)
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _require_rows(selection: Selection, files: Sequence[TokenizedFile], roles: Sequence[Role], *, seed: int) -> None:
    if not len(selection.train):
        dropped = f"; {len(selection.dropped)} rows were dropped" if selection.dropped else ""
        validation_rows = f"; {len(selection.validation)} are for validation" if len(selection.validation) else ""
        first = f", the first is {selection.dropped[0].source}: {selection.dropped[0].reason}" if dropped else ""
        names = ", ".join(file.name for file in files[:MAX_FILES_SHOWN]) + (", …" * (len(files) > MAX_FILES_SHOWN))
        raise ValueError(f"there is no row to train on in {names}{validation_rows}{dropped}{first}")
    fraction = max(role.validation_split for role in roles)
    if fraction and not len(selection.validation):
        raise ValueError(
            f"dataset.validation_split={fraction} holds out none of the {len(selection.train)} rows; "
            f"set at least {find_smallest_split(files, seed)}, or give validation_files"
        )


def _describe_faulty(rows: Sequence[Dropped]) -> str:
    """Return the problem of consecutive bad rows of a file that have the same one."""
    first, last = rows[0], rows[-1]
    same = "" if len(rows) == 1 else f"; the same in {len(rows) - 1} more, up to {last.source.unit} {last.source.line}"
    return f"{first.source}: {first.reason}{same}"
