"""The torchao names that torchtune 0.6.1 imports, backed by this package's NF4; torchao is not needed.

Newer torchao has moved these names; peft refuses older torchao. tune2gguf._local_recipes gives this module to torchtune
only; any other `import torchao` finds the real package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tune2gguf.model.nf4 import BLOCK_SIZE, quantize_nf4
from tune2gguf.model.nf4_tensor import SCALES_PER_FACTOR, Nf4Tensor, multiply_nf4, pack_nf4

__version__ = "0.13.0"  # the torchao version that has these names

NF4Tensor = Nf4Tensor


def linear_nf4(input: Tensor, weight: Nf4Tensor) -> Tensor:
    """Return input W^T, [..., out]."""
    return multiply_nf4(input, weight)


def to_nf4(tensor: Tensor, block_size: int = BLOCK_SIZE, scaler_block_size: int = SCALES_PER_FACTOR) -> Nf4Tensor:
    """Quantize a weight [out, in] to NF4.

    Raises:
        ValueError: if the block sizes are not 64 and 256, torchao's defaults
    """
    if (block_size, scaler_block_size) != (BLOCK_SIZE, SCALES_PER_FACTOR):
        raise ValueError(
            f"block_size={block_size}, scaler_block_size={scaler_block_size}: only 64 and 256 are supported"
        )
    return pack_nf4(quantize_nf4(tensor))


def implements(operators: list) -> Callable[[Callable], Callable]:
    """Return a decorator that does nothing: torchtune would register operators that our NF4 tensor lacks."""
    return lambda function: function


def __getattr__(name: str) -> type:
    """Return a stand-in for a torchao quantizer; calling it raises ImportError."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError(
            f"torchao's {name} is not available under tune2gguf; use torchtune's own recipes with torchao 0.13"
        )

    return type(name, (), {"__init__": refuse})
