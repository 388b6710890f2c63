"""The processes of a run. One process is world size 1: the same code path, where every reduction is the identity."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str) -> World:
    """Join the processes that torchrun started, or stand alone where it did not.

    Args:
        device: cpu or cuda; with several GPUs each process takes the one of its local rank
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    torch_device = torch.device(device)
    if torch_device.type == "cuda" and torch_device.index is None:
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    if size > 1:
        dist.init_process_group("nccl" if torch_device.type == "cuda" else "gloo")
    return World(rank=rank, size=size, device=torch_device)


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum of a tensor over all processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def share_error(error: str | None) -> str | None:
    """Return the first error of any process on every process, so that all of them stop for the same reason."""
    if not dist.is_initialized():
        return error
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((found for found in errors if found is not None), None)


def replicate(model: nn.Module) -> nn.Module:
    """Average the adapter's gradients over the processes; the frozen base stays where it is and never travels."""
    if not dist.is_initialized():
        return model
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
