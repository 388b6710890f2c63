"""KV caches of a decoder that generates.

torchtune's caches compare their place on the host, in every layer: a GPU would stand still that often for each token.
On a GPU a CUDA graph replaces the thousand launches of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tune2gguf.model.recording import record_graph

if TYPE_CHECKING:
    from tune2gguf.model.llama import CausalLM


@dataclass(frozen=True)
class _Inputs:
    """Arguments of CausalLM.append, and the tokens' places in the caches, [new]."""

    embedded: Tensor
    mask: Tensor
    input_pos: Tensor
    places: Tensor


class KVCaches:
    """The keys and values of all layers of a model, filled up to the same place.

    The layers' attention uses them until `detach`. The model's weights may change meanwhile, but not be replaced.

    Args:
        batch_size: rows
        num_places: tokens per row
    """

    def __init__(self, model: CausalLM, *, batch_size: int, num_places: int, device: torch.device) -> None:
        self.model = model
        self.num_filled = 0
        self.places = torch.arange(num_places, device=device)  # of the tokens at hand
        self._all_places = self.places
        self._is_on_gpu = device.type == "cuda"
        self._graphed: _GraphedToken | None = None
        self._has_run = False  # a token: compiles and loads its kernels
        dtype = model.decoder.tok_embeddings.weight.dtype
        for layer in model.decoder.layers:
            attention = layer.attn
            shape = (2, batch_size, attention.num_kv_heads, num_places, attention.head_dim)
            # Zeros: attention multiplies places without a token by 0, and 0 * NaN is NaN.
            attention.kv_cache = _LayerCache(self, torch.zeros(shape, dtype=dtype, device=device))
            attention.cache_enabled = True

    @property
    def is_graphed(self) -> bool:
        """Whether single tokens are appended by a CUDA graph by now."""
        return self._graphed is not None

    def clear(self) -> None:
        """Forget all tokens."""
        self.num_filled = 0

    def predict_next(self, tokens: Tensor, *, mask: Tensor, input_pos: Tensor) -> Tensor:
        """Append tokens, [batch, new], and return the next token's logits, float32 [batch, vocab].

        Args:
            mask, input_pos: as in CausalLM.append
        """
        end = self.num_filled + tokens.shape[1]
        # Outside the graph: the embedding may be in host memory, and a sharded one shares its buffer with the head.
        inputs = _Inputs(self.model.embed(tokens), mask, input_pos, self._all_places[self.num_filled : end])
        self.num_filled = end
        return self.model.predict_next(self._append(inputs))

    def _append(self, inputs: _Inputs) -> Tensor:
        sharded, is_prompt = self.model.sharded, inputs.embedded.shape[1] > 1
        is_capturable = self._is_on_gpu and (sharded is None or sharded.can_be_captured)
        if is_prompt or not is_capturable:
            return self.run(inputs)
        if not self._has_run:
            self._has_run = True
            return self.run(inputs)
        if self._graphed is None:
            self._graphed = _GraphedToken(self, inputs)
        return self._graphed.append(inputs)

    def run(self, inputs: _Inputs) -> Tensor:
        """Return the last layer's output, without a graph."""
        self.places = inputs.places
        return self.model.append(inputs.embedded, mask=inputs.mask, input_pos=inputs.input_pos)

    def detach(self) -> None:
        """Let the layers attend without caches again."""
        self._graphed = None
        for layer in self.model.decoder.layers:
            layer.attn.kv_cache = None
            layer.attn.cache_enabled = False


class _GraphedToken:
    """A graph that appends one token to every row: kernels and order are those of `KVCaches.run`.

    With a sharded base it contains the gathers of all layers but the first two.
    """

    def __init__(self, caches: KVCaches, inputs: _Inputs) -> None:
        self._caches, self._sharded = caches, caches.model.sharded
        self._inputs = _Inputs(**{name: value.clone() for name, value in vars(inputs).items()})
        if self._sharded is not None:
            self._sharded.begin_graph(backward=False)
        self._graph = record_graph(self._run, pool=torch.cuda.graph_pool_handle())
        if self._sharded is not None:
            self._sharded.end_graph(backward=True)  # capture computes nothing: the first layers are still gathered

    def _run(self) -> None:
        self._hidden = self._caches.run(self._inputs)

    def append(self, inputs: _Inputs) -> Tensor:
        """Return the last layer's output, which the next token overwrites."""
        for name, kept in vars(self._inputs).items():
            kept.copy_(getattr(inputs, name))
        if self._sharded is None:
            self._graph.replay()
        else:
            self._sharded.begin_graph(backward=False)
            self._graph.replay()
            self._sharded.end_graph(backward=False)
        return self._hidden


class _LayerCache:
    """A layer's keys and values, [2, batch, kv_heads, places, head_dim], with the method that torchtune calls."""

    def __init__(self, caches: KVCaches, kept: Tensor) -> None:
        self._caches, self._kept = caches, kept

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the tokens at hand, [batch, kv_heads, new, head_dim]; return all of them."""
        for kept, new in zip(self._kept, (keys, values), strict=True):
            kept.index_copy_(2, self._caches.places, new)
        return self._kept[0], self._kept[1]
