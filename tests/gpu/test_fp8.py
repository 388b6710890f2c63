"""FP8 products and kernels of a GPU equal the plain ones, and fused layers train equally well with both."""

import pytest
import torch

from tests.gpu.models import (
    CUDA,
    MARKS,
    compute,
    list_adapter,
    make_exact_model,
    make_model,
    make_rows,
    measure_errors,
    pack,
    prepare,
)
from tune2gguf.model import fp8

pytestmark = [
    *MARKS,
    pytest.mark.skipif(
        torch.cuda.is_available() and not fp8.multiplies_fp8(CUDA), reason="this GPU has no 8-bit products"
    ),
]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, torch.bfloat16)


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def without_units(monkeypatch):
    """Make the package treat the GPU as one without FP8 units."""
    return lambda: monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: False)


@pytest.mark.parametrize("width", [128, 4096, 14336])
def test_rows_are_quantized_to_the_bits_of_the_plain_path(width):
    parts = [draw(70, width, seed=0), draw(70, 48, seed=1) * 30]
    parts[0][3], parts[1][3] = 0, 0
    factors = [torch.rand(width, device=CUDA), torch.rand(48, device=CUDA)]
    for arguments in ((parts, factors), (parts, None), (parts[:1], None)):
        codes, scales = fp8.quantize_rows(*arguments)
        expected_codes, expected_scales = fp8.quantize_rows_plainly(*arguments)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


def test_codes_are_transposed():
    from tune2gguf.model.fused.eight_bit import transpose_codes

    weights = [draw(height, 208, seed=height).to(fp8.CODES) for height in (304, 16, 128)]
    expected = torch.cat([weight.view(torch.uint8) for weight in weights]).T
    assert torch.equal(transpose_codes(weights).view(torch.uint8), expected)


def test_gate_and_up_are_kept_in_8_bits_with_a_scale_for_128_of_a_row():
    from tune2gguf.model.fused import launch

    gate, up, gradient = (draw(70, 320, seed=seed).float() for seed in range(3))
    kept = launch.KeptInputs.make(gate)
    none = {"adapted_gate": None, "adapted_up": None}
    product = launch.swiglu(gate, up, kept=kept, **none)
    assert torch.equal(product, launch.swiglu(gate, up, **none))
    scales = kept.scales.transpose(1, 2).repeat_interleave(128, dim=2)[:, :, :320]
    decoded = kept.codes.float() * scales
    for found, exact in zip(decoded, (gate, up), strict=True):
        blocks = torch.nn.functional.pad(exact, (0, 64)).view(-1, 128)
        codes, block_scales = fp8.quantize_rows_plainly([blocks], None)
        expected = (codes.float() * block_scales).view(70, 384)[:, :320]
        # Another order of division may round a tie the other way.
        assert ((found - expected).abs() > 1e-6 * expected.abs()).float().mean() < 1e-3
        assert 0.01 < measure_error(found, exact.double()) < 0.03
    results = []
    for inputs, known in (((torch.empty_like(gate), torch.empty_like(up)), kept), ((decoded[0], decoded[1]), None)):
        parts = [gradient.clone(), inputs[0].clone(), inputs[1].clone()]
        launch.swiglu_backward(*parts, adapted_down=None, kept=known, **none)
        results.append(parts)
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_products_are_those_of_the_codes_to_rounding():
    """bf16 rounds by 0.17 % root mean square; tensor cores add with fewer bits than float32."""
    x, gradients = draw(300, 4096, seed=0), [draw(300, 1024, seed=1), draw(300, 512, seed=2)]
    weights = [fp8.quantize_weight(draw(height, 4096, seed=3) * 0.02) for height in (1024, 512)]
    codes, scales = (part.double() for part in fp8.quantize_rows_plainly([x], None))
    dense = [weight.codes.double() * weight.scales.double().unsqueeze(1) for weight in weights]
    for found, weight in zip(fp8.multiply_fp8(x, weights), dense, strict=True):
        assert measure_error(found, codes * scales @ weight.T) < 4e-3
    factors = [weight.scales for weight in weights]
    codes, scales = (part.double() for part in fp8.quantize_rows_plainly(gradients, factors))
    expected = codes * scales @ torch.cat([weight.codes.double() for weight in weights])
    assert measure_error(fp8.multiply_fp8_back([*gradients], weights), expected) < 4e-3
    # Negative control: the unquantized product differs.
    exact = sum(gradient.double() @ weight for gradient, weight in zip(gradients, dense, strict=True))
    assert measure_error(expected, exact) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_fused_layers_are_as_near_to_bf16_as_those_with_plain_products(small_base, without_units, checkpointing):
    """They need not be near each other: a code rounded to its neighbour changes all later values."""
    batch = pack(make_rows([150, 93]))
    exact = compute(make_exact_model(small_base, base_weights="bf16"), batch)
    model = prepare(make_model(small_base, CUDA, base_weights="fp8"), fuse=True, checkpointing=checkpointing)
    errors = measure_errors(compute(model, batch), exact)
    without_units()
    plain_errors = measure_errors(compute(model, batch), exact)
    for error, plain_error in zip(errors, plain_errors, strict=True):
        assert error < 1.3 * plain_error
    # Negative control: a changed adapter is seen.
    with torch.no_grad():
        for _, weight in list_adapter(model):
            weight.zero_()
    assert measure_errors(compute(model, batch), exact)[0] > 1.5 * errors[0]


def test_checkpointing_and_graphs_change_no_bit(small_base):
    batch = pack(make_rows([150, 93]))
    outcomes = []
    for checkpointing in (False, True):
        model = prepare(make_model(small_base, CUDA, base_weights="fp8"), fuse=True, checkpointing=checkpointing)
        outcomes += [compute(model, batch) for _ in range(3)]  # ungraphed, captured, replayed
        assert len(model.stack.graphs.captured) == 1
    first, *others = outcomes
    for other in others:
        assert torch.equal(first.losses, other.losses)
        assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in first.gradients.items())


def test_unfused_layers_multiply_8_bit_numbers_too(small_base, without_units):
    """Generation and runs without fused layers use these products."""
    batch = pack(make_rows([96, 96]))
    exact = compute(make_exact_model(small_base, base_weights="bf16"), batch)
    model = make_model(small_base, CUDA, base_weights="fp8")
    errors = measure_errors(compute(model, batch), exact)
    without_units()
    for error, plain_error in zip(errors, measure_errors(compute(model, batch), exact), strict=True):
        assert error < 1.3 * plain_error
