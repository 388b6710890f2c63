"""A dense Llama as a GGUF file: tensor names and order, keys and values, rope factors.

Contents and order match llama.cpp's converter followed by llama-quantize (MIT) byte by byte.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, Metadata, size_label

from tune2gguf.base.layout import ROPE_FACTORS, TensorSpec, get_gguf_name
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix
from tune2gguf.export.gguf_file.vocabulary import Vocabulary
from tune2gguf.ggml.types import Quantization, choose_tensor_type, count_bytes, get_block
from tune2gguf.model.architectures import Architecture

ALIGNMENT = 32  # bytes, GGUF's default: every tensor starts at a multiple


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file; `spec` is its source in the base, None for the rope factors."""

    name: str
    shape: tuple[int, ...]
    spec: TensorSpec | None


def list_gguf_tensors(specs: dict[str, TensorSpec], architecture: Architecture) -> list[GGUFTensor]:
    """Return the file's tensors in llama-quantize's order: outside of layers first, then by layer; there by name."""
    tensors = [GGUFTensor(get_gguf_name(spec.tune_name), spec.shape, spec) for spec in specs.values()]
    if architecture.rope_scaling is not None:
        tensors.append(GGUFTensor(ROPE_FACTORS, (architecture.head_dim // 2,), None))
    return sorted(tensors, key=lambda tensor: (_get_layer(tensor.name), tensor.name))


def _get_layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def choose_types(
    tensors: list[GGUFTensor], architecture: Architecture, quantization: Quantization, *, has_importance: bool
) -> dict[str, str]:
    """Return the ggml type of each tensor by name; an importance matrix changes the types of a few layers."""
    return {
        tensor.name: choose_tensor_type(
            tensor.name,
            tensor.shape,
            quantization,
            num_layers=architecture.num_layers,
            queries_per_key=architecture.num_heads // architecture.num_kv_heads,
            is_tied=architecture.tied,
            has_importance=has_importance,
        )
        for tensor in tensors
    }


def compute_rope_factors(architecture: Architecture) -> np.ndarray:
    """Return Llama 3's divisors of the rotary frequencies, float32 [head_dim / 2].

    The formula is that of transformers' `_compute_llama3_parameters`, in the converter's float32 operations: a number
    divided by a tensor is multiplied with the reciprocal, as in torch.
    """
    scaling, one = architecture.rope_scaling, np.float32(1)
    assert scaling is not None, "only models with Llama 3's scaling have rope factors"
    original = scaling.original_max_position_embeddings
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    exponents = np.arange(0, architecture.head_dim, 2, dtype=np.float32) / np.float32(architecture.head_dim)
    frequencies = one / np.power(np.float32(architecture.rope_base), exponents)
    wavelengths = (one / frequencies) * np.float32(2 * math.pi)
    smooth = ((one / wavelengths) * np.float32(original) - low) / (high - low)
    between = one / ((one - smooth) / np.float32(scaling.factor) + smooth)
    is_short, is_long = wavelengths < original / high, wavelengths > original / low
    return np.where(is_short, one, np.where(is_long, np.float32(scaling.factor), between)).astype(np.float32)


def write_metadata(
    path: Path,
    tensors: list[GGUFTensor],
    types: dict[str, str],
    *,
    name: str,
    architecture: Architecture,
    quantization: Quantization,
    vocabulary: Vocabulary,
    jinja_template: str,
    hf_config: dict,
    sampling: dict[str, float],
    importance: ImportanceMatrix | None,
) -> None:
    """Write a GGUF file up to the first tensor's bytes.

    Args:
        types: ggml type by tensor name
        name: general.name, spelled like a Hugging Face folder
        hf_config: the base's config.json
        sampling: as read_sampling returns it
        importance: the matrix that the tensors are quantized with
    """
    writer = GGUFWriter(path, "llama")
    _add_general_keys(writer, name, sum(math.prod(tensor.shape) for tensor in tensors), sampling)
    _add_architecture_keys(writer, architecture, has_head_dim=hf_config.get("head_dim") is not None)
    _add_tokenizer_keys(writer, vocabulary, jinja_template)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(quantization.file_type)
    for key, value in ({} if importance is None else importance.list_keys()).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for tensor in tensors:
        _add_tensor_info(writer, tensor, types[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()


def _add_general_keys(writer: GGUFWriter, name: str, num_parameters: int, sampling: dict[str, float]) -> None:
    writer.add_type("model")
    # Parse base name, size and fine-tune from the name, as llama.cpp's converter does from a folder's name.
    metadata = Metadata.apply_metadata_heuristic(Metadata(), None, None, Path(name), num_parameters)
    if metadata.size_label is None:
        metadata.size_label = size_label(num_parameters, num_parameters, 0, 0)
    for name, value in sampling.items():
        setattr(metadata, f"sampling_{name}", value)
    metadata.set_gguf_meta_model(writer)


def _add_architecture_keys(writer: GGUFWriter, architecture: Architecture, *, has_head_dim: bool) -> None:
    writer.add_block_count(architecture.num_layers)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.embed_dim)
    writer.add_feed_forward_length(architecture.intermediate_dim)
    writer.add_head_count(architecture.num_heads)
    writer.add_head_count_kv(architecture.num_kv_heads)
    writer.add_rope_freq_base(architecture.rope_base)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    if has_head_dim:
        writer.add_key_length(architecture.head_dim)
        writer.add_value_length(architecture.head_dim)
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_rope_dimension_count(architecture.head_dim)


def _add_tokenizer_keys(writer: GGUFWriter, vocabulary: Vocabulary, jinja_template: str) -> None:
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    ids_keys = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # GGUF's own spelling
    for kind, number in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{ids_keys.get(kind, kind)}_token_id", number)
    for kind, is_added in vocabulary.early_flags.items():
        writer.add_bool(f"tokenizer.ggml.add_{kind}_token", is_added)
    writer.add_chat_template(jinja_template)
    for kind, is_added in vocabulary.late_flags.items():
        writer.add_bool(f"tokenizer.ggml.add_{kind}_token", is_added)


def _add_tensor_info(writer: GGUFWriter, tensor: GGUFTensor, ggml_type: str) -> None:
    elements, block_bytes = get_block(ggml_type)
    # For byte data the writer expects the shape in bytes.
    byte_shape = (*tensor.shape[:-1], tensor.shape[-1] // elements * block_bytes)
    writer.add_tensor_info(
        tensor.name,
        byte_shape,
        np.dtype(np.uint8),
        count_bytes(ggml_type, tensor.shape),
        raw_dtype=GGMLQuantizationType[ggml_type],
    )
