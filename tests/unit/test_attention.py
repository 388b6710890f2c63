import itertools

import pytest
import torch
from torch.nn import functional
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings

from tune2gguf.model import attention
from tune2gguf.model.attention import attend, lay_out_rows

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
LENGTHS = [[37], [20, 20], [5, 20, 12, 30, 7]]
ROPE = RotaryPositionalEmbeddings(HEAD_DIM, max_seq_len=64)


def draw(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compute_plainly(q, k, v, lengths, rope=ROPE):
    """Compute torch's attention row by row, with repeated keys and values and torchtune's RoPE."""
    results = []
    for q, k, v in zip(*(part.split(lengths) for part in (q, k, v)), strict=True):  # noqa: B020
        rotated = [rope(part[None])[0] for part in (q, k)]
        heads = [rotated[0], *(part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (rotated[1], v))]
        heads = [part.transpose(0, 1) for part in heads]
        results.append(functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1))
    return torch.cat(results)


def compute_ours(q, k, v, lengths, *, rope=ROPE, padding: int = 0):
    q, k, v = (functional.pad(part, (0, 0, 0, 0, 0, padding)) for part in (q, k, v))
    turns = torch.view_as_complex(rope.cache.to(torch.promote_types(q.dtype, torch.float32)))
    return attend(q, k, v, turns, lay_out_rows(lengths, len(q)))[: sum(lengths)]


def differentiate(compute, lengths, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    *inputs, upstream = draw(sum(lengths), dtype)
    inputs = [part.requires_grad_() for part in inputs]
    out = compute(*inputs, lengths, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("rope", [ROPE, Llama3ScaledRoPE(HEAD_DIM, max_seq_len=64)], ids=["plain", "scaled"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradients_equal_torchs(lengths, padding, rope):
    found = differentiate(compute_ours, lengths, torch.float32, padding=padding, rope=rope)
    expected = differentiate(compute_plainly, lengths, torch.float32, rope=rope)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


def test_padding_gets_nothing_and_gives_no_gradient():
    q, k, v, upstream = draw(80, torch.float32)
    inputs = [part.requires_grad_() for part in (q, k, v)]
    out = attend(*inputs, torch.view_as_complex(ROPE.cache), lay_out_rows(LENGTHS[2], 80))
    for part in (out, *torch.autograd.grad(out, inputs, upstream)):
        assert not part[74:].any()
        assert part[:74].any()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("num_queries", [1, 5, 16, 64])
def test_blocks_of_any_size_give_the_same(monkeypatch, num_queries, lengths):
    monkeypatch.setattr(attention, "MIN_QUERIES", num_queries)
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 0)
    found, expected = (differentiate(compute, lengths, torch.float32) for compute in (compute_ours, compute_plainly))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_in_bf16_it_is_nearer_to_the_exact_result_than_torchs(lengths):
    ours, theirs = (differentiate(compute, lengths, torch.bfloat16) for compute in (compute_ours, compute_plainly))
    for found, other, exact in zip(ours, theirs, differentiate_exactly(lengths), strict=True):
        assert (found - exact).norm() <= (other - exact).norm()
        assert (found - exact).norm() < 4e-3 * exact.norm()


def differentiate_exactly(lengths) -> list[torch.Tensor]:
    """Differentiate compute_plainly in float64, with the same bf16 inputs."""
    *inputs, upstream = (part.double() for part in draw(sum(lengths), torch.bfloat16))
    inputs = [part.requires_grad_() for part in inputs]
    out = compute_plainly(*inputs, lengths)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.double())]


def test_rows_beyond_the_longest_in_float32_give_the_same_in_bf16(monkeypatch):
    outcomes = []
    for longest in (37, 36):
        monkeypatch.setattr(attention, "LONGEST_FLOAT32_ROW", longest)
        outcomes.append(differentiate(compute_ours, [37], torch.bfloat16))
    assert not torch.equal(outcomes[0][0], outcomes[1][0])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_rows_that_see_each_other_are_something_else():
    """Negative control."""
    apart, together = (compute_ours(*draw(40, torch.float32)[:3], lengths, padding=0) for lengths in ([20, 20], [40]))
    torch.testing.assert_close(apart[:20], together[:20], atol=1e-6, rtol=1e-6)
    assert (apart[20:] - together[20:]).abs().max() > 1e-2


@pytest.mark.parametrize("longest_float32_row", [0, 128])
def test_what_is_not_finite_in_a_row_stays_there(monkeypatch, longest_float32_row):
    monkeypatch.setattr(attention, "LONGEST_FLOAT32_ROW", longest_float32_row)
    q, k, v, _ = draw(74, torch.bfloat16)
    for part in (q, k, v):
        part[5:25] = torch.nan
    rows = compute_ours(q, k, v, LENGTHS[2], padding=6).split(LENGTHS[2])
    assert [bool(row.isfinite().all()) for row in rows] == [True, False, True, True, True]


def test_every_token_has_its_place_and_rows_stand_beside_those_of_about_their_length():
    lengths = [100, 3, 55, 90, 4, 49]
    rows = lay_out_rows(lengths, 320)
    assert [(group.num_rows, group.longest) for group in rows.groups] == [(3, 100), (1, 49), (2, 4)]
    taken = torch.cat([group.places for group in rows.groups])
    assert taken[rows.places[:301]].tolist() == list(range(301))
    for group in rows.groups:
        starts = set(itertools.accumulate([0, *lengths[:-1]]))
        assert set(group.places.view(group.num_rows, -1)[:, 0].tolist()) <= starts
        assert group.is_token.sum() == sum(length for length in lengths if group.longest / 2 <= length <= group.longest)


def test_the_largest_temporary_does_not_grow_with_the_square_of_the_length():
    sizes = [
        max(
            (block.stop - block.start) * block.stop * 4 * 32
            for block in attention._list_blocks(torch.empty(1, 32, seq, 64, device="meta"))
        )
        for seq in (256, 4096)
    ]
    assert sizes[1] <= 4096 / 256 * sizes[0]
