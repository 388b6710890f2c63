"""The tensors of a dense Llama: shapes, names in Hugging Face, torchtune and GGUF, and the two orders of Q/K rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tune2gguf.model.architectures import Architecture

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ROPE_FACTORS = "rope_freqs.weight"  # GGUF's name of the divisors of Llama 3's RoPE scaling
# torchtune's name -> GGUF's name.
_TOP_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "output.weight": "output.weight",
}
_LAYER_NAMES = {
    "sa_norm.scale": "attn_norm.weight",
    "attn.q_proj.weight": "attn_q.weight",
    "attn.k_proj.weight": "attn_k.weight",
    "attn.v_proj.weight": "attn_v.weight",
    "attn.output_proj.weight": "attn_output.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "mlp.w1.weight": "ffn_gate.weight",
    "mlp.w2.weight": "ffn_down.weight",
    "mlp.w3.weight": "ffn_up.weight",
}

Rows = TypeVar("Rows", "Tensor", "np.ndarray")


@dataclass(frozen=True)
class TensorSpec:
    """One base tensor. `num_heads` is set for query and key: their row order differs in HF layout."""

    tune_name: str
    hf_name: str
    shape: tuple[int, ...]
    num_heads: int | None = None

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear weight of a decoder layer; 4-bit checkpoints quantize these."""
        return len(self.shape) == 2 and self.tune_name.startswith("layers.")


def list_tensors(architecture: Architecture) -> list[TensorSpec]:
    """Return all base tensors, in the order of the forward pass; a tied model has no `output.weight`."""
    dim, hidden = architecture.embed_dim, architecture.intermediate_dim
    query_dim = architecture.num_heads * architecture.head_dim
    key_dim = architecture.num_kv_heads * architecture.head_dim
    specs = [TensorSpec("tok_embeddings.weight", "model.embed_tokens.weight", (architecture.vocab_size, dim))]
    for layer in range(architecture.num_layers):
        tune, hf = f"layers.{layer}", f"model.layers.{layer}"
        attn, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        specs += [
            TensorSpec(f"{tune}.sa_norm.scale", f"{hf}.input_layernorm.weight", (dim,)),
            TensorSpec(f"{tune}.attn.q_proj.weight", f"{attn}.q_proj.weight", (query_dim, dim), architecture.num_heads),
            TensorSpec(
                f"{tune}.attn.k_proj.weight", f"{attn}.k_proj.weight", (key_dim, dim), architecture.num_kv_heads
            ),
            TensorSpec(f"{tune}.attn.v_proj.weight", f"{attn}.v_proj.weight", (key_dim, dim)),
            TensorSpec(f"{tune}.attn.output_proj.weight", f"{attn}.o_proj.weight", (dim, query_dim)),
            TensorSpec(f"{tune}.mlp_norm.scale", f"{hf}.post_attention_layernorm.weight", (dim,)),
            TensorSpec(f"{tune}.mlp.w1.weight", f"{mlp}.gate_proj.weight", (hidden, dim)),
            TensorSpec(f"{tune}.mlp.w3.weight", f"{mlp}.up_proj.weight", (hidden, dim)),
            TensorSpec(f"{tune}.mlp.w2.weight", f"{mlp}.down_proj.weight", (dim, hidden)),
        ]
    specs.append(TensorSpec("norm.scale", "model.norm.weight", (dim,)))
    if not architecture.tied:
        specs.append(TensorSpec("output.weight", "lm_head.weight", (architecture.vocab_size, dim)))
    return specs


def to_tune_rows(rows: Rows, num_heads: int) -> Rows:
    """Reorder query or key rows [num_heads * head_dim, ...] from HF's order to torchtune's, which is GGUF's too.

    HF rotates the pair (i, i + head_dim / 2) of a head, torchtune and llama.cpp the pair (2 i, 2 i + 1).
    """
    head_dim = rows.shape[0] // num_heads
    return rows.reshape(num_heads, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_hf_rows(rows: Rows, num_heads: int) -> Rows:
    """Reorder query or key rows [num_heads * head_dim, ...] from torchtune's and GGUF's order to HF's."""
    head_dim = rows.shape[0] // num_heads
    return rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def get_gguf_name(tune_name: str) -> str:
    """Return the GGUF name of a tensor from its torchtune name."""
    if tune_name in _TOP_NAMES:
        return _TOP_NAMES[tune_name]
    _, layer, part = tune_name.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[part]}"
