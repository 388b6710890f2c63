"""Merging: the formula, and one rounding to bfloat16."""

import numpy as np
import pytest
import torch

from tune2gguf.base.bfloat16 import narrow_to_bfloat16, round_to_bfloat16
from tune2gguf.base.safetensors_file import widen_bfloat16
from tune2gguf.export.merge.arithmetic import merge_rows


def make_matrices(*, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    base, lora_a, lora_b = (generator.normal(size=shape) for shape in ((48, 40), (rank, 40), (48, rank)))
    return base.astype(np.float32), lora_a.astype(np.float32), lora_b.astype(np.float32)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (8, 4), (1, 16)])
def test_merge_is_base_plus_scaled_product(rank, alpha):
    base, lora_a, lora_b = make_matrices(rank=rank)
    expected = base.astype(np.float64) + alpha / rank * (lora_b.astype(np.float64) @ lora_a.astype(np.float64))
    merged = merge_rows(base, lora_a, lora_b, rank=rank, alpha=alpha)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)


def test_merge_leaves_the_base_as_it_is():
    base, lora_a, lora_b = make_matrices(rank=4)
    before = base.copy()
    merge_rows(base, lora_a, lora_b, rank=4, alpha=4)
    np.testing.assert_array_equal(base, before)


def test_rounding_to_bfloat16_is_that_of_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    ties = (np.arange(0x3F80, 0x4180, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    rounded = round_to_bfloat16(values.copy())
    np.testing.assert_array_equal(narrow_to_bfloat16(rounded), expected)
    np.testing.assert_array_equal(widen_bfloat16(expected), rounded)


def test_truncation_is_not_rounding():
    """Negative control: truncating the low bits differs in half of all cases."""
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    cut = values.view(np.uint32) >> 16
    assert (cut != narrow_to_bfloat16(round_to_bfloat16(values))).mean() > 0.4


def test_widening_keeps_every_bfloat16():
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    np.testing.assert_array_equal(narrow_to_bfloat16(round_to_bfloat16(widen_bfloat16(finite))), finite)
