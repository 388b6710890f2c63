"""Which ggml type each tensor gets in each quantization: llama.cpp's rule (MIT) for dense Llama models.

The rule is `llama_tensor_get_type` and `tensor_type_fallback` in its src/llama-quant.cpp, without importance matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType


@dataclass(frozen=True)
class Quantization:
    """A GGUF file type."""

    name: str

    @property
    def default_type(self) -> str:
        """The ggml type that most tensors get."""
        return re.sub("_[SML]$", "", self.name)

    @property
    def file_type(self) -> int:
        """llama.cpp's number for the whole, general.file_type."""
        return LlamaFileType["ALL_F32" if self.name == "F32" else f"MOSTLY_{self.name}"].value


_NAMES = "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S Q2_K"
QUANTIZATIONS = {name: Quantization(name) for name in _NAMES.split()}

# Where the columns do not fill whole blocks of 256.
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


def get_block(ggml_type: str) -> tuple[int, int]:
    """Return the elements and the bytes of a block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]


def choose_tensor_type(
    name: str,
    shape: tuple[int, ...],
    quantization: Quantization,
    *,
    num_layers: int,
    queries_per_key: int,
    is_tied: bool,
) -> str:
    """Return the ggml type of one tensor of a dense Llama.

    Args:
        name: GGUF name, such as `blk.3.attn_v.weight`
        shape: [rows, columns], or [length] for norms and rope_freqs
        queries_per_key: query heads per key/value head
        is_tied: whether token_embd is the output head, too
    """
    if len(shape) == 1:
        return "F32"
    default = quantization.default_type
    if default in ("F32", "F16", "BF16"):
        return default
    is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
    if is_output:
        chosen = "Q8_0" if shape[1] % get_block(default)[0] else default
        chosen = chosen if chosen == "Q8_0" else "Q6_K"
    elif name == "token_embd.weight":
        chosen = default
    else:
        _, layer, part, _ = name.split(".")
        chosen = _choose_layer_type(part, int(layer), quantization.name, num_layers, queries_per_key) or default
        # llama.cpp calls 80 layers with shared keys 70B: their value weights are small beside the queries'.
        if part == "attn_v" and num_layers == 80 and queries_per_key > 1 and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
    return _fit_columns(chosen, shape[1])


def _choose_layer_type(part: str, layer: int, name: str, num_layers: int, queries_per_key: int) -> str | None:
    """Return the type of a layer's tensor where it is not the quantization's default."""
    if part == "attn_v":
        return _choose_value_type(layer, name, num_layers, queries_per_key)
    if part == "ffn_down":
        return _choose_down_type(layer, name, num_layers)
    if part == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name)
    return None


def _choose_value_type(layer: int, name: str, num_layers: int, queries_per_key: int) -> str | None:
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _deserves_more_bits(layer, num_layers) else None
    if name == "Q4_K_S":
        return "Q5_K" if layer < 4 else None
    if name == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if name == "Q3_K_L":
        return "Q5_K"
    if name == "Q2_K":
        return "Q4_K" if queries_per_key >= 4 else "Q3_K"
    if name in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if queries_per_key >= 4 else None
    return None


def _choose_down_type(layer: int, name: str, num_layers: int) -> str | None:
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _deserves_more_bits(layer, num_layers) else None
    if name in ("Q4_K_S", "IQ4_NL", "IQ4_XS"):
        return "Q5_K" if layer < num_layers // 8 else None
    if name == "Q3_K_M":
        return "Q5_K" if layer < num_layers // 16 else "Q4_K"
    return {"Q3_K_L": "Q5_K", "Q2_K": "Q3_K"}.get(name)


def _deserves_more_bits(layer: int, num_layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third in between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _fit_columns(chosen: str, columns: int) -> str:
    if columns % get_block(chosen)[0] == 0:
        return chosen
    chosen = _FALLBACKS.get(chosen, chosen)
    return "F16" if columns % get_block(chosen)[0] else chosen


def count_bytes(ggml_type: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor of this shape in this type."""
    elements, block_bytes = get_block(ggml_type)
    num_rows = 1 if len(shape) == 1 else shape[0]
    return num_rows * (shape[-1] // elements) * block_bytes
