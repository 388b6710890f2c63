"""Cost of a checkpoint: the time that training stops, and the time until the checkpoint is on the disk.

python benchmarks/checkpoint.py --architecture llama3_2_1b --lora-rank 16 [--folder /a/disk]

Adapter and optimizer state have their true shapes and random values. There is no base: a checkpoint holds none.
Compare the first figure with the seconds of one step.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from tune2gguf.model.architectures import ARCHITECTURES
from tune2gguf.model.llama import LORA_ATTN_MODULES, CausalLM, build_lora_llama
from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.sharding import copy_to_cpu
from tune2gguf.runs.adapter import collect_adapter, make_peft_config, to_peft_layout
from tune2gguf.runs.checkpoints import Checkpoint, CheckpointWriter
from tune2gguf.train.seeds import capture_random_state


def build_adapter(architecture: str, *, rank: int, device: torch.device) -> tuple[CausalLM, torch.optim.Optimizer]:
    """Return a model with memory for the adapter only, and its optimizer after one step."""
    with torch.device("meta"):
        model = build_lora_llama(
            ARCHITECTURES[architecture],
            lora_rank=rank,
            lora_alpha=rank,
            lora_dropout=0.1,
            lora_attn_modules=list(LORA_ATTN_MODULES),
            apply_lora_to_mlp=True,
            max_seq_len=2048,
        )
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_a.to_empty(device=device)
            module.lora_b.to_empty(device=device)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapter:
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(adapter)
    optimizer.step()
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llama3_2_1b", choices=sorted(ARCHITECTURES))
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder to write to; default: the system's temporary folder")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model, optimizer = build_adapter(arguments.architecture, rank=arguments.lora_rank, device=device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        writer = CheckpointWriter(Path(folder), keep_last=2)
        stalled, written = [], []
        for step in range(arguments.repeats):
            started = time.perf_counter()
            weights = to_peft_layout(collect_adapter(model), ARCHITECTURES[arguments.architecture])
            config = make_peft_config(weights, rank=arguments.lora_rank, alpha=1.0, dropout=0.1, base_model_name="base")
            state = {
                "optimizer": copy_to_cpu(optimizer.state_dict()["state"]),
                "random": [capture_random_state(device)],
            }
            writer.start(step, Checkpoint(weights, config, state, {"step": step}))
            stalled.append(time.perf_counter() - started)
            writer.wait()
            written.append(time.perf_counter() - started)
        writer.close()
        num_bytes = sum(path.stat().st_size for path in writer.newest.iterdir())
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}")
    print(f"{arguments.architecture}, rank {arguments.lora_rank}, {device}")
    print(f"checkpoint: {num_bytes / 1e6:.0f} MB")
    print(f"training stands still: {statistics.median(stalled):.3f} s (median of {arguments.repeats})")
    print(f"on the disk after:     {statistics.median(written):.3f} s")


if __name__ == "__main__":
    main()
