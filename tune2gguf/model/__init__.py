"""The network: a Llama with LoRA, its layers, attention, loss, quantized weights and generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune2gguf.model.llama import lora_llama

__all__ = ["lora_llama"]


def __getattr__(name: str) -> Any:
    # torchtune takes four seconds to import; reading a model's shape does not need it.
    if name == "lora_llama":
        from tune2gguf.model.llama import lora_llama

        return lora_llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
