"""CPU attention: causal attention within each row of a pass, in float32.

Rows of similar length form a group, so a pass takes a few large calls. Short rows use torch's kernel. For longer rows
that kernel's products, one head at a time, are too small; blocks of queries over all heads are faster. Blocks also
keep memory linear in the row's length. float32 halves bf16's error in the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtune.modules import MultiHeadAttention

from tune2gguf.model.lengths import LONGEST_SHORT_ROW
from tune2gguf.model.lora import apply_linears

# Scores of a block over all heads: 1 MB in float32, which fits a core's cache.
SCORES_AT_A_TIME = 1 << 18
MIN_QUERIES = 16
# Longer bf16 rows use torch's kernel in bf16: at 2048 tokens it takes three quarters of the float32 time.
LONGEST_FLOAT32_ROW = 1024
# The longest row of a group over its shortest, at most: padding costs less than further calls.
MAX_PADDING = 2.0


@dataclass(frozen=True)
class RowGroup:
    """Rows of similar length, padded to the longest.

    Attributes:
        num_rows: number of rows
        longest: tokens of the longest row
        places: index of each token in the pass, [rows * longest]; padding repeats the row's last token. None: the
            group is the whole pass, unpadded
        is_token: 1 for a token, 0 for padding, float32 [rows * longest, 1, 1]; None as for `places`
    """

    num_rows: int
    longest: int
    places: Tensor | None = None
    is_token: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """The groups that a pass is split into for attention.

    Attributes:
        places: index of each token of the pass in the concatenated groups, [tokens]; None: one group is the whole pass
        num_padding: tokens at the end of the pass that belong to no row
    """

    groups: tuple[RowGroup, ...]
    places: Tensor | None = None
    num_padding: int = 0


def lay_out_rows(lengths: list[int], num_tokens: int) -> Rows:
    """Return the groups of a pass of `num_tokens`: concatenated rows of these lengths, then padding."""
    if len(set(lengths)) == 1 and sum(lengths) == num_tokens:
        return Rows((RowGroup(len(lengths), lengths[0]),))
    ends = torch.tensor(lengths).cumsum(0)
    # torch's kernel divides by the row's length: an empty row would kill the process.
    order = sorted((row for row, length in enumerate(lengths) if length > 0), key=lambda row: -lengths[row])
    groups, places, start = [], torch.zeros(num_tokens, dtype=torch.int64), 0
    while order:
        longest = lengths[order[0]]
        rows = [row for row in order if lengths[row] * MAX_PADDING >= longest]
        order = order[len(rows) :]
        own = torch.tensor([lengths[row] for row in rows])[:, None]
        within = torch.arange(longest)[None]
        is_token = within < own
        taken = (ends[rows][:, None] - own + torch.minimum(within, own - 1)).flatten()
        flags = is_token.flatten()
        places[taken[flags]] = start + flags.nonzero().flatten()
        groups.append(RowGroup(len(rows), longest, taken, flags[:, None, None].float()))
        start += len(rows) * longest
    return Rows(tuple(groups), places, num_tokens - sum(lengths))


class Attention(MultiHeadAttention):
    """torchtune's attention, plus `attend_rows` for training on a CPU."""

    def attend_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """Map [tokens, dim] to the same shape."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in apply_linears(x, projections))
        turns = torch.view_as_complex(self.pos_embeddings.cache)
        (out,) = apply_linears(attend(q, k, v, turns, rows).flatten(1), (self.output_proj,))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, turns: Tensor, rows: Rows) -> Tensor:
    """Return causal attention, softmax(q k^T / sqrt(head_dim)) v, within each row, [tokens, heads, head_dim].

    Args:
        q: [tokens, heads, head_dim], before RoPE
        k, v: [tokens, kv_heads, head_dim], before RoPE; each kv head serves heads / kv_heads neighbouring heads
        turns: RoPE's rotation of each pair of channels, complex [positions, head_dim / 2]
    """
    return _RowAttention.apply(q, k, v, turns, rows)


class _RowAttention(torch.autograd.Function):
    """Keep q, k, v and the result for backward, which recomputes RoPE and, in blocks, the attention weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, rows: Rows) -> Tensor:
        parts, kept = [], []
        for group in rows.groups:
            heads = _take_heads(q, k, v, turns, group)
            if _is_blockwise(heads[0]):
                part, normalizers = _attend_in_blocks(*heads), None
            else:
                part, normalizers = _attend_at_once(*heads)
            parts.append(part.flatten(0, 1).to(q.dtype))
            kept.append(normalizers)
        out = _join(parts, rows)
        ctx.rows = rows
        ctx.save_for_backward(q, k, v, turns, out, *kept)
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        q, k, v, turns, out, *kept = ctx.saved_tensors
        gradients = []
        for group, normalizers in zip(ctx.rows.groups, kept, strict=True):
            heads = _take_heads(q, k, v, turns, group)
            grad_out = _take(upstream, group)
            if group.is_token is not None:
                grad_out.flatten(0, 1).mul_(group.is_token)
            grad_out = grad_out.to(heads[0].dtype)
            if normalizers is None:
                found = _attend_in_blocks_back(*heads, grad_out)
            else:
                found = _attend_at_once_back(*heads, grad_out, _take(out, group).to(grad_out.dtype), normalizers)
            # The gradient of a rotation is the inverse rotation.
            back = turns[: group.longest].conj()
            rotated_back = [_rotate(part.to(turns.real.dtype), back) for part in found[:2]]
            gradients.append([part.flatten(0, 1).to(q.dtype) for part in (*rotated_back, found[2])])
        return *(_join(list(parts), ctx.rows) for parts in zip(*gradients, strict=True)), None, None


def _take_heads(q: Tensor, k: Tensor, v: Tensor, turns: Tensor, group: RowGroup) -> list[Tensor]:
    """Return a group's q, k and v after RoPE, [rows, longest, heads, head_dim] in the kernel's dtype."""
    turns = turns[: group.longest]
    heads = [_rotate(_take(q, group), turns), _rotate(_take(k, group), turns), _take(v, group)]
    if q.dtype == torch.bfloat16 and group.longest > LONGEST_FLOAT32_ROW:
        return [part.to(q.dtype) for part in heads]
    return heads


def _take(x: Tensor, group: RowGroup) -> Tensor:
    """Copy a group's tokens from [tokens, heads, head_dim] to float32 [rows, longest, heads, head_dim]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype, copy=True) if group.places is None else x.index_select(0, group.places).to(dtype)
    return x.view(group.num_rows, group.longest, *x.shape[1:])


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of channels of [rows, seq, heads, head_dim] as complex numbers, in place."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns[:, None])
    return x


def _join(parts: list[Tensor], rows: Rows) -> Tensor:
    """Gather the groups' tokens in the order of the pass, [tokens, heads, head_dim]; zero for padding."""
    if rows.places is None:
        return parts[0]
    joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, rows.places)
    joined[len(joined) - rows.num_padding :] = 0
    return joined


def _is_blockwise(q: Tensor) -> bool:
    return q.dtype != torch.bfloat16 and q.shape[1] > LONGEST_SHORT_ROW


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of torch's kernel, shaped like q, and its log-sum-exps."""
    k, v = (_repeat(part, q.shape[2]) for part in (k, v))
    out, normalizers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(part.transpose(1, 2) for part in (q, k, v)), 0.0, True
    )
    return out.transpose(1, 2), normalizers


def _attend_at_once_back(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, out: Tensor, normalizers: Tensor
) -> list[Tensor]:
    kv_heads = k.shape[2]
    k, v = (_repeat(part, q.shape[2]) for part in (k, v))
    grad_out, q, k, v, out = (part.transpose(1, 2) for part in (grad_out, q, k, v, out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, normalizers, 0.0, True
    )
    q, k, v = (part.transpose(1, 2) for part in gradients)
    return [q.contiguous(), *(part.unflatten(2, (kv_heads, -1)).sum(3) for part in (k, v))]


def _repeat(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each key or value head for the heads that it serves."""
    group = num_heads // x.shape[2]
    return x if group == 1 else x.repeat_interleave(group, dim=2)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, kv_heads = torch.empty_like(q), k.shape[2]
    keys, values = (_split_heads(part, kv_heads) for part in (k, v))
    for block in _list_blocks(q):
        queries = _split_heads(q[:, block], kv_heads).mul_(q.shape[-1] ** -0.5)
        weights = _compute_weights(queries, keys[:, : block.stop], block)
        _join_heads(torch.bmm(weights, values[:, : block.stop]), out[:, block])
    return out


def _attend_in_blocks_back(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    keys, values = (_split_heads(part, kv_heads) for part in (k, v))
    key_gradient, value_gradient = torch.zeros_like(keys), torch.zeros_like(values)
    q_gradient, k_gradient, v_gradient = (torch.empty_like(part) for part in (q, k, v))
    for block in _list_blocks(q):
        queries, upstream = (_split_heads(part[:, block], kv_heads) for part in (q, grad_out))
        queries.mul_(scale)
        weights = _compute_weights(queries, keys[:, : block.stop], block)
        value_gradient[:, : block.stop].baddbmm_(weights.mT, upstream)
        scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(upstream, values[:, : block.stop].mT), weights, -1, weights.dtype
        )
        key_gradient[:, : block.stop].baddbmm_(scores.mT, queries)
        _join_heads(torch.bmm(scores, keys[:, : block.stop]).mul_(scale), q_gradient[:, block])
    _join_heads(key_gradient, k_gradient)
    _join_heads(value_gradient, v_gradient)
    return [q_gradient, k_gradient, v_gradient]


def _list_blocks(q: Tensor) -> Iterator[slice]:
    """Yield the slice of queries of each block of q [rows, seq, heads, head_dim]."""
    num_rows, seq, heads, _ = q.shape
    size = max(MIN_QUERIES, SCORES_AT_A_TIME // (num_rows * heads * seq))
    for start in range(0, seq, size):
        yield slice(start, min(start + size, seq))


def _compute_weights(queries: Tensor, keys: Tensor, block: slice) -> Tensor:
    """Return the attention weights, [rows * kv_heads, group * queries, keys].

    Args:
        queries: scaled queries, from _split_heads
        keys: keys up to the block's last query, from _split_heads
    """
    scores = torch.bmm(queries, keys.mT)
    size = block.stop - block.start
    behind = torch.ones(size, size, dtype=torch.bool).triu_(1)
    scores.view(-1, size, block.stop)[..., block.start :].masked_fill_(behind, -torch.inf)
    return torch.softmax(scores, dim=-1)


def _split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Return a copy of [rows, n, heads, head_dim] as [rows * kv_heads, heads / kv_heads * n, head_dim]."""
    rows, n, heads, head_dim = x.shape
    split = torch.empty(rows, kv_heads, heads // kv_heads, n, head_dim, dtype=x.dtype)
    split.copy_(x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4))
    return split.view(rows * kv_heads, -1, head_dim)


def _join_heads(split: Tensor, out: Tensor) -> None:
    """Undo _split_heads: copy `split` into `out`, [rows, n, heads, head_dim]."""
    rows, n, _, head_dim = out.shape
    by_head = split.view(rows, len(split) // rows, -1, n, head_dim)
    out.unflatten(2, (by_head.shape[1], -1)).copy_(by_head.permute(0, 3, 1, 2, 4))
