"""A fused Llama layer with LoRA: one autograd function of few kernels, without the compiler.

The base is frozen: backward computes only the gradients of the adapters and of the layer's input. Forward keeps the
input, q, k, v, the attention result, and gate and up; backward recomputes norms and activation. With checkpointing
forward keeps only the input and the low-rank products; recomputation then skips these products and the down projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tune2gguf.model.fp8 import (
    get_fp8_weight,
    is_fp8,
    multiplies_fp8,
    multiply_codes,
    multiply_fp8,
    multiply_fp8_back,
    quantize_rows,
)
from tune2gguf.model.fused import launch
from tune2gguf.model.fused.attention import Layout, attend, attend_back
from tune2gguf.model.fused.eight_bit import decode_rows
from tune2gguf.model.fused.groups import (
    DOWN,
    GATE_UP,
    OUTPUT,
    QKV,
    Group,
    Groups,
    begin_pass,
    get_projections,
    lay_out_groups,
    list_adapted,
    list_weights,
)
from tune2gguf.model.fused.launch import Adapted, KeptInputs
from tune2gguf.model.lora import to_dense

if TYPE_CHECKING:
    from torchtune.modules import TransformerSelfAttentionLayer


def multiply(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Return the base's products x W^T for projections of one input."""
    if is_fp8(linears[0].weight):
        return multiply_fp8(x, [get_fp8_weight(linear) for linear in linears])
    return [x @ to_dense(linear.weight, x.dtype).T for linear in linears]


def multiply_back(gradients: list[Tensor], *linears: nn.Module) -> Tensor:
    """Return the base's part of an input's gradient, from the gradients of the projections of that input.

    Clears the list on the way, to free the gradients' memory.
    """
    if is_fp8(linears[0].weight):
        return multiply_fp8_back(gradients, [get_fp8_weight(linear) for linear in linears])
    first, *others = linears
    gradient = gradients.pop(0)
    product = gradient @ to_dense(first.weight, gradient.dtype)
    for linear in others:
        gradient = gradients.pop(0)
        product.addmm_(gradient, to_dense(linear.weight, gradient.dtype))
    return product


@dataclass
class Pass:
    """One forward pass of a layer, with the tensors that backward needs."""

    layer: TransformerSelfAttentionLayer
    linears: dict[str, nn.Module]
    layout: Layout
    groups: Groups
    checkpointing: bool
    first_rstd: Tensor | None = None
    heads: tuple[Tensor, ...] = ()  # q, k, v: [tokens, heads, head_dim]
    attended: Tensor | None = None  # [tokens, heads, head_dim]
    kept: tuple[Tensor, ...] = ()  # by attention
    middle: Tensor | None = None  # after attention, [tokens, dim]
    second_rstd: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    kept_inputs: KeptInputs | None = None  # replaces gate and up
    kept_attended: tuple[Tensor, Tensor] | None = None  # replaces attended: its FP8 codes and scales

    @property
    def keeps_8_bits(self) -> bool:
        """Whether attended, gate and up, most of a layer's kept memory, are kept in FP8."""
        weight = self.linears["w1"].weight
        return is_fp8(weight) and multiplies_fp8(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, [tokens, dim]; with checkpointing, free all but the low-rank products."""
        self.run_attention(x, again=False)
        out = self.finish()
        if self.checkpointing:
            self.first_rstd = self.attended = self.middle = self.second_rstd = self.gate = self.up = None
            self.heads = self.kept = ()
        return out

    def rotate(self, q: Tensor, k: Tensor, v: Tensor, **how) -> None:
        attention = self.layer.attn
        launch.rotate(
            q, k, v, attention.pos_embeddings.cache, self.layout.positions, head_dim=attention.head_dim, **how
        )

    def run_attention(self, x: Tensor, *, again: bool) -> None:
        """Run the layer from its norm to gate and up; `again` reuses the low-rank products."""
        linears, qkv, output = self.linears, self.groups[QKV], self.groups[OUTPUT]
        norm = self.layer.sa_norm
        _, normed, self.first_rstd = launch.norm(x, norm.scale, norm.eps)
        if not again:
            qkv.reduce(normed)
        q, k, v = multiply(normed, *(linears[name] for name in QKV))
        self.rotate(q, k, v, adapted=tuple(qkv.add_to(name) for name in QKV))
        self.heads = tuple(flat.unflatten(1, (-1, self.layer.attn.head_dim)) for flat in (q, k, v))
        self.attended, self.kept = attend(*self.heads, self.layout)
        flat = self.attended.flatten(1)
        if not again:
            output.reduce(flat)
        delta = self._multiply_attended(flat, linears["output_proj"], keeps=again or not self.checkpointing)
        norm = self.layer.mlp_norm
        adapted_output = output.add_to("output_proj")
        self.middle, normed, self.second_rstd = launch.norm(
            x, norm.scale, norm.eps, delta=delta, adapted=adapted_output
        )
        if not again:
            self.groups[GATE_UP].reduce(normed)
        self.gate, self.up = multiply(normed, linears["w1"], linears["w3"])

    def _multiply_attended(self, flat: Tensor, linear: nn.Module, *, keeps: bool) -> Tensor:
        if not (self.keeps_8_bits and keeps):
            return multiply(flat, linear)[0]
        self.kept_attended, self.attended = quantize_rows([flat]), None
        return multiply_codes(*self.kept_attended, [get_fp8_weight(linear)], dtype=flat.dtype)[0]

    def finish(self) -> Tensor:
        """Run the rest of the layer: return its output, [rows, dim]."""
        down = self.groups[DOWN]
        product = self._activate(keeps=self.keeps_8_bits and not self.checkpointing)
        down.reduce(product)
        (out,) = multiply(product, self.linears["w2"])
        return launch.add(out, down.add_to("w2"), residual=self.middle)

    def _activate(self, *, keeps: bool) -> Tensor:
        gate_up, kept = self.groups[GATE_UP], KeptInputs.make(self.gate) if keeps else None
        adapted = {"adapted_gate": gate_up.add_to("w1"), "adapted_up": gate_up.add_to("w3")}
        product = launch.swiglu(self.gate, self.up, kept=kept, **adapted)
        if keeps:
            self.kept_inputs, self.gate, self.up = kept, None, None
        return product

    def backward(self, x: Tensor, upstream: Tensor, *, needs_input: bool) -> tuple[Tensor | None, dict]:
        """Return the gradient of the layer's input, and those of every [A, B], float32, by projection name."""
        if self.checkpointing:
            self.run_attention(x, again=True)
            if self.keeps_8_bits:
                self._activate(keeps=True)  # round as without checkpointing
        gradients = {name: [None, None] for group in self.groups.values() for name in group.names}
        middle_gradient = self._backward_mlp(upstream, gradients)
        heads = self._backward_attention(middle_gradient, gradients)
        qkv, norm = self.groups[QKV], self.layer.sa_norm
        low_rank = qkv.reduce_gradients(heads, gradients)
        qkv.finish_gradients(low_rank, gradients, x, rstd=self.first_rstd, weight=norm.scale)
        if not needs_input:
            return None, gradients
        normed_gradient = multiply_back([heads[name] for name in QKV], *(self.linears[name] for name in QKV))
        out = self._backward_norm(qkv, low_rank, normed_gradient, x, self.first_rstd, norm, middle_gradient)
        return out, gradients

    def _backward_mlp(self, upstream: Tensor, gradients: dict) -> Tensor:
        gate_up, linears, norm = self.groups[GATE_UP], self.linears, self.layer.mlp_norm
        self._backward_down(upstream, gradients)
        low_rank = gate_up.reduce_gradients({"w1": self.gate, "w3": self.up}, gradients)
        gate_up.finish_gradients(low_rank, gradients, self.middle, rstd=self.second_rstd, weight=norm.scale)
        both = [self.gate, self.up]
        self.gate = self.up = None
        normed_gradient = multiply_back(both, linears["w1"], linears["w3"])
        return self._backward_norm(gate_up, low_rank, normed_gradient, self.middle, self.second_rstd, norm, upstream)

    def _backward_down(self, upstream: Tensor, gradients: dict) -> None:
        """Overwrite gate and up with their gradients."""
        gate_up, down = self.groups[GATE_UP], self.groups[DOWN]
        low_rank = down.reduce_gradients({"w2": upstream}, gradients)
        product = multiply_back([upstream], self.linears["w2"])
        if self.kept_inputs is not None:
            self.gate, self.up = torch.empty_like(product), torch.empty_like(product)
        launch.swiglu_backward(
            product,
            self.gate,
            self.up,
            adapted_gate=gate_up.add_to("w1"),
            adapted_up=gate_up.add_to("w3"),
            adapted_down=Adapted(low_rank, down.stacked_a, down.dropout) if down.names else None,
            kept=self.kept_inputs,
        )
        self.kept_inputs = None
        down.finish_gradients(low_rank, gradients, product, is_dropped=True)

    def _backward_attention(self, middle_gradient: Tensor, gradients: dict) -> dict[str, Tensor]:
        output = self.groups[OUTPUT]
        if self.kept_attended is not None:
            self.attended = decode_rows(*self.kept_attended, middle_gradient.dtype).view_as(self.heads[0])
            self.kept_attended = None
        low_rank = output.reduce_gradients({"output_proj": middle_gradient}, gradients)
        output.finish_gradients(low_rank, gradients, self.attended.flatten(1))
        gradient = multiply_back([middle_gradient], self.linears["output_proj"])
        if output.names:
            gradient = launch.add(gradient, Adapted(low_rank, output.stacked_a, output.dropout), factor_is_a=True)
        gradient = gradient.view(self.attended.shape)
        heads = attend_back(gradient, *self.heads, self.attended, self.kept, self.layout)
        self.heads, self.attended, self.kept = (), None, ()
        q, k, v = (head.flatten(1) for head in heads)
        self.rotate(q, k, v, inverse=True)
        return {"q_proj": q, "k_proj": k, "v_proj": v}

    @staticmethod
    def _backward_norm(
        group: Group,
        low_rank: Tensor | None,
        gradient: Tensor,
        x: Tensor,
        rstd: Tensor,
        norm: nn.Module,
        residual: Tensor,
    ) -> Tensor:
        return launch.norm_backward(
            gradient,
            x,
            rstd,
            norm.scale,
            residual,
            low_rank=low_rank,
            factor=group.stacked_a,
            dropout=group.dropout,
            rank=group.rank,
        )


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, one: Pass, *weights: Tensor) -> Tensor:
        out = one.forward(x)
        ctx.save_for_backward(x)
        ctx.one = one
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        (x,), one = ctx.saved_tensors, ctx.one
        assert one is not None, "a fused layer runs backward once"
        ctx.one = None
        out, gradients = one.backward(x, upstream, needs_input=ctx.needs_input_grad[0])
        return out, None, *(part for name in list_adapted(one.linears) for part in gradients[name])


def run_layer(
    layer: TransformerSelfAttentionLayer,
    x: Tensor,
    *,
    layout: Layout,
    groups: Groups | None = None,
    seeds: Tensor | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Return a layer's output, [tokens, dim].

    Args:
        x: [tokens, dim] in bf16
        groups: the layer's adapters in x's dtype; None: cast here
        seeds: the adapters' dropout seeds, int32 [groups, adapters]; None: no dropout
        checkpointing: keep little and recompute the layer in backward
    """
    linears = get_projections(layer)
    weights = list_weights(linears)
    if groups is None:
        groups, parts = lay_out_groups(linears, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            torch._foreach_copy_(parts, weights)
    share = linears[list_adapted(linears)[0]].dropout
    one = Pass(layer, linears, layout, begin_pass(groups, seeds, share=share), checkpointing)
    return _FusedLayer.apply(x, one, *weights)
