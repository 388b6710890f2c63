"""A run's validation conversations, tokenized as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune2gguf.runs.run import Run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.tokenizer.conversation import Conversation
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True)
class ValidationRow:
    """A row as trained: token ids [seq], and a mask of the supervised ones [seq]."""

    tokens: np.ndarray
    supervised: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Positions of the supervised tokens; the first token is never predicted."""
        return np.flatnonzero(self.supervised[1:]) + 1


@dataclass(frozen=True)
class ValidationSet:
    """Conversations, and the rows of those that have a supervised token within max_seq_len."""

    tokenizer: ChatTokenizer
    conversations: list[Conversation]
    rows: list[ValidationRow]


def load_validation_rows(run: Run, *, num_rows: int) -> ValidationSet | None:
    """Return the first validation rows of a run; None if there are none.

    Raises:
        ValueError: if the tokenizer cannot be loaded
    """
    if num_rows <= 0:
        return None
    conversations = read_validation_rows(run.run_dir)[:num_rows]
    tokenizer = load_tokenizer(run.base_dir, chat_template=run.chat_template.name)
    rows = make_rows(conversations, tokenizer, max_seq_len=run.max_seq_len)
    return ValidationSet(tokenizer, conversations, rows) if rows else None


def make_rows(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, max_seq_len: int
) -> list[ValidationRow]:
    """Tokenize as for training; rows without a supervised token within max_seq_len are left out."""
    rows = []
    for conversation in conversations:
        if conversation.messages:
            tokens, supervised = tokenizer.encode_conversation(conversation.messages, conversation.tools)
        else:
            tokens, supervised = tokenizer.encode_document(conversation.text)
        kept = slice(conversation.first_token, conversation.first_token + max_seq_len)
        row = ValidationRow(np.array(tokens[kept]), np.array(supervised[kept], bool))
        row.supervised[: conversation.overlap] = False
        if len(row.positions) > 0:
            rows.append(row)
    return rows
