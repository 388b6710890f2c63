"""Seconds of a generated token, as a run's samples and forgetting generate: with and without CUDA graphs on a GPU.

    python benchmarks/generation.py BASE_DIR --speed 13032          # of the base in bf16, and a speed from gpu_user.py
    torchrun --standalone --nproc-per-node 2 benchmarks/generation.py BASE_DIR --speed 13032    # the base is sharded

Every row of the batch gets one token. The cost is that of GENERATION_COSTS: trained tokens in the time of one such
token of all rows, at the given speed of training in tokens/s.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import median

import gpu
import torch

from tune2gguf.base.load import load_base
from tune2gguf.distributed.parallel import shard
from tune2gguf.distributed.world import World, start_world, stop_world, wait_for_all
from tune2gguf.model.caches import KVCaches
from tune2gguf.model.llama import LORA_ATTN_MODULES, CausalLM, lora_llama

NUM_PROMPT, NUM_NEW = 50, 32
BATCHES = (1, 3, 8, 24)


def load_model(base_dir: Path, world: World, base_weights: str) -> CausalLM:
    model = lora_llama(
        str(base_dir),
        architecture=None,
        lora_rank=gpu.RANK,
        lora_alpha=gpu.ALPHA,
        lora_dropout=0.0,
        lora_attn_modules=[*LORA_ATTN_MODULES],
        apply_lora_to_mlp=True,
        max_seq_len=2048,
    )
    if world.size > 1:
        shard(model, world)
    load_base(model, str(base_dir), device=world.device, base_weights=base_weights, show=False)
    return model.eval()


@torch.no_grad()
def time_tokens(model: CausalLM, device: torch.device, *, batch: int, graphed: bool) -> tuple[float, list[float]]:
    """Return the seconds of a prompt, and of each token after it."""
    num_places = NUM_PROMPT + NUM_NEW
    caches = KVCaches(model, batch_size=batch, num_places=num_places, device=device)
    mask = torch.ones(batch, num_places, num_places, dtype=torch.bool, device=device).tril()
    places = torch.arange(num_places, device=device).expand(batch, -1)
    new, begin, seconds = torch.randint(5, 1000, (batch, NUM_PROMPT), device=device), 0, []
    while begin < num_places:
        started, now = time.perf_counter(), slice(begin, begin + new.shape[1])
        rest = {"mask": mask[:, now], "input_pos": places[:, now]}
        if graphed:
            logits = caches.predict_next(new, **rest)
        else:
            caches.num_filled, caches.places = now.stop, places[0, now]
            logits = model.predict_next(model.append(model.embed(new), **rest))
        chosen = logits.argmax(-1).tolist()
        new, begin = torch.tensor(chosen, device=device)[:, None], now.stop
        seconds.append(time.perf_counter() - started)
    caches.detach()
    return seconds[0], seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--base-weights", default="bf16")
    parser.add_argument("--speed", type=float, required=True, help="tokens/s of training this base")
    arguments = parser.parse_args()
    world = start_world("cuda" if torch.cuda.is_available() else "cpu")
    device, model = world.device, load_model(arguments.base, world, arguments.base_weights)
    say = partial(print, flush=True) if world.is_main else lambda _: None
    kind = "" if world.size == 1 else f", sharded over {world.size}"
    say(f"{gpu.describe_machine()}\n{arguments.base.name}, {arguments.base_weights}, {device.type}{kind}; ms")
    say(f"{'rows':>4}{'graphs':>8}{'prompt':>8}{'token 1':>9}{'token 2':>9}{'others':>8}{'cost':>6}")
    for batch in BATCHES:
        for graphed in (False, True) if device.type == "cuda" else (False,):
            time_tokens(model, device, batch=batch, graphed=graphed)  # compiles and loads kernels
            prompt, tokens = time_tokens(model, device, batch=batch, graphed=graphed)
            others = median(tokens[2:])
            line = f"{batch:>4}{'yes' if graphed else 'no':>8}{1000 * prompt:>8.1f}{1000 * tokens[0]:>9.1f}"
            say(f"{line}{1000 * tokens[1]:>9.1f}{1000 * others:>8.1f}{others * arguments.speed:>6.0f}")
    wait_for_all()
    stop_world()


if __name__ == "__main__":
    main()
