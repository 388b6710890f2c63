"""CPU attention: causal attention within each row of a pass, in float32.

Rows of similar length form a group, so a pass takes a few large calls. A group is computed in blocks of queries over
all heads: torch's kernel multiplies one head at a time, and its products are small. Blocks also keep memory linear in
the row's length. float32 halves bf16's error in the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchtune.modules import MultiHeadAttention

from tune2gguf.model.lengths import LONGEST_FLOAT32_ROW
from tune2gguf.model.lora import apply_linears

# Scores of a block over all heads: 1 MB in float32, which fits a core's cache.
SCORES_AT_A_TIME = 1 << 18
MIN_QUERIES = 16
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
        is_token: 1 for a token, 0 for padding, float32 [rows, 1, longest, 1]; None as for `places`
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
        groups.append(RowGroup(len(rows), longest, taken, is_token[:, None, :, None].float()))
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
            part, normalizers = (_attend_in_blocks(*heads), None) if _is_blockwise(heads) else _attend_at_once(*heads)
            parts.append(_put(part, q.dtype))
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
                grad_out.mul_(group.is_token)
            if _is_blockwise(heads):
                found = _attend_in_blocks_back(*heads, grad_out)
            else:
                found = _attend_at_once_back(*heads, grad_out, _take(out, group), normalizers)
            # The gradient of a rotation is the inverse rotation.
            of_q, of_k = (part.conj() for part in _turn_heads(turns, group))
            found = _rotate(found[0], of_q), _rotate(found[1], of_k), found[2]
            gradients.append([_put(part, q.dtype) for part in found])
        return *(_join(list(parts), ctx.rows) for parts in zip(*gradients, strict=True)), None, None


def _take_heads(q: Tensor, k: Tensor, v: Tensor, turns: Tensor, group: RowGroup) -> list[Tensor]:
    """Return a group's scaled q, k and v after RoPE, [rows, heads, longest, head_dim] in the kernel's dtype."""
    of_q, of_k = _turn_heads(turns, group)
    heads = [_rotate(_take(q, group), of_q), _rotate(_take(k, group), of_k), _take(v, group)]
    if q.dtype == torch.bfloat16 and group.longest > LONGEST_FLOAT32_ROW:
        return [part.to(q.dtype) for part in heads]
    return heads


def _turn_heads(turns: Tensor, group: RowGroup) -> tuple[Tensor, Tensor]:
    """Return the rotations of q and k; q's also scale it by 1 / sqrt(head_dim)."""
    turns = turns[: group.longest]
    return turns * (2 * turns.shape[1]) ** -0.5, turns


def _take(x: Tensor, group: RowGroup) -> Tensor:
    """Copy a group's tokens from [tokens, heads, head_dim] to float32 [rows, heads, longest, head_dim]."""
    taken = x if group.places is None else x.index_select(0, group.places)
    by_head = taken.view(group.num_rows, group.longest, *x.shape[1:]).transpose(1, 2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(by_head.shape, dtype=dtype).copy_(by_head)


def _put(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo _take: return [rows * longest, heads, head_dim] of a dtype."""
    by_token = x.transpose(1, 2)
    return torch.empty(by_token.shape, dtype=dtype).copy_(by_token).flatten(0, 1)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of channels of [rows, heads, seq, head_dim] as complex numbers; float32 in place."""
    x = x.to(turns.real.dtype)
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
    return x


def _join(parts: list[Tensor], rows: Rows) -> Tensor:
    """Gather the groups' tokens in the order of the pass, [tokens, heads, head_dim]; zero for padding."""
    if rows.places is None:
        return parts[0]
    joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, rows.places)
    joined[len(joined) - rows.num_padding :] = 0
    return joined


def _is_blockwise(heads: list[Tensor]) -> bool:
    return heads[0].dtype != torch.bfloat16


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of torch's kernel, shaped like q, and its log-sum-exps."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=1.0)


def _attend_at_once_back(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, out: Tensor, normalizers: Tensor
) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out.to(q.dtype), q, k, v, out.to(q.dtype), normalizers, 0.0, True, scale=1.0
    )


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    parts = []
    for block in _list_blocks(q):
        weights = _compute_weights(_take_block(q, block, len(keys)), keys[:, : block.stop], block)
        part = torch.bmm(weights, values[:, : block.stop])
        parts.append(part.view(*q.shape[:2], -1, q.shape[-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend_in_blocks_back(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    q_parts, k_gradient, v_gradient = [], torch.empty_like(keys), torch.empty_like(values)
    adds = 0  # the last block, which is the first here, has every key
    for block in reversed(list(_list_blocks(q))):
        queries, upstream = (_take_block(part, block, len(keys)) for part in (q, grad_out))
        weights = _compute_weights(queries, keys[:, : block.stop], block)
        v_gradient[:, : block.stop].baddbmm_(weights.mT, upstream, beta=adds)
        scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(upstream, values[:, : block.stop].mT), weights, -1, weights.dtype
        )
        k_gradient[:, : block.stop].baddbmm_(scores.mT, queries, beta=adds)
        q_parts.insert(0, torch.bmm(scores, keys[:, : block.stop]).view(*q.shape[:2], -1, q.shape[-1]))
        adds = 1
    q_gradient = q_parts[0] if len(q_parts) == 1 else torch.cat(q_parts, dim=2)
    return q_gradient, k_gradient.view(k.shape), v_gradient.view(v.shape)


def _list_blocks(q: Tensor) -> Iterator[slice]:
    """Yield the slice of queries of each block of q [rows, heads, seq, head_dim]."""
    num_rows, heads, seq, _ = q.shape
    size = max(MIN_QUERIES, SCORES_AT_A_TIME // (num_rows * heads * seq))
    for start in range(0, seq, size):
        yield slice(start, min(start + size, seq))


def _take_block(x: Tensor, block: slice, num_groups: int) -> Tensor:
    """Return a block of [rows, heads, seq, head_dim] as [rows * kv_heads, heads / kv_heads * queries, head_dim]."""
    return x[:, :, block].reshape(num_groups, -1, x.shape[-1])


@lru_cache(maxsize=64)
def _make_causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    """Return -inf where a key is behind its query, else 0, [size, size]. To add it is faster than masked_fill_."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu_(1)


def _compute_weights(queries: Tensor, keys: Tensor, block: slice) -> Tensor:
    """Return the attention weights, [rows * kv_heads, group * queries, keys].

    Args:
        queries: a block of scaled queries, from _take_block
        keys: keys up to the block's last query, [rows * kv_heads, keys, head_dim]
    """
    scores = torch.bmm(queries, keys.mT)
    size = block.stop - block.start
    scores.view(-1, size, block.stop)[..., block.start :].add_(_make_causal_mask(size, scores.dtype))
    return torch.softmax(scores, dim=-1)
