"""heldout.jsonl: the validation rows of a run as text, for whatever asks the model later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from tune2gguf.data.messages import detect_format, digest, read_conversation
from tune2gguf.data.rows import Row, Source, read_rows
from tune2gguf.data.tokenize import TokenizedRows
from tune2gguf.files.records import make_record
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.files import VALIDATION_FILE, read_json_lines
from tune2gguf.tokenizer.conversation import Conversation, Message


def format_validation_rows(validation: TokenizedRows, *, format: str) -> str:
    """Return the content of heldout.jsonl: one validation row a line, with its source, in the order of the rows.

    Args:
        format: as the files were read with

    Raises:
        ValueError: if a file is not what it was when its rows were tokenized
    """
    sources = [row.source for row in validation]
    lines_by_file: dict[str, set[int]] = {}
    for source in sources:
        lines_by_file.setdefault(source.file, set()).add(source.line)
    found = {
        row.source: _read_again(row, format)
        for name, lines in lines_by_file.items()
        for row in read_rows(name, lines=lines)
    }
    for source, expected in zip(sources, validation.digests(), strict=True):
        if source not in found or found[source] is None or digest(found[source]) != expected:
            raise ValueError(f"{source}: is not what it was a moment ago; leave data files alone while a run begins")
    records = [_make_record(source, found[source]) for source in sources]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _make_record(source: Source, conversation: Conversation) -> dict[str, Any]:
    """Return a row of heldout.jsonl; keys of tools stand in it only where there are some."""
    messages = [
        {key: value for key, value in vars(one).items() if key != "tool_calls" or value}
        for one in conversation.messages
    ]
    record = {"source": str(source), "messages": messages, "text": conversation.text}
    return record | ({"tools": conversation.tools} if conversation.tools else {})


def _read_again(row: Row, format: str) -> Conversation | None:
    """Return the conversation of a row that was a good one: of the format that was named, or the one of its keys."""
    if row.problem is not None:
        return None
    try:
        return read_conversation(row.value, format=detect_format(row.value) if format == "auto" else format)
    except ValueError:
        return None


def read_validation_rows(run_dir: Path) -> list[Conversation]:
    """Return the validation conversations of a run, raw texts among them.

    Raises:
        ValueError: if the run has no heldout.jsonl
    """
    return [
        Conversation(
            messages=tuple(make_record(Message, message) for message in row["messages"]),
            text=row["text"],
            tools=tuple(row.get("tools", ())),
        )
        for row in _read_rows(run_dir)
    ]


class _RowOfVersion1(TypedDict):
    messages: list[dict[str, Any]]
    text: str | None


class _Row(_RowOfVersion1, total=False):
    tools: list[dict[str, Any]]


def _read_rows(run_dir: Path) -> list[_Row]:
    return [*read_json_lines(run_dir / VALIDATION_FILE, _parse_row)]


def _parse_row(values: Any) -> _Row:
    row = make_record(_Row, values)
    for message in row["messages"]:
        make_record(Message, message)
        # Earlier versions wrote contents as they were read, and stripped them when they were rendered.
        message["content"] = message["content"].strip()
    return row


def read_row_losses(run_dir: Path, validation: Validation) -> dict[str, tuple[float, int]]:
    """Return summed loss and tokens of each measured validation row, by the digest of its text and tokens.

    Raises:
        ValueError: if heldout.jsonl is missing, damaged or not that of the validation
    """
    records = _read_rows(run_dir)
    indices = validation.row_indices or range(len(validation.row_losses))
    beyond = next((index for index in indices if not 0 <= index < len(records)), None)
    if beyond is not None:
        path = run_dir / VALIDATION_FILE
        raise ValueError(f"{path}: has {len(records)} rows, but row {beyond + 1} was measured; is it another run's?")
    found = {}
    for index, loss, tokens in zip(indices, validation.row_losses, validation.row_tokens, strict=True):
        tools = [records[index]["tools"]] if "tools" in records[index] else []
        content = json.dumps([records[index]["messages"], records[index]["text"], tokens, *tools], sort_keys=True)
        found[hashlib.sha256(content.encode()).hexdigest()] = (loss, tokens)
    return found


def digest_validation_rows(run_dir: Path, validation: Validation) -> str:
    """Return one digest of the validation rows that a run measured, whatever their order."""
    return hashlib.sha256("".join(sorted(read_row_losses(run_dir, validation))).encode()).hexdigest()
