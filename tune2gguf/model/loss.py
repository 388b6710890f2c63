"""Cross entropy over the supervised positions only, without ever holding [batch, seq, vocab]."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from tune2gguf.model.lengths import pad_length

IGNORED_LABEL = -100

# Projected at a time: 256 x 128256 logits are 66 MB in bf16, and the product is still large enough to be efficient.
# A GPU, whose kernel needs no float32 copy of them, takes 512: the product of 256 ran at three quarters of its speed.
POSITIONS_PER_CHUNK = {"cpu": 256, "cuda": 512, "mps": 512}
# A CPU takes the softmax of so many logits at a time: their float32 copies of 2 MB stay in its cache.
CACHED_LOGITS = 1 << 19


def find_supervised(labels: Tensor) -> Tensor:
    """Return the places whose next token is supervised, row by row, as indices of labels.flatten(), [n] int64.

    Whoever asks on a GPU waits for it: batches are made with their places.

    Args:
        labels: [batch, seq], not shifted; IGNORED_LABEL where a token is not supervised
    """
    rows, places = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    return rows * labels.shape[1] + places


def select_supervised(hidden: Tensor, labels: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states that predict a supervised token, [n, dim], and those tokens, [n].

    Args:
        hidden: [tokens or more, dim]
        labels: [batch, seq], not shifted
        supervised: places from `find_supervised`
    """
    return hidden.index_select(0, supervised), labels.flatten().index_select(0, supervised + 1)


def cross_entropy_of_supervised(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each position, [n] in float32, for a frozen output head.

    Args:
        hidden: [n, dim]
        head_weight: [vocab, dim]; gets no gradient
        targets: token ids, [n]
    """
    return _ChunkedCrossEntropy.apply(hidden, head_weight, targets)


def pad_rows(hidden: Tensor) -> Tensor:
    """Return [n, dim] with zeros behind it on a CPU, for which every number of rows is another product."""
    padding = pad_length(len(hidden)) - len(hidden) if hidden.device.type == "cpu" else 0
    return functional.pad(hidden, (0, 0, 0, padding)) if padding else hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is taken while its logits are at hand, so that only [n, dim] is kept for backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        compute = _compute_fused if hidden.is_cuda and find_spec("triton") is not None else _compute_plainly
        num_positions = POSITIONS_PER_CHUNK[hidden.device.type]
        for start in range(0, targets.numel(), num_positions):
            chunk = slice(start, start + num_positions)
            rows = pad_rows(hidden[chunk])
            logits = rows @ head_weight.T
            own = logits[: len(targets[chunk])]
            losses[chunk], own_gradient = compute(own, targets[chunk], with_gradient=gradient is not None)
            if gradient is not None:
                gradient[chunk] = (logits @ head_weight)[: len(own)]  # the gradient stands where the logits were
            del logits, own, own_gradient  # before the next chunk's are there
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # The factors are 1 / N: rounded to bf16 they would be off by up to 0.4 %, all alike.
        return torch.mul(gradient, upstream[:, None], out=torch.empty_like(gradient)), None, None


def _compute_plainly(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return each position's cross entropy, float32 [n], and its gradient over the logits [n, vocab], written there."""
    num_positions, vocab = logits.shape
    losses = torch.empty(num_positions, dtype=torch.float32, device=logits.device)
    at_a_time = max(1, CACHED_LOGITS // vocab) if logits.device.type == "cpu" else max(1, num_positions)
    for start in range(0, num_positions, at_a_time):
        block = slice(start, start + at_a_time)
        log_probabilities = torch.log_softmax(logits[block], dim=-1, dtype=torch.float32)
        target = targets[block, None]
        losses[block] = -log_probabilities.gather(1, target).squeeze(1)
        if with_gradient:
            probabilities = torch.softmax(logits[block], dim=-1, dtype=torch.float32)  # faster than exp
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            logits[block] = probabilities
    return losses, logits if with_gradient else None


def _compute_fused(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same in one kernel, which writes the gradient over the logits."""
    from tune2gguf.model.fused.launch import cross_entropy

    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    cross_entropy(logits, targets, losses, with_gradient=with_gradient)
    return losses, logits if with_gradient else None
