import importlib

import pytest
import torch

from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.nf4 import BLOCK_SIZE, LOOKUP_CELLS, NF4_VALUES, Nf4Weight, get_nf4_table, quantize_nf4
from tune2gguf.model.nf4_tensor import Nf4Tensor, multiply_nf4, pack_nf4

# The module in torchao 0.13, and since 0.16.
TORCHAO_NF4 = ("torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor")


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02


def get_relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to that of the expected values."""
    return ((found - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


@pytest.fixture(scope="module")
def torchao_nf4():
    """Return torchao's NF4 module."""
    pytest.importorskip("torchao")
    for name in TORCHAO_NF4:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    pytest.skip("this torchao has no NF4 tensor where it was looked for")


def test_table_is_torchaos_rounded_one(torchao_nf4):
    to_nf4 = torchao_nf4.to_nf4
    assert torch.allclose(get_nf4_table(), to_nf4(torch.ones(128, 128)).nf4.float(), atol=5e-5, rtol=0)


def test_codes_are_the_nearest_values():
    bounds = (get_nf4_table()[:-1] + get_nf4_table()[1:]) / 2
    edges = torch.arange(LOOKUP_CELLS + 1) * (2 / LOOKUP_CELLS) - 1
    hard = torch.cat([bounds, edges, get_nf4_table()])
    # Every bfloat16 between -1 and 1, and the float32 neighbours of each bound and of each cell's edge.
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    neighbours = [hard, torch.nextafter(hard, torch.tensor(9.0)), torch.nextafter(hard, torch.tensor(-9.0))]
    values = torch.cat([bits[bits.abs() <= 1], *(near.clamp(-1, 1) for near in neighbours)])
    # A leading 1 makes each block's scale 1: values equal their scaled values.
    blocks = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK_SIZE - 1))).view(-1, BLOCK_SIZE - 1)
    blocks = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1)
    codes = quantize_nf4(blocks).codes
    unpacked = torch.stack([codes >> 4, codes & 15], dim=1).view(blocks.shape)
    assert torch.equal(unpacked, torch.bucketize(blocks, bounds).to(torch.uint8))


def test_dequantized_weight_is_value_times_scale():
    codes = torch.tensor([0x0F, 0x37] * 16, dtype=torch.uint8)
    dense = Nf4Weight(codes, torch.tensor([0.5]), (4, 16)).dequantize()
    assert dense[0, :4].tolist() == [-0.5, 0.5, 0.5 * NF4_VALUES[3], 0.0]


def test_blocks_of_zeros_stay_zero():
    weight = torch.zeros(2, 64)
    weight[1, 5] = 3.0
    assert torch.equal(quantize_nf4(weight).dequantize(), weight)


def test_weight_that_does_not_divide_into_blocks_is_refused():
    with pytest.raises(ValueError, match=r"weight of shape \[3, 50\]: the number of weights must divide by 64"):
        quantize_nf4(torch.ones(3, 50))


def test_chunks_do_not_show(monkeypatch, weight):
    whole = quantize_nf4(weight)
    dense = whole.dequantize(torch.bfloat16)
    monkeypatch.setattr("tune2gguf.model.nf4.CHUNK_WEIGHTS", 128)
    in_chunks = quantize_nf4(weight[:64])
    assert torch.equal(in_chunks.codes, whole.codes[: len(in_chunks.codes)])
    assert torch.equal(in_chunks.dequantize(torch.bfloat16), dense[:64])


def test_packed_weight_has_the_same_codes_and_a_small_error_from_its_scales(weight):
    quantized = quantize_nf4(weight)
    exact, packed = quantized.dequantize(), pack_nf4(quantized)
    assert torch.equal(packed.codes, quantized.codes)
    error = get_relative_error(packed.dequantize(torch.float32), exact)
    # Normal weights: 127 steps up to the largest of 256 deviations of scales from their mean.
    assert 0.0005 < error < 0.0016
    assert error < get_relative_error(exact.bfloat16().float(), exact) < get_relative_error(exact, weight) / 50


def make_torchao_tensor(torchao_nf4, packed: Nf4Tensor):
    """Return torchao's tensor with our tensor's parts."""
    stride = torch.empty(packed.shape, device="meta").stride()
    meta = torchao_nf4.SubclassTensorArgs(packed.shape, stride, 0, torch.float32, packed.device, False)
    sizes = (BLOCK_SIZE, packed.scales.numel(), packed.scales.numel() // packed.factors.numel())
    parts = (packed.scales, packed.factors, packed.offset, packed.codes, packed.table)
    return torchao_nf4.NF4Tensor(meta, *sizes, *parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weight_is_torchaos_bit_for_bit(torchao_nf4, weight, dtype):
    packed = pack_nf4(quantize_nf4(weight))
    expected = make_torchao_tensor(torchao_nf4, packed).to(dtype)
    assert torch.equal(packed.dequantize(dtype), expected)
    assert torch.equal(packed._dequantize_plainly(dtype), expected)  # the compiler's path
    error = get_relative_error(torchao_nf4.to_nf4(weight).to(torch.float32), weight)
    assert error == pytest.approx(get_relative_error(packed.dequantize(torch.float32), weight), rel=0.01)


def test_equal_scales_need_no_factor():
    packed = pack_nf4(quantize_nf4(torch.full((256, 64), 0.25)))
    assert torch.equal(packed.dequantize(torch.float32), torch.full((256, 64), 0.25))


def test_product_and_its_gradient_are_those_of_the_dequantized_weight(weight):
    parameter = torch.nn.Parameter(pack_nf4(quantize_nf4(weight)), requires_grad=False)
    dense = parameter.dequantize(torch.float32)
    rows = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert parameter.shape == (512, 1024) and isinstance(parameter, Nf4Tensor)
    for found, expected in zip(
        *(_with_gradient(out, rows) for out in (multiply_nf4(rows, parameter), rows @ dense.T)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def _with_gradient(out: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return out, torch.autograd.grad(out.square().sum(), rows)[0]


def test_packed_weight_is_moved_and_refuses_all_else(weight):
    packed = pack_nf4(quantize_nf4(weight))
    moved = packed.to("meta")
    assert moved.is_meta and moved.codes.is_meta and moved.shape == packed.shape
    for use in (lambda: packed + 1, lambda: packed.to(torch.bfloat16), lambda: packed.clone()):
        with pytest.raises(NotImplementedError, match="is not supported for an NF4 weight; dequantize it first"):
            use()


@pytest.mark.slow
def test_compiled_layer_is_the_eager_one(weight):
    torch.manual_seed(0)
    layer = LoRALinear(1024, 512, rank=4, alpha=4.0, dropout=0.0)
    for adapter in (layer.lora_a, layer.lora_b):
        torch.nn.init.normal_(adapter.weight, std=0.1)
    layer.weight = torch.nn.Parameter(pack_nf4(quantize_nf4(weight)), requires_grad=False)
    rows = torch.randn(5, 1024).requires_grad_()
    expected, expected_gradient = _with_gradient(layer(rows), rows)
    compiled = torch.compile(layer, fullgraph=True)
    found, gradient = _with_gradient(compiled(rows), rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)
