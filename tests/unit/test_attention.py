import pytest
import torch
from torch.nn import functional

from tune2gguf.model import attention
from tune2gguf.model.attention import attend
from tune2gguf.model.llama import make_row_mask

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 37, 6, 2, 8


def draw(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, SEQ, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compute_plainly(q, k, v, mask):
    """Attention of torch with every head's own keys and values."""
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def differentiate(compute, dtype: torch.dtype, mask) -> list[torch.Tensor]:
    *inputs, upstream = draw(dtype)
    inputs = [part.requires_grad_() for part in inputs]
    out = compute(*inputs, mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def make_packs() -> torch.Tensor:
    return make_row_mask(torch.tensor([0, 5, 25, 37, 67, 74]), BATCH, SEQ)


@pytest.mark.parametrize("num_queries", [1, 5, 16, 64])
@pytest.mark.parametrize("is_packed", [False, True])
def test_output_and_gradients_equal_torchs_in_blocks_of_any_size(monkeypatch, num_queries, is_packed):
    monkeypatch.setattr(attention, "MIN_QUERIES", num_queries)
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 0)
    mask = make_packs() if is_packed else None
    found = differentiate(lambda q, k, v, mask: attend(q, k, v, mask=mask), torch.float32, mask)
    for ours, theirs in zip(found, differentiate(compute_plainly, torch.float32, mask), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("is_packed", [False, True])
def test_in_bf16_it_is_nearer_to_the_exact_result_than_torchs(is_packed):
    mask = make_packs() if is_packed else None
    ours = differentiate(lambda q, k, v, mask: attend(q, k, v, mask=mask), torch.bfloat16, mask)
    theirs = differentiate(compute_plainly, torch.bfloat16, mask)
    for found, other, exact in zip(ours, theirs, differentiate_exactly(mask), strict=True):
        assert (found - exact).norm() <= (other - exact).norm()
        assert (found - exact).norm() < 4e-3 * exact.norm()


def differentiate_exactly(mask) -> list[torch.Tensor]:
    """The same bf16 inputs, in float64."""
    *inputs, upstream = (part.double() for part in draw(torch.bfloat16))
    inputs = [part.requires_grad_() for part in inputs]
    out = compute_plainly(*inputs, mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.double())]


def test_rows_beyond_the_longest_give_the_same_by_torchs_kernel(monkeypatch):
    *inputs, upstream = draw(torch.bfloat16)
    outcomes = []
    for longest in (SEQ, SEQ - 1):
        monkeypatch.setattr(attention, "LONGEST_BF16_ROW", longest)
        parts = [part.clone().requires_grad_() for part in inputs]
        out = attend(*parts, mask=None)
        outcomes.append([out.detach(), *torch.autograd.grad(out, parts, upstream)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_a_mask_of_whole_rows_is_no_mask_and_one_of_packs_is_not():
    q, k, v, _ = draw(torch.float32)
    whole = make_row_mask(torch.tensor([0, SEQ, 2 * SEQ]), BATCH, SEQ)
    torch.testing.assert_close(attend(q, k, v, mask=whole), attend(q, k, v, mask=None), atol=1e-6, rtol=1e-6)
    assert (attend(q, k, v, mask=make_packs()) - attend(q, k, v, mask=None)).abs().max() > 1e-2


def test_keys_before_the_rows_of_a_block_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(attention, "MIN_QUERIES", 8)
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 0)
    rows = make_row_mask(torch.tensor([0, 16, 32]), 1, 32)
    blocks = list(attention._list_blocks(torch.empty(1, 32, HEADS, HEAD_DIM), rows))
    assert blocks == [(slice(start, start + 8), slice(start // 16 * 16, start + 8)) for start in (0, 8, 16, 24)]


def test_the_largest_temporary_does_not_grow_with_the_square_of_the_length():
    sizes = [
        max((queries.stop - queries.start) * (sees.stop - sees.start) * 4 * 32 for queries, sees in blocks)
        for blocks in (attention._list_blocks(torch.empty(1, seq, 32, 64, device="meta"), None) for seq in (256, 4096))
    ]
    assert sizes[1] <= 4096 / 256 * sizes[0]
