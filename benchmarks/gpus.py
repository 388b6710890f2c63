"""Training speed and memory on several GPUs of one machine: this package and stock torchtune 0.6.1's sharded recipe.

    python benchmarks/gpus.py --num-gpus 2 --out benchmarks/results/gpus.txt

Per GPU a case is one of benchmarks/gpu.py: the same shapes, packs and optimizer, of which each process has its own. On
one GPU first, then on all: replicated (the base on each, the adapters' gradients travel) and sharded (FSDP2). Scaling
efficiency is tokens/s on N over N times tokens/s on one, both measured in this run. Stock shards as its
lora_finetune_distributed does: every layer, gathered in forward and backward, compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import gpu


def make_stock_sharded(arguments, device: str):
    """Stock torchtune, sharded as its distributed recipe does it, with random weights."""
    import torch
    from torchtune import training
    from torchtune.models import llama3_1, llama3_2
    from torchtune.modules.attention_utils import packed_block_causal_mask
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    builders = {"1b": llama3_2.lora_llama3_2_1b, "3b": llama3_2.lora_llama3_2_3b, "8b": llama3_1.lora_llama3_1_8b}
    with training.set_default_dtype(torch.bfloat16), torch.device("meta"):
        model = builders[arguments.model](
            lora_attn_modules=gpu.ATTENTION,
            apply_lora_to_mlp=True,
            lora_rank=gpu.RANK,
            lora_alpha=gpu.ALPHA,
            lora_dropout=arguments.dropout,
        )
    set_trainable_params(model, get_adapter_params(model))
    loss_module = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_module.num_output_chunks)
    training.compile_model(model, verbose=False)
    loss_module = training.compile_loss(loss_module, verbose=False)
    conditions = [partial(training.get_shard_conditions, names_to_match=None)]
    training.shard_model(model, conditions, cpu_offload=False, reshard_after_forward=True)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local()
            local.fill_(1.0) if "scale" in name else local.normal_(std=0.02)
    with training.set_default_dtype(torch.bfloat16), torch.device(device):
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    tokens, labels, input_pos, row_lengths = gpu.make_pack(
        model.tok_embeddings.num_embeddings, arguments.batch, arguments.seq, device
    )
    mask = packed_block_causal_mask(row_lengths)
    ignored = torch.full((arguments.batch, 1), loss_module.ignore_index, device=device)
    shifted = torch.hstack((labels[:, 1:], ignored))
    return model, lambda: loss_module(model(tokens, mask=mask, input_pos=input_pos), shifted), None


def run_case(arguments) -> None:
    """Train a few steps as one of several processes; the first prints the result of all."""
    from tune2gguf.distributed.world import start_world, stop_world, wait_for_all

    world = start_world("cuda")
    make = partial(gpu.make_ours, world=world) if arguments.side == "ours" else make_stock_sharded
    result = gpu.measure(arguments, make, str(world.device))
    result["tokens_per_second"] *= world.size
    if world.is_main:
        print("RESULT " + json.dumps(result), flush=True)
    wait_for_all()
    stop_world()


def list_cases(num_gpus: int) -> list[dict]:
    shape = {"model": "8b", "kind": "lora", "batch": 2, "seq": 4096, "checkpointing": False}
    ours, stock = shape | {"side": "ours", "compile": False}, shape | {"side": "stock", "compile": True}
    cases = [ours | {"num_gpus": 1, "parallel": "alone"}]
    cases += [ours | {"num_gpus": num_gpus, "parallel": parallel} for parallel in ("replicate", "shard")]
    cases.insert(2, stock | {"num_gpus": num_gpus, "parallel": "shard"})
    qlora = ours | {"kind": "qlora", "checkpointing": True, "seq": 2048}
    cases += [qlora | {"num_gpus": 1, "parallel": "alone"}]
    return cases + [qlora | {"num_gpus": num_gpus, "parallel": parallel} for parallel in ("replicate", "shard")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--timeout", type=int, default=150, help="seconds a case may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help="run one case, given as JSON (used by the script itself, in each process)")
    arguments = parser.parse_args()
    if arguments.case:
        run_case(argparse.Namespace(**json.loads(arguments.case)))
        return
    lines = [gpu.describe_machine(), "command: python benchmarks/gpus.py " + " ".join(sys.argv[1:]), ""]
    print("\n".join(lines), flush=True)
    alone = {}
    for case in list_cases(arguments.num_gpus):
        shared = {"steps": arguments.steps, "dropout": arguments.dropout, "device": "cuda"}
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(case["num_gpus"]),
        ]
        found = gpu.run_in_process([*launch, __file__, "--case", json.dumps(case | shared)], arguments.timeout)
        if isinstance(found, dict):
            key = (case["model"], case["kind"], case["seq"])
            if case["num_gpus"] == 1:
                alone[key] = found["tokens_per_second"]
            elif key in alone and case["side"] == "ours":
                found["efficiency"] = round(found["tokens_per_second"] / (case["num_gpus"] * alone[key]), 3)
        label = f"{case['model']} {case['kind']} {case['batch']}x{case['seq']} {case['side']} {case['parallel']}"
        lines.append(f"{label:40} on {case['num_gpus']} {json.dumps(found)}")
        print(lines[-1], flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
