"""The fused layers equal torchtune's layers: losses and all adapter gradients."""

import gc

import pytest
import torch

from tests.gpu.models import (
    CUDA,
    MARKS,
    SMALL,
    compute,
    list_adapter,
    make_batch,
    make_exact_model,
    make_model,
    make_rows,
    measure_errors,
    pack,
    prepare,
)
from tune2gguf.machine.memory import RunSpec
from tune2gguf.train.compiling import compile_kernels

pytestmark = MARKS


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("base_weights", ["bf16", "nf4"])
def test_fused_layers_are_as_near_to_float32_as_plain_ones(small_base, base_weights, is_packed, checkpointing):
    batch = (pack if is_packed else make_batch)(make_rows([96, 96]))
    expected = compute(make_exact_model(small_base, base_weights=base_weights), batch)
    plain = measure_errors(compute(make_model(small_base, CUDA, base_weights=base_weights), batch), expected)
    model = prepare(make_model(small_base, CUDA, base_weights=base_weights), fuse=True, checkpointing=checkpointing)
    fused = measure_errors(compute(model, batch), expected)
    for fused_error, plain_error in zip(fused, plain, strict=True):
        assert fused_error < 1.3 * plain_error
    # Negative control: a changed adapter is seen.
    with torch.no_grad():
        list_adapter(model)[0][1].zero_()
    assert measure_errors(compute(model, batch), expected)[0] > 2 * fused[0]


def test_with_dropout_checkpointing_changes_nothing_and_a_seed_decides(small_base):
    outcomes = []
    for checkpointing, seed in ((False, 0), (True, 0), (False, 1)):
        model = make_model(small_base, CUDA, base_weights="bf16", dropout=0.2)
        torch.manual_seed(seed)
        outcomes.append(compute(prepare(model, fuse=True, checkpointing=checkpointing), pack(make_rows([150, 93]))))
    kept, checkpointed, other = outcomes
    assert torch.equal(kept.losses, checkpointed.losses)
    assert measure_errors(checkpointed, kept)[1] == 0
    assert not torch.equal(kept.losses, other.losses)


def test_dropped_gradients_are_on_average_those_without_dropout(small_base):
    """Mean over 200 masks; a wrong mask in backward, or missing scaling, would give another mean."""
    batch = make_batch(make_rows([96, 96]))
    model = prepare(make_model(small_base, CUDA, base_weights="bf16", dropout=0.1), fuse=True)
    torch.manual_seed(0)
    masked = [compute(model, batch).gradients for _ in range(200)]
    expected = compute(prepare(make_model(small_base, CUDA, base_weights="bf16"), fuse=True), batch).gradients
    for name, gradient in expected.items():
        mean = torch.stack([gradients[name] for gradients in masked]).mean(dim=0)
        assert torch.nn.functional.cosine_similarity(mean.flatten(), gradient.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_gradients_are_the_same_bits_each_time(small_base, is_packed):
    """Rows span several blocks of the attention kernel, which by default adds them in any order."""
    rows = make_rows([1024] * 4)
    batch = pack(rows[:2]) if is_packed else make_batch(rows)
    model = prepare(make_model(small_base, CUDA, base_weights="bf16"), fuse=True)
    first, *others = (compute(model, batch) for _ in range(5))
    for other in others:
        assert torch.equal(first.losses, other.losses)
        assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in first.gradients.items())


def count_allocated() -> int:
    """Return the bytes of all tensors on the GPU, without cuBLAS's workspaces, which stay from the first product on."""
    torch.empty(1, device=CUDA)
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("base_weights", ["bf16", "fp8", "nf4"])
def test_kernels_that_are_compiled_ahead_leave_nothing_on_the_gpu(base_weights):
    spec = RunSpec(
        SMALL,
        base_weights=base_weights,
        dtype="bf16",
        lora_rank=4,
        lora_dropout=0.1,
        lora_attn_modules=("q_proj", "v_proj"),
        apply_lora_to_mlp=True,
        longest_row=32,
        tokens_per_pass=64,
        enable_activation_checkpointing=False,
        device_type="cuda",
    )
    gc.collect()
    gc.disable()  # it would hide a reference cycle by freeing its tensors later
    try:
        before = count_allocated()
        compile_kernels(spec, scaling=1.0, device=torch.device("cuda", 0))
        assert count_allocated() == before
    finally:
        gc.enable()
