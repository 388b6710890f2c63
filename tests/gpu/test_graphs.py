"""Passes replayed as CUDA graphs equal ungraphed passes, bit for bit."""

import dataclasses

import pytest
import torch

from tests.gpu.models import CUDA, MARKS, compute, list_adapter, make_batch, make_model, make_rows, measure_errors, pack
from tune2gguf.model.fused import MAX_GRAPHED_TOKENS
from tune2gguf.model.llama import CausalLM, prepare_training

pytestmark = MARKS


def make_fused(base_dir, *, graphed: bool, checkpointing: bool = False, **options) -> CausalLM:
    model = make_model(base_dir, CUDA, **{"base_weights": "bf16"} | options)
    prepare_training(model, compile=False, enable_activation_checkpointing=checkpointing, fuse=True)
    if not graphed:
        model.stack.graphs = None
    return model


def train(model: CausalLM, batches: list) -> list[torch.Tensor]:
    """Take two steps over all batches, each batch twice to capture its kind; return losses and gradients."""
    optimizer = torch.optim.AdamW([weight for _, weight in list_adapter(model)], lr=1e-3, fused=True)
    torch.manual_seed(3)
    found = []
    for _ in range(2):
        for batch in (*batches, *batches[::-1]):
            losses = model(**vars(batch.to(CUDA)))
            losses.mean().backward()
            found.append(losses.detach())
        found += [weight.grad.clone() for _, weight in list_adapter(model)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("base_weights", ["bf16", "fp8", "nf4"])
def test_graphed_passes_have_the_bits_of_others_with_dropout_over_lengths_and_steps(
    small_base, base_weights, checkpointing
):
    # The longest comes last: it resets the pool.
    lengths = [[70], [40, 50], [150, 93, 17], [300, 200, 150, 90], [600] * 4]
    batches = [pack(make_rows(rows)) for rows in lengths] + [make_batch(make_rows([96, 96]))]
    options = {"base_weights": base_weights, "dropout": 0.2, "checkpointing": checkpointing}
    graphed, eager = (make_fused(small_base, graphed=graphed, **options) for graphed in (True, False))
    found, expected = train(graphed, batches), train(eager, batches)
    assert len(graphed.stack.graphs.captured) >= 4
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number
    # Negative control: repeated dropout masks would be detected.
    torch.manual_seed(4)
    other = make_fused(small_base, graphed=True, **options)
    torch.manual_seed(5)
    first, second = (compute(other, batches[2]) for _ in range(2))
    assert not torch.equal(first.losses, second.losses)


def test_masks_differ_from_replay_to_replay(small_base):
    model, batch = make_fused(small_base, graphed=True, dropout=0.2), pack(make_rows([150, 93]))
    first, second, third = (compute(model, batch).losses for _ in range(3))
    assert len(model.stack.graphs.captured) == 1
    assert not torch.equal(second, third) and not torch.equal(first, second)


def test_packed_rows_are_the_rows_one_by_one(small_base):
    rows = make_rows([40, 150, 17, 93])
    model = make_fused(small_base, graphed=True)
    for _ in range(2):  # ungraphed, then replayed
        packed, alone = compute(model, pack(rows)), compute(model, *(make_batch([row]) for row in rows))
        assert measure_errors(packed, alone)[0] < 0.01 and measure_errors(packed, alone)[1] < 0.08
    # Negative control: rows attend to earlier rows of their pack.
    blind = compute(model, dataclasses.replace(pack(rows), row_starts=None))
    assert measure_errors(blind, alone)[1] > 0.1


def test_few_graphs_serve_all_lengths_and_long_passes_have_none(small_base):
    model = make_fused(small_base, graphed=True)
    for length in range(129, 250, 10):
        compute(model, pack(make_rows([length // 2, length - length // 2])))
    assert len(model.stack.graphs.captured) == 1
    long = pack(make_rows([2000] * 4 + [600]))
    assert long.tokens.numel() > MAX_GRAPHED_TOKENS
    first, again = (compute(model, long) for _ in range(2))
    assert len(model.stack.graphs.captured) == 1
    assert torch.equal(first.losses, again.losses)
    assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in first.gradients.items())


def test_validation_between_steps_is_graphed_and_changes_nothing(small_base):
    batch, other = pack(make_rows([150, 93])).to(CUDA), make_batch(make_rows([200, 200])).to(CUDA)
    model = make_fused(small_base, graphed=True, dropout=0.2)
    outcomes = []
    for validates in (False, True):
        torch.manual_seed(0)
        outcomes.append([])
        for _ in range(3):
            outcomes[-1].append(compute(model, batch).losses)
            if validates:
                with torch.no_grad():
                    losses = [model.eval()(**vars(other)) for _ in range(3)]
                assert torch.equal(losses[0], losses[2])
                model.train()
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))
    assert sorted(kind.trains for kind in model.stack.graphs.captured) == [False, True]


def test_a_pass_that_another_one_followed_cannot_go_back(small_base):
    model, batch = make_fused(small_base, graphed=True), pack(make_rows([150, 93])).to(CUDA)
    compute(model, batch)
    losses = model(**vars(batch))
    model(**vars(batch))
    with pytest.raises(AssertionError, match="once, before the next pass"):
        losses.sum().backward()
