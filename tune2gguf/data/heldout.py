"""The held-out conversations of a run, as text: kept in the run folder, for whatever asks the model later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tune2gguf.data.messages import Conversation, Message
from tune2gguf.data.rows import Source
from tune2gguf.data.tokenize import TokenizedRows, read_conversations

HELDOUT_FILE = "heldout.jsonl"


def format_heldout(validation: TokenizedRows, *, format: str) -> str:
    """Return the content of heldout.jsonl: one held-out row a line, with its source, in the order of the rows.

    Args:
        format: as the files were read with
    """
    sources = [row.source for row in validation]
    found: dict[Source, Conversation] = {}
    for name in {source.file for source in sources}:
        lines = {source.line for source in sources if source.file == name}
        for row, conversation in read_conversations(name, format=format):
            if row.source.line in lines and isinstance(conversation, Conversation):
                found[row.source] = conversation
    return "".join(_format_line(source, found[source]) for source in sources)


def read_heldout(run_dir: str | Path) -> list[Conversation]:
    """Return the held-out conversations of a run, raw texts among them.

    Raises:
        ValueError: if the run has no heldout.jsonl
    """
    path = Path(run_dir) / HELDOUT_FILE
    if not path.is_file():
        raise ValueError(f"{path}: not found; is {run_dir} the folder of a run?")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Conversation(messages=tuple(Message(**message) for message in record["messages"]), text=record["text"])
        for record in records
    ]


def cut_before_reply(conversation: Conversation) -> tuple[list[dict[str, str]], str]:
    """Return the messages up to the last assistant turn, and that turn's content, the reference."""
    messages: Sequence[Message] = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    prompt = [{"role": message.role, "content": message.content} for message in messages[:last]]
    return prompt, messages[last].content


def _format_line(source: Source, conversation: Conversation) -> str:
    messages = [vars(message) for message in conversation.messages]
    record = {"source": str(source), "messages": messages, "text": conversation.text}
    return json.dumps(record, ensure_ascii=False) + "\n"
