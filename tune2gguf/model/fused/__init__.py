"""A Llama layer's training step in few CUDA kernels: `kernels` in Triton, `launch` for each, `layer` of all of them.

`stack` takes all layers together, and `graphs` replays short passes in one launch.
"""

from __future__ import annotations

from importlib.util import find_spec

NO_TRITON = "Triton is not installed"
MAX_GRAPHED_TOKENS = 4096  # of a pass; for more a GPU computes longer than its kernels take to launch
MAX_RANK = 128  # of an adapter whose tiles fit into a multiprocessor's memory


def why_not_fused(device_type: str, *, dtype: str, compile: bool, lora_rank: int) -> str | None:
    """Return why a run trains torchtune's layers instead of the fused ones; None where nothing is in the way."""
    if device_type != "cuda":
        return f"device={device_type}"
    if compile:
        return "compile=true"
    if dtype != "bf16":
        return f"dtype={dtype}"
    if lora_rank > MAX_RANK:
        return f"lora_rank={lora_rank} is above {MAX_RANK}"
    return None if find_spec("triton") is not None else NO_TRITON


def pad_length(num_tokens: int) -> int:
    """Return the length that a pass is padded to: 16 different ones up to MAX_GRAPHED_TOKENS."""
    step = 128 if num_tokens <= 1024 or num_tokens > MAX_GRAPHED_TOKENS else 256 if num_tokens <= 2048 else 512
    return max(1, -(-num_tokens // step)) * step


def describe_layers(obstacle: str | None) -> str:
    """Return what a run on a GPU says of its layers."""
    return "layers: fused kernels" if obstacle is None else f"layers: torchtune's, not the fused ones ({obstacle})"
