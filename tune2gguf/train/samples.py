"""Sample replies: the model's answers to a few validation prompts before, during and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tune2gguf.model.generate import generate_together, kv_caches, make_reply
from tune2gguf.model.llama import CausalLM
from tune2gguf.runs.samples import Sample
from tune2gguf.tokenizer.conversation import Conversation, cut_before_reply, make_request_messages
from tune2gguf.tokenizer.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Prompt:
    """A validation conversation up to its last reply."""

    row: int  # index of the validation row
    messages: list[dict[str, Any]]  # as clients send them
    ids: list[int]
    reference: str  # that reply

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def choose_prompts(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, num_samples: int, max_seq_len: int
) -> list[Prompt]:
    """Return the first validation prompts that leave room for a reply in max_seq_len. Raw texts have no prompt."""
    prompts: list[Prompt] = []
    for row, conversation in enumerate(conversations):
        if not conversation.messages or len(prompts) == num_samples:
            continue
        prompt = cut_before_reply(conversation)
        ids = tokenizer.encode_prompt(prompt.messages, prompt.tools)
        if prompt.messages and len(ids) < max_seq_len:
            prompts.append(Prompt(row, make_request_messages(prompt.messages), ids, prompt.reference))
    return prompts


def describe_prompts(
    prompts: Sequence[Prompt], *, num_samples: int, num_validation_rows: int, max_tokens: int
) -> str | None:
    """Return the line that a run prints before training, None without samples or validation rows."""
    if num_samples == 0 or num_validation_rows == 0:
        return None
    line = f"samples: {len(prompts)} validation prompts, answered before training, after each epoch and at the end, "
    line += f"in at most {max_tokens} tokens"
    if len(prompts) < num_samples:
        line += f"; num_samples={num_samples}, but no other validation row is a conversation with room for a reply"
    return line


def answer_prompts(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    *,
    step: int,
    epoch: int,
    max_seq_len: int,
    max_tokens: int,
    device: torch.device,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> list[Sample]:
    """Return the greedy answer to each prompt. The model is left unchanged.

    No random numbers are drawn: a run with samples trains to the same bytes as one without.

    Args:
        max_tokens: most tokens of a reply
        agree: as in generate.AdapterModel
    """
    ids = [prompt.ids for prompt in prompts]
    num_places = max(map(len, ids)) + max_tokens
    caches = {"batch_size": len(ids), "num_places": num_places}
    with kv_caches(model, tokenizer, max_seq_len=max_seq_len, device=device, agree=agree, **caches) as adapter_model:
        replies = generate_together(adapter_model, ids, max_tokens=max_tokens)
    samples = []
    for prompt, prompt_ids, reply_ids in zip(prompts, ids, replies, strict=True):
        reply = make_reply(tokenizer, prompt_ids, reply_ids)
        sample = Sample(
            step, epoch, prompt.row, tuple(prompt.messages), prompt.reference, reply.text, reply.ended_by_itself
        )
        samples.append(sample)
    return samples
