"""Fill a model that was built on the meta device with the base's weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules.tied_linear import TiedLinear
from tqdm import tqdm

from tune2gguf.base.checkpoint import open_base
from tune2gguf.model.fp8 import quantize_weight
from tune2gguf.model.llama import CausalLM
from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.nf4 import Nf4Weight, quantize_nf4
from tune2gguf.model.sharding import shard_like

# An 8-bit base is the bf16 base with its layers' matrices quantized.
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


def load_base(model: CausalLM, base_dir: str, *, device: torch.device, base_weights: str, show: bool) -> None:
    """Load the frozen base into the model, make room for its adapters and build its rope tables, all on the device.

    Args:
        base_weights: bf16 or fp32, the dtype of embedding, head and layers; fp8 and nf4 for 8-bit and
            4-bit layers between a bf16 embedding and head
        show: whether to show a progress bar

    Raises:
        ValueError: if the checkpoint is incomplete, damaged or of another shape than the model
    """
    base = open_base(base_dir)
    # 4-bit weights stay as they are on their way into NF4; anything else is converted as it is read.
    weights = base.iterate_tensors(dtype=_DTYPES.get(base_weights))
    bar = tqdm(weights, total=len(base.specs), desc="loading the base", unit="tensor", disable=not show, leave=False)
    fill_model(model, bar, device=device, base_weights=base_weights)


def fill_model(
    model: CausalLM, weights: Iterable[tuple[str, Tensor | Nf4Weight]], *, device: torch.device, base_weights: str
) -> None:
    """Give a model from the meta device its base weights, room for its adapters and its rope tables.

    Args:
        weights: (torchtune's parameter name, weight) of every base weight
        base_weights: as in load_base

    Raises:
        ValueError: if a weight has another shape than the model's
    """
    decoder = model.decoder
    for name, weight in weights:
        if base_weights == "nf4" and _is_layer_matrix(decoder, name):
            weight = weight if isinstance(weight, Nf4Weight) else quantize_nf4(weight)
            weight = weight.to_torchao()
        elif base_weights == "fp8" and _is_layer_matrix(decoder, name):
            # On the device: a GPU quantizes a layer in the time that the next one takes to arrive.
            quantized = quantize_weight(weight.to(device))
            weight = quantized.codes
            # Few enough to be whole in every process.
            decoder.get_submodule(name.rsplit(".", 1)[0]).weight_scales = quantized.scales
        else:
            # The norms are computed in float32; a weight in another dtype sends them down torch's slow path.
            weight = weight.to(torch.float32 if weight.dim() == 1 else _DTYPES.get(base_weights, torch.bfloat16))
        _set_frozen(decoder, name, weight.to(_choose_device(decoder, name, device, base_weights)))
    for module in decoder.modules():
        if isinstance(module, LoRALinear):
            module.lora_a.to_empty(device=device)
            module.lora_b.to_empty(device=device)
        if hasattr(module, "rope_init"):
            with torch.device(device):
                module.rope_init()
    unfilled = [name for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()] if tensor.is_meta]
    assert not unfilled, f"every base weight is to be given; not filled: {unfilled}"


def _choose_device(decoder: nn.Module, name: str, device: torch.device, base_weights: str) -> torch.device:
    """Beside 4-bit layers an embedding that is not the head as well is a large part: it stays in the host's memory."""
    is_looked_up_only = name == "tok_embeddings.weight" and not isinstance(decoder.output, TiedLinear)
    is_sharded = isinstance(decoder.tok_embeddings.weight, DTensor)
    return torch.device("cpu") if base_weights == "nf4" and is_looked_up_only and not is_sharded else device


def _is_layer_matrix(decoder: nn.Module, name: str) -> bool:
    module_name = name.rsplit(".", 1)[0]
    return name.startswith("layers.") and isinstance(decoder.get_submodule(module_name), (nn.Linear, LoRALinear))


def _set_frozen(decoder: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, parameter_name = name.rsplit(".", 1)
    module = decoder.get_submodule(module_name)
    parameter = getattr(module, parameter_name)
    if tensor.shape != parameter.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)} in the base, the model needs {list(parameter.shape)}")
    setattr(module, parameter_name, nn.Parameter(shard_like(tensor, parameter), requires_grad=False))
