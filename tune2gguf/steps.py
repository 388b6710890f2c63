"""What an optimizer step needs besides the model: counts over all ranks, an empty batch, a guard against NaN."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tune2gguf.distributed import World, sum_over_ranks
from tune2gguf.loss import IGNORED_LABEL

if TYPE_CHECKING:
    from tune2gguf.data import Batch, TokenizedRow


def count_tokens(micro_batches: list[list[TokenizedRow]], world: World) -> tuple[int, int]:
    """Return the tokens and the supervised tokens of a step's rows over all ranks, padding not counted."""
    rows = [row for batch in micro_batches for row in batch]
    own = [sum(len(row.tokens) for row in rows), sum(row.num_supervised for row in rows)]
    tokens, supervised_tokens = sum_over_ranks(torch.tensor(own, device=world.device)).tolist()
    return tokens, supervised_tokens


def make_empty_batch() -> Batch:
    """Return a batch without a supervised token: it goes through the whole model and adds nothing."""
    from tune2gguf.data import Batch

    return Batch(tokens=torch.zeros((1, 2), dtype=torch.long), labels=torch.full((1, 2), IGNORED_LABEL))


def require_finite(loss: float, *, step: int, rows: list[TokenizedRow]) -> None:
    """Stop before a step whose loss is NaN or infinite reaches the weights.

    Raises:
        FloatingPointError: naming the rows of this rank's step
    """
    if not math.isfinite(loss):
        places = ", ".join(str(row.source) for row in rows)
        raise FloatingPointError(f"step {step}: the loss is {loss}; its rows are {places}")
