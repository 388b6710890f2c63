"""The validation loss of each step of an export, and its divergence from the trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tune2gguf.export.measure.layerwise import WeightSource, compute_hidden
from tune2gguf.export.measure.validation_set import ValidationRow

POSITIONS_PER_CHUNK = 512  # 512 x 128256 logits are 263 MB


@dataclass(frozen=True)
class StepLoss:
    """The losses of one step, over all supervised tokens.

    Attributes:
        loss: cross entropy, nats per token
        increase: increase over the reference's loss, as a fraction of it
        agreement: fraction of tokens with the same top-1 prediction as the reference
        token_losses: cross entropy of each token, row by row
        token_divergences: Kullback-Leibler divergence from the reference of each token, row by row
    """

    loss: float
    increase: float
    agreement: float
    token_losses: np.ndarray
    token_divergences: np.ndarray

    @cached_property
    def divergence(self) -> float:
        """Kullback-Leibler divergence from the reference, nats per token."""
        return float(self.token_divergences.mean(dtype=np.float64))


def measure_steps(
    sources: Mapping[str, WeightSource],
    rows: Sequence[ValidationRow],
    *,
    reference: str,
    report: Callable[[int], None] = lambda count: None,
) -> dict[str, StepLoss]:
    """Return the losses of each source, compared with the source named `reference`.

    Args:
        report: called with the number of layers done
    """
    return measure_groups(sources, [(rows, reference)], report=report)[0]


def measure_groups(
    sources: Mapping[str, WeightSource],
    groups: Sequence[tuple[Sequence[ValidationRow], str]],
    *,
    report: Callable[[int], None] = lambda count: None,
) -> list[dict[str, StepLoss]]:
    """Return measure_steps's result for each group of rows and its reference; all groups share one read of weights."""
    rows = [row for group, _ in groups for row in group]
    selected = {name: _select_hidden(source, rows, report) for name, source in sources.items()}
    sizes = [sum(len(row.positions) for row in group) for group, _ in groups]
    parts = {name: hidden.split(sizes) for name, hidden in selected.items()}
    return [
        _compare_sources(sources, {name: parts[name][place] for name in sources}, group, reference)
        for place, (group, reference) in enumerate(groups)
    ]


def _compare_sources(
    sources: Mapping[str, WeightSource],
    selected: Mapping[str, Tensor],
    rows: Sequence[ValidationRow],
    reference: str,
) -> dict[str, StepLoss]:
    targets = torch.from_numpy(np.concatenate([row.tokens[row.positions] for row in rows]).astype(np.int64))
    token_losses = {name: torch.empty(len(targets)) for name in sources}
    divergences = {name: torch.empty(len(targets)) for name in sources}
    agreements = dict.fromkeys(sources, 0)
    with torch.no_grad():
        for begin in range(0, len(targets), POSITIONS_PER_CHUNK):
            chunk = slice(begin, begin + POSITIONS_PER_CHUNK)
            expected = sources[reference].multiply_head(selected[reference][chunk]).log_softmax(-1)
            for name, source in sources.items():
                found = expected if name == reference else source.multiply_head(selected[name][chunk]).log_softmax(-1)
                token_losses[name][chunk] = -found.gather(1, targets[chunk, None])[:, 0]
                divergences[name][chunk] = (expected.exp() * (expected - found)).sum(-1)
                agreements[name] += int((expected.argmax(-1) == found.argmax(-1)).sum())
    reference_loss = float(token_losses[reference].double().mean())
    return {
        name: StepLoss(
            loss=(loss := float(token_losses[name].double().mean())),
            increase=_compare(loss, reference_loss),
            agreement=agreements[name] / len(targets),
            token_losses=token_losses[name].numpy(),
            token_divergences=divergences[name].numpy(),
        )
        for name in sources
    }


def _compare(loss: float, reference_loss: float) -> float:
    if reference_loss == 0:  # memorized rows
        return math.inf if loss else 0.0
    return loss / reference_loss - 1


def _select_hidden(source: WeightSource, rows: Sequence[ValidationRow], report: Callable[[int], None]) -> Tensor:
    """Return the states that predict the supervised tokens, [n, dim]."""
    starts = np.cumsum([0, *(len(row.tokens) for row in rows[:-1])])
    places = np.concatenate([start + row.positions - 1 for start, row in zip(starts, rows, strict=True)])
    return compute_hidden(source, [row.tokens for row in rows], report=report)[torch.from_numpy(places)].clone()
