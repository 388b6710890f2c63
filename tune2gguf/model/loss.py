"""Cross entropy over the supervised positions only; logits of [batch, seq, vocab] never exist."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from tune2gguf.model.lengths import pad_length

IGNORED_LABEL = -100

# 256 x 128256 logits take 66 MB in bf16, and the product is large enough to be efficient. A GPU's kernel needs no
# float32 copy of the logits; with 512 positions its product is a third faster than with 256.
POSITIONS_PER_CHUNK = {"cpu": 256, "cuda": 512, "mps": 512}
# Logits per softmax on a CPU: their float32 copy of 2 MB fits its cache.
CACHED_LOGITS = 1 << 19


def find_supervised(labels: Tensor) -> Tensor:
    """Return the positions whose next token is supervised, as indices of labels.flatten(), int64 [n], row by row.

    On a GPU this synchronizes; batches therefore carry their positions.

    Args:
        labels: [batch, seq], not shifted; IGNORED_LABEL where a token is not supervised
    """
    rows, places = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    return rows * labels.shape[1] + places


def select_supervised(hidden: Tensor, labels: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states that predict supervised tokens, [n, dim], and these tokens, [n].

    Args:
        hidden: [tokens or more, dim]
        labels: [batch, seq], not shifted
        supervised: positions from `find_supervised`
    """
    return hidden.index_select(0, supervised), labels.flatten().index_select(0, supervised + 1)


def cross_entropy_of_supervised(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each position, float32 [n], for a frozen output head.

    Args:
        hidden: [n, dim]
        head_weight: [vocab, dim]; gets no gradient
        targets: token ids, [n]
    """
    return _ChunkedCrossEntropy.apply(hidden, head_weight, targets)


def pad_rows(hidden: Tensor) -> Tensor:
    """Pad [n, dim] with zero rows on a CPU, where oneDNN compiles a product for each number of rows."""
    padding = pad_length(len(hidden)) - len(hidden) if hidden.device.type == "cpu" else 0
    return functional.pad(hidden, (0, 0, 0, padding)) if padding else hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy in chunks; forward computes each chunk's gradient, so backward keeps [n, dim] only."""

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
                gradient[chunk] = (logits @ head_weight)[: len(own)]  # `compute` has replaced logits by their gradient
            del logits, own, own_gradient  # before the next chunk's are allocated
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # The factors are 1 / N: in bf16 all would be off by the same error, up to 0.4 %.
        return torch.mul(gradient, upstream[:, None], out=torch.empty_like(gradient)), None, None


def _compute_plainly(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return each position's cross entropy, float32 [n], and its gradient, which overwrites the logits [n, vocab]."""
    num_positions, vocab = logits.shape
    losses = torch.empty(num_positions, dtype=torch.float32, device=logits.device)
    at_a_time = max(1, CACHED_LOGITS // vocab) if logits.device.type == "cpu" else max(1, num_positions)
    for start in range(0, num_positions, at_a_time):
        block = slice(start, start + at_a_time)
        own, target = logits[block].float(), targets[block, None]
        probabilities = torch.softmax(own, dim=-1)
        # log_softmax would nearly double the time. The logits are subtracted first: a small loss keeps its digits.
        losses[block] = (own.amax(-1) - own.gather(1, target).squeeze(1)) - probabilities.amax(-1).log()
        if with_gradient:
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            logits[block] = probabilities
    return losses, logits if with_gradient else None


def _compute_fused(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Same as _compute_plainly, in one kernel."""
    from tune2gguf.model.fused.launch import cross_entropy

    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    cross_entropy(logits, targets, losses, with_gradient=with_gradient)
    return losses, logits if with_gradient else None
