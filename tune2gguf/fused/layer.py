"""A Llama layer with LoRA as one differentiable function: few kernels, no compiler, and little kept for backward.

The base's weights are frozen, so that backward computes the gradients of the adapters and of the layer's input only.
Kept are the layer's input, q, k, v and the attention's result, and gate and up before the activation; norms and the
activation are computed again. With checkpointing only the input and the adapters' low-rank products are kept: the
second forward pass needs neither those products nor the down projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from tune2gguf.fused import launch
from tune2gguf.fused.launch import Adapted, Dropout
from tune2gguf.lora import LoRALinear, to_dense

if TYPE_CHECKING:
    from torchtune.modules import TransformerSelfAttentionLayer

# Projections that take the same input, in the order in which their adapters lie side by side.
QKV, OUTPUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("output_proj",), ("w1", "w3"), ("w2",)
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)


def get_projections(layer: TransformerSelfAttentionLayer) -> dict[str, nn.Module]:
    """Return a layer's linear modules by name, in the order of GROUPS."""
    attention = {name: getattr(layer.attn, name) for name in (*QKV, *OUTPUT)}
    return attention | {name: getattr(layer.mlp, name) for name in (*GATE_UP, *DOWN)}


@dataclass
class Group:
    """The adapters of projections that take the same input; in the activations' dtype, A below each other."""

    names: list[str]
    stacked_a: Tensor | None  # [n * rank, in]
    b: dict[str, Tensor]  # [out, rank]
    dropouts: dict[str, Dropout]
    scaling: float
    rank: int
    low_rank: Tensor | None = None  # [rows, n * rank], the first product of a forward pass

    def get_slice(self, low_rank: Tensor, name: str) -> Tensor:
        """Return one adapter's columns of [rows, n * rank]."""
        start = self.names.index(name) * self.rank
        return low_rank[:, start : start + self.rank]

    def get_a(self, name: str) -> Tensor:
        start = self.names.index(name) * self.rank
        return self.stacked_a[start : start + self.rank]

    def add_to(self, name: str) -> Adapted | None:
        """Return what a projection's adapter adds in forward."""
        if name not in self.names:
            return None
        return Adapted(self.get_slice(self.low_rank, name), self.b[name])

    @property
    def draws(self) -> tuple[Dropout, ...]:
        """What each adapter drops, in the order of names; none where nothing is dropped."""
        return tuple(self.dropouts[name] for name in self.names if name in self.dropouts)

    def reduce(self, x: Tensor) -> None:
        """Compute the first products from what the projections take, [rows, in]."""
        if not self.names:
            return
        if self.dropouts:
            self.low_rank = launch.reduce_dropped(x, self.stacked_a, self.draws)
        else:
            self.low_rank = x @ self.stacked_a.T
        if self.scaling != 1.0:
            self.low_rank *= self.scaling

    def reduce_gradients(self, upstream: dict[str, Tensor], gradients: dict[str, list[Tensor]]) -> Tensor | None:
        """Return the gradient of the first products, [rows, n * rank]; note the gradient of every B."""
        if not self.names:
            return None
        parts = []
        for name in self.names:
            gradients[name][1] = multiply_in_float32(upstream[name].T, self.get_slice(self.low_rank, name))
            parts.append(upstream[name] @ self.b[name])
        low_rank = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return low_rank if self.scaling == 1.0 else low_rank.mul_(self.scaling)

    def finish_gradients(
        self,
        low_rank: Tensor | None,
        gradients: dict[str, list[Tensor]],
        x: Tensor,
        *,
        rstd: Tensor | None = None,
        weight: Tensor | None = None,
        is_dropped: bool = False,
    ) -> None:
        """Note the gradient of every A, from that of the first products and what the projections take.

        Args:
            x: [rows, in]; with rstd and weight they take its norm
            is_dropped: what the only adapter drops of x is zero in it
        """
        if not self.names:
            return
        if self.dropouts and not is_dropped:
            whole = launch.compute_dropped_gradient(low_rank, x, self.draws, rstd=rstd, weight=weight)
        else:
            taken = x if rstd is None else launch.apply_norm(x, rstd, weight)
            whole = multiply_in_float32(low_rank.T, taken)
        for number, name in enumerate(self.names):
            gradients[name][0] = whole[number * self.rank : (number + 1) * self.rank]


def multiply_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32: sums over all tokens, which are not to be rounded to bf16."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


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
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    from torchtune.modules.attention_utils import flex_attention_compiled

    return flex_attention_compiled(q, k, v, block_mask=mask, enable_gqa=True)


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

    def go_back(self, x: Tensor, upstream: Tensor, *, needs_input: bool) -> tuple[Tensor | None, dict]:
        """Return the gradient of the layer's input and those of every [A, B], float32, by the projection's name."""
        gradients = {name: [None, None] for group in self.groups.values() for name in group.names}
        middle_gradient = self._go_back_through_mlp(upstream, gradients)
        heads = self._go_back_through_attention(middle_gradient, gradients)
        qkv, norm = self.groups[QKV], self.layer.sa_norm
        low_rank = qkv.reduce_gradients(heads, gradients)
        qkv.finish_gradients(low_rank, gradients, x, rstd=self.first_rstd, weight=norm.scale)
        if not needs_input:
            return None, gradients
        normed_gradient = None
        for name in QKV:
            normed_gradient = multiply_back(heads[name], self.linears[name], add_to=normed_gradient)
        out = self._go_back_through_norm(qkv, low_rank, normed_gradient, x, self.first_rstd, norm, middle_gradient)
        return out, gradients

    def _go_back_through_mlp(self, upstream: Tensor, gradients: dict) -> Tensor:
        gate_up, linears, norm = self.groups[GATE_UP], self.linears, self.layer.mlp_norm
        self._go_back_through_down(upstream, gradients)
        low_rank = gate_up.reduce_gradients({"w1": self.gate, "w3": self.up}, gradients)
        gate_up.finish_gradients(low_rank, gradients, self.middle, rstd=self.second_rstd, weight=norm.scale)
        normed_gradient = multiply_back(self.gate, linears["w1"])
        self.gate = None
        normed_gradient = multiply_back(self.up, linears["w3"], add_to=normed_gradient)
        self.up = None
        return self._go_back_through_norm(
            gate_up, low_rank, normed_gradient, self.middle, self.second_rstd, norm, upstream
        )

    def _go_back_through_down(self, upstream: Tensor, gradients: dict) -> None:
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

    def _go_back_through_attention(self, middle_gradient: Tensor, gradients: dict) -> dict[str, Tensor]:
        output = self.groups[OUTPUT]
        flat = self.join_heads(self.attended.detach())
        low_rank = output.reduce_gradients({"output_proj": middle_gradient}, gradients)
        output.finish_gradients(low_rank, gradients, flat)
        gradient = multiply_back(middle_gradient, self.linears["output_proj"])
        if output.names:
            adapted = Adapted(low_rank, output.stacked_a, output.dropouts.get("output_proj"))
            gradient = launch.add(gradient, adapted, factor_is_a=True)
        heads = torch.autograd.grad(self.attended, self.heads, self.split_heads(gradient))
        self.heads, self.attended = [], None
        q, k, v = (self.join_heads(head) for head in heads)
        rope = self.layer.attn.pos_embeddings.cache
        launch.rotate(q, k, v, rope, self.positions, seq=self.seq, head_dim=self.head_dim, inverse=True)
        return {"q_proj": q, "k_proj": k, "v_proj": v}

    @staticmethod
    def _go_back_through_norm(
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


def collect_groups(
    linears: dict[str, nn.Module], adapters: dict[str, tuple[Tensor, Tensor]], *, dtype: torch.dtype, drops: bool
) -> dict[tuple[str, ...], Group]:
    """Return a layer's adapters by group, cast to dtype in one kernel, with fresh seeds where inputs are dropped."""
    order = [adapters[name][0] for name in adapters] + [adapters[name][1] for name in adapters]
    sizes = [weight.numel() for weight in order]
    flat = torch.empty(sum(sizes), dtype=dtype, device=order[0].device)
    views = [part.view(weight.shape) for part, weight in zip(flat.split(sizes), order, strict=True)]
    torch._foreach_copy_(views, [weight.detach() for weight in order])
    num, names, groups, start = len(adapters), list(adapters), {}, 0
    seeds = torch.randint(2**31 - 1, (num,)).tolist() if drops else []
    for members in GROUPS:
        own = [name for name in members if name in adapters]
        rank = linears[own[0]].rank if own else 0
        numel = sum(adapters[name][0].numel() for name in own)
        groups[members] = Group(
            names=own,
            stacked_a=flat[start : start + numel].view(len(own) * rank, -1) if own else None,
            b={name: views[num + names.index(name)] for name in own},
            dropouts={name: Dropout(seeds[names.index(name)], linears[name].dropout) for name in own} if drops else {},
            scaling=linears[own[0]].scaling if own else 1.0,
            rank=rank,
        )
        start += numel
    return groups


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
        out, gradients = run.go_back(x, upstream, needs_input=ctx.needs_input_grad[0])
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
