"""What torchtune 0.6.1 imports of torchao, from this package's own NF4: torchao is neither needed nor imported.

Later torchao has moved these names, and older torchao is refused by peft. tune2gguf._local_recipes gives this module to
torchtune alone; any other `import torchao` finds the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tune2gguf.model.nf4 import BLOCK_SIZE, quantize_nf4
from tune2gguf.model.nf4_tensor import SCALES_PER_FACTOR, Nf4Tensor, multiply_nf4, pack_nf4

__version__ = "0.13.0"  # whose names these are

NF4Tensor = Nf4Tensor


def linear_nf4(input: Tensor, weight: Nf4Tensor) -> Tensor:
    """Return input W^T, [..., out]."""
    return multiply_nf4(input, weight)


def to_nf4(tensor: Tensor, block_size: int = BLOCK_SIZE, scaler_block_size: int = SCALES_PER_FACTOR) -> Nf4Tensor:
    """Quantize a weight [out, in] in torchao's block sizes, which are the only ones."""
    if (block_size, scaler_block_size) != (BLOCK_SIZE, SCALES_PER_FACTOR):
        raise ValueError(f"NF4 in blocks of {block_size} and {scaler_block_size}; only 64 and 256 are made")
    return pack_nf4(quantize_nf4(tensor))


def implements(operators: list) -> Callable[[Callable], Callable]:
    """Leave a function as it is: torchtune would register operators of an NF4 tensor that ours does not have."""
    return lambda function: function


def __getattr__(name: str) -> type:
    """Return a stand-in for a quantizer, of which nothing here makes use; to call it is an error."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"torchao's {name} is not there beside tune2gguf; torchtune's own recipes need torchao 0.13")

    return type(name, (), {"__init__": refuse})
