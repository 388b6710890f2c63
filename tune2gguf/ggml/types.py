"""The ggml type of each tensor in each quantization, by llama.cpp's rule (MIT) for dense Llama models.

The rule is `llama_tensor_get_type` and `tensor_type_fallback` in its src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType


@dataclass(frozen=True)
class Quantization:
    """A GGUF file type."""

    name: str

    @property
    def default_type(self) -> str:
        """The ggml type that most tensors get."""
        return _DEFAULT_TYPES.get(self.name) or re.sub("_[SML]$", "", self.name)

    @property
    def needs_importance(self) -> bool:
        """Whether llama.cpp refuses this type without an importance matrix: its result would be garbage."""
        return self.name in _NEED_IMPORTANCE

    @property
    def takes_importance(self) -> bool:
        """Whether its bytes depend on an importance matrix."""
        return self.default_type not in ("F32", "F16", "BF16", "Q8_0")

    @property
    def is_trainable(self) -> bool:
        """Whether an adapter can be trained over a base in this type: it is quantized, and needs no matrix."""
        return self.default_type not in ("F32", "F16", "BF16") and not self.needs_importance

    @property
    def file_type(self) -> int:
        """llama.cpp's number of the file type, general.file_type."""
        return LlamaFileType["ALL_F32" if self.name == "F32" else f"MOSTLY_{self.name}"].value


_NAMES = (
    "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S "
    "IQ3_M IQ3_S IQ3_XS IQ3_XXS Q2_K Q2_K_S IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S"
)
QUANTIZATIONS = {name: Quantization(name) for name in _NAMES.split()}
# Types that the name does not tell.
_DEFAULT_TYPES = {"IQ3_M": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS"}
_DEFAULT_TYPES |= {"IQ1_M": "IQ1_M", "IQ1_S": "IQ1_S"}
_NEED_IMPORTANCE = ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

# Types for columns that do not fill whole blocks of 256.
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "IQ4_NL"),
}
# Types of the values, the attention's output and the first layers' down projections.
_SMALLEST = {
    "IQ2_M": {"attn_v": "IQ3_S", "ffn_down": "IQ3_S", "attn_output": "IQ3_S"},
    "IQ2_S": {"attn_v": "IQ3_S", "ffn_down": "IQ3_S", "attn_output": "IQ3_S"},
    "IQ2_XS": {"attn_v": "Q2_K", "ffn_down": "Q2_K"},
    "IQ2_XXS": {"attn_v": "Q2_K", "ffn_down": "Q2_K"},
    "IQ1_M": {"attn_v": "Q2_K", "ffn_down": "Q2_K", "attn_output": "IQ2_XXS"},
    "IQ1_S": {"attn_v": "Q2_K", "ffn_down": "Q2_K", "attn_output": "IQ2_XXS"},
}
# Types of an untied embedding.
_EMBEDDING_TYPES = {
    **dict.fromkeys(("IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "Q2_K"),
    **dict.fromkeys(("IQ3_XXS", "IQ2_M", "IQ2_S"), "IQ3_S"),
}


def get_quantizations(names: Sequence[str]) -> list[Quantization]:
    """Return the types with these names, in any case, each once.

    Raises:
        ValueError: if there is no such type, or no name
    """
    unknown = [name for name in names if name.upper() not in QUANTIZATIONS]
    if unknown or not names:
        raise ValueError(
            f"unknown quantization {', '.join(unknown) or '(none given)'}; choose from {', '.join(QUANTIZATIONS)}"
        )
    return list(dict.fromkeys(QUANTIZATIONS[name.upper()] for name in names))


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
    has_importance: bool = False,
) -> str:
    """Return the ggml type of one tensor of a dense Llama.

    Args:
        name: GGUF name, such as `blk.3.attn_v.weight`
        shape: [rows, columns], or [length] for norms and rope_freqs
        queries_per_key: query heads per key/value head
        is_tied: whether token_embd is also the output head
        has_importance: whether the file is quantized with an importance matrix
    """
    if len(shape) == 1:
        return "F32"
    default = quantization.default_type
    if default in ("F32", "F16", "BF16"):
        return default
    is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
    if is_output:
        chosen = "Q5_K" if quantization.name in ("IQ3_XXS", *_SMALLEST) else "Q6_K"
        chosen = "Q8_0" if default == "Q8_0" or shape[1] % get_block(default)[0] else chosen
    elif name == "token_embd.weight":
        chosen = _EMBEDDING_TYPES.get(quantization.name, default)
    else:
        _, layer, part, _ = name.split(".")
        place = _Place(part, int(layer), num_layers, queries_per_key, has_importance)
        chosen = _choose_layer_type(quantization.name, place) or default
        # llama.cpp calls 80 layers with shared keys 70B: their value weights are small beside the queries'.
        is_70b = part == "attn_v" and num_layers == 80 and queries_per_key > 1
        if is_70b and quantization.name not in _SMALLEST and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
    return _fit_columns(chosen, shape[1])


@dataclass(frozen=True)
class _Place:
    """The position of a layer's matrix, and the properties of the model that decide its type."""

    part: str
    layer: int
    num_layers: int
    queries_per_key: int
    has_importance: bool

    @property
    def is_in_first_eighth(self) -> bool:
        return self.layer < self.num_layers // 8

    @property
    def shares_keys(self) -> bool:
        return self.queries_per_key >= 4


def _choose_layer_type(name: str, place: _Place) -> str | None:
    """Return the type of a layer's tensor; None: the quantization's default."""
    if name in _SMALLEST:
        return _choose_smallest_type(name, place)
    if place.part == "attn_v":
        return _choose_value_type(name, place)
    if place.part == "ffn_down":
        return _choose_down_type(name, place)
    if place.part == "attn_output":
        types = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
        return types.get(name)
    if place.part in ("attn_q", "attn_k"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(name)
    is_in_the_middle = not place.is_in_first_eighth and place.layer < 7 * place.num_layers // 8
    return "IQ3_XXS" if name == "IQ3_XS" and is_in_the_middle else None


def _choose_smallest_type(name: str, place: _Place) -> str | None:
    if place.part == "attn_v" and place.shares_keys:
        return "Q4_K"
    if place.part == "ffn_down" and not place.is_in_first_eighth:
        return None
    return _SMALLEST[name].get(place.part)


def _choose_value_type(name: str, place: _Place) -> str | None:
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _deserves_more_bits(place) else None
    if name == "Q4_K_S":
        return "Q5_K" if place.layer < 4 else None
    if name == "Q3_K_M":
        return "Q5_K" if place.layer < 2 else "Q4_K"
    if name in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if place.shares_keys else None
    if name in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"):
        return "Q4_K" if place.shares_keys else None
    if name == "Q2_K":
        return "Q4_K" if place.shares_keys else "Q3_K"
    return {"Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(name)


def _choose_down_type(name: str, place: _Place) -> str | None:
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _deserves_more_bits(place) else None
    if name == "Q3_K_M":
        return "Q5_K" if place.layer < place.num_layers // 16 else "Q4_K"
    of_all = {"Q3_K_L": "Q5_K", "Q2_K": "Q3_K"}
    of_the_first = {"Q4_K_S": "Q5_K", "Q2_K_S": "Q4_K", "IQ3_M": "Q4_K"}
    if place.has_importance:
        of_the_first |= {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
    else:
        of_the_first |= {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
    return of_the_first.get(name) if place.is_in_first_eighth and name in of_the_first else of_all.get(name)


def _deserves_more_bits(place: _Place) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third in between."""
    eighth = place.num_layers // 8
    return place.layer < eighth or place.layer >= 7 * place.num_layers // 8 or (place.layer - eighth) % 3 == 2


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
