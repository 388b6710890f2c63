"""Checks of an exported file in llama.cpp: its ids, losses and replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tune2gguf.export.measure.validation_set import ValidationRow
from tune2gguf.serve.llama_cpp import LlamaCppModel, open_model
from tune2gguf.tokenizer.conversation import (
    Conversation,
    cut_before_reply,
    describe_reply,
    make_request_messages,
)
from tune2gguf.tokenizer.tokenizer import ChatTokenizer

MAX_SCORED_TOKENS = 128  # each costs a request
MAX_REPLY_TOKENS = 512


@dataclass(frozen=True)
class TokenCheck:
    """The comparison of served ids with trained ids.

    Attributes:
        num_equal: conversations with equal ids, and with exactly one BOS if the format has one
        num_different: conversations with different ids
        num_skipped: conversations whose text spells a special token, which is trained as text
        first_difference: a description of the first difference, or None
    """

    num_equal: int
    num_different: int
    num_skipped: int
    first_difference: str | None


@dataclass(frozen=True)
class ScoreCheck:
    """The loss of the same supervised tokens, by llama.cpp and in float32 from the file's dequantized tensors."""

    num_tokens: int
    loss_by_llama_cpp: float
    loss_by_torch: float

    @property
    def difference(self) -> float:
        return self.loss_by_llama_cpp - self.loss_by_torch


@dataclass(frozen=True)
class ServedReply:
    """A greedy reply to a validation question."""

    question: str
    reference: str
    reply: str
    ended_by_itself: bool


@dataclass(frozen=True)
class ServedFile:
    """The checks of one file; `scores` is None if no token could be scored, raw texts have no replies."""

    tokens: TokenCheck
    scores: ScoreCheck | None
    replies: list[ServedReply]


def serve_file(
    path: Path,
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    rows: Sequence[ValidationRow],
    token_losses: np.ndarray,
    *,
    context_length: int,
    num_replies: int,
    num_threads: int | None,
    adapter_path: Path | None = None,
) -> ServedFile:
    """Load a file into llama.cpp and check ids, losses and replies.

    Args:
        rows: the conversations as trained
        token_losses: torch's losses of the rows' supervised tokens, row by row
        context_length: tokens of a conversation; the replies get room beyond it
        adapter_path: an adapter's GGUF to apply

    Raises:
        ValueError: if the file cannot be loaded
    """
    model = open_model(
        path,
        num_threads=num_threads,
        context_length=context_length + MAX_REPLY_TOKENS,
        adapter_path=adapter_path,
    )
    chats = find_askable(conversations, tokenizer, context_length=context_length)
    return ServedFile(
        tokens=check_tokens(model, tokenizer, conversations),
        scores=check_scores(model, rows, token_losses, max_tokens=MAX_SCORED_TOKENS),
        replies=ask_validation(model, chats[:num_replies], max_tokens=MAX_REPLY_TOKENS),
    )


def find_askable(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, context_length: int
) -> list[Conversation]:
    """Return the conversations whose prompt fits into `context_length`; a server would refuse the others."""
    return [
        conversation
        for conversation in conversations
        if conversation.messages and _count_prompt_tokens(conversation, tokenizer) <= context_length
    ]


def _count_prompt_tokens(conversation: Conversation, tokenizer: ChatTokenizer) -> int:
    prompt = cut_before_reply(conversation)
    return len(tokenizer.encode_prompt(prompt.messages, prompt.tools))


def check_tokens(model: LlamaCppModel, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> TokenCheck:
    """Compare served with trained ids of each conversation up to its last reply, or of its raw text."""
    num_equal = num_different = num_skipped = 0
    first_difference = None
    for number, conversation in enumerate(conversations, start=1):
        texts = [message.content for message in conversation.messages] or [conversation.text]
        if any(tokenizer.find_spelled_special(text) for text in texts):
            num_skipped += 1
            continue
        if conversation.messages:
            trained, _ = tokenizer.encode_conversation(conversation.messages, conversation.tools)
            served = _serve(model, tokenizer, conversation)
        else:
            trained, _ = tokenizer.encode_document(conversation.text)
            served = model.tokenize(conversation.text, adds_bos=True)
        difference = _describe_difference(trained[: len(served)], served, tokenizer)
        num_equal += difference is None
        num_different += difference is not None
        if difference is not None and first_difference is None:
            first_difference = f"conversation {number}, {difference}"
    return TokenCheck(num_equal, num_different, num_skipped, first_difference)


def _serve(model: LlamaCppModel, tokenizer: ChatTokenizer, chat: Conversation) -> list[int]:
    """Return the server's ids of the prompt and of the reply."""
    prompt = cut_before_reply(chat)
    chat_template = tokenizer.chat_template
    *_, reply = tokenizer.write_out([*prompt.messages, prompt.reply], prompt.tools)
    generated = reply.content + chat_template.end_of_turn + chat_template.turn_separator
    rendered = model.apply_template(make_request_messages(prompt.messages), tools=prompt.tools)
    return model.tokenize(rendered, adds_bos=True) + model.tokenize(generated)


def _describe_difference(trained: list[int], served: list[int], tokenizer: ChatTokenizer) -> str | None:
    bos = tokenizer.special_ids.get(tokenizer.chat_template.beginning)
    if bos is not None and served.count(bos) != 1:
        return f"{tokenizer.chat_template.beginning} is served {served.count(bos)} times"
    if trained == served:
        return None
    pairs = zip(trained, served, strict=False)
    place = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(served)))
    shown = slice(max(0, place - 2), place + 3)
    return (
        f"token {place}: trained {tokenizer.decode(trained[shown])!r} {trained[shown]}, "
        f"served {tokenizer.decode(served[shown])!r} {served[shown]}"
    )


def check_scores(
    model: LlamaCppModel, rows: Sequence[ValidationRow], token_losses: np.ndarray, *, max_tokens: int
) -> ScoreCheck | None:
    """Compare llama.cpp's losses of the first supervised tokens with torch's."""
    by_llama_cpp: list[float] = []
    by_torch: list[float] = []
    place = 0
    for row in rows:
        positions = row.positions[: max_tokens - len(by_llama_cpp)]
        scores = model.score(row.tokens.tolist(), positions.tolist())
        for score, loss in zip(scores, token_losses[place:], strict=False):
            if score is not None:
                by_llama_cpp.append(-score)
                by_torch.append(float(loss))
        place += len(row.positions)
    if not by_torch:
        return None
    return ScoreCheck(len(by_torch), float(np.mean(by_llama_cpp)), float(np.mean(by_torch)))


def ask_validation(model: LlamaCppModel, chats: Sequence[Conversation], *, max_tokens: int) -> list[ServedReply]:
    """Ask for the last reply of each conversation, greedily."""
    replies = []
    for chat in chats:
        prompt = cut_before_reply(chat)
        reply = model.chat(make_request_messages(prompt.messages), tools=prompt.tools, max_tokens=max_tokens)
        text = describe_reply(reply.text, reply.tool_calls)
        replies.append(ServedReply(prompt.question, prompt.reference, text, reply.ended_by_itself))
    return replies
