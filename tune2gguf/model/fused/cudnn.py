"""cuDNN attention over concatenated long rows.

On Hopper GPUs its deterministic kernels are twice as fast on long rows as torch's FlashAttention 2. torch does not
expose the deterministic ones; NVIDIA's package `nvidia-cudnn-frontend` does. Tensors have its ragged layout,
[rows, heads, longest, head_dim] with an offset per row
(https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MIN_ROW = 1024  # tokens of a pass's longest row: for shorter rows, building a plan costs more than it saves
# The deterministic backward writes the gradient of every score, bf16 [rows, longest, heads, longest]. Heads are
# computed in groups that stay below this.
BACKWARD_BYTES = 512 << 20
MISSING = f"rows of {MIN_ROW} tokens or more are faster with cuDNN: pip install 'tune2gguf[cudnn]'"


@cache
def is_available() -> bool:
    """Return whether the package is installed, with cuDNN 9.6 or later, and the GPU is Hopper or later."""
    if not pays() or find_spec("cudnn") is None:
        return False
    import cudnn

    return cudnn.backend_version() >= 90600


def pays() -> bool:
    """Return whether cuDNN is faster on this GPU: Hopper or later."""
    return torch.cuda.get_device_capability()[0] >= 9


@dataclass(frozen=True)
class Shape:
    """The shape that a plan is built for; lengths that vary per pass are rounded up to powers of two."""

    rows: int
    longest: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    groups: int  # groups of heads, computed one at a time

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *, num_rows: int, longest: int, is_backward: bool) -> Shape:
        longest, tokens = (1 << (number - 1).bit_length() for number in (longest, len(q)))
        heads, kv_heads = q.shape[1], k.shape[1]
        shape = cls(num_rows, longest, heads, kv_heads, q.shape[2], tokens, groups=1)
        while is_backward and shape.backward_bytes > BACKWARD_BYTES and kv_heads % (2 * shape.groups) == 0:
            shape = replace(shape, groups=2 * shape.groups)
        return shape

    @property
    def backward_bytes(self) -> int:
        """Bytes of the gradients of one group's scores."""
        return 2 * self.rows * self.longest**2 * self.heads // self.groups

    def get_dim(self, heads: int) -> list[int]:
        return [self.rows, heads // self.groups, self.longest, self.head_dim]

    def get_stride(self, heads: int) -> list[int]:
        return [self.longest * heads * self.head_dim, self.head_dim, heads * self.head_dim, 1]

    @property
    def stats_dim(self) -> list[int]:
        return [self.rows, self.heads // self.groups, self.longest, 1]

    @property
    def stats_stride(self) -> list[int]:
        return [self.longest * self.heads, 1, self.heads, 1]


class Plan:
    """cuDNN's forward and backward graphs for one shape, built on first use."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @cached_property
    def forward(self) -> tuple[Any, dict[str, Any]]:
        graph, tensors = self._begin()
        out, stats = graph.sdpa(
            q=tensors["q"],
            k=tensors["k"],
            v=tensors["v"],
            generate_stats=True,
            name="attention",
            **self._choose(tensors),
        )
        self._put_out(out, self.shape.heads, tensors["q_offsets"])
        stats.set_output(True).set_data_type(torch.float32)
        stats.set_dim(self.shape.stats_dim).set_stride(self.shape.stats_stride).set_ragged_offset(
            tensors["stats_offsets"]
        )
        return self._build(graph), tensors | {"out": out, "stats": stats}

    @cached_property
    def backward(self) -> tuple[Any, dict[str, Any]]:
        shape = self.shape
        graph, tensors = self._begin()
        for name in ("out", "gradient"):
            tensors[name] = self._tensor(graph, shape.heads, tensors["q_offsets"])
        tensors["stats"] = graph.tensor(
            dim=shape.stats_dim,
            stride=shape.stats_stride,
            data_type=torch.float32,
            ragged_offset=tensors["stats_offsets"],
        )
        found = graph.sdpa_backward(
            q=tensors["q"],
            k=tensors["k"],
            v=tensors["v"],
            o=tensors["out"],
            dO=tensors["gradient"],
            stats=tensors["stats"],
            max_total_seq_len_q=shape.tokens,
            max_total_seq_len_kv=shape.tokens,
            use_deterministic_algorithm=True,
            name="backward",
            **self._choose(tensors),
        )
        for name, one in zip(("dq", "dk", "dv"), found, strict=True):
            heads, offsets = (shape.heads, "q_offsets") if name == "dq" else (shape.kv_heads, "kv_offsets")
            self._put_out(one, heads, tensors[offsets])
            tensors[name] = one
        return self._build(graph), tensors

    def _begin(self) -> tuple[Any, dict[str, Any]]:
        import cudnn

        shape = self.shape
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_get_handle(),
        )
        tensors = {"lengths": graph.tensor(dim=[shape.rows, 1, 1, 1], stride=[1, 1, 1, 1], data_type=torch.int32)}
        for name in ("q_offsets", "kv_offsets", "stats_offsets"):
            tensors[name] = graph.tensor(dim=[shape.rows + 1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=torch.int32)
        tensors["q"] = self._tensor(graph, shape.heads, tensors["q_offsets"])
        tensors["k"], tensors["v"] = (self._tensor(graph, shape.kv_heads, tensors["kv_offsets"]) for _ in range(2))
        return graph, tensors

    def _tensor(self, graph, heads: int, offsets):
        dim, stride = self.shape.get_dim(heads), self.shape.get_stride(heads)
        return graph.tensor(dim=dim, stride=stride, data_type=torch.bfloat16, ragged_offset=offsets)

    def _put_out(self, tensor, heads: int, offsets) -> None:
        tensor.set_output(True).set_dim(self.shape.get_dim(heads))
        tensor.set_stride(self.shape.get_stride(heads)).set_ragged_offset(offsets)

    def _choose(self, tensors: dict[str, Any]) -> dict[str, Any]:
        import cudnn

        return {
            "attn_scale": self.shape.head_dim**-0.5,
            "use_padding_mask": True,
            "seq_len_q": tensors["lengths"],
            "seq_len_kv": tensors["lengths"],
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

    @staticmethod
    def _build(graph):
        import cudnn

        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph


@dataclass(frozen=True)
class RaggedRows:
    """The rows of a pass in cuDNN's ragged layout; all int32 on the GPU."""

    lengths: Tensor  # [rows]
    q_offsets: Tensor  # [rows + 1] in elements, like the next two
    kv_offsets: Tensor
    stats_offsets: Tensor

    @classmethod
    def of(cls, starts: Tensor, q: Tensor, k: Tensor) -> RaggedRows:
        heads, dim = q.shape[1:]
        return cls(starts.diff(), starts * (heads * dim), starts * (k.shape[1] * dim), starts * heads)


def fits(q: Tensor, k: Tensor, *, num_rows: int, longest: int) -> bool:
    """Return whether backward fits BACKWARD_BYTES; it does not for very long rows, or a long row among many."""
    return Shape.of(q, k, num_rows=num_rows, longest=longest, is_backward=True).backward_bytes <= BACKWARD_BYTES


def attend(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, longest: int) -> tuple[Tensor, Tensor]:
    """Return causal attention within each row, [tokens, heads, head_dim], and log-sum-exps, float32 [tokens, heads]."""
    plan = _get_plan(Shape.of(q, k, num_rows=len(rows.lengths), longest=longest, is_backward=False))
    out = torch.empty_like(q)
    stats = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _execute(plan.forward, {"q": q, "k": k, "v": v, "out": out, "stats": stats, **vars(rows)})
    return out, stats


def attend_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, rows: RaggedRows, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; deterministic."""
    plan = _get_plan(Shape.of(q, k, num_rows=len(rows.lengths), longest=longest, is_backward=True))
    found = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    given = {"q": q, "k": k, "v": v, "out": out, "gradient": gradient, "stats": stats, **found}
    groups = {name: part.chunk(plan.shape.groups, dim=1) for name, part in given.items()}
    for number in range(plan.shape.groups):
        _execute(plan.backward, {name: parts[number] for name, parts in groups.items()} | vars(rows))
    return found["dq"], found["dk"], found["dv"]


@cache
def _get_plan(shape: Shape) -> Plan:
    return Plan(shape)


@cache
def _get_handle() -> int:
    import cudnn

    return cudnn.create_handle()


def _execute(built: tuple[Any, dict[str, Any]], given: dict[str, Tensor]) -> None:
    import cudnn

    graph, tensors = built
    handle = _get_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=given["q"].device)
    graph.execute({tensors[name]: tensor for name, tensor in given.items()}, workspace, handle=handle)
