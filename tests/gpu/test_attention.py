"""Flash and cuDNN attention equal exact attention of each row, and are deterministic."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from tests.gpu.models import CUDA, MARKS
from tune2gguf.model.fused import cudnn
from tune2gguf.model.fused.attention import Layout, attend, attend_back

pytestmark = MARKS
HEADS, KV_HEADS = 4, 2
ROWS = {"full": [2048, 2048], "mixed": [1500, 37, 1, 1023, 0, 0], "short": [90, 182, 33]}


def attend_exactly(q, k, v, starts: list[int]) -> torch.Tensor:
    outs = []
    for start, end in pairwise(starts):
        own = [part[None, start:end].transpose(1, 2) for part in (q, k, v)]
        outs.append(functional.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def get_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rows", "longest"), [(2, 1024), (9, 1024), (3, 2048), (1, 4096)])
def test_what_cudnn_takes_for_backward_is_what_the_choice_counts(rows, longest):
    if not cudnn.is_available():
        pytest.skip(cudnn.MISSING)
    q, k = (torch.empty(longest + rows - 1, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    shape = cudnn.Shape.of(q, k, num_rows=rows, longest=longest, is_backward=True)
    graph, _ = cudnn.Plan(shape).backward
    # Besides the gradients of the scores, at most four float32 tensors of the heads' size and one of row sums.
    others = 4 * 4 * shape.rows * shape.longest * shape.heads // shape.groups * (shape.head_dim + 1)
    assert shape.backward_bytes <= graph.get_workspace_size() <= 1.05 * (shape.backward_bytes + others)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["flash", "cudnn", "cudnn, a few heads at a time"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention_equals_that_of_each_row_alone_and_repeats_its_bits(rows, kernel, head_dim, monkeypatch):
    is_long = kernel != "flash"
    if is_long and not cudnn.is_available():
        pytest.skip(cudnn.MISSING)
    if "few" in kernel:  # one group of heads per kv head
        longest = 1 << (max(rows) - 1).bit_length()
        monkeypatch.setattr(cudnn, "BACKWARD_BYTES", 2 * len(rows) * longest**2 * HEADS // KV_HEADS)
    torch.manual_seed(0)
    starts = [sum(rows[:number]) for number in range(len(rows) + 1)]
    q, k, v, gradient = (
        torch.randn(starts[-1], heads, head_dim, dtype=torch.bfloat16, device=CUDA)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    places = torch.tensor(starts, dtype=torch.int32, device=CUDA)
    layout = Layout(torch.zeros(starts[-1], dtype=torch.int64, device=CUDA), places, max(rows), is_long)
    assert layout.takes_cudnn(q, k) == is_long
    out, kept = attend(q, k, v, layout)
    found = attend_back(gradient, q, k, v, out, kept, layout)
    exact = [part.double().requires_grad_() for part in (q, k, v)]
    exact_out = attend_exactly(*exact, starts)
    expected = torch.autograd.grad(exact_out, exact, gradient.double())
    # bf16 rounds to 8 bits: up to 0.4 %.
    assert get_error(out, exact_out.detach()) < 4e-3
    assert all(get_error(*pair) < 6e-3 for pair in zip(found, expected, strict=True))
    for _ in range(3):
        again = attend_back(gradient, q, k, v, *attend(q, k, v, layout), layout)
        assert all(map(torch.equal, again, found))
    # Negative control: rows attend to each other.
    whole = attend_exactly(*exact, [0, starts[-1]]).detach()
    assert get_error(out, whole) > 0.05
