"""Builders of Llama decoders with LoRA, from torchtune's modules and the base's architecture.

torchtune's own LoRA builders give the adapter the dtype of the base; these keep it in float32 (see lora.py). They
cover every dense Llama, tied or not, with or without Llama 3's RoPE scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchtune.modules import RotaryPositionalEmbeddings, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.tied_linear import TiedLinear

from tune2gguf.model.architectures import ARCHITECTURES, Architecture, check_architecture, read_architecture
from tune2gguf.model.attention import Attention, lay_out_rows
from tune2gguf.model.fp8 import FrozenLinear
from tune2gguf.model.layers import DecoderLayer, FrozenRMSNorm, GatedMLP
from tune2gguf.model.lengths import pad_length
from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.loss import cross_entropy_of_supervised, find_supervised, select_supervised
from tune2gguf.model.sharding import ShardedBase, run_layer

if TYPE_CHECKING:
    from tune2gguf.model.fused.stack import FusedStack

LORA_ATTN_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")


class TokenEmbedding(nn.Embedding):
    """A token embedding whose weight may stay in host memory: a step looks up few of its rows."""

    def reset_parameters(self) -> None:
        """Leave the weight to load_base: on the meta device drawing it would import sympy."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [batch, seq] to [batch, seq, dim] on the tokens' device."""
        if self.weight.device == tokens.device:
            return super().forward(tokens)
        places = tokens.to(self.weight.device)
        if not tokens.is_cuda:
            return super().forward(places).to(tokens.device)
        # Pinned memory makes the copy asynchronous.
        shape = (*tokens.shape, self.embedding_dim)
        found = torch.empty(shape, dtype=self.weight.dtype, pin_memory=True)
        torch.index_select(self.weight, 0, places.flatten(), out=found.view(-1, self.embedding_dim))
        return found.to(tokens.device, non_blocking=True)


class CausalLM(nn.Module):
    """A decoder whose forward returns the loss of the supervised positions, output head included."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.offloading: AbstractContextManager = nullcontext()
        self.is_compiled = False
        self.stack: FusedStack | None = None  # set by prepare_training(fuse=True)
        self.sharded: ShardedBase | None = None  # set if the base is sharded over processes

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight, [vocab, dim]; the token embedding if the model is tied."""
        output = self.decoder.output
        return output.tied_module.weight if isinstance(output, TiedLinear) else output.weight

    def compute_hidden(self, tokens: Tensor, **rows) -> Tensor:
        """Return the hidden states after the final norm, [batch, seq, dim]; arguments as in forward."""
        return self.decoder.norm(self._run_layers(tokens, **rows)[: tokens.numel()]).view(*tokens.shape, -1)

    def _run_layers(
        self,
        tokens: Tensor,
        *,
        row_starts: Tensor | None = None,
        longest_row: int | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's output for the flat batch, [tokens or more, dim]; padding may follow."""
        if self.stack is not None:
            from tune2gguf.model.fused.stack import lay_out_pass

            flat, layout = lay_out_pass(tokens, row_starts=row_starts, longest_row=longest_row, input_pos=input_pos)
            with self.offloading:
                return self.stack.run(self.embed(flat), layout, sharded=self.sharded)
        if tokens.device.type == "cpu" and not self.is_compiled:
            flat, lengths = pad_pass(tokens, row_starts)
            hidden, laid_out = self.embed(flat), lay_out_rows(lengths, len(flat))
            for number, layer in enumerate(self.decoder.layers):
                hidden = run_layer(self.sharded, number, layer, hidden, rows=laid_out)
            return hidden
        mask = None if row_starts is None else make_row_mask(row_starts, *tokens.shape)
        hidden = self.embed(tokens)
        with self.offloading:
            for number, layer in enumerate(self.decoder.layers):
                hidden = run_layer(self.sharded, number, layer, hidden, mask=mask, input_pos=input_pos)
        return hidden.flatten(0, 1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Map tokens [...] to [..., dim], on the tokens' device."""
        sharded = self.sharded
        with nullcontext() if sharded is None else sharded.hold(sharded.embedding, then=sharded.head):
            return self.decoder.tok_embeddings(tokens)

    def run_eagerly(self) -> AbstractContextManager:
        """Return a context in which compiled layers run eagerly.

        Prompts, single tokens and growing caches would recompile them, and evict the graphs of training.
        """
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def hold_head(self) -> AbstractContextManager:
        sharded = self.sharded
        return nullcontext() if sharded is None else sharded.hold(sharded.head, then=sharded.embedding)

    def forward(self, tokens: Tensor, labels: Tensor, supervised: Tensor | None = None, **rows) -> Tensor:
        """Return the cross entropy of each supervised position, float32 [n], row by row.

        Args:
            tokens: [batch, seq]
            labels: [batch, seq], not shifted; IGNORED_LABEL where a token is not supervised
            supervised: indices from `find_supervised`; None: computed here
            rows: row_starts, longest_row and input_pos of a data.Batch; none if each sequence is one row
        """
        hidden = self._run_layers(tokens, **rows)
        if supervised is None:
            supervised = find_supervised(labels)
        hidden, targets = select_supervised(hidden, labels, supervised)
        with self.hold_head():
            return cross_entropy_of_supervised(self.decoder.norm(hidden), self.head_weight, targets)

    def append(self, embedded: Tensor, *, mask: Tensor, input_pos: Tensor) -> Tensor:
        """Append tokens to the KV caches and return the last layer's output, [batch, new, dim].

        Args:
            embedded: new tokens, [batch, new, dim], from `embed`
            mask: True where a new token attends to a cache place, [batch, new, max_seq_len]
            input_pos: positions of the new tokens, [batch, new]
        """
        hidden = embedded
        with self.run_eagerly():
            for number, layer in enumerate(self.decoder.layers):
                hidden = run_layer(self.sharded, number, layer, hidden, mask=mask, input_pos=input_pos)
        return hidden

    def predict_next(self, hidden: Tensor) -> Tensor:
        """Return the next token's logits, float32 [batch, vocab], from the last layer's output [batch, new, dim]."""
        with self.run_eagerly(), self.hold_head():
            return self.decoder.unembed(hidden[:, -1:])[:, -1].float()


def pad_pass(tokens: Tensor, row_starts: Tensor | None) -> tuple[Tensor, list[int]]:
    """Return the flat tokens of a pass, padded to `pad_length`, and the lengths of its rows.

    Args:
        tokens: [batch, seq]
        row_starts: first token of each row in the flat batch, then the batch's size; None: each sequence is a row
    """
    batch, seq = tokens.shape
    lengths = [seq] * batch if row_starts is None else row_starts.diff().tolist()
    return functional.pad(tokens.flatten(), (0, pad_length(batch * seq) - batch * seq)), lengths


def make_row_mask(row_starts: Tensor, batch: int, seq: int) -> Tensor:
    """Return the causal mask within each row, bool [batch, seq, seq].

    Args:
        row_starts: first token of each row in the flat batch, then the batch's size, [rows + 1]
    """
    places = torch.arange(batch * seq, dtype=row_starts.dtype, device=row_starts.device)
    row_ids = torch.searchsorted(row_starts, places, right=True).view(batch, seq)
    return (row_ids[:, :, None] == row_ids[:, None, :]).tril()


def prepare_training(
    model: CausalLM,
    *,
    compile: bool,
    enable_activation_checkpointing: bool,
    enable_activation_offloading: bool = False,
    fuse: bool = False,
) -> None:
    """Wrap, compile or fuse the layers of a model, in place.

    Args:
        compile: compile each layer. All share one graph with dynamic lengths: torch silently gives up after eight
            recompilations
        enable_activation_checkpointing: keep only each layer's input and recompute the layer in backward
        enable_activation_offloading: keep these inputs in CPU memory until backward; needs a GPU
        fuse: train the layers with the kernels of tune2gguf.model.fused
    """
    layers = model.decoder.layers
    if enable_activation_offloading:
        from torchtune import training

        model.offloading = training.OffloadActivations()
    if fuse:
        from tune2gguf.model.fused.stack import FusedStack

        model.stack = FusedStack(
            layers, checkpointing=enable_activation_checkpointing, is_graphed=not enable_activation_offloading
        )
        for layer in layers:
            layer.forward = partial(_run_fused, layer, layer.forward, checkpointing=enable_activation_checkpointing)
        return
    # Compile before checkpointing: around a checkpoint the compiler gives up at attention's graph break.
    model.is_compiled = compile
    if compile:
        for layer in layers:
            # Round where eager layers round: else the smallest adapter decides the ties of bf16 sums.
            layer.compile(dynamic=True, options={"emulate_precision_casts": True})
    if enable_activation_checkpointing:
        from torchtune import training

        training.set_activation_checkpointing(layers, auto_wrap_policy={TransformerSelfAttentionLayer})


def _run_fused(
    layer: TransformerSelfAttentionLayer,
    plain_forward: Callable[..., Tensor],
    x: Tensor,
    *,
    checkpointing: bool,
    **rest,
) -> Tensor:
    from tune2gguf.model.fused.layer import run_layer

    if "layout" not in rest:  # generation with caches, token by token
        return plain_forward(x, **rest)
    return run_layer(layer, x, checkpointing=checkpointing, **rest)


def build_lora_llama(
    architecture: Architecture,
    *,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool,
    max_seq_len: int,
) -> CausalLM:
    """Build the model on torch's default device; `load_base` fills in base weights and RoPE tables.

    Raises:
        ValueError: if a LoRA module is unknown, or none is named
    """
    unknown = sorted(set(lora_attn_modules) - set(LORA_ATTN_MODULES))
    if unknown:
        raise ValueError(f"lora_attn_modules={unknown} is unknown; choose from {', '.join(LORA_ATTN_MODULES)}")
    if not lora_attn_modules and not apply_lora_to_mlp:
        raise ValueError(
            "lora_attn_modules=[] and apply_lora_to_mlp=false leave nothing to train; "
            f"set apply_lora_to_mlp=true, or choose from {', '.join(LORA_ATTN_MODULES)}"
        )

    def make_linear(in_dim: int, out_dim: int, has_lora: bool) -> nn.Module:
        if has_lora:
            return LoRALinear(in_dim, out_dim, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)
        return FrozenLinear(in_dim, out_dim)

    shape = architecture
    # Arithmetic on the meta device would import sympy, too; load_base makes the tables on the run's device.
    with torch.device("cpu"):
        rope = _make_rope(architecture, max_seq_len)
    layers = nn.ModuleList()
    for _ in range(shape.num_layers):
        layers.append(
            DecoderLayer(
                attn=_make_attention(shape, rope, make_linear, lora_attn_modules),
                mlp=GatedMLP(
                    gate_proj=make_linear(shape.embed_dim, shape.intermediate_dim, apply_lora_to_mlp),
                    down_proj=make_linear(shape.intermediate_dim, shape.embed_dim, apply_lora_to_mlp),
                    up_proj=make_linear(shape.embed_dim, shape.intermediate_dim, apply_lora_to_mlp),
                ),
                sa_norm=FrozenRMSNorm(dim=shape.embed_dim, eps=shape.norm_eps),
                mlp_norm=FrozenRMSNorm(dim=shape.embed_dim, eps=shape.norm_eps),
            )
        )
    tok_embeddings = TokenEmbedding(shape.vocab_size, shape.embed_dim)
    output = TiedLinear(tok_embeddings) if shape.tied else nn.Linear(shape.embed_dim, shape.vocab_size, bias=False)
    decoder = TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        norm=FrozenRMSNorm(shape.embed_dim, eps=shape.norm_eps),
        output=output,
    )
    model = CausalLM(decoder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


def _make_rope(architecture: Architecture, max_seq_len: int) -> nn.Module:
    scaling = architecture.rope_scaling
    if scaling is None:
        return RotaryPositionalEmbeddings(architecture.head_dim, max_seq_len=max_seq_len, base=architecture.rope_base)
    from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE

    return Llama3ScaledRoPE(
        architecture.head_dim,
        max_seq_len=max_seq_len,
        base=architecture.rope_base,
        scale_factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        old_context_len=scaling.original_max_position_embeddings,
    )


def _make_attention(
    shape: Architecture, rope: nn.Module, make_linear: Callable[..., nn.Module], lora_attn_modules: list[str]
) -> Attention:
    query_dim, key_dim = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return Attention(
        embed_dim=shape.embed_dim,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        q_proj=make_linear(shape.embed_dim, query_dim, "q_proj" in lora_attn_modules),
        k_proj=make_linear(shape.embed_dim, key_dim, "k_proj" in lora_attn_modules),
        v_proj=make_linear(shape.embed_dim, key_dim, "v_proj" in lora_attn_modules),
        output_proj=make_linear(query_dim, shape.embed_dim, "output_proj" in lora_attn_modules),
        pos_embeddings=rope,
    )


def lora_llama(
    base_dir: str,
    *,
    architecture: str | None,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool,
    max_seq_len: int,
) -> CausalLM:
    """Build a dense Llama with LoRA from its base folder's config.json, on the meta device, without weights.

    Args:
        architecture: name in ARCHITECTURES that config.json must match; None accepts any dense Llama

    Raises:
        ValueError: if config.json cannot be read, is not a dense Llama, or does not match `architecture`
    """
    found = read_architecture(base_dir)
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={architecture!r} is unknown; choose from {', '.join(ARCHITECTURES)}, or null"
            )
        check_architecture(architecture, found, base_dir)
    with torch.device("meta"):
        return build_lora_llama(
            found,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_attn_modules=lora_attn_modules,
            apply_lora_to_mlp=apply_lora_to_mlp,
            max_seq_len=max_seq_len,
        )
