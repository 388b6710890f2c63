"""How several processes share one model: each holds all of it (replicate), or a part of the base (shard)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from tune2gguf.distributed.gather import connect
from tune2gguf.distributed.world import World, max_over_ranks
from tune2gguf.machine.memory import RunSpec, estimate_memory
from tune2gguf.model.llama import CausalLM
from tune2gguf.model.sharding import ShardedBase

# The allocator's gaps and what others keep on a GPU are not in the estimate.
USABLE_SHARE = 0.9


def choose_parallel(parallel: str, spec: RunSpec, world: World) -> str:
    """Return replicate or shard: what was asked for, or for `auto` replicate where the run then fits on every GPU.

    The GPU's whole memory counts, not what is free, so that a run that is resumed is split as it was. Processes of a
    CPU replicate: they share its memory, and whoever wants them to shard says so.
    """
    if world.size == 1:
        return "replicate"
    if parallel != "auto" or world.device.type != "cuda":
        return "shard" if parallel == "shard" else "replicate"
    memory = torch.cuda.get_device_properties(world.device).total_memory
    is_too_large = estimate_memory(replace(spec, parallel="replicate")).peak > USABLE_SHARE * memory
    return "shard" if max_over_ranks(int(is_too_large)) else "replicate"


def describe_parallel(requested: str, chosen: str, *, device: str) -> str:
    """Return what a run says of the way its processes share the base, and why where `auto` chose it."""
    part = f"each with {'a part' if chosen == 'shard' else 'all'} of the base"
    if requested != "auto":
        return part
    if device == "cpu":
        return f"{part} (parallel=auto replicates on a CPU)"
    verb = "exceeds" if chosen == "shard" else "fits into"
    return f"{part} (parallel=auto: the estimated memory {verb} {USABLE_SHARE:.0%} of a GPU)"


def shard(model: CausalLM, world: World) -> None:
    """Split the base's matrices over the processes, in place, as they are loaded.

    Args:
        model: without weights, on the meta device
    """
    model.sharded = ShardedBase(model.decoder, rank=world.rank, size=world.size, connect=partial(connect, world=world))


def sum_gradients(parameters: Sequence[Tensor], world: World) -> None:
    """Replace the gradients of parameters that every process has by their sums over the processes.

    They travel together, once a step: at 8B and rank 16 168 MB, within a millisecond between GPUs of a machine, which
    is less than it costs to have them travel piece by piece in backward. One sum of always the same size is
    taken in the same order each time.
    """
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, _unflatten_dense_tensors(flat, gradients), strict=True):
        parameter.grad = total
