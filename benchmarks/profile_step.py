"""Time of a training step on this CPU by operator, and relative to its matrix products alone.

    python benchmarks/profile_step.py --out benchmarks/results/profile_cpu.txt
    python benchmarks/profile_step.py --layers 4 --dtype fp32 --supervised 1.0

One step is forward, loss, backward, clipping and AdamW of the 1B model with random weights and adapters of rank 16 on
all linear layers. Floor: the step's floating point operations in matrix products and attention, as counted by torch,
over oneDNN's highest rate for a product with one of the model's frozen weights here. The time is the median of steps
without the profiler; the table is from one step with it, by torch's operators.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tune2gguf.base.layout import list_tensors
from tune2gguf.base.load import fill_model
from tune2gguf.machine.cpu import prepare_cpu
from tune2gguf.machine.devices import measure_peak
from tune2gguf.model.architectures import ARCHITECTURES, Architecture
from tune2gguf.model.lengths import pad_length
from tune2gguf.model.llama import CausalLM, build_lora_llama, prepare_training
from tune2gguf.model.lora import initialize_adapters
from tune2gguf.model.loss import IGNORED_LABEL
from tune2gguf.train.steps import compute_grad_norm

CPU_INFO = Path("/proc/cpuinfo")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mkldnn_linear", "aten::_mkldnn_linear")
OPERATORS = {
    "attention": ("scaled_dot_product", "BlockwiseAttention", "bmm"),  # nothing else multiplies in batches
    "copies and casts": ("copy_", "_to_copy", "clone", "contiguous", "cat", "stack", "index"),
    "loss": ("log_softmax", "scatter", "gather", "exp"),
    "RMSNorm": ("rms_norm", "native_layer_norm", "rsqrt", "mean", "pow"),
    "SwiGLU": ("silu",),
    "optimizer and clipping": ("_foreach", "_fused", "linalg_vector_norm", "adamw", "lerp", "addcdiv", "sqrt"),
    "dropout mask": ("random_", "aten::ge"),
    "elementwise": ("aten::mul", "aten::add", "aten::sub", "aten::neg", "aten::sum", "addcmul"),
}


@dataclass(frozen=True)
class Case:
    """A step to time: one pass over rows of these lengths, and the supervised share of each."""

    architecture: Architecture
    lengths: tuple[int, ...] = (256, 256)
    rank: int = 16
    dropout: float = 0.0
    dtype: str = "bf16"
    supervised: float = 0.5
    checkpointing: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def make_model(case: Case) -> CausalLM:
    """Return the model with random weights. The adapter's are random, too: no gradient is zero."""
    prepare_cpu(1)
    with torch.device("meta"):
        model = build_lora_llama(
            case.architecture,
            lora_rank=case.rank,
            lora_alpha=case.rank,
            lora_dropout=case.dropout,
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            max_seq_len=max(*case.lengths, 256),
        )

    def draw(shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[case.dtype]
        return torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.empty(shape, dtype=dtype).normal_(std=0.02)

    weights = ((spec.tune_name, draw(spec.shape)) for spec in list_tensors(case.architecture))
    fill_model(model, weights, device=torch.device("cpu"), base_weights=case.dtype)
    initialize_adapters(model, 0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            parameter.data.normal_(std=0.01)
    prepare_training(model, compile=False, enable_activation_checkpointing=case.checkpointing)
    return model.train()


def make_step(case: Case, model: CausalLM):
    """Return the function that takes one optimizer step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens = torch.randint(0, case.architecture.vocab_size, (1, case.num_tokens))
    labels = tokens.clone()
    for length, row in zip(case.lengths, labels.split(case.lengths, dim=1), strict=True):
        row[:, : max(1, round(length * (1 - case.supervised)))] = IGNORED_LABEL
    row_starts = torch.tensor([0, *case.lengths]).cumsum(0).int()

    def step() -> None:
        model(tokens, labels, row_starts=row_starts, longest_row=max(case.lengths)).mean().backward()
        compute_grad_norm(parameters, clip_to=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(step, num_steps: int) -> float:
    """Return the median seconds of steps after one to warm up."""
    seconds = []
    for _ in range(num_steps + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure_rates(case: Case) -> dict[str, float]:
    """Return FLOP/s of each product with a frozen weight, forward and backward."""
    dtype, rows = DTYPES[case.dtype], pad_length(case.num_tokens)
    shapes = sorted({spec.shape for spec in list_tensors(case.architecture) if len(spec.shape) == 2})
    rates = {}
    for out_dim, in_dim in shapes:
        weight = torch.empty(out_dim, in_dim, dtype=dtype).normal_()
        x, upstream = (torch.empty(rows, dim, dtype=dtype).normal_() for dim in (in_dim, out_dim))
        for name, product in (("x W^T", partial(torch.mm, x, weight.T)), ("dy W", partial(torch.mm, upstream, weight))):
            seconds = time_steps(product, 5)
            rates[f"{name} {out_dim} x {in_dim}"] = 2 * rows * out_dim * in_dim / seconds
    return rates


def count_flops(step) -> dict[str, int]:
    """Return the FLOPs of a step by operator. Attention counts as its matrix products."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def count_addmm(added, a, b, *args, out_shape=None, **kwargs) -> int:
        return 2 * a[0] * a[1] * b[1]

    def count_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value) // 2  # causal

    def count_attention_backward(upstream, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(upstream, query, key, value) // 2

    custom = {
        aten.addmm_: count_addmm,
        aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: count_attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        step()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def classify(name: str, shapes: list, case: Case) -> str:
    """Return an operator's group, by its name and the shapes of its inputs."""
    if name in PRODUCTS:
        dims = {dim for shape in shapes for dim in shape if isinstance(shape, (list, tuple))}
        if case.architecture.vocab_size in dims:
            return "products: head"
        return "products: adapters" if case.rank in dims else "products: frozen layers"
    for group, parts in OPERATORS.items():
        if any(part in name for part in parts):
            return group
    return "other"


def profile(case: Case, step) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Return the seconds of one step by group, and its operators (name with shapes, seconds, calls), longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    groups: dict[str, float] = defaultdict(float)
    operators = []
    for event in profiler.key_averages(group_by_input_shape=True):
        seconds = event.self_cpu_time_total / 1e6
        groups[classify(event.key, event.input_shapes, case)] += seconds
        operators.append((f"{event.key} {[shape for shape in event.input_shapes if shape]}", seconds, event.count))
    return dict(groups), sorted(operators, key=lambda operator: -operator[1])


def describe(case: Case, *, num_steps: int, num_operators: int) -> list[str]:
    """Measure a case; return the lines of its result."""
    model = make_model(case)
    step = make_step(case, model)
    seconds = time_steps(step, num_steps)
    peak = measure_peak(model.head_weight.device)
    flops = count_flops(step)
    groups, operators = profile(case, step)
    rates = measure_rates(case)
    best = max(rates.values())
    total, profiled = sum(flops.values()), sum(groups.values())
    floor = total / best
    architecture = case.architecture
    lines = [
        f"{architecture.num_layers} layers, {case.dtype}, rows of {', '.join(map(str, case.lengths))} tokens,"
        f" {case.supervised:.0%} supervised, rank {case.rank}, dropout {case.dropout}:",
        f"{seconds:.2f} s a step, {case.num_tokens / seconds:.1f} tokens/s; the floor is {total / 1e12:.2f} TFLOP"
        f" at {best / 1e9:.0f} GFLOP/s = {floor:.2f} s, the step {seconds / floor:.2f} times that;"
        f" peak {peak / 1e9:.2f} GB",
        "rates, GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()),
        "",
        f"{'group':26}{'s':>8}{'share':>8}   (one profiled step: {profiled:.2f} s)",
    ]
    for group, value in sorted(groups.items(), key=lambda item: -item[1]):
        lines.append(f"{group:26}{value:8.3f}{value / profiled:8.1%}")
    lines += ["", "longest operators: seconds, calls"]
    lines += [f"{seconds:8.3f} {calls:6d}  {name[:150]}" for name, seconds, calls in operators[:num_operators]]
    return lines


def describe_machine() -> str:
    cpu = next(line.split(":")[1].strip() for line in CPU_INFO.read_text().splitlines() if "model name" in line)
    has_bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return (
        f"{date.today()}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, oneDNN {has_bf16} bf16,"
        f" Python {platform.python_version()}, torch {version('torch')}, load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_2_1b", choices=ARCHITECTURES)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 256], help="tokens of each row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of the tokens")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--operators", type=int, default=20, help="operators listed")
    parser.add_argument("--out", type=Path, help="appended to; default: print only")
    arguments = parser.parse_args()
    architecture = ARCHITECTURES[arguments.model]
    if arguments.layers is not None:
        architecture = replace(architecture, num_layers=arguments.layers)
    names = ("rank", "dropout", "dtype", "supervised")
    options = {name: getattr(arguments, name) for name in names}
    case = Case(architecture, lengths=tuple(arguments.lengths), **options)
    lines = [describe_machine(), "command: python benchmarks/profile_step.py " + " ".join(sys.argv[1:]), ""]
    lines += describe(case, num_steps=arguments.steps, num_operators=arguments.operators)
    print("\n".join(lines))
    if arguments.out is not None:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
