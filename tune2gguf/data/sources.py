"""Sources of a `dataset` component: files with the same reading options and one share of an epoch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune2gguf.data.columns import RowReader, find_reader_problems, make_reader
from tune2gguf.data.rows import find_files
from tune2gguf.data.select import Share

# Options that a source inherits from the data set.
_SHARED_KEYS = ("format", "columns", "prompt", "validation_split")
_FILE_KEYS = ("files", "validation_files")
_SHARE_KEYS = ("weight", "rows")
SOURCE_KEYS = (*_FILE_KEYS, *_SHARED_KEYS, *_SHARE_KEYS)


@dataclass(frozen=True)
class DataSource:
    """Files with the same reading options, and their share of an epoch."""

    files: list[str]
    validation_files: list[str]
    validation_split: float
    reader: RowReader
    share: Share


def list_sources(options: Mapping[str, Any]) -> list[DataSource]:
    """Return the sources of options without problems (see find_source_problems)."""
    return [
        DataSource(
            files=find_files(one["files"]),
            validation_files=[] if one.get("validation_files") is None else find_files(one["validation_files"]),
            validation_split=float(one.get("validation_split") or 0),
            reader=make_reader(one),
            share=Share(*(one[key] for key in ("weight",) if one.get(key) is not None), rows=one.get("rows")),
        )
        for one in _list_options(options)
    ]


def _list_options(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of each source; a data set without `sources` is one source."""
    given = options.get("sources")
    if given is None:
        return [{key: options[key] for key in (*_FILE_KEYS, *_SHARED_KEYS) if key in options}]
    shared = {key: options[key] for key in _SHARED_KEYS if key in options}
    # Format, columns and prompt belong together: a source with its own inherits none of them.
    return [_inherit(shared, dict(one)) for one in given]


def _inherit(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    reading = ("format", "columns", "prompt")
    left_out = reading if any(key in own for key in reading) else ()
    if own.get("validation_files") is not None:
        left_out = (*left_out, "validation_split")
    return {key: value for key, value in shared.items() if key not in left_out} | own


def find_source_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a data set's sources. No row is read."""
    given = options.get("sources")
    if given is None:
        yield from _find_problems(_list_options(options)[0], "dataset.")
        return
    for key in _FILE_KEYS:
        if options.get(key) is not None:
            yield f"dataset.sources and dataset.{key} are both given; set dataset.{key}=null"
    if not _is_list_of_mappings(given):
        yield f"dataset.sources={given} must be a list of sources, such as [{{files: a.jsonl, weight: 2}}]"
        return
    for number, one in enumerate(given):
        for key in one:
            if key not in SOURCE_KEYS:
                nearest = difflib.get_close_matches(str(key), SOURCE_KEYS, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(SOURCE_KEYS)}"
                yield f"unknown key {str(key)!r} in dataset.sources[{number}]; {hint}"
    for number, one in enumerate(_list_options(options)):
        yield from _find_problems(one, f"dataset.sources[{number}].")


def _is_list_of_mappings(value: Any) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(one, Mapping) for one in value)


def _find_problems(source: Mapping[str, Any], prefix: str) -> Iterator[str]:
    yield from find_reader_problems(source, prefix)
    yield from _find_split_problems(source, prefix)
    yield from _find_share_problems(source, prefix)
    for key in _FILE_KEYS:
        value = source.get(key)
        if value is None and key == "validation_files":
            continue
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
        if not names:
            yield f"{prefix}{key}={value} names no file"
            continue
        try:
            find_files(names)
        except ValueError as error:
            yield str(error)


def _find_split_problems(source: Mapping[str, Any], prefix: str) -> Iterator[str]:
    fraction = source.get("validation_split")
    if fraction is None:
        return
    if not _is_number(fraction) or not 0 <= fraction < 1:
        yield f"{prefix}validation_split={fraction} must be a fraction of at least 0 and below 1"
    elif fraction > 0 and source.get("validation_files") is not None:
        yield f"{prefix}validation_files and {prefix}validation_split are both given; set one of them to null"


def _find_share_problems(source: Mapping[str, Any], prefix: str) -> Iterator[str]:
    weight, rows = source.get("weight"), source.get("rows")
    if weight is not None and (not _is_number(weight) or not 0 < weight <= 1000):
        yield f"{prefix}weight={weight} must be above 0 and at most 1000 (times an epoch takes each row)"
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        yield f"{prefix}rows={rows} must be a whole number of at least 1 (rows per epoch)"
    if weight is not None and rows is not None:
        yield f"{prefix}weight and {prefix}rows are both given; keep one of them"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def list_files(options: Mapping[str, Any]) -> list[str]:
    """Return the training files of all sources, for options without problems."""
    return [name for source in list_sources(options) for name in source.files]


def holds_rows_out(options: Mapping[str, Any]) -> bool:
    """Return whether any source has validation rows."""
    given = options.get("sources")
    sources = _list_options(options) if given is None or _is_list_of_mappings(given) else []
    return any(one.get("validation_files") is not None or bool(one.get("validation_split")) for one in sources)
