"""Loading of base weights into a model on the meta device, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

import torch
from torch import Tensor, nn
from torchtune.modules.tied_linear import TiedLinear
from tqdm import tqdm

from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.gguf_rounding import get_gguf_type
from tune2gguf.model.fp8 import quantize_weight
from tune2gguf.model.llama import CausalLM
from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.nf4 import Nf4Weight, quantize_nf4
from tune2gguf.model.nf4_tensor import pack_nf4

# fp8 quantizes the layers' matrices of the bf16 base.
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
STAGED_BYTES = 64 << 20  # size of each of the two staging buffers


def load_base(model: CausalLM, base_dir: str, *, device: torch.device, base_weights: str, show: bool) -> None:
    """Load the frozen base, allocate the adapters and build the RoPE tables, all on the device.

    Args:
        base_weights: bf16 or fp32: dtype of embedding, head and layers; fp8 or nf4: quantized layers, bf16 embedding
            and head; gguf:TYPE: all rounded to a GGUF of that type, held in bf16
        show: show a progress bar

    Raises:
        ValueError: if the checkpoint is incomplete or damaged, or its shapes differ from the model's
    """
    base = open_base(base_dir)
    gguf_type = get_gguf_type(base_weights)
    if gguf_type is not None:
        base, base_weights = base.round_to_gguf(gguf_type), "bf16"
    # Stored 4-bit weights need no conversion to NF4; others are converted as they are read. Weights that a CPU
    # quantizes to FP8 are read, not mapped: mapped pages stay in memory.
    is_read_as_stored = base_weights == "nf4" or (base_weights == "fp8" and device.type == "cpu")
    dtype = None if is_read_as_stored else _DTYPES[base_weights]
    weights = base.iterate_tensors(dtype=dtype, is_copied=device.type == "cuda")
    bar = tqdm(weights, total=len(base.specs), desc="loading the base", unit="tensor", disable=not show, leave=False)
    fill_model(model, bar, device=device, base_weights=base_weights)


def fill_model(
    model: CausalLM, weights: Iterable[tuple[str, Tensor | Nf4Weight]], *, device: torch.device, base_weights: str
) -> None:
    """Fill a model on the meta device: base weights, uninitialized adapters, RoPE tables.

    Args:
        weights: (torchtune's parameter name, weight) of every base weight
        base_weights: as in load_base

    Raises:
        ValueError: if a weight's shape differs from the model's
    """
    decoder = model.decoder
    sender = GpuSender(device) if device.type == "cuda" else None
    for name, weight in weights:
        if sender is not None and _choose_device(model, name, device, base_weights) == device:
            weight = sender.send(weight)  # before quantization, which is faster on a GPU
        if base_weights == "nf4" and _is_layer_matrix(decoder, name):
            weight = pack_nf4(weight if isinstance(weight, Nf4Weight) else quantize_nf4(weight))
        elif base_weights == "fp8" and _is_layer_matrix(decoder, name):
            # On the device: a GPU quantizes a layer while the next one arrives.
            if isinstance(weight, Nf4Weight):
                weight = weight.dequantize(torch.bfloat16)
            quantized = quantize_weight(weight.to(device).bfloat16())
            weight = quantized.codes
            # Scales are small: they stay replicated.
            decoder.get_submodule(name.rsplit(".", 1)[0]).weight_scales = quantized.scales
        else:
            # Norms compute in float32: a weight in another dtype takes torch's slow path.
            weight = weight.to(torch.float32 if weight.dim() == 1 else _DTYPES.get(base_weights, torch.bfloat16))
        _set_frozen(decoder, name, weight.to(_choose_device(model, name, device, base_weights)))
        if model.sharded is not None:
            model.sharded.split_filled()
    for module in decoder.modules():
        if isinstance(module, LoRALinear):
            for linear in (module.lora_a, module.lora_b):
                # Not to_empty, which imports sympy.
                shape, dtype = linear.weight.shape, linear.weight.dtype
                linear.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        if hasattr(module, "rope_init"):
            with torch.device(device):
                module.rope_init()
    unfilled = [name for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()] if tensor.is_meta]
    assert not unfilled, f"base weights missing: {unfilled}"


class GpuSender:
    """Copies of tensors to a GPU through two pinned buffers: all cores fill one while the other is sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        buffers = [torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._buffers = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])

    def send(self, weight: Tensor | Nf4Weight) -> Tensor | Nf4Weight:
        """Copy a tensor, or both parts of a 4-bit weight, to the GPU."""
        if isinstance(weight, Nf4Weight):
            return Nf4Weight(self.send(weight.codes), self.send(weight.scales), weight.shape)
        if weight.device.type != "cpu":
            return weight
        sent = torch.empty(weight.shape, dtype=weight.dtype, device=self.device)
        parts = (tensor.reshape(-1).view(torch.uint8).split(STAGED_BYTES) for tensor in (weight, sent))
        for part, place in zip(*parts, strict=True):
            buffer, has_left = next(self._buffers)
            has_left.synchronize()
            place.copy_(buffer[: len(part)].copy_(part), non_blocking=True)
            has_left.record()
        return sent


def _choose_device(model: CausalLM, name: str, device: torch.device, base_weights: str) -> torch.device:
    """Return a weight's device: an untied embedding, large beside 4-bit layers, stays in host memory."""
    is_looked_up_only = name == "tok_embeddings.weight" and not isinstance(model.decoder.output, TiedLinear)
    return torch.device("cpu") if base_weights == "nf4" and is_looked_up_only and model.sharded is None else device


def _is_layer_matrix(decoder: nn.Module, name: str) -> bool:
    module_name = name.rsplit(".", 1)[0]
    return name.startswith("layers.") and isinstance(decoder.get_submodule(module_name), (nn.Linear, LoRALinear))


def _set_frozen(decoder: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, parameter_name = name.rsplit(".", 1)
    module = decoder.get_submodule(module_name)
    parameter = getattr(module, parameter_name)
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} in the base, the model expects {list(parameter.shape)}"
        )
    setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=False))
