"""Causal attention on a CPU, in float32, a block of queries at a time.

torch's own kernel multiplies head by head, in products so small for rows of a few hundred tokens that float32 over all
heads at once takes less time than its bf16, with half the error in the gradients. Blocks keep memory linear in a row's
length, and skip the keys of other rows in a pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torchtune.modules import MultiHeadAttention

# Of a block, in all heads: 1 MB in float32, which stays in a core's cache.
SCORES_AT_A_TIME = 1 << 18
MIN_QUERIES = 16
# Beyond, the products of torch's kernel are large enough for bf16 to pay: 2048 tokens take three quarters of the time.
LONGEST_BF16_ROW = 1024


class Attention(MultiHeadAttention):
    """torchtune's attention, with the product of queries, keys and values done by `attend` where rows are trained."""

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Map [batch, seq, dim] to the same; with caches, on a GPU and compiled as torchtune does it."""
        if self.kv_cache is not None or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x, y, mask=mask, input_pos=input_pos)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self.pos_embeddings(part, input_pos=input_pos) for part in (q, k))
        return self.output_proj(attend(q, k, v, mask=mask).flatten(-2))


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v of each head, [batch, seq, heads, head_dim].

    Args:
        q: [batch, seq, heads, head_dim]
        k: [batch, seq, kv_heads, head_dim], of which each serves heads / kv_heads neighbouring heads
        v: like k
        mask: True where a token attends to another, none of them behind it, [batch, seq, seq]; None for all before it
    """
    if mask is None and q.dtype == torch.bfloat16 and q.shape[1] > LONGEST_BF16_ROW:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return _BlockwiseAttention.apply(q, k, v, mask)


class _BlockwiseAttention(torch.autograd.Function):
    """Keeps q, k and v for backward, which computes the weights of each block again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        kv_heads, out = k.shape[2], torch.empty_like(q)
        keys, values = (_split_heads(part, kv_heads) for part in (k, v))
        for query_range, key_range in _list_blocks(q, mask):
            queries = _split_heads(q[:, query_range], kv_heads).mul_(q.shape[-1] ** -0.5)
            weights = _compute_weights(queries, keys[:, key_range], mask, query_range, key_range)
            _join_heads(torch.bmm(weights, values[:, key_range]), out[:, query_range])
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        q, k, v, mask = ctx.saved_tensors
        kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
        keys, values = (_split_heads(part, kv_heads) for part in (k, v))
        key_gradient, value_gradient = torch.zeros_like(keys), torch.zeros_like(values)
        q_gradient, k_gradient, v_gradient = (torch.empty_like(part) for part in (q, k, v))
        for query_range, key_range in _list_blocks(q, mask):
            queries, grad_out = (_split_heads(part[:, query_range], kv_heads) for part in (q, upstream))
            queries.mul_(scale)
            weights = _compute_weights(queries, keys[:, key_range], mask, query_range, key_range)
            value_gradient[:, key_range].baddbmm_(weights.mT, grad_out)
            scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(grad_out, values[:, key_range].mT), weights, -1, weights.dtype
            )
            key_gradient[:, key_range].baddbmm_(scores.mT, queries)
            _join_heads(torch.bmm(scores, keys[:, key_range]).mul_(scale), q_gradient[:, query_range])
        _join_heads(key_gradient, k_gradient)
        _join_heads(value_gradient, v_gradient)
        return q_gradient, k_gradient, v_gradient, None


def _list_blocks(q: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block and the keys that they see, from the first that one of them attends to.

    A block ends where a row does: what is not finite in one must not reach another.
    """
    batch, seq, heads, _ = q.shape
    first_keys = torch.zeros(1, seq, dtype=torch.int64) if mask is None else mask.byte().argmax(dim=-1)
    row_starts = (first_keys == torch.arange(seq)).any(dim=0).nonzero().flatten().tolist()
    for row_start, row_stop in itertools.pairwise([*row_starts, seq]):
        size = max(MIN_QUERIES, SCORES_AT_A_TIME // (batch * heads * (row_stop - row_start)))
        for start in range(row_start, row_stop, size):
            stop = min(start + size, row_stop)
            yield slice(start, stop), slice(int(first_keys[:, start].min()), stop)


def _compute_weights(
    queries: Tensor, keys: Tensor, mask: Tensor | None, query_range: slice, key_range: slice
) -> Tensor:
    """Return what each query takes of each value, [batch * kv_heads, group * queries, keys]; a row's sum is 1.

    Args:
        queries: scaled queries, from _split_heads
        keys: those that one of the queries attends to, likewise
    """
    scores = torch.bmm(queries, keys.mT)
    num_queries, num_keys = query_range.stop - query_range.start, key_range.stop - key_range.start
    if mask is None:
        behind = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1)
        scores.view(-1, num_queries, num_keys)[..., query_range.start - key_range.start :].masked_fill_(
            behind, -torch.inf
        )
    else:
        hidden = mask[:, query_range, key_range].logical_not()
        scores.view(len(mask), -1, num_queries, num_keys).masked_fill_(hidden[:, None], -torch.inf)
    return torch.softmax(scores, dim=-1)


def _split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Return [batch, n, heads, head_dim] as [batch * kv_heads, heads / kv_heads * n, head_dim], in float32 or more."""
    batch, n, heads, head_dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    split = torch.empty(batch, kv_heads, heads // kv_heads, n, head_dim, dtype=dtype)
    split.copy_(x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4))
    return split.view(batch * kv_heads, -1, head_dim)


def _join_heads(split: Tensor, out: Tensor) -> None:
    """Write what _split_heads has made of a tensor like `out`, [batch, n, heads, head_dim], back into it."""
    batch, n, _, head_dim = out.shape
    by_head = split.view(batch, len(split) // batch, -1, n, head_dim)
    out.unflatten(2, (by_head.shape[1], -1)).copy_(by_head.permute(0, 3, 1, 2, 4))
