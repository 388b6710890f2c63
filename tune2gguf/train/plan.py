"""The plan of a run, as the lines that it prints before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from omegaconf import DictConfig

from tune2gguf.base.gguf_rounding import get_gguf_type
from tune2gguf.data import PreparedData
from tune2gguf.distributed.parallel import describe_parallel
from tune2gguf.machine.cpu import describe_cpu
from tune2gguf.machine.memory import RunSpec
from tune2gguf.model.fp8 import describe_products
from tune2gguf.model.fused import describe_layers
from tune2gguf.train.forgetting import ForgettingPlan
from tune2gguf.train.samples import Prompt, describe_prompts
from tune2gguf.train.validation_plan import ValidationPlan


def describe_plan(
    cfg: DictConfig,
    data: PreparedData,
    *,
    world_size: int,
    device: str,
    parallel: str,
    num_trainable: int,
    validation: ValidationPlan,
    prompts: Sequence[Prompt],
    forgetting: ForgettingPlan,
    num_steps: int,
    spec: RunSpec,
) -> list[str]:
    """Return the lines that describe a run: base and adapter, processes, rows, and the parts of a step."""
    lines = [f"base: {cfg.base_dir} in {cfg.base_weights}, adapter: {num_trainable:,} float32 weights, on {device}"]
    if device == "cpu":
        lines.append(describe_cpu())
    else:
        lines.append(describe_layers(spec.obstacle_to_fusing, longest_row=spec.longest_row))
    if cfg.base_weights == "fp8":
        lines.append(describe_products(torch.device(device)))
    gguf_type = get_gguf_type(cfg.base_weights)
    if gguf_type is not None:
        lines.append(f"served: the base in {gguf_type} and the adapter beside it, as trained; nothing is merged")
    if world_size > 1:
        lines.append(f"processes: {world_size}, {describe_parallel(cfg.parallel, parallel, device=device)}")
    formats = ", ".join(dict.fromkeys(file["format"] for file in data.ledger["files"] if file["format"]))
    lines.append(f"rows: {len(data.train)} to train on, {len(data.validation)} for validation; read as {formats}")
    lines.append(validation.describe())
    samples = describe_prompts(
        prompts,
        num_samples=cfg.num_samples,
        num_validation_rows=len(data.validation),
        max_tokens=validation.max_reply_tokens,
    )
    lines += [*([] if samples is None else [samples]), forgetting.describe()]
    if data.unit == "packs":
        lines.append(f"packs: {len(data.sequences)} of {cfg.max_seq_len} tokens, {data.sequences.fill:.1%} full")
    batch, accumulation = cfg.batch_size, cfg.gradient_accumulation_steps
    lines.append(
        f"{data.unit} per step: {batch} x {accumulation} x {world_size} = {batch * accumulation * world_size}"
        " (batch x accumulation x processes)"
    )
    kept = "recomputed in backward" if spec.enable_activation_checkpointing else "kept"
    lines.append(f"passes: rows without padding, up to {spec.tokens_per_pass} tokens at a time; activations are {kept}")
    return [*lines, f"{num_steps} steps in {cfg.epochs} epochs"]
