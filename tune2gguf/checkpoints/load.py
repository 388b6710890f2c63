"""Fill a model that was built on the meta device with the base's weights, one tensor at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tune2gguf.checkpoints.base import open_base
from tune2gguf.lora import LoRALinear
from tune2gguf.nf4 import Nf4Weight, quantize_nf4

if TYPE_CHECKING:
    from tune2gguf.models import CausalLM

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(model: CausalLM, base_dir: str, *, device: torch.device, base_weights: str, show: bool) -> None:
    """Load the frozen base into the model, make room for its adapters and build its rope tables, all on the device.

    Args:
        base_weights: bf16 or fp32, the dtype of embedding, head and layers; nf4 for 4-bit layers between a bf16
            embedding and head
        show: whether to show a progress bar

    Raises:
        ValueError: if the checkpoint is incomplete, damaged or of another shape than the model
    """
    from tqdm import tqdm

    base = open_base(base_dir)
    decoder = model.decoder
    # 4-bit weights stay as they are on their way into NF4; anything else is converted as it is read.
    weights = base.iterate_tensors(dtype=_DTYPES.get(base_weights))
    bar = tqdm(weights, total=len(base.specs), desc="loading the base", unit="tensor", disable=not show, leave=False)
    for name, weight in bar:
        if base_weights == "nf4" and base.specs[name].is_linear:
            weight = weight if isinstance(weight, Nf4Weight) else quantize_nf4(weight)
            weight = weight.to_torchao()
        else:
            # The norms are computed in float32; a weight in another dtype sends them down torch's slow path.
            weight = weight.to(torch.float32 if weight.dim() == 1 else _DTYPES.get(base_weights, torch.bfloat16))
        _set_frozen(decoder, name, weight.to(device=device))
    for module in decoder.modules():
        if isinstance(module, LoRALinear):
            module.lora_a.to_empty(device=device)
            module.lora_b.to_empty(device=device)
        if hasattr(module, "rope_init"):
            with torch.device(device):
                module.rope_init()
    unfilled = [name for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()] if tensor.is_meta]
    assert not unfilled, f"open_base checks that every tensor is there; not filled: {unfilled}"


def _set_frozen(decoder: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, parameter_name = name.rsplit(".", 1)
    module = decoder.get_submodule(module_name)
    expected = getattr(module, parameter_name).shape
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)} in the base, the model needs {list(expected)}")
    setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=False))
