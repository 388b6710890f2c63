"""Fused training of Llama layers on a GPU.

`kernels` holds the Triton kernels, `launch` calls them, `layer` combines them into a layer, `stack` runs all layers,
and `graphs` replays short passes as CUDA graphs.
"""

from __future__ import annotations

from importlib.util import find_spec

from tune2gguf.model.architectures import Architecture

NO_TRITON = "Triton is not installed"
MAX_GRAPHED_TOKENS = 8192  # tokens of a graphed pass; longer ones compute longer than their kernels take to launch
MAX_RANK = 128  # LoRA rank; larger tiles do not fit a multiprocessor's shared memory
MAX_HEAD_TILE = 128 * 128  # head_dim times rank padded to a power of two, for the same reason
MAX_HEAD_DIM = 256  # flash attention's limit


def why_not_fused(
    device_type: str, *, architecture: Architecture, dtype: str, compile: bool, lora_rank: int
) -> str | None:
    """Return why a run cannot train the fused layers; None if it can."""
    if device_type != "cuda":
        return f"device={device_type}"
    if compile:
        return "compile=true"
    if dtype != "bf16":
        return f"dtype={dtype}"
    if lora_rank > MAX_RANK:
        return f"lora_rank={lora_rank} is above {MAX_RANK}"
    head_dim = architecture.head_dim
    if head_dim.bit_count() != 1 or head_dim > MAX_HEAD_DIM:
        return f"head_dim={head_dim} is not a power of two up to {MAX_HEAD_DIM}"
    if head_dim * lora_rank > MAX_HEAD_TILE:
        return f"lora_rank={lora_rank} is above {MAX_HEAD_TILE // head_dim} with head_dim={head_dim}"
    return None if find_spec("triton") is not None else NO_TRITON


def pad_length(num_tokens: int) -> int:
    """Return the padded length of a pass; there are 24 lengths up to MAX_GRAPHED_TOKENS."""
    step = 128 if num_tokens <= 1024 or num_tokens > MAX_GRAPHED_TOKENS else 256 if num_tokens <= 2048 else 512
    return max(1, -(-num_tokens // step)) * step


def describe_layers(obstacle: str | None, *, longest_row: int) -> str:
    """Return the line that a run on a GPU prints about its layers.

    Args:
        longest_row: tokens of the run's longest row
    """
    if obstacle is not None:
        return f"layers: torchtune's, not the fused ones ({obstacle})"
    from tune2gguf.model.fused import cudnn

    if longest_row < cudnn.MIN_ROW or not cudnn.pays():
        return "layers: fused kernels"
    if cudnn.is_available():
        return f"layers: fused kernels, cuDNN attention for passes with a row of {cudnn.MIN_ROW} tokens or more"
    return f"layers: fused kernels; {cudnn.MISSING}"
