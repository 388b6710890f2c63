"""Column mapping: columns of any name as the parts of a format, and a prompt template over several columns."""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tune2gguf.data.messages import FORMATS, PARTS, detect_format, read_conversation
from tune2gguf.data.rows import decode_json
from tune2gguf.tokenizer.conversation import Conversation

_TURN_PARTS = ("role", "content", "from", "value")


@dataclass(frozen=True)
class RowReader:
    """The options that turn a file's rows into conversations.

    Attributes:
        format: one of FORMATS, or auto: detected from the row's keys
        columns: part of a format -> its column; other parts have columns of their own name
        prompt: template of the user's message, with columns in braces; read_template has the syntax
    """

    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    prompt: str | None = None

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that a row may have: all with every part in `columns`."""
        if self.format != "auto":
            return (self.format,)
        named = {part for part, _ in self.columns} | ({"prompt"} if self.prompt is not None else set())
        return tuple(name for name in FORMATS if named <= set(PARTS[name]))

    def describe(self) -> str:
        """Return the mapped columns and the prompt template as text, "" without any."""
        parts = [f"{part} = column {name!r}" for part, name in self.columns]
        return ", ".join(parts + ([] if self.prompt is None else [f"prompt = {self.prompt!r}"]))

    def detect(self, row: Mapping[str, Any]) -> str:
        """Return the format of a row.

        Raises:
            AmbiguousFormatError: if more than one format fits
            ValueError: if none fits
        """
        if self.format != "auto":
            return self.format
        if not self.columns and self.prompt is None:
            return detect_format(row)
        return detect_format(self._map(row)[0], among=self.formats, is_mapped=True)

    def read(self, row: Mapping[str, Any], *, format: str) -> Conversation:
        """Return the conversation of a row of this format.

        Raises:
            ValueError: if the row cannot be trained on
        """
        if not self.columns and self.prompt is None:
            return read_conversation(row, format=format)
        mapped, absent, unused = self._map(row)
        try:
            conversation = read_conversation(mapped, format=format)
        except ValueError as error:
            said = [f"{part!r} is the column {name!r}" for part, name in self.columns if repr(part) in str(error)]
            raise ValueError("; ".join([str(error), *said])) from None
        return replace(conversation, unused_keys=conversation.unused_keys + unused, absent_columns=absent)

    def _map(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
        """Return the row keyed by part, its empty or missing columns, and its keys that a mapped part replaces."""
        columns = dict(self.columns)
        in_turns = {part: columns.pop(part) for part in _TURN_PARTS if part in columns}
        pieces = () if self.prompt is None else read_template(self.prompt)
        in_prompt = [name for _, name in pieces if name is not None]
        taken = {*columns.values(), *in_prompt}
        covered = {*columns, *(["prompt"] if pieces else [])}
        unused = tuple(key for key in row if key in covered and key not in taken and row[key] not in (None, "", []))
        mapped = {key: value for key, value in row.items() if key not in taken | covered}
        mapped |= {part: _read_cell(part, row[name], name) for part, name in columns.items() if name in row}
        if pieces:
            mapped["prompt"] = _fill_template(pieces, row)
        if in_turns:
            mapped = {key: _rename_turns(value, in_turns) for key, value in mapped.items()}
        absent = tuple(name for name in dict.fromkeys([*columns.values(), *in_prompt]) if _is_empty(row.get(name)))
        return mapped, absent, unused


@lru_cache
def read_template(template: str) -> tuple[tuple[str, str | None], ...]:
    r"""Return a prompt template as pairs of a text and the column after it (None after the last text).

    Columns are in braces; {{ and }} are literal braces; \n and \t may be spelled with a backslash.

    Raises:
        ValueError: if braces do not match, or hold no name
    """
    text = template.replace(r"\n", "\n").replace(r"\t", "\t")
    try:
        parsed = [*string.Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(f"{error}; write a literal brace as {{{{ or }}}}") from None
    pieces = []
    for before, name, spec, conversion in parsed:
        if name is not None:
            # string.Formatter splits a name at ! and :, which a column may contain.
            name += (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            if not name.strip():
                raise ValueError("braces without a column; write its name in them, such as {question}")
        pieces.append((before, name))
    if not any(name is not None for _, name in pieces):
        raise ValueError("no column; write one in braces, such as {question}")
    return tuple(pieces)


def _fill_template(pieces: Sequence[tuple[str, str | None]], row: Mapping[str, Any]) -> str:
    """Join texts and columns. A missing or empty column is left out with the text before it."""
    filled = ""
    for before, name in pieces:
        value = "" if name is None else row.get(name)
        if name is None:
            filled += before
        elif not _is_empty(value):
            if not isinstance(value, str):
                raise ValueError(f"column {name!r} of dataset.prompt must be text, got {type(value).__name__}")
            filled += before + value
    return filled if any(not _is_empty(row.get(name)) for _, name in pieces if name is not None) else ""


def _read_cell(part: str, value: Any, name: str) -> Any:
    """Return a column's value; tables without nested columns hold a list of messages as JSON text."""
    if part in ("messages", "conversations") and isinstance(value, str):
        try:
            return decode_json(value)
        except ValueError as error:
            raise ValueError(f"column {name!r}: {error}") from None
    return value


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _rename_turns(value: Any, in_turns: Mapping[str, str]) -> Any:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return value
    names = {name: part for part, name in in_turns.items()}
    return [
        {names.get(key, key): held for key, held in turn.items() if key not in in_turns or key in names}
        for turn in value
    ]


def find_reader_problems(options: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the problems of `format`, `columns` and `prompt`, with `prefix` before each key."""
    format, columns, prompt = options.get("format", "auto"), options.get("columns"), options.get("prompt")
    if format not in ("auto", *FORMATS):
        yield f"{prefix}format={format} is not one of {', '.join(('auto', *FORMATS))}"
        return
    if columns is not None:
        problem = _find_column_problem(columns)
        if problem is not None:
            yield f"{prefix}columns={columns}: {problem}"
            return
    if prompt is not None:
        yield from (f"{prefix}prompt={prompt!r}: {problem}" for problem in _find_template_problems(prompt))
        if "prompt" in (columns or {}):
            yield f"{prefix}columns and {prefix}prompt both define 'prompt'; keep one of the two"
            return
    try:
        reader = make_reader(options)
    except (TypeError, ValueError):
        return
    named = [part for part, _ in reader.columns] + (["prompt"] if prompt is not None else [])
    outside = [part for part in named if part not in PARTS.get(format, named)]
    if outside:
        yield f"{prefix}columns: {outside[0]!r} is not a part of format={format} ({', '.join(PARTS[format])})"
    elif not reader.formats:
        known = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in PARTS.items())
        yield f"{prefix}columns: no format has {' and '.join(map(repr, named))} ({known})"


def _find_column_problem(columns: Any) -> str | None:
    if not isinstance(columns, Mapping) or not columns:
        return "must map parts to columns, such as {prompt: question, completion: answer}"
    known = list(dict.fromkeys(part for parts in PARTS.values() for part in parts))
    for part, name in columns.items():
        if part not in known:
            nearest = difflib.get_close_matches(str(part), known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known parts are {', '.join(known)}"
            swapped = f"; write part: column, that is {name}: {part}" if name in known else hint
            return f"unknown part {part!r}{swapped}"
        if not isinstance(name, str) or not name:
            return f"the column of {part!r} must be a name, got {name!r}"
    names = list(columns.values())
    twice = next((name for name in names if names.count(name) > 1), None)
    return None if twice is None else f"column {twice!r} is mapped to two parts; keep one of them"


def _find_template_problems(prompt: Any) -> Iterator[str]:
    if not isinstance(prompt, str):
        yield "must be text"
        return
    try:
        read_template(prompt)
    except ValueError as error:
        yield str(error)


def make_reader(options: Mapping[str, Any]) -> RowReader:
    """Return the reader of options without problems (see find_reader_problems)."""
    columns = options.get("columns") or {}
    return RowReader(options.get("format", "auto"), tuple(columns.items()), options.get("prompt"))
