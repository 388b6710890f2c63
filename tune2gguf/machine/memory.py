"""The memory estimate of a run, part by part, from its RunSpec alone.

The parts count the tensors that lora.py, loss.py and torchtune's layers keep: d = embed_dim, i = intermediate_dim,
q = num_heads * head_dim, T = tokens of a pass, c = bytes of dtype. Tests compare the counts with autograd's saved
tensors, and the sum with the peak of real runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tune2gguf.base.gguf_rounding import get_gguf_type
from tune2gguf.base.layout import TensorSpec, list_tensors
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.fused import MAX_GRAPHED_TOKENS, NO_TRITON, pad_length, why_not_fused
from tune2gguf.model.lengths import LONGEST_FLOAT32_ROW
from tune2gguf.model.lengths import pad_length as pad_length_on_cpu

BYTES = {"bf16": 2, "fp32": 4}
# An Nf4Tensor: half a byte of code per weight, a byte of scale per 64 weights, a float32 factor per 256 scales.
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Measured: Python with torch and torchtune, and a tokenizer's bytes per token of its vocabulary.
PROGRAM_BYTES = 310_000_000
PROGRAM_BYTES_PER_TOKEN = 1300
# Assumed: the CUDA context and the workspaces of CUDA's libraries.
CUDA_BYTES = 600_000_000
# Measured: the bytes that oneDNN never frees for a bf16 product compiled for one number of tokens, without AMX. With
# AMX it is a quarter less. A weight has two products, its adapter five.
COMPILED_BYTES = 650_000
PRODUCTS_OF_A_WEIGHT, PRODUCTS_OF_AN_ADAPTER = 2, 5
# glibc returns blocks of 32 MiB or more at once. Smaller ones leave gaps, measured as this many layers' activations:
# fewest where a layer frees nothing before backward, more with dropout, most where a layer is computed again.
RETURNED_BYTES = 32 * 2**20
LAYERS_IN_GAPS, LAYERS_IN_GAPS_OF_DROPOUT, LAYERS_IN_GAPS_OF_CHECKPOINTING = 1.5, 3.0, 4.0
# Layer inputs that torchtune's offloading holds on the GPU while it copies them.
OFFLOADING_INPUTS = 5


@dataclass(frozen=True)
class RunSpec:
    """The settings that a run's memory depends on. `parallel` is replicate or shard."""

    architecture: Architecture
    base_weights: str  # bf16 | fp32 | fp8 | nf4 | gguf:TYPE
    dtype: str  # bf16 | fp32
    lora_rank: int
    lora_dropout: float
    lora_attn_modules: tuple[str, ...]
    apply_lora_to_mlp: bool
    longest_row: int  # tokens
    tokens_per_pass: int  # a longer row is a pass by itself
    enable_activation_checkpointing: bool
    enable_activation_offloading: bool = False
    device_type: str = "cpu"
    num_devices: int = 1
    parallel: str = "replicate"
    compile: bool = False
    multiplies_fp8: bool = False  # the device has fp8 products
    num_lengths: int = 1  # different padded lengths of passes, on a CPU

    @property
    def obstacle_to_fusing(self) -> str | None:
        """The reason why the layers are not those of tune2gguf.model.fused, None if they are."""
        return why_not_fused(
            self.device_type,
            architecture=self.architecture,
            dtype=self.dtype,
            compile=self.compile,
            lora_rank=self.lora_rank,
        )

    @property
    def keeps_8_bits(self) -> bool:
        """Whether the fused layers keep gate and up in 8 bits."""
        return self.is_fused and self.base_weights == "fp8" and self.multiplies_fp8

    @property
    def is_fused(self) -> bool:
        """Whether the run has fused layers. Its machine has Triton if it has a GPU; this one may not."""
        return self.obstacle_to_fusing in (None, NO_TRITON)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process on its device. `work`: temporaries besides the kept activations, and gaps of the heap."""

    program: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    checkpoint: int  # copies that a checkpoint is written from during the next steps
    activations: int
    work: int
    loading: int  # peak while the base is loaded, all included

    @property
    def training(self) -> int:
        """Peak of an optimizer step, all included."""
        trained = self.adapter + self.gradients + self.optimizer + self.checkpoint
        return self.program + self.weights + trained + self.activations + self.work

    @property
    def peak(self) -> int:
        """Peak of the whole run."""
        return max(self.training, self.loading)


def estimate_memory(spec: RunSpec) -> Estimate:
    """Return the estimated bytes of one process of a run."""
    tensors = list_tensors(spec.architecture)
    weights = {tensor.tune_name: _count_weight_bytes(tensor, spec.base_weights) for tensor in tensors}
    is_whole_on_gpu = spec.device_type == "cuda" and spec.parallel != "shard"
    if spec.base_weights == "nf4" and is_whole_on_gpu and not spec.architecture.tied:
        weights["tok_embeddings.weight"] = 0  # stays in the host's memory
    dense = {tensor.tune_name: math.prod(tensor.shape) * BYTES[spec.dtype] for tensor in tensors}
    adapter = 4 * count_adapter_weights(spec)
    parts = spec.num_devices if spec.parallel == "shard" else 1
    # CUDA graphs have buffers for gradients, which are copied to the parameters, and for input and output of a pass.
    is_graphed = spec.is_fused and not spec.enable_activation_offloading
    num_passed = 2 * min(_count_tokens(spec), MAX_GRAPHED_TOKENS) if is_graphed else 0
    passed = num_passed * spec.architecture.embed_dim * BYTES[spec.dtype]
    split = {tensor.tune_name: weights[tensor.tune_name] for tensor in tensors if len(tensor.shape) > 1}
    # With sharding, the current layer, the next one, and the embedding or the head are gathered.
    layer = sum(size for name, size in split.items() if name.startswith("layers.0."))
    edge = max(size for name, size in split.items() if not name.startswith("layers."))
    gathered = 0 if parts == 1 else 2 * layer + edge
    program = CUDA_BYTES
    if spec.device_type == "cpu":
        program = PROGRAM_BYTES + PROGRAM_BYTES_PER_TOKEN * spec.architecture.vocab_size + _count_compiled(spec)
    resident = sum(weights.values()) - sum(split.values()) * (parts - 1) // parts
    on_host = 2 * max(size for name, size in dense.items() if name.startswith("layers."))
    return Estimate(
        program=program,
        weights=resident,
        adapter=adapter,
        gradients=(1 + is_graphed) * adapter,
        optimizer=2 * adapter,
        # Copies of adapter and optimizer, and the adapter's file. On a GPU they are in host memory.
        checkpoint=4 * adapter if spec.device_type == "cpu" else 0,
        activations=count_kept_activations(spec),
        work=_count_work(spec) + passed + gathered,
        # With sharding, a layer or the embedding is whole on the device until it is split.
        loading=program + resident + (on_host if spec.device_type == "cpu" else 0) + gathered + min(gathered, edge),
    )


def count_adapter_weights(spec: RunSpec) -> int:
    """Return the trainable weights: rank * (in + out) for each linear layer with an adapter."""
    return sum(spec.lora_rank * sum(tensor.shape) for tensor in _list_adapted(spec))


def list_layer_activations(spec: RunSpec) -> list[int]:
    """Return the bytes of each tensor that one layer keeps until backward, without the adapter's casts."""
    a, c = spec.architecture, BYTES[spec.dtype]
    d, i, q = a.embed_dim, a.intermediate_dim, a.num_heads * a.head_dim
    if spec.is_fused:
        # Both norms' inputs, q and the attention's output, k and v, gate and up; norms' factors and log-sum-exp.
        kept = [q * c, *2 * [i * c]]
        if spec.keeps_8_bits:  # with a float32 scale per token, or per 128 values
            kept = [q + 4, *2 * [i + i // 32]]
        per_token = 2 * [d * c] + [q * c] + 2 * [a.num_kv_heads * a.head_dim * c] + kept + [8, 4 * a.num_heads]
        return [size * _count_tokens(spec) for size in [*per_token, _count_low_rank(spec)]]
    adapted = _map_adapted(spec)
    # q, k, v and output; torchtune expands k and v to all heads, and torch's kernel keeps the log-sum-exp.
    if spec.device_type == "cpu":
        per_token = 2 * [q * c] + 2 * [a.num_kv_heads * a.head_dim * c]
        per_token += [4 * a.num_heads] if spec.dtype == "bf16" and spec.longest_row > LONGEST_FLOAT32_ROW else []
    else:
        per_token = 4 * [q * c] + [4 * a.num_heads]
    # Both norms' inputs and factors; on a GPU torchtune's own norm computes in float32.
    per_token += 2 * [c * d if spec.device_type == "cpu" else 4 * d, 4]
    per_token += 2 * [i * c] if spec.device_type == "cpu" else 3 * [i * c]  # gate, up; torchtune: silu of gate, too
    per_token += [i * c] if "w2" in adapted else []
    per_token += [d * c] if adapted.keys() & {"q_proj", "k_proj", "v_proj"} else []
    per_token += [d * c] if adapted.keys() & {"w1", "w3"} else []
    per_token += len(adapted) * [spec.lora_rank * c]
    if spec.lora_dropout > 0:  # a mask of one byte per element
        shared = [group[0] for group in _group_by_input(spec)]
        per_token += shared if spec.device_type == "cpu" else list(adapted.values())
    return [size * _count_tokens(spec) for size in per_token]


def _map_adapted(spec: RunSpec) -> dict[str, int]:
    """Return the input width of each projection with an adapter."""
    return {tensor.tune_name.split(".")[-2]: tensor.shape[1] for tensor in _list_adapted(spec)}


def _group_by_input(spec: RunSpec) -> list[list[int]]:
    """Return these widths by input: projections of one input share a dropout mask, and a product with their A's."""
    adapted = _map_adapted(spec)
    inputs = (("q_proj", "k_proj", "v_proj"), ("output_proj",), ("w1", "w3"), ("w2",))
    groups = [[adapted[name] for name in names if name in adapted] for names in inputs]
    return [group for group in groups if group]


def count_kept_activations(spec: RunSpec) -> int:
    """Return the bytes kept until backward: of all layers, or with checkpointing of one layer and all layers' inputs.

    With offloading, the GPU holds only a few of these inputs at a time.
    """
    a, c, tokens = spec.architecture, BYTES[spec.dtype], _count_tokens(spec)
    layer = sum(list_layer_activations(spec))
    if spec.enable_activation_checkpointing:
        is_offloaded = spec.enable_activation_offloading and spec.device_type == "cuda"
        num_inputs = min(OFFLOADING_INPUTS, a.num_layers) if is_offloaded else a.num_layers
        layers = num_inputs * tokens * a.embed_dim * c + layer
        layers += a.num_layers * tokens * _count_low_rank(spec) if spec.is_fused else 0
    else:
        layers = a.num_layers * layer
    # The adapter in dtype is kept from forward to backward. On a CPU, the A's of one input are stacked.
    casts = 0 if spec.dtype == "fp32" else count_adapter_weights(spec) * c
    if spec.dtype == "fp32" and spec.device_type == "cpu":
        stacked = [group for group in _group_by_input(spec) if len(group) > 1]
        casts = c * spec.lora_rank * a.num_layers * sum(map(sum, stacked))
    return layers + casts + tokens * a.embed_dim * c


def _count_compiled(spec: RunSpec) -> int:
    """Return the bytes that oneDNN keeps of compiled products; float32 products use another library."""
    if spec.dtype == "fp32":
        return 0
    frozen = {tensor.shape for tensor in list_tensors(spec.architecture) if len(tensor.shape) == 2}  # and the head
    adapted = {tensor.shape for tensor in _list_adapted(spec)}
    products = PRODUCTS_OF_A_WEIGHT * len(frozen) + PRODUCTS_OF_AN_ADAPTER * len(adapted)
    return COMPILED_BYTES * products * spec.num_lengths


def _count_work(spec: RunSpec) -> int:
    """Return the bytes of temporaries of the loss or of an MLP's backward, whichever is more, and the heap's gaps."""
    from tune2gguf.model.loss import POSITIONS_PER_CHUNK

    a, c, tokens = spec.architecture, BYTES[spec.dtype], _count_tokens(spec)
    loss = c * min(POSITIONS_PER_CHUNK[spec.device_type], tokens) * a.vocab_size  # overwritten by their gradient
    loss += 2 * tokens * a.embed_dim * c  # the hidden states and their gradient
    # torchtune's norm has input and output in float32.
    loss += 2 * tokens * a.embed_dim * 4 if spec.device_type == "cuda" else 0
    largest = max(math.prod(tensor.shape) for tensor in list_tensors(a) if tensor.is_linear)
    dense = largest * c if spec.base_weights == "nf4" else 0
    if spec.base_weights == "fp8":
        dense = _count_fp8_work(spec, largest)
    upstream = 2 * tokens * a.embed_dim * c
    if spec.is_fused:
        # silu(gate) * up, besides gate and up, which their gradients overwrite.
        mlp = 2 * upstream + tokens * a.intermediate_dim * c + dense
        return max(loss, mlp, _count_attention_work(spec))
    mlp = upstream + max(3 * tokens * a.intermediate_dim * c, tokens * a.intermediate_dim * c + dense)
    return max(loss, mlp) + (_count_gaps(spec) if spec.device_type == "cpu" else 0)


def _count_gaps(spec: RunSpec) -> int:
    """Return the bytes of the heap's gaps on a CPU."""
    num_layers = LAYERS_IN_GAPS_OF_DROPOUT if spec.lora_dropout > 0 else LAYERS_IN_GAPS
    if spec.enable_activation_checkpointing:
        num_layers = LAYERS_IN_GAPS_OF_CHECKPOINTING
    return round(num_layers * sum(size for size in list_layer_activations(spec) if size < RETURNED_BYTES))


def _count_attention_work(spec: RunSpec) -> int:
    """Return the temporaries of attention's backward for long rows, less what the layer's MLP has freed by then."""
    from tune2gguf.model.fused import cudnn

    if spec.longest_row < cudnn.MIN_ROW:
        return 0
    a, c, tokens = spec.architecture, BYTES[spec.dtype], _count_tokens(spec)
    gradients = tokens * (2 * a.embed_dim + (a.num_heads + 2 * a.num_kv_heads) * a.head_dim) * c
    gate_and_up = (a.intermediate_dim + a.intermediate_dim // 32) if spec.keeps_8_bits else a.intermediate_dim * c
    return cudnn.BACKWARD_BYTES + gradients - 2 * tokens * gate_and_up


def _count_fp8_work(spec: RunSpec, largest: int) -> int:
    """Return the temporaries of fp8 products in an MLP; `largest` counts the largest matrix's weights."""
    a, c, tokens = spec.architecture, BYTES[spec.dtype], _count_tokens(spec)
    values = tokens * a.intermediate_dim
    if spec.keeps_8_bits:
        # Gate and up in dtype, and the codes of their product, or of a gradient and a transposed weight.
        return 2 * values * c + max(values, tokens * a.embed_dim + largest)
    # Codes, and both operands in dtype.
    return values + (values + largest) * c


def _count_low_rank(spec: RunSpec) -> int:
    """Return the bytes of all x @ A, per token and layer."""
    return len(_list_adapted(spec)) // spec.architecture.num_layers * spec.lora_rank * BYTES[spec.dtype]


def _count_tokens(spec: RunSpec) -> int:
    tokens = max(spec.tokens_per_pass, spec.longest_row)
    if spec.is_fused:
        return pad_length(tokens)
    return pad_length_on_cpu(tokens) if spec.device_type == "cpu" else tokens


def _count_weight_bytes(tensor: TensorSpec, base_weights: str) -> int:
    size = math.prod(tensor.shape)
    if len(tensor.shape) == 1:
        return 4 * size  # norms stay in float32
    if base_weights == "nf4":
        return round(size * (NF4_BYTES_PER_WEIGHT if tensor.is_linear else BYTES["bf16"]))
    if base_weights == "fp8":
        return size + 4 * tensor.shape[0] if tensor.is_linear else BYTES["bf16"] * size  # a byte each, a scale per row
    return size * BYTES["bf16" if get_gguf_type(base_weights) else base_weights]


def _list_adapted(spec: RunSpec) -> list[TensorSpec]:
    mlp = ("w1", "w2", "w3") if spec.apply_lora_to_mlp else ()
    names = {*spec.lora_attn_modules, *mlp}
    return [tensor for tensor in list_tensors(spec.architecture) if tensor.tune_name.split(".")[-2] in names]
