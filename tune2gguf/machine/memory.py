"""What a run will need in memory, part by part, from its shape alone; and what to change where that is too much.

The parts are counted from what lora.py, loss.py and torchtune's layers keep: d = embed_dim, i = intermediate_dim,
q = num_heads * head_dim, T = batch_size * longest row, c = bytes of dtype. Tests hold the counts to autograd's saved
tensors, and the sum to the peak of real runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune2gguf.base.layout import TensorSpec, list_tensors
from tune2gguf.model.fused import MAX_GRAPHED_TOKENS, NO_TRITON, pad_length, why_not_fused

if TYPE_CHECKING:
    from tune2gguf.model.architectures import Architecture

BYTES = {"bf16": 2, "fp32": 4}
# Of torchao's tensor: half a byte of code, a byte of scale for 64 weights, a float32 factor for 256 scales.
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Measured: Python with torch, torchtune and datasets; and what a tokenizer takes for each token of its vocabulary.
PROGRAM_BYTES = 480_000_000
PROGRAM_BYTES_PER_TOKEN = 1300
# Assumed: the context of CUDA and its libraries' workspaces.
CUDA_BYTES = 600_000_000
# glibc gives blocks from 32 MiB on back at once; smaller ones leave gaps, measured as this many layers' activations.
RETURNED_BYTES = 32 * 2**20
LAYERS_IN_GAPS = 3.0
# Layer inputs on their way to the CPU or back that torchtune's offloading holds on the GPU.
OFFLOADING_INPUTS = 5


@dataclass(frozen=True)
class RunSpec:
    """What the memory of a run depends on. `longest_row` in tokens; `parallel` is replicate or shard."""

    architecture: Architecture
    base_weights: str  # bf16 | fp32 | nf4
    dtype: str  # bf16 | fp32
    lora_rank: int
    lora_dropout: float
    lora_attn_modules: tuple[str, ...]
    apply_lora_to_mlp: bool
    batch_size: int
    gradient_accumulation_steps: int
    longest_row: int
    enable_activation_checkpointing: bool
    enable_activation_offloading: bool = False
    device_type: str = "cpu"
    num_devices: int = 1
    parallel: str = "replicate"
    compile: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether the layers are those of tune2gguf.model.fused; a machine with a GPU has Triton, this one need not."""
        obstacle = why_not_fused(self.device_type, dtype=self.dtype, compile=self.compile, lora_rank=self.lora_rank)
        return obstacle in (None, NO_TRITON)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process on its device. `work`: temporaries beside the kept activations, and gaps of the heap."""

    program: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    loading: int  # peak while the base is read, all included

    @property
    def training(self) -> int:
        """Peak of an optimizer step, all included."""
        return (
            self.program + self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.work
        )

    @property
    def peak(self) -> int:
        """The most that the run needs at any time."""
        return max(self.training, self.loading)


def estimate_memory(shape: RunSpec) -> Estimate:
    """Count the bytes that one process of a run needs."""
    specs = list_tensors(shape.architecture)
    weights = {spec.tune_name: _count_weight_bytes(spec, shape.base_weights) for spec in specs}
    is_whole_on_gpu = shape.device_type == "cuda" and shape.parallel != "shard"
    if shape.base_weights == "nf4" and is_whole_on_gpu and not shape.architecture.tied:
        weights["tok_embeddings.weight"] = 0  # stays in the host's memory
    dense = {spec.tune_name: math.prod(spec.shape) * BYTES[shape.dtype] for spec in specs}
    adapter = 4 * count_adapter_weights(shape)
    parts = shape.num_devices if shape.parallel == "shard" else 1
    # Graphs write gradients to a place of their own, from which the parameters get a copy.
    is_graphed = shape.is_fused and parts == 1 and not shape.enable_activation_offloading
    num_gradients = 2 if is_graphed and _count_tokens(shape) <= MAX_GRAPHED_TOKENS else 1
    # Sharded, the layer at work and the next one are gathered whole, and so is the head.
    gathered = 0 if parts == 1 else 2 * _count_layer(weights) + max(weights.values())
    program = CUDA_BYTES
    if shape.device_type == "cpu":
        program = PROGRAM_BYTES + PROGRAM_BYTES_PER_TOKEN * shape.architecture.vocab_size
    resident = sum(weights.values()) // parts
    on_host = 2 * max(size for name, size in dense.items() if name.startswith("layers."))
    return Estimate(
        program=program,
        weights=resident,
        adapter=adapter // parts,
        gradients=num_gradients * adapter // parts,
        optimizer=2 * adapter // parts,
        activations=count_kept_activations(shape),
        work=_count_work(shape) + gathered,
        loading=program + resident + (on_host if shape.device_type == "cpu" else 0),
    )


def count_adapter_weights(shape: RunSpec) -> int:
    """Return the trainable weights: rank * (in + out) for each linear layer with an adapter."""
    return sum(shape.lora_rank * sum(spec.shape) for spec in _list_adapted(shape))


def list_layer_activations(shape: RunSpec) -> list[int]:
    """Return the bytes of each tensor that is kept of one layer until backward, without the adapter's casts."""
    a, c = shape.architecture, BYTES[shape.dtype]
    d, i, q = a.embed_dim, a.intermediate_dim, a.num_heads * a.head_dim
    if shape.is_fused:
        # Input and middle, q and the attention's result, k and v, gate and up; norms' factors and log of normalizers.
        per_token = (
            2 * [d * c] + 2 * [q * c] + 2 * [a.num_kv_heads * a.head_dim * c] + 2 * [i * c] + [8, 4 * a.num_heads]
        )
        return [size * _count_tokens(shape) for size in [*per_token, _count_low_rank(shape)]]
    adapted = {spec.tune_name.split(".")[-2]: spec.shape[1] for spec in _list_adapted(shape)}
    # q, k, v and output; torchtune expands k and v to all heads, and its kernel keeps the log of the normalizers.
    if shape.device_type == "cpu":
        per_token = 2 * [q * c] + 2 * [a.num_kv_heads * a.head_dim * c]
    else:
        per_token = 4 * [q * c] + [4 * a.num_heads]
    # Both norms' inputs and factors; on a GPU torchtune's own norm computes in float32.
    per_token += 2 * [c * d if shape.device_type == "cpu" else 4 * d, 4]
    per_token += 2 * [i * c] if shape.device_type == "cpu" else 3 * [i * c]  # gate, up; torchtune: silu of gate, too
    per_token += [i * c] if "w2" in adapted else []
    per_token += [d * c] if adapted.keys() & {"q_proj", "k_proj", "v_proj"} else []
    per_token += [d * c] if adapted.keys() & {"w1", "w3"} else []
    per_token += len(adapted) * [shape.lora_rank * c]
    per_token += list(adapted.values()) if shape.lora_dropout > 0 else []  # a byte an element: what is dropped
    return [size * _count_tokens(shape) for size in per_token]


def count_kept_activations(shape: RunSpec) -> int:
    """Return the bytes kept until backward: of all layers, or with checkpointing of one layer and all inputs.

    With offloading on a GPU only a few of these inputs are there at a time.
    """
    a, c, tokens = shape.architecture, BYTES[shape.dtype], _count_tokens(shape)
    layer = sum(list_layer_activations(shape))
    if shape.enable_activation_checkpointing:
        is_offloaded = shape.enable_activation_offloading and shape.device_type == "cuda"
        num_inputs = min(OFFLOADING_INPUTS, a.num_layers) if is_offloaded else a.num_layers
        layers = num_inputs * tokens * a.embed_dim * c + layer
        layers += a.num_layers * tokens * _count_low_rank(shape) if shape.is_fused else 0
    else:
        layers = a.num_layers * layer
    # The adapter in dtype is kept from forward to backward.
    casts = 0 if shape.dtype == "fp32" else count_adapter_weights(shape) * c
    return layers + casts + tokens * a.embed_dim * c


def _count_work(shape: RunSpec) -> int:
    """Return the temporaries of a chunk of logits or an MLP's backward, whichever is more, and the heap's gaps."""
    from tune2gguf.model.loss import POSITIONS_PER_CHUNK

    a, c, tokens = shape.architecture, BYTES[shape.dtype], _count_tokens(shape)
    loss = c * min(POSITIONS_PER_CHUNK[shape.device_type], tokens) * a.vocab_size  # the gradient is written over them
    loss += 2 * tokens * a.embed_dim * c  # the hidden states that go in, and their gradient
    # torchtune's norm has its input and its result in float32.
    loss += 2 * tokens * a.embed_dim * 4 if shape.device_type == "cuda" else 0
    largest = max(math.prod(spec.shape) for spec in list_tensors(a) if spec.is_linear)
    dense = largest * c if shape.base_weights == "nf4" else 0
    upstream = 2 * tokens * a.embed_dim * c
    if shape.is_fused:
        # The activation's product beside gate and up, which their gradients overwrite.
        return max(loss, 2 * upstream + tokens * a.intermediate_dim * c + dense)
    mlp = upstream + max(3 * tokens * a.intermediate_dim * c, tokens * a.intermediate_dim * c + dense)
    gaps = 0
    if shape.device_type == "cpu":
        gaps = LAYERS_IN_GAPS * sum(size for size in list_layer_activations(shape) if size < RETURNED_BYTES)
    return max(loss, mlp) + round(gaps)


def _count_low_rank(shape: RunSpec) -> int:
    """Return the bytes of the adapters' first products, a token and layer."""
    return len(_list_adapted(shape)) // shape.architecture.num_layers * shape.lora_rank * BYTES[shape.dtype]


def _count_tokens(shape: RunSpec) -> int:
    tokens = shape.batch_size * shape.longest_row
    return pad_length(tokens) if shape.is_fused else tokens


def _count_weight_bytes(spec: TensorSpec, base_weights: str) -> int:
    size = math.prod(spec.shape)
    if len(spec.shape) == 1:
        return 4 * size  # norms stay in float32
    if base_weights == "nf4":
        return round(size * (NF4_BYTES_PER_WEIGHT if spec.is_linear else BYTES["bf16"]))
    return size * BYTES[base_weights]


def _count_layer(weights: dict[str, int]) -> int:
    return sum(size for name, size in weights.items() if name.startswith("layers.0."))


def _list_adapted(shape: RunSpec) -> list[TensorSpec]:
    mlp = ("w1", "w2", "w3") if shape.apply_lora_to_mlp else ()
    names = {*shape.lora_attn_modules, *mlp}
    return [spec for spec in list_tensors(shape.architecture) if spec.tune_name.split(".")[-2] in names]
