"""bitsandbytes' 4-bit checkpoints: NF4 codes with quantized scales, as transformers and Unsloth write them.

A weight X.weight is stored as the tensors
    X.weight                                 codes, uint8 [num_weights / 2, 1] (or other dtypes of the same bytes)
    X.weight.absmax                          one scale per 64 weights: uint8 if nested, else float32
    X.weight.nested_absmax                   one scale of scales per 256 scales, float32
    X.weight.nested_quant_map                values of a scale's byte, float32 [256]
    X.weight.quant_map                       values of a code, float32 [16]
    X.weight.quant_state.bitsandbytes__nf4   JSON as bytes: shape, block sizes, mean of the scales (nested_offset)
A nested scale is nested_quant_map[absmax] * nested_absmax + nested_offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.base.safetensors_file import StoredTensor, TensorToWrite, get_torch_dtype, read_raw
from tune2gguf.model.nf4 import BLOCK_SIZE, NF4_VALUES, Nf4Weight, get_nf4_table, quantize_nf4

if TYPE_CHECKING:
    from torch import Tensor

STATE_INFIX = ".quant_state.bitsandbytes__"
PART_SUFFIXES = ("absmax", "nested_absmax", "nested_quant_map", "quant_map")
NESTED_BLOCK_SIZE = 256
STATE_BYTES = 256  # our JSON, padded with spaces: its length must be known before its content

# config.json's quantization_config of such a checkpoint; the names are transformers'.
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": None,
}


@dataclass(frozen=True)
class StoredNf4:
    """The stored parts of a 4-bit weight. The nested parts are None if the scales are stored as float32."""

    codes: StoredTensor
    absmax: StoredTensor
    nested_absmax: StoredTensor | None
    nested_quant_map: StoredTensor | None
    shape: tuple[int, ...]
    block_size: int
    nested_block_size: int
    nested_offset: float

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def path(self) -> Path:
        return self.codes.path

    @property
    def begin(self) -> int:
        return self.codes.begin

    @property
    def dtype(self) -> str:
        return "NF4"

    @property
    def has_whole_rows(self) -> bool:
        """Whether every row consists of whole blocks; only then can rows be read and moved singly."""
        return self.shape[-1] % self.block_size == 0


def group_nf4(found: dict[str, StoredTensor]) -> dict[str, StoredTensor | StoredNf4]:
    """Return the tensors by name, with the parts of each 4-bit weight grouped into one.

    Raises:
        ValueError: if a weight has a 4-bit type other than NF4, or its parts are missing or inconsistent
    """
    grouped: dict[str, StoredTensor | StoredNf4] = dict(found)
    for state_name in [name for name in found if STATE_INFIX in name]:
        weight_name, quant_type = state_name.split(STATE_INFIX)
        if quant_type != "nf4":
            raise ValueError(
                f"{found[state_name].path}: {weight_name} has 4-bit type {quant_type!r}; only nf4 is supported"
            )
        grouped[weight_name] = _open_weight(weight_name, found[state_name], found)
        for name in (state_name, *(f"{weight_name}.{suffix}" for suffix in PART_SUFFIXES)):
            grouped.pop(name, None)
    return grouped


def _open_weight(weight_name: str, state_tensor: StoredTensor, found: dict[str, StoredTensor]) -> StoredNf4:
    try:
        state = json.loads(bytes(read_raw(state_tensor)))
        is_nested = "nested_offset" in state
        weight = StoredNf4(
            codes=found[weight_name],
            absmax=found[f"{weight_name}.absmax"],
            nested_absmax=found[f"{weight_name}.nested_absmax"] if is_nested else None,
            nested_quant_map=found[f"{weight_name}.nested_quant_map"] if is_nested else None,
            shape=tuple(int(length) for length in state["shape"]),
            block_size=int(state["blocksize"]),
            nested_block_size=int(state["nested_blocksize"]) if is_nested else 1,
            nested_offset=float(state["nested_offset"]) if is_nested else 0.0,
        )
        if weight.block_size < 1 or weight.nested_block_size < 1 or len(weight.shape) != 2:
            raise ValueError(f"shape {weight.shape}, block sizes {weight.block_size} and {weight.nested_block_size}")
        problems = _find_problems(weight, found.get(f"{weight_name}.quant_map"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{state_tensor.path}: {weight_name} has a broken 4-bit state ({error!r})") from None
    if problems:
        raise ValueError(f"{state_tensor.path}: {weight_name} cannot be read as NF4: {'; '.join(problems)}")
    return weight


def _find_problems(weight: StoredNf4, quant_map: StoredTensor | None) -> list[str]:
    num_weights = math.prod(weight.shape)
    num_scales = num_weights // weight.block_size
    sizes = [
        ("codes", weight.codes.end - weight.codes.begin, num_weights // 2),
        ("absmax", weight.absmax.end - weight.absmax.begin, num_scales * (1 if weight.nested_absmax else 4)),
    ]
    if weight.nested_absmax is not None:
        num_nested = -(-num_scales // weight.nested_block_size)
        sizes.append(("nested_absmax", weight.nested_absmax.end - weight.nested_absmax.begin, 4 * num_nested))
        sizes.append(("nested_quant_map", weight.nested_quant_map.end - weight.nested_quant_map.begin, 4 * 256))
    problems = [f"{what} has {found} bytes, expected {wanted}" for what, found, wanted in sizes if found != wanted]
    if num_weights % weight.block_size != 0 or num_weights % 2 != 0:
        problems.append(f"shape {list(weight.shape)} does not divide into blocks of {weight.block_size}")
    expected = ("U8", "F32", "F32") if weight.nested_absmax is not None else ("F32",)
    scales = [part for part in (weight.absmax, weight.nested_absmax, weight.nested_quant_map) if part is not None]
    problems += [
        f"{part.name} has dtype {part.dtype}, expected {dtype}"
        for part, dtype in zip(scales, expected, strict=True)
        if part.dtype != dtype
    ]
    # bitsandbytes' kernels have a built-in table and never read this one; it only identifies the codes as NF4.
    values = () if quant_map is None or quant_map.dtype != "F32" else read_raw(quant_map).view(np.float32)
    if len(values) != 16 or max(abs(value - nf4) for value, nf4 in zip(values, NF4_VALUES, strict=True)) > 1e-3:
        problems.append("quant_map is not NF4's")
    return problems


def read_nf4(stored: StoredNf4, *, begin: int = 0, end: int | None = None) -> Nf4Weight:
    """Read rows [begin, end) of a 4-bit weight; its scales are decoded to float32, bit for bit as in bitsandbytes.

    Without `has_whole_rows` only the whole weight can be read.
    """
    import torch

    end = stored.shape[0] if end is None else end
    assert stored.has_whole_rows or (begin, end) == (0, stored.shape[0]), "blocks span rows"
    columns = math.prod(stored.shape[1:])
    codes = torch.from_numpy(read_raw(stored.codes, begin * columns // 2, (end - begin) * columns // 2))
    scales = _read_scales(stored, begin * columns // stored.block_size, end * columns // stored.block_size)
    return Nf4Weight(codes, scales, (end - begin, *stored.shape[1:]))


def _read_scales(stored: StoredNf4, begin: int, end: int) -> Tensor:
    absmax = _read_elements(stored.absmax, begin, end)
    if stored.nested_absmax is None:
        return absmax
    first_nested = begin // stored.nested_block_size
    nested_absmax = _read_elements(stored.nested_absmax, first_nested, -(-end // stored.nested_block_size))
    factors = nested_absmax.repeat_interleave(stored.nested_block_size)
    skipped = begin - first_nested * stored.nested_block_size
    decoded = _read_elements(stored.nested_quant_map, 0, 256)[absmax.int()]
    return decoded.mul_(factors[skipped : skipped + end - begin]).add_(stored.nested_offset)


def _read_elements(stored: StoredTensor, begin: int, end: int) -> Tensor:
    """Read elements [begin, end) of a flattened tensor."""
    import torch

    dtype = get_torch_dtype(stored)
    return torch.from_numpy(read_raw(stored, begin * dtype.itemsize, (end - begin) * dtype.itemsize)).view(dtype)


def list_nf4_tensors(name: str, shape: tuple[int, ...]) -> list[TensorToWrite]:
    """Return the stored tensors of a 4-bit weight with nested scales, in the order of `encode_nf4`."""
    num_weights = math.prod(shape)
    num_scales = num_weights // BLOCK_SIZE
    return [
        TensorToWrite(name, "U8", (num_weights // 2, 1)),
        TensorToWrite(f"{name}.absmax", "U8", (num_scales,)),
        TensorToWrite(f"{name}.nested_absmax", "F32", (-(-num_scales // NESTED_BLOCK_SIZE),)),
        TensorToWrite(f"{name}.nested_quant_map", "F32", (256,)),
        TensorToWrite(f"{name}.quant_map", "F32", (16,)),
        TensorToWrite(f"{name}{STATE_INFIX}nf4", "U8", (STATE_BYTES,)),
    ]


def encode_nf4(rows: Iterable[Tensor], shape: tuple[int, ...], *, dtype: str) -> Iterator[Tensor]:
    """Yield the contents of `list_nf4_tensors` for a weight.

    Args:
        rows: chunks of rows, each a multiple of 64 weights
        dtype: the weight's dtype before quantization, for the state
    """
    import torch

    all_scales = []
    for chunk in rows:
        weight = quantize_nf4(chunk)
        all_scales.append(weight.scales)
        yield weight.codes
    scales = torch.cat(all_scales)
    offset = scales.mean()
    quant_map = make_dynamic_map()
    absmax, nested_absmax = _quantize_scales(scales - offset, quant_map)
    yield from (absmax, nested_absmax, quant_map, get_nf4_table())
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": offset.item(),
    }
    yield torch.frombuffer(bytearray(json.dumps(state).ljust(STATE_BYTES).encode()), dtype=torch.uint8)


def _quantize_scales(deviations: Tensor, quant_map: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    padding = -len(deviations) % NESTED_BLOCK_SIZE
    blocks = torch.nn.functional.pad(deviations, (0, padding)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / nested_absmax.clamp(min=1e-38)).unsqueeze(1)
    nearest = torch.bucketize(scaled, (quant_map[:-1] + quant_map[1:]) / 2).to(torch.uint8)
    return nearest.flatten()[: len(deviations)].contiguous(), nested_absmax


def make_dynamic_map() -> Tensor:
    """Return bitsandbytes' signed dynamic 8-bit values, float32 [256], ascending (https://arxiv.org/abs/1511.04561).

    They are 0, 1 and, with both signs, the midpoints of 2^k equal parts of the k-th of seven decades from 1e-7 to 1.
    """
    import torch

    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
