"""Compiling, checkpointing and offloading: they change a step's cost, not its result."""

import dataclasses

import pytest
import torch

from tests.conftest import write_tiny_base
from tests.gpu.models import (
    CUDA,
    MARKS,
    SMALL,
    STD,
    compute,
    make_batch,
    make_model,
    make_rows,
    measure_errors,
    prepare,
)

pytestmark = MARKS


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("base_weights", ["fp32", "nf4"])
def test_compiled_equals_eager(compiled_cases, base_weights, is_packed, checkpointing):
    found = compiled_cases[base_weights, is_packed, checkpointing].result()
    assert found["every_adapter_has_a_gradient"], "no adapter is left out"
    assert max(found["errors"]) < (1e-4 if base_weights == "fp32" else 0.08)


def test_checkpointing_and_offloading_change_no_loss_and_no_gradient(small_base):
    """Dropout is on: a recomputed layer must draw the same mask."""
    batches = [make_batch(make_rows([length, length])) for length in (96, 60)]
    outcomes = {}
    for name, options in SAVERS.items():
        torch.manual_seed(0)
        model = make_model(small_base, CUDA, base_weights="fp32", dropout=0.2)
        outcomes[name] = compute(prepare(model, **options), *batches)
    for name in ("checkpointing", "offloading"):
        assert torch.equal(outcomes[name].losses, outcomes["kept"].losses), name
        assert measure_errors(outcomes[name], outcomes["kept"])[1] < 1e-6, name
    # Negative control: another mask changes the loss.
    torch.manual_seed(1)
    other = compute(make_model(small_base, CUDA, base_weights="fp32", dropout=0.2), *batches)
    assert not torch.equal(other.losses, outcomes["kept"].losses)


SAVERS = {
    "kept": {},
    "checkpointing": {"checkpointing": True},
    "offloading": {"checkpointing": True, "offloading": True},
}


def test_checkpointing_takes_less_memory_and_offloading_less_again(tmp_path):
    base = write_tiny_base(tmp_path / "deep", dataclasses.replace(SMALL, num_layers=24), std=STD)
    batch, peaks = make_batch(make_rows([512] * 8)), {}
    for name, options in SAVERS.items():
        model = prepare(make_model(base, CUDA, base_weights="bf16"), **options)
        compute(model, batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute(model, batch)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del model
    # A layer's input is 8 x 512 x 128 in bf16, 1 MiB; offloading keeps about 5 of the 24 on the GPU.
    assert peaks["checkpointing"] < 0.7 * peaks["kept"]
    assert peaks["offloading"] < peaks["checkpointing"] - 10 * 2**20
