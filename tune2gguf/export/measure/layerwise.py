"""A Llama's hidden states and logits in float32 from any source of weights, with one matrix in memory at a time.

The base, the base with an unmerged adapter, the merged weights and a GGUF's dequantized tensors share this code, so
results differ by the weights alone. An 8B model needs less than 2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from tune2gguf.base.layout import list_tensors
from tune2gguf.export.gguf_file.llama import compute_rope_factors
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.machine.spinning import share_cores
from tune2gguf.model.architectures import Architecture

# (torchtune's name, begin, end) -> float32 rows [end - begin, in], query and key in torchtune's and GGUF's order.
ReadRows = Callable[[str, int, int], np.ndarray]
HEAD_ROWS = 8192  # vocabulary rows per product


@dataclass(frozen=True)
class WeightSource:
    """A source of weights, with an optional unmerged adapter.

    `observe` is called with the name and the inputs, [n, in], of each layer matrix.
    """

    architecture: Architecture
    read_rows: ReadRows
    adapter: Adapter | None = None
    observe: Callable[[str, Tensor], None] | None = None

    @cached_property
    def num_rows(self) -> dict[str, int]:
        return {spec.tune_name: spec.shape[0] for spec in list_tensors(self.architecture)}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        end = self.num_rows[name] if end is None else end
        return torch.from_numpy(np.ascontiguousarray(self.read_rows(name, begin, end)))

    def multiply(self, name: str, x: Tensor) -> Tensor:
        """Return x W^T, [n, rows of W], plus the adapter's product if the weight has one."""
        if self.observe is not None:
            self.observe(name, x)
        product = x @ self.read(name).T
        pair = None if self.adapter is None else self.adapter.pairs.get(name)
        if pair is not None:
            low_rank = x @ torch.from_numpy(pair.lora_a).T * (self.adapter.alpha / self.adapter.rank)
            product += low_rank @ torch.from_numpy(pair.lora_b).T
        return product

    def embed(self, tokens: np.ndarray) -> Tensor:
        """Return the embeddings of token ids, [n, dim]; only their rows are read."""
        unique, places = np.unique(tokens, return_inverse=True)
        rows = torch.cat([self.read("tok_embeddings.weight", int(token), int(token) + 1) for token in unique])
        return rows[torch.from_numpy(places)]

    def multiply_head(self, hidden: Tensor) -> Tensor:
        """Map hidden states [n, dim] to logits [n, vocab]."""
        name = "tok_embeddings.weight" if self.architecture.tied else "output.weight"
        vocab_size = self.num_rows[name]
        logits = torch.empty(hidden.shape[0], vocab_size)
        for begin in range(0, vocab_size, HEAD_ROWS):
            end = min(begin + HEAD_ROWS, vocab_size)
            logits[:, begin:end] = hidden @ self.read(name, begin, end).T
        return logits


def compute_hidden(
    source: WeightSource, rows: Sequence[np.ndarray], *, report: Callable[[int], None] = lambda count: None
) -> Tensor:
    """Return the hidden states after the final norm, [tokens, dim], rows concatenated; no row attends to another.

    Args:
        rows: token ids of each row
        report: called with the number of layers done
    """
    share_cores(torch.get_num_threads())
    architecture = source.architecture
    lengths = [len(row) for row in rows]
    with torch.no_grad():
        cos, sin = _compute_rope(architecture, max(lengths))
        hidden = source.embed(np.concatenate(rows))
        for layer in range(architecture.num_layers):
            prefix = f"layers.{layer}."
            normed = _normalize(hidden, source, f"{prefix}sa_norm.scale")
            hidden = hidden + _attend(source, f"{prefix}attn.", normed, lengths, cos, sin)
            normed = _normalize(hidden, source, f"{prefix}mlp_norm.scale")
            hidden = hidden + _feed_forward(source, f"{prefix}mlp.", normed)
            report(1)
        return _normalize(hidden, source, "norm.scale")


def _normalize(hidden: Tensor, source: WeightSource, name: str) -> Tensor:
    mean_square = hidden.pow(2).mean(-1, keepdim=True)
    return hidden * (mean_square + source.architecture.norm_eps).rsqrt() * source.read(name)


def _attend(source: WeightSource, prefix: str, x: Tensor, lengths: list[int], cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = (
        source.multiply(f"{prefix}{kind}_proj.weight", x).unflatten(1, (-1, source.architecture.head_dim))
        for kind in "qkv"
    )
    attended = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads = scaled_dot_product_attention(
            _rotate(q, cos, sin).transpose(0, 1)[None],
            _rotate(k, cos, sin).transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )
        attended.append(heads[0].transpose(0, 1).flatten(1))
    return source.multiply(f"{prefix}output_proj.weight", torch.cat(attended))


def _feed_forward(source: WeightSource, prefix: str, x: Tensor) -> Tensor:
    gate, up = source.multiply(f"{prefix}w1.weight", x), source.multiply(f"{prefix}w3.weight", x)
    return source.multiply(f"{prefix}w2.weight", silu(gate) * up)


def _compute_rope(architecture: Architecture, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [positions, 1, head_dim / 2]."""
    head_dim = architecture.head_dim
    frequencies = architecture.rope_base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if architecture.rope_scaling is not None:
        frequencies = frequencies / torch.from_numpy(compute_rope_factors(architecture))
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2 i, 2 i + 1) of [positions, heads, head_dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[: x.shape[0]], sin[: x.shape[0]]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
