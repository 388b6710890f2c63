"""A CUDA device equals the CPU: losses and all adapter gradients, over plain and 4-bit bases."""

import dataclasses

import pytest
import torch

from tests.gpu.models import (
    CPU,
    CUDA,
    MARKS,
    compute,
    list_adapter,
    make_batch,
    make_exact_model,
    make_model,
    make_rows,
    measure_errors,
    pack,
)

pytestmark = MARKS


def test_float32_losses_and_gradients_equal_those_of_the_cpu(small_base):
    batch = make_batch(make_rows([96, 96]))
    found, expected = (compute(make_model(small_base, device, base_weights="fp32"), batch) for device in (CUDA, CPU))
    assert max(measure_errors(found, expected)) < 1e-4


@pytest.mark.parametrize("base_weights", ["bf16", "nf4"])
def test_bf16_losses_and_gradients_are_as_near_to_float32_as_those_of_the_cpu(small_base, base_weights):
    batch = make_batch(make_rows([96, 96]))
    expected = compute(make_exact_model(small_base, base_weights=base_weights), batch)
    on_cpu, on_cuda = (make_model(small_base, device, base_weights=base_weights) for device in (CPU, CUDA))
    cpu_errors, cuda_errors = (measure_errors(compute(model, batch), expected) for model in (on_cpu, on_cuda))
    # Rounding differs between machines; its size is bf16's, 2^-9 of a value, through a few products.
    assert cuda_errors[0] < 0.01 and cuda_errors[1] < 0.08
    for cuda_error, cpu_error in zip(cuda_errors, cpu_errors, strict=True):
        assert cuda_error < 2 * cpu_error
    # Negative control: a changed adapter is seen.
    with torch.no_grad():
        for name, weight in list_adapter(on_cuda):
            if name.endswith("lora_b.weight"):
                weight.zero_()
    assert measure_errors(compute(on_cuda, batch), expected)[0] > 2 * cuda_errors[0]


@pytest.mark.parametrize("base_weights", ["fp32", "bf16", "nf4"])
def test_packed_rows_equal_the_rows_alone(small_base, base_weights):
    """Without fused layers packs have a mask, single rows none."""
    rows = make_rows([40, 150, 17, 93])
    model = make_model(small_base, CUDA, base_weights=base_weights)
    packed, alone = compute(model, pack(rows)), compute(model, *(make_batch([row]) for row in rows))
    assert max(measure_errors(packed, alone)) < (1e-4 if base_weights == "fp32" else 0.08)
    # Negative control: rows attend to earlier rows of their pack.
    blind = compute(model, dataclasses.replace(pack(rows), row_starts=None))
    assert measure_errors(blind, alone)[1] > 0.1
