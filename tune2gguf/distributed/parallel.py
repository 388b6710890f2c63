"""How several processes share one model: each holds all of it (replicate), or a part of every weight (shard)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import shard_model

from tune2gguf.data import make_empty_batch
from tune2gguf.distributed.world import World, max_over_ranks
from tune2gguf.machine.memory import RunSpec, estimate_memory

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


def replicate(model: nn.Module, world: World) -> nn.Module:
    """Average the adapter's gradients over the processes; the frozen base stays where it is and never travels."""
    if world.size == 1:
        return model
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
    replicated = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # DDP sums in other buckets after its first backward than in it. A run that is resumed has its first backward later
    # than one that was never stopped: taken here, on nothing, it makes no difference.
    replicated(**vars(make_empty_batch().to(world.device))).sum().backward()
    model.zero_grad(set_to_none=True)
    return replicated


def shard(model: nn.Module, world: World) -> None:
    """Split every weight over the processes, in place: a layer is whole only while it computes.

    Works on a model without weights (on the meta device), too: each process then fills in its own part.
    """
    shard_model(
        model,
        [lambda _, module: isinstance(module, TransformerSelfAttentionLayer)],
        cpu_offload=False,
        dp_mesh=init_device_mesh(world.device.type, (world.size,)),
    )
    register_fsdp_forward_method(model, "predict_next")


def reduce_gradients(model: nn.Module, *, is_last: bool) -> AbstractContextManager:
    """Return the context of a micro-batch: gradients travel in the step's last one only, as the sum of all."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(is_last)
    return model.no_sync() if hasattr(model, "no_sync") and not is_last else nullcontext()
