"""A conversation: messages with roles, tools and calls, or raw text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user, assistant, or tool: a call's result; only the assistant's can be trained."""

    role: str
    content: str
    is_trained: bool = True  # False for an assistant turn that the row marks with weight 0
    tool_calls: tuple[dict[str, Any], ...] = ()  # the assistant's, each of `name` and `arguments`, an object


@dataclass(frozen=True)
class Conversation:
    """What a row holds: messages, or raw text and then no messages."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()  # each {"type": "function", "function": {…}}
    first_token: int = 0  # where a piece of a long text begins in it
    overlap: int = 0  # of its tokens, those of the piece before, which are not trained again
    unused_keys: tuple[str, ...] = field(default=(), compare=False)  # of the row, where they hold anything
    absent_columns: tuple[str, ...] = field(default=(), compare=False)  # that the user names and the row has not
    had_end: bool = field(
        default=False, compare=False
    )  # a text of the row ended in an end-of-turn token, now taken off
    was_stripped: bool = field(default=False, compare=False)  # a content began or ended in white space, now taken off

    @property
    def system_prompt(self) -> str | None:
        """What the system says before the first turn."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its last reply, and that reply, the reference."""

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
    """Return a reply as one text for people: what it says, and a line for each call."""
    calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in tool_calls]
    return "\n".join([*([content] if content else []), *calls])


def make_request_messages(messages: Sequence[Message], *, arguments_as_text: bool = True) -> list[dict[str, Any]]:
    """Return messages as clients send them.

    Args:
        arguments_as_text: a call's arguments as JSON text, which OpenAI's API has; Ollama's has an object
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
