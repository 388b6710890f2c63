"""4-bit weights: our reading and writing equal bitsandbytes', on the CPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_TIED
from tune2gguf.base.bnb4bit import encode_nf4, group_nf4, list_nf4_tensors, make_dynamic_map, read_nf4
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.layout import to_tune_rows
from tune2gguf.base.random_base import write_random_base
from tune2gguf.base.safetensors_file import read_header, write_safetensors
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.nf4 import quantize_nf4

SHAPES = [(32, 2), (1, 64), (2, 32), (64, 64), (3, 128), (10, 96), (48, 2048), (129, 640), (1024, 576), (256, 4096)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the reference")


def draw_weight(shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Return normal weights with very different scales by row, and a few outliers and zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 2, shape[0]).unsqueeze(1)
    weight[torch.rand(shape, generator=generator) < 0.01] *= 30
    weight[torch.rand(shape, generator=generator) < 0.1] = 0
    return weight


def save_weight(bnb, path: Path, weight: torch.Tensor, *, is_nested: bool, block_size: int, storage=torch.uint8):
    """Quantize and save with bitsandbytes; return its float32 values."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=is_nested, quant_type="nf4", quant_storage=storage
    )
    parts = {f"w.{name}": part.contiguous() for name, part in state.as_dict(packed=True).items()}
    save_file({"w": codes, **parts}, path)
    state.dtype = torch.float32
    # Blocks run along the flattened weight; only bitsandbytes' CPU kernel starts new ones at each row.
    state.shape = torch.Size((1, weight.numel()))
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_values_are_bitsandbytes_own(bnb, tmp_path, shape, is_nested, dtype):
    path = tmp_path / "w.safetensors"
    expected = save_weight(bnb, path, draw_weight(shape).to(dtype), is_nested=is_nested, block_size=64)
    stored = group_nf4(read_header(path))["w"]
    assert torch.equal(read_nf4(stored).dequantize(), expected)


@pytest.mark.parametrize("block_size", [32, 128, 256])
@pytest.mark.parametrize("is_nested", [True, False])
def test_other_block_sizes_are_read(bnb, tmp_path, block_size, is_nested):
    path = tmp_path / "w.safetensors"
    expected = save_weight(bnb, path, draw_weight((96, 512)), is_nested=is_nested, block_size=block_size)
    assert torch.equal(read_nf4(group_nf4(read_header(path))["w"]).dequantize(), expected)


def test_codes_stored_as_bfloat16_are_read(bnb, tmp_path):
    path = tmp_path / "w.safetensors"
    expected = save_weight(bnb, path, draw_weight((96, 128)), is_nested=True, block_size=64, storage=torch.bfloat16)
    assert torch.equal(read_nf4(group_nf4(read_header(path))["w"]).dequantize(), expected)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (3, 7), (95, 96), (40, 96)])
def test_rows_are_bitsandbytes_rows(bnb, tmp_path, begin, end):
    path = tmp_path / "w.safetensors"
    expected = save_weight(bnb, path, draw_weight((96, 640)), is_nested=True, block_size=64)
    stored = group_nf4(read_header(path))["w"]
    assert torch.equal(read_nf4(stored, begin=begin, end=end).dequantize(), expected[begin:end])


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map", "w"])
def test_every_part_matters(bnb, tmp_path, part):
    path = tmp_path / "w.safetensors"
    expected = save_weight(bnb, path, draw_weight((96, 640)), is_nested=True, block_size=64)
    weights = load_file(path)
    name = part if part == "w" else f"w.{part}"
    weights[name] = weights[name].flip(0)
    save_file(weights, path)
    assert not torch.allclose(read_nf4(group_nf4(read_header(path))["w"]).dequantize(), expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_bitsandbytes_chooses(bnb, shape, dtype):
    weight = draw_weight(shape).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize_nf4(weight)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.scales, state.absmax)


def test_dynamic_map_is_bitsandbytes_own(bnb):
    assert torch.equal(make_dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("shape", [(64, 64), (100, 192), (256, 1024)])
def test_bitsandbytes_reads_what_we_write(bnb, tmp_path, shape):
    weight = draw_weight(shape).bfloat16()
    chunks = encode_nf4([weight[:32], weight[32:]], shape, dtype="bfloat16")
    write_safetensors(tmp_path / "w.safetensors", list_nf4_tensors("w", shape), chunks)
    parts = load_file(tmp_path / "w.safetensors")
    codes = parts.pop("w")
    state = bnb.QuantState.from_dict({name.removeprefix("w."): part for name, part in parts.items()}, "cpu")
    expected_codes, expected_state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert (state.shape, state.dtype, state.blocksize) == (weight.shape, torch.bfloat16, 64)
    assert torch.equal(codes, expected_codes)
    assert torch.allclose(state.offset, expected_state.offset) and torch.equal(state.code, expected_state.code)
    assert torch.allclose(state.state2.absmax, expected_state.state2.absmax)
    # bitsandbytes' CPU kernel sometimes misses the nearer of two nearly equal values.
    assert (state.absmax != expected_state.absmax).float().mean() < 0.005
    exact = quantize_nf4(weight).scales
    ours, theirs = (
        bnb.dequantize_blockwise(one.absmax, one.state2) + one.offset - exact for one in (state, expected_state)
    )
    assert ours.pow(2).sum() <= theirs.pow(2).sum()


def test_transformers_and_bitsandbytes_load_a_written_base(bnb, tmp_path):
    from transformers import AutoModelForCausalLM

    shape = {"embed_dim": 128, "intermediate_dim": 192, "head_dim": 32}
    base = open_base(
        write_random_base(Architecture(**{**vars(TINY_TIED), **shape}), tmp_path / "base", kind="bnb-4bit")
    )
    parameters = dict(AutoModelForCausalLM.from_pretrained(base.base_dir, device_map="cpu").named_parameters())
    assert parameters.keys() == {spec.hf_name for spec in base.specs.values()}
    num_quantized = 0
    for name, spec in base.specs.items():
        expected = parameters[spec.hf_name].data
        if hasattr(parameters[spec.hf_name], "quant_state"):
            num_quantized += 1
            state = parameters[spec.hf_name].quant_state
            state.dtype = torch.float32
            expected = bnb.dequantize_4bit(expected, state)
        expected = expected if spec.num_heads is None else to_tune_rows(expected, spec.num_heads)
        assert torch.equal(base.read_tensor(name), expected), name
    assert num_quantized == 7 * TINY_TIED.num_layers
