"""KV caches of a decoder that generates.

torchtune's caches compare their place on the host, in every layer: a GPU would stand still that often for each token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tune2gguf.model.llama import CausalLM


class KVCaches:
    """The keys and values of all layers of a model, filled up to the same place.

    The layers' attention uses them until `detach`.

    Args:
        batch_size: rows
        num_places: tokens per row
    """

    def __init__(self, model: CausalLM, *, batch_size: int, num_places: int, device: torch.device) -> None:
        self.model = model
        self.num_filled = 0
        self.places = torch.arange(num_places, device=device)  # of the tokens at hand
        self._all_places = self.places
        dtype = model.decoder.tok_embeddings.weight.dtype
        for layer in model.decoder.layers:
            attention = layer.attn
            shape = (2, batch_size, attention.num_kv_heads, num_places, attention.head_dim)
            # Zeros: attention multiplies places without a token by 0, and 0 * NaN is NaN.
            attention.kv_cache = _LayerCache(self, torch.zeros(shape, dtype=dtype, device=device))
            attention.cache_enabled = True

    def clear(self) -> None:
        """Forget all tokens."""
        self.num_filled = 0

    def predict_next(self, tokens: Tensor, *, mask: Tensor, input_pos: Tensor) -> Tensor:
        """Append tokens and return the next token's logits; arguments as in CausalLM.predict_next."""
        end = self.num_filled + tokens.shape[1]
        self.places = self._all_places[self.num_filled : end]
        self.num_filled = end
        return self.model.predict_next(tokens, mask=mask, input_pos=input_pos)

    def detach(self) -> None:
        """Let the layers attend without caches again."""
        for layer in self.model.decoder.layers:
            layer.attn.kv_cache = None
            layer.attn.cache_enabled = False


class _LayerCache:
    """A layer's keys and values, [2, batch, kv_heads, places, head_dim], with the method that torchtune calls."""

    def __init__(self, caches: KVCaches, kept: Tensor) -> None:
        self._caches, self._kept = caches, kept

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the tokens at hand, [batch, kv_heads, new, head_dim]; return all of them."""
        for kept, new in zip(self._kept, (keys, values), strict=True):
            kept.index_copy_(2, self._caches.places, new)
        return self._kept[0], self._kept[1]
