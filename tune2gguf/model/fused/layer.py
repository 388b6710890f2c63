"""A Llama layer with LoRA as one differentiable function: few kernels, no compiler, and little kept for backward.

The base's weights are frozen, so that backward computes the gradients of the adapters and of the layer's input only.
Kept are the layer's input, q, k, v and the attention's result, and gate and up before the activation; norms and the
activation are computed again. With checkpointing only the input and the adapters' low-rank products are kept: the
second forward pass needs neither those products nor the down projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from tune2gguf.model.fused import launch
from tune2gguf.model.fused.groups import DOWN, GATE_UP, OUTPUT, QKV, Group, collect_groups, get_projections
from tune2gguf.model.fused.launch import Adapted
from tune2gguf.model.lora import LoRALinear, to_dense

if TYPE_CHECKING:
    from torchtune.modules import TransformerSelfAttentionLayer


def multiply(x: Tensor, linear: nn.Module) -> Tensor:
    """Return the base's product x W^T."""
    return x @ to_dense(linear.weight, x.dtype).T


def multiply_back(gradient: Tensor, linear: nn.Module, add_to: Tensor | None = None) -> Tensor:
    """Return the base's part of the gradient of a projection's input, added to another where one is given."""
    weight = to_dense(linear.weight, gradient.dtype)
    return gradient @ weight if add_to is None else add_to.addmm_(gradient, weight)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Tensor:
    """Return causal attention, [batch, heads, seq, head_dim]; k and v may have fewer heads, mask keeps rows apart."""
    if mask is None:
        # cuDNN's kernel is faster, but its backward gives other bits each time.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    from torchtune.modules.attention_utils import flex_attention_compiled

    return flex_attention_compiled(q, k, v, block_mask=mask, enable_gqa=True)


@contextmanager
def choose_exact_kernels() -> Iterator[None]:
    """Let flash attention's backward add in a fixed order, so that a run that is resumed ends as it would have."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # With warn_only it would warn, and add in any order.
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@dataclass
class Pass:
    """What one forward pass of a layer computes, as far as backward has a use for it."""

    layer: TransformerSelfAttentionLayer
    batch: int
    seq: int
    mask: BlockMask | None
    positions: Tensor | None  # [rows]
    groups: dict[tuple[str, ...], Group]
    needs_gradient: bool
    linears: dict[str, nn.Module] = field(default_factory=dict)
    first_rstd: Tensor | None = None
    heads: list[Tensor] = field(default_factory=list)  # q, k, v: leaves of the attention's own graph
    attended: Tensor | None = None  # [batch, heads, seq, head_dim]
    middle: Tensor | None = None  # after attention, [rows, dim]
    second_rstd: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.layer.attn.head_dim

    def split_heads(self, flat: Tensor) -> Tensor:
        """Return [rows, heads * head_dim] as [batch, heads, seq, head_dim]."""
        return flat.view(self.batch, self.seq, -1, self.head_dim).transpose(1, 2)

    def join_heads(self, split: Tensor) -> Tensor:
        return split.transpose(1, 2).reshape(self.batch * self.seq, -1)

    def run_attention(self, x: Tensor, *, again: bool) -> None:
        """Compute what is kept up to the middle of the layer; the low-rank products only the first time."""
        linears, qkv, output = self.linears, self.groups[QKV], self.groups[OUTPUT]
        norm = self.layer.sa_norm
        _, normed, self.first_rstd = launch.norm(x, norm.scale, norm.eps)
        if not again:
            qkv.reduce(normed)
        q, k, v = (multiply(normed, linears[name]) for name in QKV)
        rope = self.layer.attn.pos_embeddings.cache
        adapted = tuple(qkv.add_to(name) for name in QKV)
        launch.rotate(q, k, v, rope, self.positions, seq=self.seq, head_dim=self.head_dim, adapted=adapted)
        self.heads = [self.split_heads(flat).detach().requires_grad_(self.needs_gradient) for flat in (q, k, v)]
        with torch.set_grad_enabled(self.needs_gradient):
            self.attended = attend(*self.heads, self.mask)
        flat = self.join_heads(self.attended.detach())
        if not again:
            output.reduce(flat)
        delta = multiply(flat, linears["output_proj"])
        norm = self.layer.mlp_norm
        adapted_output = output.add_to("output_proj")
        self.middle, normed, self.second_rstd = launch.norm(
            x, norm.scale, norm.eps, delta=delta, adapted=adapted_output
        )
        if not again:
            self.groups[GATE_UP].reduce(normed)
        self.gate, self.up = multiply(normed, linears["w1"]), multiply(normed, linears["w3"])

    def finish(self) -> Tensor:
        """Return the layer's output, [rows, dim]."""
        gate_up, down = self.groups[GATE_UP], self.groups[DOWN]
        product = launch.swiglu(self.gate, self.up, adapted_gate=gate_up.add_to("w1"), adapted_up=gate_up.add_to("w3"))
        down.reduce(product)
        return launch.add(multiply(product, self.linears["w2"]), down.add_to("w2"), residual=self.middle)

    def forget(self) -> None:
        """Keep what checkpointing keeps."""
        self.first_rstd = self.attended = self.middle = self.second_rstd = self.gate = self.up = None
        self.heads = []

    def backward(self, x: Tensor, upstream: Tensor, *, needs_input: bool) -> tuple[Tensor | None, dict]:
        """Return the gradient of the layer's input and those of every [A, B], float32, by the projection's name."""
        gradients = {name: [None, None] for group in self.groups.values() for name in group.names}
        middle_gradient = self._backward_mlp(upstream, gradients)
        heads = self._backward_attention(middle_gradient, gradients)
        qkv, norm = self.groups[QKV], self.layer.sa_norm
        low_rank = qkv.reduce_gradients(heads, gradients)
        qkv.finish_gradients(low_rank, gradients, x, rstd=self.first_rstd, weight=norm.scale)
        if not needs_input:
            return None, gradients
        normed_gradient = None
        for name in QKV:
            normed_gradient = multiply_back(heads[name], self.linears[name], add_to=normed_gradient)
        out = self._backward_norm(qkv, low_rank, normed_gradient, x, self.first_rstd, norm, middle_gradient)
        return out, gradients

    def _backward_mlp(self, upstream: Tensor, gradients: dict) -> Tensor:
        gate_up, linears, norm = self.groups[GATE_UP], self.linears, self.layer.mlp_norm
        self._backward_down(upstream, gradients)
        low_rank = gate_up.reduce_gradients({"w1": self.gate, "w3": self.up}, gradients)
        gate_up.finish_gradients(low_rank, gradients, self.middle, rstd=self.second_rstd, weight=norm.scale)
        normed_gradient = multiply_back(self.gate, linears["w1"])
        self.gate = None
        normed_gradient = multiply_back(self.up, linears["w3"], add_to=normed_gradient)
        self.up = None
        return self._backward_norm(gate_up, low_rank, normed_gradient, self.middle, self.second_rstd, norm, upstream)

    def _backward_down(self, upstream: Tensor, gradients: dict) -> None:
        """Replace gate and up by their gradients."""
        gate_up, down = self.groups[GATE_UP], self.groups[DOWN]
        low_rank = down.reduce_gradients({"w2": upstream}, gradients)
        product = multiply_back(upstream, self.linears["w2"])
        launch.swiglu_backward(
            product,
            self.gate,
            self.up,
            adapted_gate=gate_up.add_to("w1"),
            adapted_up=gate_up.add_to("w3"),
            adapted_down=Adapted(low_rank, down.stacked_a, down.dropouts.get("w2")) if down.names else None,
        )
        down.finish_gradients(low_rank, gradients, product, is_dropped=True)

    def _backward_attention(self, middle_gradient: Tensor, gradients: dict) -> dict[str, Tensor]:
        output = self.groups[OUTPUT]
        flat = self.join_heads(self.attended.detach())
        low_rank = output.reduce_gradients({"output_proj": middle_gradient}, gradients)
        output.finish_gradients(low_rank, gradients, flat)
        gradient = multiply_back(middle_gradient, self.linears["output_proj"])
        if output.names:
            adapted = Adapted(low_rank, output.stacked_a, output.dropouts.get("output_proj"))
            gradient = launch.add(gradient, adapted, factor_is_a=True)
        # Flex attention is exact as it is.
        with choose_exact_kernels() if self.mask is None else nullcontext():
            heads = torch.autograd.grad(self.attended, self.heads, self.split_heads(gradient))
        self.heads, self.attended = [], None
        q, k, v = (self.join_heads(head) for head in heads)
        rope = self.layer.attn.pos_embeddings.cache
        launch.rotate(q, k, v, rope, self.positions, seq=self.seq, head_dim=self.head_dim, inverse=True)
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
            dropouts=group.draws,
            rank=group.rank,
        )


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        layer: TransformerSelfAttentionLayer,
        mask: BlockMask | None,
        positions: Tensor | None,
        checkpointing: bool,
        needs_gradient: bool,
        names: tuple[str, ...],
        *adapters: Tensor,
    ) -> Tensor:
        batch, seq, dim = x.shape
        linears = get_projections(layer)
        pairs = {name: (adapters[2 * number], adapters[2 * number + 1]) for number, name in enumerate(names)}
        drops = layer.training and any(linears[name].dropout > 0 for name in names)
        run = Pass(
            layer=layer,
            batch=batch,
            seq=seq,
            mask=mask,
            positions=None if positions is None else positions.flatten(),
            groups=collect_groups(linears, pairs, dtype=x.dtype, drops=drops),
            needs_gradient=needs_gradient and not checkpointing,
            linears=linears,
        )
        flat = x.reshape(-1, dim)
        run.run_attention(flat, again=False)
        out = run.finish()
        if checkpointing:
            run.forget()
        ctx.save_for_backward(flat)
        ctx.run, ctx.names, ctx.checkpointing = run, names, checkpointing
        return out.view(batch, seq, dim)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        (x,), run = ctx.saved_tensors, ctx.run
        assert run is not None, "a fused layer goes back once"
        ctx.run = None
        if ctx.checkpointing:
            run.needs_gradient = True
            run.run_attention(x, again=True)
        upstream = upstream.reshape(x.shape)
        out, gradients = run.backward(x, upstream, needs_input=ctx.needs_input_grad[0])
        out = None if out is None else out.view(run.batch, run.seq, -1)
        return out, None, None, None, None, None, None, *(one for name in ctx.names for one in gradients[name])


def run_layer(
    layer: TransformerSelfAttentionLayer,
    x: Tensor,
    *,
    mask: BlockMask | None,
    positions: Tensor | None,
    checkpointing: bool,
) -> Tensor:
    """Return a layer's output, [batch, seq, dim].

    Args:
        x: [batch, seq, dim] in bf16
        mask: which keeps the rows of a pack apart; None: every sequence is one row
        positions: of each token in its own row, [batch, seq]; None where a sequence is one row
        checkpointing: keep little, and compute the layer again in backward
    """
    adapted = {name: linear for name, linear in get_projections(layer).items() if isinstance(linear, LoRALinear)}
    weights = [weight for linear in adapted.values() for weight in (linear.lora_a.weight, linear.lora_b.weight)]
    # Inside the function autograd is off, whether or not there will be a backward.
    needs_gradient = torch.is_grad_enabled()
    return _FusedLayer.apply(x, layer, mask, positions, checkpointing, needs_gradient, tuple(adapted), *weights)
