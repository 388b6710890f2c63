"""The RunSpec of a config, from which its memory is estimated."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from tune2gguf.machine.memory import RunSpec
from tune2gguf.machine.passes import AUTO
from tune2gguf.model.architectures import ARCHITECTURES, read_architecture
from tune2gguf.model.fp8 import multiplies_fp8


def get_run_spec(config: DictConfig, *, longest_row: int, num_devices: int, parallel: str) -> RunSpec:
    """Return the RunSpec of a config; the base folder is read only if the config names no architecture.

    `auto` becomes the value that needs least memory: one row per pass, with activation checkpointing.

    Raises:
        ValueError: if the base folder's config.json cannot be read
    """
    name = config.model.architecture
    return RunSpec(
        architecture=read_architecture(config.base_dir) if name is None else ARCHITECTURES[name],
        base_weights=config.base_weights,
        dtype=config.dtype,
        lora_rank=config.lora_rank,
        lora_dropout=config.lora_dropout,
        lora_attn_modules=tuple(config.model.lora_attn_modules),
        apply_lora_to_mlp=config.model.apply_lora_to_mlp,
        longest_row=longest_row,
        tokens_per_pass=longest_row if config.tokens_per_pass == AUTO else config.tokens_per_pass,
        enable_activation_checkpointing=config.enable_activation_checkpointing in (AUTO, True),
        enable_activation_offloading=config.enable_activation_offloading,
        device_type=config.device.partition(":")[0],
        num_devices=num_devices,
        parallel=parallel,
        compile=config.compile,
        multiplies_fp8=torch.cuda.is_available() and multiplies_fp8(torch.device(config.device)),
    )
