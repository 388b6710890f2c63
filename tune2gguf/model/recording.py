"""Recording of CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache

import torch


def record_graph(work: Callable[[], None], *, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """Return a graph of the kernels that `work` launches; they do not run.

    Args:
        pool: of the graph's memory, from torch.cuda.graph_pool_handle
    """
    graph = torch.cuda.CUDAGraph()
    # The garbage collector must not destroy other graphs during capture.
    collects = gc.isenabled()
    gc.disable()
    try:
        stream = _get_stream(torch.cuda.current_device())
        # Other threads use CUDA meanwhile: NCCL's watchdog polls, a checkpoint is written.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    finally:
        if collects:
            gc.enable()
    return graph


@cache
def _get_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all captures: cuBLAS keeps a workspace of 32 MiB for every stream that it meets."""
    return torch.cuda.Stream(device)
