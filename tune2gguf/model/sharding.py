"""Weights split over processes: the whole of one, one rank's shard of it, a copy on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torchao.dtypes.nf4tensor import NF4Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be split; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's rows of a tensor that every process has whole, split as `like` is; nothing travels.

    Raises:
        ValueError: if the blocks of a 4-bit weight cannot be split between its rows
    """
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    if not isinstance(whole, NF4Tensor):
        return distribute_tensor(whole, mesh, like.placements, src_data_rank=None)
    if whole.shape[0] % mesh.size() or whole.quantization_factor.numel() % mesh.size():
        raise ValueError(
            f"a 4-bit weight of shape {list(whole.shape)} cannot be split over {mesh.size()} processes; "
            "use parallel=replicate, or base_weights=bf16"
        )
    rows = torch.chunk(whole, mesh.size())[mesh.get_local_rank()]
    # A copy, so that the whole can be freed; torchao's own clone would quantize again.
    rows = torch.empty_like(rows).copy_(rows)
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def copy_to_cpu(value: Any) -> Any:
    """Return a nested structure with every tensor copied to the CPU, whole; every process has to ask for it."""
    if isinstance(value, dict):
        return {key: copy_to_cpu(element) for key, element in value.items()}
    return full_tensor(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
