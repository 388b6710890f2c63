import pytest
import torch
from torchao.dtypes.nf4tensor import to_nf4

from tune2gguf.model.nf4 import (
    BLOCK_SIZE,
    LOOKUP_CELLS,
    NF4_VALUES,
    Nf4Weight,
    dequantize_nf4_tensor,
    get_nf4_table,
    quantize_nf4,
)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02


def get_relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return ((found - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def test_table_is_torchaos_rounded_one():
    assert torch.allclose(get_nf4_table(), to_nf4(torch.ones(128, 128)).nf4.float(), atol=5e-5, rtol=0)


def test_codes_are_the_nearest_values():
    bounds = (get_nf4_table()[:-1] + get_nf4_table()[1:]) / 2
    edges = torch.arange(LOOKUP_CELLS + 1) * (2 / LOOKUP_CELLS) - 1
    hard = torch.cat([bounds, edges, get_nf4_table()])
    # Every bfloat16 between -1 and 1, and the float32 neighbours of each bound and of each cell's edge.
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    neighbours = [hard, torch.nextafter(hard, torch.tensor(9.0)), torch.nextafter(hard, torch.tensor(-9.0))]
    values = torch.cat([bits[bits.abs() <= 1], *(near.clamp(-1, 1) for near in neighbours)])
    # A leading 1 makes the scale of each block 1, so that the values are their own scaled values.
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
    with pytest.raises(ValueError, match=r"shape \[3, 50\] does not divide into blocks of 64"):
        quantize_nf4(torch.ones(3, 50))


def test_chunks_do_not_show(monkeypatch, weight):
    whole = quantize_nf4(weight)
    dense = whole.dequantize(torch.bfloat16)
    monkeypatch.setattr("tune2gguf.model.nf4.CHUNK_WEIGHTS", 128)
    in_chunks = quantize_nf4(weight[:64])
    assert torch.equal(in_chunks.codes, whole.codes[: len(in_chunks.codes)])
    assert torch.equal(in_chunks.dequantize(torch.bfloat16), dense[:64])


def test_torchao_tensor_has_the_same_codes_and_a_small_error_from_its_scales(weight):
    quantized = quantize_nf4(weight)
    exact, tensor = quantized.dequantize(), quantized.to_torchao()
    assert torch.equal(tensor.quantized_data, quantized.codes)
    error = get_relative_error(tensor.to(torch.float32), exact)
    # Normal weights: 127 steps up to the largest of 256 deviations of scales from their mean.
    assert 0.0005 < error < 0.0016
    assert error < get_relative_error(exact.bfloat16().float(), exact) < get_relative_error(exact, weight) / 50
    through_bfloat16 = to_nf4(exact.bfloat16()).to(torch.float32)
    assert get_relative_error(through_bfloat16, exact) > 1.5 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_dequantization_is_torchaos_own_bit_for_bit(weight, dtype):
    for tensor in (quantize_nf4(weight).to_torchao(), to_nf4(weight)):
        assert torch.equal(dequantize_nf4_tensor(tensor, dtype), tensor.to(dtype))


def test_equal_scales_need_no_factor():
    quantized = quantize_nf4(torch.full((256, 64), 0.25))
    assert torch.equal(quantized.to_torchao().to(torch.float32), torch.full((256, 64), 0.25))


def test_torchao_tensor_serves_linear_layers(weight):
    tensor = torch.nn.Parameter(quantize_nf4(weight).to_torchao(), requires_grad=False)
    rows = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    expected = rows @ dequantize_nf4_tensor(tensor, torch.float32).T
    assert tensor.shape == (512, 1024)
    assert torch.allclose(torch.nn.functional.linear(rows, tensor), expected, rtol=0, atol=1e-5)
