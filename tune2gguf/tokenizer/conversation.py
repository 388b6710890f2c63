"""A conversation: messages with roles, or raw text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant; only the assistant's turns can be trained."""

    role: str
    content: str
    is_trained: bool = True  # False for an assistant turn that the row marks with weight 0


@dataclass(frozen=True)
class Conversation:
    """What a row holds: messages, or raw text and then no messages."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    unused_keys: tuple[str, ...] = field(default=(), compare=False)  # of the row, where they hold anything
    had_end: bool = field(
        default=False, compare=False
    )  # a text of the row ended in an end-of-turn token, now taken off
    was_stripped: bool = field(default=False, compare=False)  # a content began or ended in white space, now taken off

    @property
    def system_prompt(self) -> str | None:
        """What the system says before the first turn."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None


def cut_before_reply(conversation: Conversation) -> tuple[list[dict[str, str]], str]:
    """Return the messages up to the last assistant turn, and that turn's content, the reference."""
    messages: Sequence[Message] = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    prompt = [{"role": message.role, "content": message.content} for message in messages[:last]]
    return prompt, messages[last].content
