"""A conversation: messages with roles, or raw text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# C's isspace in the C locale: what the trim filter of llama.cpp's jinja engine strips. Python's strip takes more.
TRIMMED = " \t\n\v\f\r"
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
    first_token: int = 0  # where a piece of a long text begins in it
    overlap: int = 0  # of its tokens, those of the piece before, which are not trained again
    unused_keys: tuple[str, ...] = field(default=(), compare=False)  # of the row, where they hold anything
    absent_columns: tuple[str, ...] = field(default=(), compare=False)  # that the user names and the row has not
    had_end: bool = field(
        default=False, compare=False
    )  # a text of the row ended in an end-of-turn token, now taken off

    @property
    def system_prompt(self) -> str | None:
        """What the system says before the first turn."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None


def trim(text: str) -> str:
    """Strip what the server's chat template strips: the six ASCII white-space characters."""
    return text.strip(TRIMMED)


def cut_before_reply(conversation: Conversation) -> tuple[list[dict[str, str]], str]:
    """Return the messages up to the last assistant turn, and that turn's content, the reference."""
    messages: Sequence[Message] = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    prompt = [{"role": message.role, "content": message.content} for message in messages[:last]]
    return prompt, messages[last].content
