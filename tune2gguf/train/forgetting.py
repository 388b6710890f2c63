"""Forgetting: the adapter compared with the base, on general prompts and the base's own greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tune2gguf.data import TokenizedRow, collate, lay_out_passes
from tune2gguf.data.general import list_scored_prompts
from tune2gguf.data.rows import Source
from tune2gguf.model.generate import generate_together, kv_caches, make_reply
from tune2gguf.model.llama import CausalLM
from tune2gguf.model.loss import POSITIONS_PER_CHUNK
from tune2gguf.runs.adapter import collect_adapter, restore_adapter, switch_adapter_off
from tune2gguf.runs.forgetting import Forgetting, GeneralAnswer
from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.tokenizer import ChatTokenizer
from tune2gguf.train.validation_plan import GenerationCost

ANSWER_TOKENS = 32
MAX_SHARE = 0.05  # of the training time
MIN_PROMPTS = 8  # fewer give too wide an interval
NUM_SHOWN = 3  # prompts with the largest divergence; the adapter answers them, too


@dataclass(frozen=True)
class ForgettingPlan:
    """The general prompts that a run scores at its end."""

    prompts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    share: float = 0.0  # estimated cost, as a share of the training time
    obstacle: str = ""  # why none are scored

    def describe(self) -> str:
        """Return the line that a run prints before training."""
        if self.obstacle:
            return f"forgetting is not measured: {self.obstacle}"
        cost = f"about {self.share:.0%} of the training time"
        return f"forgetting: {len(self.prompts)} general prompts, scored once at the end, {cost}"


def plan_forgetting(
    tokenizer: ChatTokenizer, *, score: bool | str, max_seq_len: int, training_tokens: float, generation: GenerationCost
) -> ForgettingPlan:
    """Choose the general prompts: the first ones that fit.

    Costs are counted, not timed, so a resumed run scores the same prompts as an uninterrupted one.

    Args:
        score: True for all prompts, False for none, "auto" for as many as MAX_SHARE of the training time covers, or
            as `generation` always covers
        training_tokens: tokens trained on, over all epochs
    """
    if score is False:
        return ForgettingPlan(obstacle="score_general_prompts=false")
    encoded = {one: tuple(tokenizer.encode_prompt([Message("user", one)])) for one in list_scored_prompts()}
    fitting = [(one, ids) for one, ids in encoded.items() if len(ids) + ANSWER_TOKENS <= max_seq_len]
    if len(fitting) < MIN_PROMPTS:
        return ForgettingPlan(obstacle=f"general prompts and answers are longer than max_seq_len={max_seq_len}")
    lengths = [len(ids) for _, ids in fitting]
    costs = [_estimate_cost(lengths[:count], generation) for count in range(len(fitting) + 1)]
    budget = max(MAX_SHARE * training_tokens, generation.always_covered)
    count = len(fitting) if score is True else sum(cost <= budget for cost in costs[1:])
    if count < MIN_PROMPTS:
        share = f"{MIN_PROMPTS} prompts would take {costs[MIN_PROMPTS] / training_tokens:.0%} of the training time"
        return ForgettingPlan(obstacle=f"{share}; score_general_prompts=true scores {len(fitting)} anyway")
    prompts, ids = zip(*fitting[:count], strict=True)
    return ForgettingPlan(prompts, ids, costs[count] / training_tokens)


def _estimate_cost(prompt_lengths: Sequence[int], generation: GenerationCost) -> float:
    """Return the prompts' cost in trained tokens: answers of base and adapter, and a forward pass of each."""
    answering = 2 * ANSWER_TOKENS * (generation.token + generation.forward * len(prompt_lengths))
    return answering + 2 * generation.forward * (sum(prompt_lengths) + ANSWER_TOKENS * len(prompt_lengths))


@torch.no_grad()
def measure_forgetting(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    plan: ForgettingPlan,
    *,
    adapter_name: str,
    tokens_per_pass: int,
    max_seq_len: int,
    device: torch.device,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> Forgetting:
    """Let the base answer general prompts and compare base and adapter on each token of its answers.

    The base is the model with B set to zero. B is restored afterwards; the model stays in evaluation mode.

    Args:
        adapter_name: name of the model's adapter
        agree: as in generate.AdapterModel
    """
    model.eval()

    def answer(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        places = max(map(len, prompts)) + ANSWER_TOKENS
        caches = {"batch_size": len(prompts), "num_places": places}
        with kv_caches(model, tokenizer, max_seq_len=max_seq_len, device=device, agree=agree, **caches) as able:
            return generate_together(able, prompts, max_tokens=ANSWER_TOKENS)

    adapter = collect_adapter(model)
    switch_adapter_off(model)
    answers = answer(plan.ids)
    rows = [_make_row(prompt, ids) for prompt, ids in zip(plan.ids, answers, strict=True)]
    base_hidden = _compute_hidden(model, rows, tokens_per_pass=tokens_per_pass, device=device)
    restore_adapter(model, adapter)
    hidden = _compute_hidden(model, rows, tokens_per_pass=tokens_per_pass, device=device)
    targets = torch.tensor([token for ids in answers for token in ids], device=device)
    figures = _compare(model, base_hidden, hidden, targets).split([len(ids) for ids in answers], dim=1)
    sums = torch.stack([one.sum(1) for one in figures]).tolist()
    most = sorted(range(len(sums)), key=lambda place: -sums[place][2] / len(answers[place]))[:NUM_SHOWN]
    replies = dict(zip(most, answer([plan.ids[place] for place in most]), strict=True))

    def read(place: int, ids: Sequence[int]) -> str:
        return make_reply(tokenizer, plan.ids[place], ids).text

    found = [
        GeneralAnswer(
            prompt=plan.prompts[place],
            answer=read(place, ids),
            prompt_ids=plan.ids[place],
            answer_ids=tuple(ids),
            base_loss=base_loss,
            adapter_loss=adapter_loss,
            divergence=divergence,
            agreed=round(agreed),
            adapter_answer=read(place, replies[place]) if place in replies else None,
        )
        for place, (ids, (base_loss, adapter_loss, divergence, agreed)) in enumerate(zip(answers, sums, strict=True))
    ]
    return Forgetting(adapter_name, tuple(found))


def _make_row(prompt: Sequence[int], answer: Sequence[int]) -> TokenizedRow:
    supervised = np.repeat([False, True], [len(prompt), len(answer)])
    return TokenizedRow(np.array([*prompt, *answer], np.int32), supervised, Source("general prompts", 1))


def _compute_hidden(model: CausalLM, rows: list[TokenizedRow], *, tokens_per_pass: int, device: torch.device) -> Tensor:
    """Return the hidden states that predict the supervised tokens, row by row, [n, dim]."""
    parts: list[Tensor] = [torch.empty(0)] * len(rows)
    for places in lay_out_passes([len(row.tokens) for row in rows], tokens_per_pass=tokens_per_pass):
        batch = vars(collate([rows[place] for place in places]).to(device))
        supervised = batch.pop("supervised")
        del batch["labels"]
        chosen = model.compute_hidden(**batch).flatten(0, 1).index_select(0, supervised)
        for place, part in zip(places, chosen.split([rows[place].num_supervised for place in places]), strict=True):
            parts[place] = part
    return torch.cat(parts)


def _compare(model: CausalLM, base_hidden: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return base loss, adapter loss, KL divergence and agreement of the argmax for each position, [4, n]."""
    figures = torch.empty(4, len(targets), dtype=torch.float64)
    with model.hold_head():
        for begin in range(0, len(targets), POSITIONS_PER_CHUNK[targets.device.type]):
            chunk = slice(begin, begin + POSITIONS_PER_CHUNK[targets.device.type])
            base, found = ((one[chunk] @ model.head_weight.T).float().log_softmax(-1) for one in (base_hidden, hidden))
            target = targets[chunk, None]
            losses = [-one.gather(1, target)[:, 0] for one in (base, found)]
            divergence = (base.exp() * (base - found)).sum(-1)
            agreed = (base.argmax(-1) == found.argmax(-1)).float()
            figures[:, chunk] = torch.stack([*losses, divergence, agreed]).double().cpu()
    return figures
