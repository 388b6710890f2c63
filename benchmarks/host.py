"""Host and GPU time of one pass (forward and backward) of Llama-3.1-8B, with and without CUDA graphs.

    python benchmarks/host.py [--model 8b] [--kind lora] [--tokens 256 1024 8192]

Random weights; rank 16, dropout 0.05, no checkpointing; rows of 128 tokens. Host time: from an idle GPU until all
kernels of a pass are launched, without reading the loss. GPU time: between events, for passes launched one after the
other, so it is never less than the host's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gpu

ROW = 128


def make_pass(model, num_tokens: int):
    """Return a function that runs a pass of `num_tokens` tokens."""
    import torch

    device, generator = model.head_weight.device, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.head_weight.shape[0], (1, num_tokens), generator=generator).to(device)
    rows = {
        "row_starts": torch.arange(0, num_tokens + 1, ROW, dtype=torch.int32, device=device),
        "longest_row": ROW,
        "input_pos": torch.arange(num_tokens, device=device)[None] % ROW,
    }
    supervised = torch.arange(num_tokens - 1, device=device)

    def run() -> None:
        model(tokens, tokens, supervised, **rows).mean().backward()

    return run


def measure(run, count: int = 7) -> tuple[float, float]:
    """Return the median host ms of a pass, and the ms per pass of several in a row."""
    import torch

    for _ in range(3):  # compiled, captured, replayed
        run()
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(seconds), start.elapsed_time(end) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b", choices=gpu.MODELS)
    parser.add_argument("--kind", default="lora", choices=["lora", "qlora"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 8192])
    arguments = parser.parse_args()
    case = argparse.Namespace(
        model=arguments.model, kind=arguments.kind, seq=1024, batch=1, dropout=0.05, compile=False, checkpointing=False
    )
    model, _, _ = gpu.make_ours(case, "cuda")
    model.train()
    graphs = model.stack.graphs
    print(gpu.describe_machine())
    print(f"{'tokens':>8} {'without graphs: host':>22} {'pass':>8} {'with: host':>12} {'pass':>8}   ms")
    for num_tokens in arguments.tokens:
        run, times = make_pass(model, num_tokens), []
        for chosen in (None, graphs):
            model.stack.graphs = chosen
            times += measure(run)
            model.zero_grad(set_to_none=True)
        print(f"{num_tokens:8} {times[0]:22.1f} {times[1]:8.1f} {times[2]:12.1f} {times[3]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
