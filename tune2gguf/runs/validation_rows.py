"""heldout.jsonl: the validation rows of a run as conversations, for evaluation after training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tune2gguf.data.columns import RowReader
from tune2gguf.data.messages import digest
from tune2gguf.data.rows import Row, Source, read_rows
from tune2gguf.data.tokenize import TokenizedRows
from tune2gguf.files.records import make_record
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.files import VALIDATION_FILE, read_json_lines
from tune2gguf.tokenizer.conversation import Conversation, Message


def format_validation_rows(validation: TokenizedRows) -> str:
    """Return the content of heldout.jsonl: one validation row per line, with its source, in row order.

    A piece of a long text is a line with the whole text, the piece's first token and the overlap.

    Raises:
        ValueError: if a file has changed since its rows were tokenized
    """
    found = {}
    for number, file in enumerate(validation.files):
        rows = np.unique(validation.picks[validation.picks[:, 0] == number, 1])
        lines = set(file.index.lines[rows].tolist())
        for row in read_rows(file.name, lines=lines) if lines else ():
            found[number, row.source.line] = _read_again(row, file.reader)
    records = []
    for (number, row, first), expected in zip(validation.picks.tolist(), validation.row_digests(), strict=True):
        file = validation.files[number]
        source = file.locate(int(file.index.lines[row]))
        conversation = found.get((number, source.line))
        if conversation is None or digest(conversation) != bytes(expected):
            raise ValueError(f"{source}: changed while the run was starting; start the run again")
        record = _make_record(source, conversation)
        if first:
            record |= {"first_token": first, "overlap": validation.overlap}
        records.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(records)


def _make_record(source: Source, conversation: Conversation) -> dict[str, Any]:
    """Return a row of heldout.jsonl; it has keys for tools only if there are tools."""
    messages = [
        {key: value for key, value in vars(one).items() if key != "tool_calls" or value}
        for one in conversation.messages
    ]
    record = {"source": str(source), "messages": messages, "text": conversation.text}
    return record | ({"tools": conversation.tools} if conversation.tools else {})


def _read_again(row: Row, reader: RowReader) -> Conversation | None:
    """Return the conversation of a row; None if it is no longer valid."""
    if row.problem is not None:
        return None
    try:
        return reader.read(row.value, format=reader.detect(row.value))
    except ValueError:
        return None


def read_validation_rows(run_dir: Path) -> list[Conversation]:
    """Return the validation conversations of a run, including raw texts.

    Raises:
        ValueError: if the run has no heldout.jsonl
    """
    return [
        Conversation(
            messages=tuple(make_record(Message, message) for message in row["messages"]),
            text=row["text"],
            tools=tuple(row.get("tools", ())),
            first_token=row.get("first_token", 0),
            overlap=row.get("overlap", 0),
        )
        for row in _read_rows(run_dir)
    ]


class _RowOfVersion1(TypedDict):
    messages: list[dict[str, Any]]
    text: str | None


class _Row(_RowOfVersion1, total=False):
    tools: list[dict[str, Any]]
    first_token: int
    overlap: int


def _read_rows(run_dir: Path) -> list[_Row]:
    return [*read_json_lines(run_dir / VALIDATION_FILE, _parse_row)]


def _parse_row(values: Any) -> _Row:
    row = make_record(_Row, values)
    for message in row["messages"]:
        make_record(Message, message)
        # Folders of earlier versions hold contents unstripped.
        message["content"] = message["content"].strip()
    return row


def read_row_losses(run_dir: Path, validation: Validation) -> dict[str, tuple[float, int]]:
    """Return (summed loss in nats, tokens) of each measured validation row, by the digest of its text and tokens.

    Raises:
        ValueError: if heldout.jsonl is missing, damaged or another run's
    """
    records = _read_rows(run_dir)
    indices = validation.row_indices or range(len(validation.row_losses))
    beyond = next((index for index in indices if not 0 <= index < len(records)), None)
    if beyond is not None:
        path = run_dir / VALIDATION_FILE
        raise ValueError(f"{path}: has {len(records)} rows, but row {beyond + 1} was measured; restore this run's file")
    found = {}
    for index, loss, tokens in zip(indices, validation.row_losses, validation.row_tokens, strict=True):
        record = records[index]
        piece = [record["first_token"]] if "first_token" in record else []
        tools = [record["tools"]] if "tools" in record else []
        content = json.dumps([record["messages"], record["text"], tokens, *piece, *tools], sort_keys=True)
        found[hashlib.sha256(content.encode()).hexdigest()] = (loss, tokens)
    return found


def digest_validation_rows(run_dir: Path, validation: Validation) -> str:
    """Return one digest of a run's measured validation rows, independent of their order."""
    return hashlib.sha256("".join(sorted(read_row_losses(run_dir, validation))).encode()).hexdigest()
