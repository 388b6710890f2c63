"""Time of a training step on a GPU by kernel, for a case of benchmarks/gpu.py.

    python benchmarks/profile_gpu.py '{"side": "ours", "model": "8b", "kind": "lora", "batch": 2, "seq": 4096}'

Three steps to warm up, the median of five, then one under torch's profiler. The floor is the time of the large products
alone: 4 N FLOPs per token at this GPU's rate for the product of two large bf16 matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter

import gpu

DEFAULTS = {"dropout": 0.0, "compile": False, "checkpointing": False, "steps": 5}


def classify(kernel: str) -> str:
    name = kernel.lower()
    if any(word in name for word in ("gemm", "nvjet", "xmma", "cutlass", "splitk")):
        return "matrix products"
    if any(word in name for word in ("flash", "flex_attention", "triton_tem", "fmha", "cudnn")):
        return "attention"
    if name.startswith("triton"):
        return "compiled kernels"
    if name.startswith("_") and name.endswith("_kernel"):
        return "fused kernels"
    return "copies" if "memcpy" in name or "memset" in name else "other kernels"


def measure_rate() -> float:
    """Return FLOP/s of a product of two 8192 x 8192 bf16 matrices, the median of 20."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(25):
        torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * 8192**3 / statistics.median(seconds[5:])


def profile_step(take_step) -> tuple[Counter, Counter]:
    """Return microseconds and launches of each kernel of one step."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        take_step()
        torch.cuda.synchronize()
    spent, launches = Counter(), Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.device_time_total
            launches[event.name] += 1
    return spent, launches


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=json.loads, help="JSON of a case of benchmarks/gpu.py")
    parser.add_argument("--num-kernels", type=int, default=28, help="kernels listed")
    arguments = parser.parse_args()
    case = argparse.Namespace(**DEFAULTS | arguments.case)
    make = {"ours": gpu.make_ours, "stock": gpu.make_stock, "peft": gpu.make_peft}[case.side]
    torch.manual_seed(0)
    model, compute_loss, _ = make(case, "cuda")
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def take_step() -> None:
        compute_loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = []
    for _ in range(3 + case.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        take_step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[3:])
    tokens, flops = case.batch * case.seq, 4 * gpu.count_weights(case.model)
    spent, launches = profile_step(take_step)
    kinds = Counter()
    for name, microseconds in spent.items():
        kinds[classify(name)] += microseconds
    rate = measure_rate()
    floor = flops * tokens / rate
    print(gpu.describe_machine())
    print(f"{json.dumps(arguments.case)}: step {1e3 * step:.1f} ms, {tokens / step:.0f} tokens/s")
    print(
        f"the large products alone: {1e3 * floor:.1f} ms at {rate / 1e12:.0f} TFLOP/s; step / that {step / floor:.2f}"
    )
    listed = {kind: round(microseconds / 1e3, 1) for kind, microseconds in kinds.most_common()}
    print(f"kernels {sum(spent.values()) / 1e3:.1f} ms:", listed)
    for name, microseconds in spent.most_common(arguments.num_kernels):
        print(f"{microseconds / 1e3:9.2f} ms {launches[name]:5d}  {name[:100]}")


if __name__ == "__main__":
    main()
