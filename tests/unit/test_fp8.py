"""FP8 weights and products against their definition and torch's own scaled products."""

import pytest
import torch

from tests.conftest import INTERPRETS_TRITON, TINY_UNTIED, write_tiny_base
from tune2gguf.base.load import load_base
from tune2gguf.model import fp8
from tune2gguf.model.fp8 import CODES, Fp8Weight, FrozenLinear
from tune2gguf.model.llama import build_lora_llama, lora_llama
from tune2gguf.model.lora import LoRALinear

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode(weight: Fp8Weight) -> torch.Tensor:
    return weight.codes.double() * weight.scales.double().unsqueeze(1)


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_largest_magnitude_of_a_row_becomes_448():
    codes, scales = fp8.quantize_rows([torch.tensor([[1.0, -4.0, 0.5], [0.25, 0.0, 0.125]])])
    assert codes.float().tolist() == [[112, -448, 56], [448, 0, 224]]
    assert torch.equal(scales, torch.tensor([[4 / 448], [0.25 / 448]]))


def test_parts_share_a_rows_scale_and_factors_come_before_it():
    parts, factors = [draw(4, 32), draw(4, 16, seed=1)], [draw(32, seed=2).abs(), draw(16, seed=3).abs()]
    whole = torch.cat([part * factor for part, factor in zip(parts, factors, strict=True)], dim=1)
    for found, expected in zip(fp8.quantize_rows(parts, factors), fp8.quantize_rows([whole]), strict=True):
        assert torch.equal(found.float(), expected.float())


def test_a_row_of_zeros_stays_zero_and_a_value_that_is_not_finite_is_seen():
    rows = torch.zeros(3, 16)
    rows[1, 2], rows[2, 5] = torch.nan, torch.inf
    codes, scales = fp8.quantize_rows([rows])
    products = codes.float() * scales
    assert torch.equal(products[0], rows[0])
    assert not products[1].isfinite().all() and not products[2].isfinite().all()


def test_quantizing_leaves_its_input_as_it_is():
    rows = draw(4, 16)
    before = rows.clone()
    fp8.quantize_rows([rows])
    assert torch.equal(rows, before)


def test_weights_take_the_best_of_eight_scales_for_each_row():
    weight = draw(40, 96) * torch.logspace(-3, 1, 40).unsqueeze(1)
    found = (decode(fp8.quantize_weight(weight)) - weight).square().sum(dim=1)
    largest = weight.abs().amax(dim=1, keepdim=True)
    for number in range(8):
        scales = largest / 448 * 2 ** (number / 8)
        other = ((weight / scales).to(CODES).double() * scales - weight).square().sum(dim=1)
        assert (found <= other * 1.001).all()


def test_normal_weights_lose_a_fortieth_a_quarter_of_what_4_bits_lose():
    from tune2gguf.model.nf4 import quantize_nf4

    weight = draw(256, 512)
    error = measure_error(decode(fp8.quantize_weight(weight)), weight)
    assert error == pytest.approx(0.025, rel=0.05)
    assert error < 0.3 * measure_error(quantize_nf4(weight).dequantize(), weight)


def test_chunks_of_a_weight_are_quantized_as_the_whole(monkeypatch):
    weight = draw(50, 64)
    whole = fp8.quantize_weight(weight)
    monkeypatch.setitem(fp8.CHUNK_VALUES, "cpu", 64 * 7)
    in_chunks = fp8.quantize_weight(weight)
    assert torch.equal(decode(whole), decode(in_chunks))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_products_are_those_of_the_codes(dtype, limit):
    x, weights = draw(30, 64).to(dtype), [fp8.quantize_weight(draw(n, 64, seed=n)) for n in (48, 16)]
    codes, scales = fp8.quantize_rows([x])
    for found, weight in zip(fp8.multiply_fp8(x, weights), weights, strict=True):
        assert found.dtype == dtype
        assert measure_error(found, codes.double() * scales @ decode(weight).T) < limit
    gradients = [draw(30, n, seed=n + 1).to(dtype) for n in (48, 16)]
    codes, scales = fp8.quantize_rows(gradients, [weight.scales for weight in weights])
    expected = codes.double() * scales @ torch.cat([weight.codes.double() for weight in weights])
    exact = sum(part.double() @ decode(weight) for part, weight in zip(gradients, weights, strict=True))
    given = [*gradients]
    assert measure_error(fp8.multiply_fp8_back(given, weights), expected) < limit
    assert given == []
    # Negative control: the gradients' quantization error would be detected.
    assert measure_error(expected, exact) > 4 * limit


def test_plain_products_are_those_of_torchs_scaled_rows():
    x, weight = draw(32, 64).bfloat16(), fp8.quantize_weight(draw(48, 64, seed=1))
    codes, scales = fp8.quantize_rows([x])
    columns = weight.scales.unsqueeze(0)
    expected = torch._scaled_mm(codes, weight.codes.t(), scales, columns, out_dtype=torch.bfloat16)
    (found,) = fp8.multiply_fp8(x, [weight])
    assert measure_error(found, expected) < 4e-3
    # Negative control: the scales of other columns.
    wrong = torch._scaled_mm(codes, weight.codes.t(), scales, columns.flip(1).contiguous(), out_dtype=torch.bfloat16)
    assert measure_error(wrong, expected) > 0.1


@pytest.mark.parametrize("has_adapter", [False, True], ids=["frozen", "adapter"])
def test_linear_layers_multiply_with_the_codes_both_ways(has_adapter):
    layer = LoRALinear(32, 48, rank=4, alpha=8.0, dropout=0.0) if has_adapter else FrozenLinear(32, 48)
    weight = fp8.quantize_weight(draw(48, 32))
    layer.weight = torch.nn.Parameter(weight.codes, requires_grad=False)
    layer.weight_scales = weight.scales
    x, upstream = draw(2, 5, 32, seed=1).requires_grad_(), draw(2, 5, 48, seed=2)
    out = layer(x)
    out.backward(upstream)
    adapter = 2.0 * layer.lora_b.weight @ layer.lora_a.weight if has_adapter else torch.zeros(48, 32)
    (product,) = fp8.multiply_fp8(x.detach().view(10, 32), [weight])
    gradient = fp8.multiply_fp8_back([upstream.view(10, 48)], [weight])
    assert torch.allclose(out.view(10, 48), product + x.view(10, 32) @ adapter.T, atol=1e-4)
    assert torch.allclose(x.grad.view(10, 32), gradient + upstream.view(10, 48) @ adapter, atol=1e-4)
    assert measure_error(out.view(10, 48), x.view(10, 32) @ (decode(weight).float() + adapter).T) < 0.05


@pytest.fixture
def model(tmp_path):
    base = write_tiny_base(tmp_path / "base", TINY_UNTIED, dtype=torch.bfloat16)
    model = lora_llama(
        str(base),
        architecture=None,
        lora_rank=2,
        lora_alpha=2.0,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj"],
        apply_lora_to_mlp=False,
        max_seq_len=32,
    )
    load_base(model, str(base), device=CPU, base_weights="fp8", show=False)
    return model


def test_a_loaded_base_has_a_byte_a_weight_in_its_layers_and_bf16_around_them(model):
    for name, parameter in model.decoder.named_parameters():
        if ".lora_" in name or parameter.dim() == 1:
            assert parameter.dtype == torch.float32, name
        else:
            assert parameter.dtype == (CODES if name.startswith("layers.") else torch.bfloat16), name
    for layer in model.decoder.layers:
        # One with and one without an adapter.
        for linear in (layer.attn.q_proj, layer.mlp.w2):
            assert linear.weight_scales.shape == (len(linear.weight),)
    assert not any("weight_scales" in name for name in model.state_dict())


@pytest.mark.skipif(not INTERPRETS_TRITON, reason="needs Triton's interpreter; tests/gpu has the kernels themselves")
def test_kernels_quantize_and_transpose_as_torch_does():
    from tune2gguf.model.fused import eight_bit

    parts = [draw(5, 72), draw(5, 40, seed=1) * 1e-3, draw(5, 16, seed=2) * 30]
    for part in parts:
        part[2] = 0
    factors = [draw(part.shape[1], seed=3).abs() for part in parts]
    for dtype in (torch.float32, torch.bfloat16):
        rows = [part.to(dtype) for part in parts]
        for arguments in ((rows, factors), (rows, None), (rows[:1], None), (rows[:2], factors[:2])):
            codes, scales = eight_bit.quantize_rows(*arguments)
            expected_codes, expected_scales = fp8.quantize_rows_plainly(*arguments)
            assert torch.equal(scales, expected_scales)
            # Triton's interpreter rounds ties away from zero, loses the carry when it rounds up to a power of two, and
            # flushes the smallest values to zero; tests/gpu compares the bits.
            bits, expected_bits = (part.view(torch.uint8).int() for part in (codes, expected_codes))
            is_sound = (expected_bits & 7 != 0) & (expected_bits & 127 > 8)
            assert is_sound.float().mean() > 0.3
            assert (bits - expected_bits)[is_sound].abs().max() <= 1
    weights = [draw(height, 96).to(CODES) for height in (48, 16, 160)]
    expected = torch.cat([weight.view(torch.uint8) for weight in weights]).T
    assert torch.equal(eight_bit.transpose_codes(weights).view(torch.uint8), expected)


@pytest.mark.skipif(not INTERPRETS_TRITON, reason="needs Triton's interpreter; tests/gpu has the kernels themselves")
def test_checkpointing_changes_no_bit_where_activations_are_kept_in_8_bits(monkeypatch):
    from tune2gguf.model.fused.attention import Layout
    from tune2gguf.model.fused.layer import Pass, run_layer

    layer, x, upstream = make_layer(), draw(20, 32), draw(20, 32, seed=1)
    quantize_layer(layer)
    layout = Layout(torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), 20)

    def compute(*, checkpointing: bool) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = run_layer(layer, leaf, layout=layout, checkpointing=checkpointing)
        out.backward(upstream)
        return [
            out.detach(),
            leaf.grad,
            *(weight.grad.clone() for weight in layer.parameters() if weight.requires_grad),
        ]

    exact = compute(checkpointing=False)
    # Take the path of a GPU with FP8 units.
    monkeypatch.setattr(Pass, "keeps_8_bits", True)
    kept, again = (compute(checkpointing=checkpointing) for checkpointing in (False, True))
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))
    # Negative control: kept activations are rounded.
    assert not torch.equal(kept[1], exact[1])


def make_layer() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_lora_llama(
        TINY_UNTIED,
        lora_rank=4,
        lora_alpha=4.0,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=32,
    )
    layer = model.decoder.layers[0]
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.2)
    return layer


def quantize_layer(layer: torch.nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, (LoRALinear, FrozenLinear)):
            weight = fp8.quantize_weight(module.weight)
            module.weight, module.weight_scales = torch.nn.Parameter(weight.codes, False), weight.scales


@pytest.mark.skipif(not INTERPRETS_TRITON, reason="needs Triton's interpreter; tests/gpu has the kernels themselves")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_a_fused_layer_is_as_near_to_exact_as_the_plain_one(checkpointing):
    from tune2gguf.model.fused.attention import Layout
    from tune2gguf.model.fused.layer import run_layer

    layer, x = make_layer(), draw(20, 32)
    layout = Layout(torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), 20)
    upstream = draw(20, 32, seed=1)

    def compute(run) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = run(leaf)
        out.backward(upstream)
        gradients = [weight.grad.clone() for weight in layer.parameters() if weight.requires_grad]
        return [out.detach(), leaf.grad, *gradients]

    def run_plainly(leaf: torch.Tensor) -> torch.Tensor:
        return layer(leaf[None])[0]

    exact = compute(run_plainly)
    quantize_layer(layer)
    plain = compute(run_plainly)
    fused = compute(lambda leaf: run_layer(layer, leaf, layout=layout, checkpointing=checkpointing))
    errors = [[measure_error(*pair) for pair in zip(found, exact, strict=True)] for found in (fused, plain)]
    for fused_error, plain_error in zip(*errors, strict=True):
        assert fused_error < 1.3 * plain_error
    # Negative control: codes with the scales of other rows.
    layer.mlp.w1.weight_scales = layer.mlp.w1.weight_scales.flip(0)
    wrong = compute(lambda leaf: run_layer(layer, leaf, layout=layout, checkpointing=checkpointing))
    assert measure_error(wrong[1], exact[1]) > 2 * errors[0][1]
