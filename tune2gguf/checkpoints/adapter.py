"""The adapter out and in, in the layout that Hugging Face's `peft` loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tune2gguf.architectures import Architecture
    from tune2gguf.models import CausalLM

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def collect_adapter(model: CausalLM) -> dict[str, Tensor]:
    """Return the adapter by torchtune's names (`layers.0.attn.q_proj.lora_a.weight` …), on the CPU."""
    # state_dict names parameters as in the model without activation checkpointing, which wraps the layers.
    weights = model.decoder.state_dict()
    return {name: weight.detach().cpu() for name, weight in weights.items() if ".lora_" in name}


def to_peft_layout(adapter: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Rename to PEFT's names and bring the rows of the query's and key's lora_b into Hugging Face's order."""
    from torchtune.models.convert_weights import tune_to_peft_adapter_weights

    weights = tune_to_peft_adapter_weights(
        adapter,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        dim=architecture.embed_dim,
        head_dim=architecture.head_dim,
    )
    return {name: weight.contiguous() for name, weight in weights.items()}


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


def save_adapter(folder: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Write an adapter folder in one move: a killed process leaves the old folder or the new one, never half of one."""
    from safetensors.torch import save_file

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(weights, unfinished / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (unfinished / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(unfinished, folder)
    shutil.rmtree(replaced, ignore_errors=True)
