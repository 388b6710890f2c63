"""Parallel modes: each process holds the whole base (replicate) or a shard of it (shard)."""

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

# The rest covers fragmentation and other users of the GPU, which the estimate leaves out.
USABLE_SHARE = 0.9


def choose_parallel(parallel: str, spec: RunSpec, world: World) -> str:
    """Return replicate or shard, as requested; for `auto`, replicate if the run then fits on every GPU.

    Total GPU memory counts, not free memory: a resumed run keeps its mode. On a CPU `auto` replicates, because the
    processes share its memory.
    """
    if world.size == 1:
        return "replicate"
    if parallel != "auto" or world.device.type != "cuda":
        return "shard" if parallel == "shard" else "replicate"
    memory = torch.cuda.get_device_properties(world.device).total_memory
    is_too_large = estimate_memory(replace(spec, parallel="replicate")).peak > USABLE_SHARE * memory
    return "shard" if max_over_ranks(int(is_too_large)) else "replicate"


def describe_parallel(requested: str, chosen: str, *, device: str) -> str:
    """Return how the processes share the base, for a run's printed line; with the reason if `auto` chose."""
    part = f"each with {'a shard' if chosen == 'shard' else 'all'} of the base"
    if requested != "auto":
        return part
    if device == "cpu":
        return f"{part} (parallel=auto replicates on a CPU)"
    verb = "exceeds" if chosen == "shard" else "is within"
    return f"{part} (parallel=auto: the estimated memory {verb} {USABLE_SHARE:.0%} of a GPU's)"


def shard(model: CausalLM, world: World) -> None:
    """Make a model shard the base's matrices over the processes as they are loaded.

    Args:
        model: on the meta device, without weights
    """
    model.sharded = ShardedBase(model.decoder, rank=world.rank, size=world.size, connect=partial(connect, world=world))


def sum_gradients(parameters: Sequence[Tensor], world: World) -> None:
    """All-reduce the gradients of replicated parameters, in place.

    One all-reduce per step: 168 MB at 8B and LoRA rank 16, within a millisecond between GPUs of one machine, cheaper
    than many small ones during backward. Its size never changes, so its order of summation does not either.
    """
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, _unflatten_dense_tensors(flat, gradients), strict=True):
        parameter.grad = total
