"""Validation loss per row, exact on any number of processes, with the uncertainty of its mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tune2gguf.data import TokenizedRow, collate, lay_out_passes, make_empty_batch
from tune2gguf.distributed.world import World, sum_over_ranks
from tune2gguf.model.llama import CausalLM
from tune2gguf.runs.curves import Validation
from tune2gguf.runs.intervals import estimate_ratio


@dataclass(frozen=True)
class ValidationLoss:
    """Summed cross entropy and supervised tokens of each validation row, in the order of the rows."""

    row_sums: list[float]
    row_tokens: list[int]

    @property
    def mean(self) -> float:
        """Cross entropy per supervised token, in nats."""
        return sum(self.row_sums) / sum(self.row_tokens)

    def at(self, step: int, epoch: int, *, row_indices: Sequence[int]) -> Validation:
        """Return the validation's record. A single row has no spread, so no interval.

        Args:
            row_indices: indices of the rows in heldout.jsonl
        """
        estimate = estimate_ratio(self.row_sums, self.row_tokens) if len(self.row_sums) > 1 else None
        return Validation(
            step=step,
            epoch=epoch,
            loss=self.mean,
            low=estimate and estimate.low,
            high=estimate and estimate.high,
            rows=len(self.row_sums),
            tokens=sum(self.row_tokens),
            row_losses=tuple(self.row_sums),
            row_tokens=tuple(self.row_tokens),
            row_indices=tuple(row_indices),
        )


@torch.no_grad()
def compute_validation_loss(
    model: CausalLM,
    rows: Sequence[TokenizedRow],
    *,
    tokens_per_pass: int,
    world: World,
    before_pass: Callable[[], None] = lambda: None,
) -> ValidationLoss:
    """Return the loss of each row without dropout. Each process takes every world.size-th pass.

    Args:
        before_pass: called equally often by all processes; may raise to stop
    """
    was_training = model.training
    model.eval()
    rows = list(rows)
    row_sums = torch.zeros(len(rows), dtype=torch.float64)
    passes = lay_out_passes([len(row.tokens) for row in rows], tokens_per_pass=tokens_per_pass)
    # A sharded model must run in all processes at once: one without rows left takes an empty batch.
    for start in range(0, len(passes), world.size):
        before_pass()
        indices = passes[start + world.rank] if start + world.rank < len(passes) else []
        batch = collate([rows[index] for index in indices]) if indices else make_empty_batch()
        losses = model(**vars(batch.to(world.device))).double().cpu()
        parts = losses.split([rows[index].num_supervised for index in indices])
        for index, part in zip(indices, parts, strict=True):
            row_sums[index] = part.sum()
    model.train(was_training)
    # NCCL reduces tensors on the GPU only.
    row_sums = sum_over_ranks(row_sums.to(world.device)).cpu()
    return ValidationLoss(row_sums=row_sums.tolist(), row_tokens=[row.num_supervised for row in rows])
