"""Causal attention within each of several concatenated rows, on a GPU.

torch's FlashAttention takes the starts of the rows; it needs no mask and no compilation. cuDNN, if installed, is faster
for long rows. Empty rows are allowed: they pad the list of starts to a length that many passes share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import deterministic

from tune2gguf.model.fused import cudnn


@dataclass(frozen=True)
class Layout:
    """The rows of a pass.

    Attributes:
        positions: position of each token in its row, int64 [tokens]
        starts: first token of each row, then the number of tokens, int32 [rows + 1]
        longest: upper bound on the tokens of a row
        is_long: whether the longest row has at least cudnn.MIN_ROW tokens
    """

    positions: Tensor
    starts: Tensor
    longest: int
    is_long: bool = False

    def takes_cudnn(self, q: Tensor, k: Tensor) -> bool:
        """Whether to use cuDNN: it is available, rows are long, and its backward fits BACKWARD_BYTES."""
        if not (self.is_long and self.starts.is_cuda and cudnn.is_available()):
            return False
        return cudnn.fits(q, k, num_rows=len(self.starts) - 1, longest=self.longest)

    @cached_property
    def ragged_rows(self) -> dict[tuple[int, int, int], cudnn.RaggedRows]:
        """A cache of the rows in cuDNN's layout, by heads, kv heads and head_dim."""
        return {}


@contextmanager
def choose_exact_kernels() -> Iterator[None]:
    """Make flash attention's backward deterministic: a resumed run ends with the bits of an uninterrupted one."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory
    # warn_only would only warn and stay nondeterministic. Filling temporaries with NaN would cost time.
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warns)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return causal attention within each row, [tokens, heads, head_dim], and tensors to keep for `attend_back`.

    Args:
        q: [tokens, heads, head_dim]
        k, v: [tokens, kv heads, head_dim]
    """
    if not q.is_cuda:
        return _attend_densely(q, k, v, layout), ()
    if layout.takes_cudnn(q, k):
        out, stats = cudnn.attend(q, k, v, _lay_out_for_cudnn(layout, q, k), layout.longest)
        return out, (stats,)
    out, normalizers, random_state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, layout.starts, layout.starts, layout.longest, layout.longest, 0.0, True, False
    )
    return out, (normalizers, random_state, unused)


def attend_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: tuple[Tensor, ...], layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    Args:
        gradient: gradient of `out`
        out, kept: the results of `attend`
    """
    if not q.is_cuda:
        leaves = [part.detach().requires_grad_() for part in (q, k, v)]
        with torch.enable_grad():
            again = _attend_densely(*leaves, layout)
        return torch.autograd.grad(again, leaves, gradient)
    if layout.takes_cudnn(q, k):
        rows = _lay_out_for_cudnn(layout, q, k)
        return cudnn.attend_back(gradient, q, k, v, out, *kept, rows, layout.longest)
    normalizers, random_state, unused = kept
    starts, longest = layout.starts, layout.longest
    with choose_exact_kernels():
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, normalizers, starts, starts, longest, longest, 0.0, True, random_state, unused
        )


def _lay_out_for_cudnn(layout: Layout, q: Tensor, k: Tensor) -> cudnn.RaggedRows:
    """Return the layout's rows in cuDNN's layout; all layers of a pass share them."""
    key = (q.shape[1], k.shape[1], q.shape[2])
    if key not in layout.ragged_rows:
        layout.ragged_rows[key] = cudnn.RaggedRows.of(layout.starts, q, k)
    return layout.ragged_rows[key]


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Same as `attend`, on a CPU; for tests."""
    places = torch.arange(len(q), dtype=layout.starts.dtype, device=q.device)
    row_ids = torch.searchsorted(layout.starts, places, right=True)
    mask = (row_ids[:, None] == row_ids[None, :]).tril()
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
