"""A small Llama that a CPU and a GPU's kernels can run, and the losses and gradients of its passes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_TIED
from tune2gguf.base.load import load_base
from tune2gguf.data import Batch
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.llama import CausalLM, lora_llama, prepare_training
from tune2gguf.model.loss import IGNORED_LABEL, find_supervised

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# The kernels need a power of two as head_dim; NF4 needs rows of whole blocks.
SMALL = Architecture(
    **{
        **vars(TINY_TIED),
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 128,
        "intermediate_dim": 256,
        "head_dim": 32,
    }
)
STD = 128**-0.5  # keeps the size of activations: rounding is not amplified


def make_model(
    base_dir: Path,
    device: torch.device,
    *,
    base_weights: str,
    dropout: float = 0.0,
    shard: Callable[[CausalLM], None] | None = None,
) -> CausalLM:
    """Load a base with a random adapter, equal on every device; without zeros, no gradient is zero.

    Args:
        shard: shards the base before it is loaded
    """
    model = lora_llama(
        str(base_dir),
        architecture=None,
        lora_rank=4,
        lora_alpha=4.0,
        lora_dropout=dropout,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=2048,
    )
    if shard is not None:
        shard(model)
    load_base(model, str(base_dir), device=device, base_weights=base_weights, show=False)
    generator = torch.Generator().manual_seed(0)
    for _, weight in list_adapter(model):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model.train()


def make_exact_model(base_dir: Path, *, base_weights: str) -> CausalLM:
    """Make the reference model: the same weights, 4-bit ones included, in float32 on the CPU."""
    model = make_model(base_dir, CPU, base_weights=base_weights)
    for module in (model.decoder.tok_embeddings, *model.decoder.layers):
        for parameter in module.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
    return model


def list_adapter(model: CausalLM) -> list[tuple[str, torch.nn.Parameter]]:
    # Activation checkpointing adds a wrapper to the names; the order stays.
    named = [(name.replace("_checkpoint_wrapped_module.", ""), weight) for name, weight in model.named_parameters()]
    return [(name, weight) for name, weight in named if weight.requires_grad]


def make_rows(lengths: list[int]) -> list[torch.Tensor]:
    """Return rows of random tokens, [length] each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SMALL.vocab_size, (length,), generator=generator) for length in lengths]


def supervise_second_half(row: torch.Tensor) -> torch.Tensor:
    labels = row.clone()
    labels[: len(row) // 2] = IGNORED_LABEL
    return labels


def make_batch(rows: list[torch.Tensor]) -> Batch:
    """Return rows of equal length as a batch."""
    labels = torch.stack([supervise_second_half(row) for row in rows])
    return Batch(torch.stack(rows), labels, find_supervised(labels))


def pack(rows: list[torch.Tensor]) -> Batch:
    """Concatenate rows into a batch of one pack."""
    lengths = [len(row) for row in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.cat([supervise_second_half(row) for row in rows])[None]
    return Batch(torch.cat(rows)[None], labels, find_supervised(labels), starts, max(lengths), positions)


@dataclass(frozen=True)
class Outcome:
    """The losses [supervised] and adapter gradients of one forward and backward pass, on the CPU."""

    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


def compute(model: CausalLM, *batches: Batch) -> Outcome:
    model.zero_grad(set_to_none=True)
    device = model.decoder.norm.scale.device
    losses = []
    for batch in batches:
        losses.append(model(**vars(batch.to(device))))
        losses[-1].sum().backward()
    gradients = {name: weight.grad.cpu() for name, weight in list_adapter(model)}
    return Outcome(torch.cat([loss.detach() for loss in losses]).cpu(), gradients)


def measure_errors(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """Return the relative root mean square error of the losses, and the worst one of the gradients."""
    assert found.gradients.keys() == expected.gradients.keys()
    return (
        _measure_error(found.losses, expected.losses),
        max(_measure_error(found.gradients[name], gradient) for name, gradient in expected.gradients.items()),
    )


def _measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def prepare(
    model: CausalLM,
    *,
    compile: bool = False,
    checkpointing: bool = False,
    offloading: bool = False,
    fuse: bool = False,
) -> CausalLM:
    prepare_training(
        model,
        compile=compile,
        enable_activation_checkpointing=checkpointing,
        enable_activation_offloading=offloading,
        fuse=fuse,
    )
    return model
