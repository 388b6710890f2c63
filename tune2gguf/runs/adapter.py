"""Adapters on disk, in the layout of Hugging Face's `peft`."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tune2gguf.base.layout import list_tensors, to_tune_rows
from tune2gguf.files.atomic import write_file, write_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from tune2gguf.model.architectures import Architecture
    from tune2gguf.model.llama import CausalLM

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def collect_adapter(model: CausalLM) -> dict[str, Tensor]:
    """Return CPU copies of the trainable parameters by torchtune's names (`layers.0.attn.q_proj.lora_a.weight` …)."""
    from tune2gguf.model.sharding import copy_to_cpu

    return {name: copy_to_cpu(parameter) for name, parameter in _list_adapter_parameters(model)}


def restore_adapter(model: CausalLM, adapter: dict[str, Tensor]) -> None:
    """Set the trainable parameters from the result of collect_adapter."""
    import torch

    with torch.no_grad():
        for name, parameter in _list_adapter_parameters(model):
            parameter.copy_(adapter[name])


def switch_adapter_off(model: CausalLM) -> None:
    """Set every B to zero: the model then computes its base."""
    import torch

    with torch.no_grad():
        for name, parameter in _list_adapter_parameters(model):
            if ".lora_b." in name:
                parameter.zero_()


def _list_adapter_parameters(model: CausalLM) -> list[tuple[str, Tensor]]:
    # Activation checkpointing adds a wrapper to the names.
    return [
        (name.replace("_checkpoint_wrapped_module.", ""), parameter)
        for name, parameter in model.decoder.named_parameters()
        if parameter.requires_grad
    ]


def to_peft_layout(adapter: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Convert to PEFT's names, and query's and key's lora_b to Hugging Face's row order."""
    from torchtune.models.convert_weights import tune_to_peft_adapter_weights

    weights = tune_to_peft_adapter_weights(
        adapter,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        dim=architecture.embed_dim,
        head_dim=architecture.head_dim,
    )
    return {name: weight.contiguous() for name, weight in weights.items()}


def from_peft_layout(weights: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Undo to_peft_layout, bit for bit."""
    adapter = {}
    for spec in list_tensors(architecture):
        hf_module, module = spec.hf_name.removesuffix(".weight"), spec.tune_name.removesuffix(".weight")
        lora_a = weights.get(f"base_model.model.{hf_module}.lora_A.weight")
        if lora_a is not None:
            lora_b = weights[f"base_model.model.{hf_module}.lora_B.weight"]
            adapter[f"{module}.lora_a.weight"] = lora_a
            adapter[f"{module}.lora_b.weight"] = (
                lora_b if spec.num_heads is None else to_tune_rows(lora_b, spec.num_heads)
            )
    return adapter


def read_adapter_weights(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Read an adapter folder's weights, in the layout of collect_adapter."""
    from safetensors.torch import load_file

    return from_peft_layout(load_file(folder / ADAPTER_WEIGHTS), architecture)


def make_peft_config(
    weights: dict[str, Tensor], *, rank: int, alpha: float, dropout: float, base_model_name: str
) -> dict:
    """Return the content of adapter_config.json for weights in the PEFT layout."""
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[1] for name in weights})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": modules,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def collect_peft_adapter(
    model: CausalLM, architecture: Architecture, *, rank: int, alpha: float, dropout: float, base_model_name: str
) -> tuple[dict[str, Tensor], dict]:
    """Return the adapter's weights in PEFT's layout and the content of adapter_config.json."""
    weights = to_peft_layout(collect_adapter(model), architecture)
    config = make_peft_config(weights, rank=rank, alpha=alpha, dropout=dropout, base_model_name=base_model_name)
    return weights, config


def save_adapter(folder: Path, weights: dict[str, Tensor], config: dict) -> str:
    """Write an adapter folder and return the sha256 of its weights.

    A killed process leaves either the old adapter or the new one, complete.
    """
    from safetensors.torch import save

    content = save(weights, metadata={"format": "pt"})
    # A rename can replace a file, not a folder with files. The config never changes during a run.
    with nullcontext(folder) if folder.exists() else write_folder(folder) as target:
        write_json(target / ADAPTER_CONFIG, config)
        with write_file(target / ADAPTER_WEIGHTS) as file:
            file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
