"""A conversation: messages with roles, tools and calls, or raw text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message. `role` is system, user, assistant or tool (a call's result); only assistant messages are trained."""

    role: str
    content: str
    is_trained: bool = True  # False for an assistant turn that the row marks with weight 0
    tool_calls: tuple[dict[str, Any], ...] = ()  # of an assistant message, each with `name` and `arguments` (an object)


@dataclass(frozen=True)
class Conversation:
    """The content of a row: messages, or raw text without messages."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()  # each {"type": "function", "function": {…}}
    first_token: int = 0  # of a piece of a long text: its first token in the text
    overlap: int = 0  # tokens that a piece repeats from the piece before; they are not trained again
    unused_keys: tuple[str, ...] = field(default=(), compare=False)  # of the row, if not empty
    absent_columns: tuple[str, ...] = field(default=(), compare=False)  # mapped, but empty or missing in the row
    had_end: bool = field(default=False, compare=False)  # an end-of-turn token at the end of a text was removed
    was_stripped: bool = field(default=False, compare=False)  # white space around a content was removed

    @property
    def system_prompt(self) -> str | None:
        """The content of a leading system message, or None."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its last reply, and that reply as the reference."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reply: Message

    @property
    def question(self) -> str:
        """The last message before the reply."""
        return self.messages[-1].content if self.messages else ""

    @property
    def reference(self) -> str:
        """The reply as text: its content, and its calls in JSON."""
        return describe_reply(self.reply.content, self.reply.tool_calls)


def cut_before_reply(conversation: Conversation) -> Prompt:
    """Return a conversation's messages up to its last assistant turn, and that turn."""
    messages: Sequence[Message] = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return Prompt(tuple(messages[:last]), conversation.tools, messages[last])


def describe_reply(content: str, tool_calls: Sequence[Mapping[str, Any]]) -> str:
    """Return a reply as text for people: its content, and a line for each call."""
    calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in tool_calls]
    return "\n".join([*([content] if content else []), *calls])


def make_request_messages(messages: Sequence[Message], *, arguments_as_text: bool = True) -> list[dict[str, Any]]:
    """Return messages as clients send them.

    Args:
        arguments_as_text: whether a call's arguments are JSON text (OpenAI's API) or an object (Ollama's)
    """
    sent: list[dict[str, Any]] = []
    ids: list[str] = []
    for place, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            ids = [f"call{place}{number}" for number in range(len(message.tool_calls))]
            turn["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": call["name"], "arguments": arguments}}
                for id_, call in zip(ids, message.tool_calls, strict=True)
                for arguments in [
                    json.dumps(call["arguments"], ensure_ascii=False) if arguments_as_text else call["arguments"]
                ]
            ]
        elif message.role == "tool" and ids:
            turn["tool_call_id"] = ids.pop(0)
        sent.append(turn)
    return sent
