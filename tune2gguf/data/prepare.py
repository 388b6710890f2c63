"""Files to the rows of a run: found, read, checked, tokenized, split, and accounted for in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tune2gguf.data.ledger import RowLedger, make_ledger
from tune2gguf.data.messages import FORMATS
from tune2gguf.data.packing import PackedRows, pack_rows
from tune2gguf.data.rows import find_files
from tune2gguf.data.select import Selection, find_smallest_split, select_rows
from tune2gguf.data.token_cache import tokenize_once
from tune2gguf.data.tokenize import TokenizedFile, TokenizedRows

if TYPE_CHECKING:
    from tune2gguf.tokenizer.tokenizer import ChatTokenizer

MAX_PROBLEMS_SHOWN = 20
MAX_FILES_SHOWN = 5


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run. `ledger` is what data.json holds; its `notes` are for the user to see before training."""

    train: TokenizedRows
    validation: TokenizedRows
    ledger: RowLedger
    sequences: TokenizedRows | PackedRows  # what a step takes: the training rows, or packs of them

    @property
    def unit(self) -> str:
        """What a sequence is called."""
        return "rows" if self.sequences is self.train else "packs"

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, [sequences]."""
        lengths = self.train.lengths()
        if self.sequences is self.train:
            return lengths
        return np.array([lengths[pack].sum() for pack in self.sequences.packs])


def chat_dataset(
    files: str | Sequence[str],
    *,
    tokenizer: ChatTokenizer,
    max_seq_len: int,
    seed: int,
    validation_files: str | Sequence[str] | None = None,
    validation_split: float | None = None,
    format: str = "auto",
    on_bad_row: str = "error",
    on_long_row: str = "truncate",
    packing: bool = False,
) -> PreparedData:
    """Prepare the rows of a run: the component `dataset` of the configs.

    Args:
        files: paths, globs, or hub:OWNER/NAME[/CONFIG][:SPLIT]
        max_seq_len: tokens that are kept of a row
        seed: decides which rows validation_split holds out
        validation_files: all their rows are for validation; a row of `files` that also stands in them is a bad row
        validation_split: fraction of the rows to hold out; a row's content decides, so that it keeps its side when
            rows are added
        format: the shape of the rows, one of messages.FORMATS, or auto
        on_bad_row: error | drop, for rows that cannot be trained on and for repeated ones
        on_long_row: truncate | drop | error, for rows of more than max_seq_len tokens
        packing: train on sequences of max_seq_len that hold several rows, none of which sees another

    Raises:
        ValueError: with every problem found, those of rows with file and line
    """
    options = {
        "files": files,
        "validation_files": validation_files,
        "validation_split": validation_split,
        "format": format,
        "on_bad_row": on_bad_row,
        "on_long_row": on_long_row,
        "packing": packing,
    }
    problems = check_files(options)
    if problems:
        raise ValueError("\n".join(problems))
    validation_names = [] if validation_files is None else find_files(validation_files)
    names = [*validation_names, *find_files(files)]
    tokenized, problems = _tokenize_files(names, tokenizer, format=format, stop_at_problem=on_bad_row == "error")
    selection = select_rows(
        tokenized,
        num_validation_files=len(validation_names),
        validation_split=0.0 if validation_split is None else validation_split,
        seed=seed,
        max_seq_len=max_seq_len,
        keep_long=on_long_row == "truncate",
    )
    _require_good_rows(selection, problems, on_bad_row=on_bad_row, on_long_row=on_long_row)
    _require_rows(selection, tokenized, validation_split=validation_split, seed=seed)
    train = TokenizedRows(tokenized, np.array(selection.train, np.int64).reshape(-1, 2), max_seq_len)
    validation = TokenizedRows(tokenized, np.array(selection.validation, np.int64).reshape(-1, 2), max_seq_len)
    ledger = make_ledger(tokenized, selection, train=train, validation=validation)
    return PreparedData(train, validation, ledger, pack_rows(train, seed=seed) if packing else train)


def _tokenize_files(
    names: Sequence[str], tokenizer: ChatTokenizer, *, format: str, stop_at_problem: bool
) -> tuple[list[TokenizedFile], list[str]]:
    """Return the files that can be read, and what is wrong with those that cannot."""
    tokenized, problems = [], []
    for name in names:
        try:
            tokenized.append(tokenize_once(name, tokenizer, format=format, stop_at_problem=stop_at_problem))
        except ValueError as error:
            problems.append(str(error))
    return tokenized, problems


def check_files(dataset: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the options and files of a `dataset` component, before a row or a tokenizer is read."""
    return [*_find_option_problems(dataset), *_find_file_problems(dataset)]


def _find_option_problems(dataset: Mapping[str, Any]) -> Iterator[str]:
    choices = {
        "format": ("auto", *FORMATS),
        "on_bad_row": ("error", "drop"),
        "on_long_row": ("truncate", "drop", "error"),
    }
    for key, known in choices.items():
        value = dataset.get(key, known[0])
        if value not in known:
            yield f"dataset.{key}={value} is not one of {', '.join(known)}"
    if not isinstance(dataset.get("packing", False), bool):
        yield f"dataset.packing={dataset['packing']} must be true or false"
    fraction = dataset.get("validation_split")
    if fraction is not None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
            yield f"dataset.validation_split={fraction} must be a fraction from 0 up to, not including, 1"
        elif fraction > 0 and dataset.get("validation_files") is not None:
            yield "dataset.validation_files and dataset.validation_split are both given; set one of them to null"


def _find_file_problems(dataset: Mapping[str, Any]) -> Iterator[str]:
    for key in ("files", "validation_files"):
        value = dataset.get(key)
        if value is None and key == "validation_files":
            continue
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
        if not names:
            yield f"dataset.{key}={value} names no file"
            continue
        try:
            find_files(names)
        except ValueError as error:
            yield str(error)


def _require_good_rows(selection: Selection, file_problems: list[str], *, on_bad_row: str, on_long_row: str) -> None:
    faulty = [row for row in selection.dropped if (on_long_row if row.kind == "long" else on_bad_row) == "error"]
    if not faulty and not file_problems:
        return
    lines = [*file_problems, *(f"{row.source}: {row.reason}" for row in faulty[:MAX_PROBLEMS_SHOWN])]
    if len(faulty) > MAX_PROBLEMS_SHOWN:
        lines.append(f"and {len(faulty) - MAX_PROBLEMS_SHOWN} more")
    if any(row.kind != "long" for row in faulty):
        lines.append("Correct these rows, or leave them out with dataset.on_bad_row=drop")
    if any(row.kind == "nothing supervised" for row in faulty):
        lines.append("A larger max_seq_len would reach the replies that lie behind it")
    if any(row.kind == "long" for row in faulty):
        lines.append("Raise max_seq_len, or set dataset.on_long_row=truncate or drop")
    raise ValueError("\n".join(lines))


def _require_rows(
    selection: Selection, files: Sequence[TokenizedFile], *, validation_split: float | None, seed: int
) -> None:
    if not selection.train:
        dropped = f"; {len(selection.dropped)} rows were dropped" if selection.dropped else ""
        validation_rows = f"; {len(selection.validation)} are for validation" if selection.validation else ""
        first = f", the first is {selection.dropped[0].source}: {selection.dropped[0].reason}" if dropped else ""
        names = ", ".join(file.name for file in files[:MAX_FILES_SHOWN]) + (", …" * (len(files) > MAX_FILES_SHOWN))
        raise ValueError(f"there is no row to train on in {names}{validation_rows}{dropped}{first}")
    if validation_split and not selection.validation:
        raise ValueError(
            f"dataset.validation_split={validation_split} holds out none of the {len(selection.train)} rows; "
            f"from {find_smallest_split(files, seed)} on it holds out one (or name validation_files)"
        )
