"""Precision of bases in fp32, bf16, fp8 and nf4, and their speed and memory on a GPU.

    python benchmarks/base_kinds.py weights gradients --out benchmarks/results/base_kinds_cpu.txt
    python benchmarks/base_kinds.py training --seeds 1 2 3         # an epoch of the quickstart for each kind and seed
    python benchmarks/base_kinds.py gradients products --device cuda --out base_kinds_gpu.txt     # 8B, random weights
    python benchmarks/base_kinds.py speed --device cuda

On a CPU the model is SmolLM2-135M-Instruct (scripts/download.py), whose weights were in Q4_1 before. On a GPU it is
Llama-3.1-8B with normal weights (standard deviation 0.02). `with outlier channels` is the same function: eight channels
of every norm are 50 times as large and the matching columns 50 times as small.
The reference has the same weights in float32, and an adapter of rank 16 with nonzero B. Columns: error of a layer's
residual update, mean and worst; cosine of all adapter gradients, mean and least over the adapter's matrices; error of
all gradients. Errors are root mean squares, relative to the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import gpu
import torch
from torch import Tensor

from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.layout import list_tensors
from tune2gguf.base.load import fill_model
from tune2gguf.model import fp8, layers
from tune2gguf.model.architectures import ARCHITECTURES, Architecture
from tune2gguf.model.fused.attention import Layout
from tune2gguf.model.llama import CausalLM, build_lora_llama, prepare_training
from tune2gguf.model.lora import initialize_adapters
from tune2gguf.model.nf4 import quantize_nf4

REPOSITORY = Path(__file__).resolve().parents[1]
SMOLLM2 = REPOSITORY / "models/SmolLM2-135M-Instruct"
QUICKSTART = REPOSITORY / "examples/quickstart"
KINDS = ("bf16", "fp8", "nf4")
NUM_OUTLIERS, OUTLIER = 8, 50.0
B_STD = 0.02
SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}  # [out, in]
TOKENS = 8192
E5M2_LARGEST = 57344.0
SPEED_CASES = [
    {"kind": kind, "batch": 2, "seq": 4096, "rows": rows, "checkpointing": checkpointing}
    for rows, checkpointing in (("full", False), ("packs", False), ("full", True))
    for kind in ("lora", "fp8")
] + [{"kind": kind, "batch": 2, "seq": 256, "rows": "full", "checkpointing": False} for kind in ("lora", "fp8")]
SPEED_CASES += [{"kind": "qlora", "batch": 2, "seq": 4096, "rows": "full", "checkpointing": True}]


def measure_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error: norm of the difference over norm of `expected`."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


# Weights.


def round_by_largest(weight: Tensor) -> Tensor:
    scales = weight.abs().amax(dim=1, keepdim=True).clamp_(min=fp8.LEAST_MAGNITUDE) / fp8.LARGEST_CODE
    return (weight / scales).to(fp8.CODES).float() * scales


def round_by_best(weight: Tensor) -> Tensor:
    return fp8.quantize_weight(weight).dequantize(torch.float32)


def round_blocks(weight: Tensor, size: int = 128) -> Tensor:
    """Round blocks of 128 x 128 by their largest magnitude. Blocks at the edges are smaller."""
    out = torch.empty_like(weight)
    for row in range(0, weight.shape[0], size):
        for column in range(0, weight.shape[1], size):
            block = weight[row : row + size, column : column + size]
            flat = round_by_largest(block.reshape(1, -1))
            out[row : row + size, column : column + size] = flat.view(block.shape)
    return out


def round_nf4(weight: Tensor) -> Tensor:
    return quantize_nf4(weight).dequantize(torch.float32)


def report_weights(arguments) -> Iterator[str]:
    """Yield the error of each rounding method on weights."""
    ways = {
        "fp8, rows, best scale": round_by_best,
        "fp8, rows, largest": round_by_largest,
        "fp8, 128 x 128": round_blocks,
        "nf4, 64": round_nf4,
    }
    base = open_base(SMOLLM2)
    names = [name for name, spec in base.specs.items() if spec.is_linear]
    torch.manual_seed(0)  # StudentT takes no generator
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1024, 1024, generator=generator) * 0.02
    sets = {
        "SmolLM2": [base.read_tensor(name).float() for name in names],
        "normal": [normal],
        "normal, 1 of 128 inputs x 20": [torch.where(torch.arange(1024) % 128 == 0, 20 * normal, normal)],
        "Student's t, 3 degrees": [torch.distributions.StudentT(torch.tensor(3.0)).sample((1024, 1024)) * 0.02],
    }
    yield f"{'error of weights':<32}" + "".join(f"{name:>24}" for name in ways)
    for name, weights in sets.items():
        errors = [statistics.mean(measure_error(way(weight), weight) for weight in weights) for way in ways.values()]
        yield f"{name:<32}" + "".join(f"{error:>24.4f}" for error in errors)


# Layers and gradients.


def add_outliers(name: str, weight: Tensor) -> Tensor:
    """Scale eight channels of a norm's weight up, and the matching columns of the next weights down."""
    kind = name.split(".")[-2] if "." in name else ""
    if not name.startswith("layers.") or kind in ("output_proj", "w2"):
        return weight
    channels = torch.linspace(3, weight.shape[-1] - 5, NUM_OUTLIERS, device=weight.device).long()
    factor = torch.ones(weight.shape[-1], device=weight.device)
    factor[channels] = OUTLIER if weight.dim() == 1 else 1 / OUTLIER
    return weight.float() * factor


def iterate_weights(device: torch.device, *, outliers: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (torchtune's name, weight): SmolLM2's in float32 on a CPU, random bf16 ones of 8B on a GPU."""
    if device.type == "cpu":
        tensors = open_base(SMOLLM2).iterate_tensors(dtype=torch.float32)
    else:
        generator = torch.Generator(device).manual_seed(0)
        tensors = ((spec.tune_name, draw(spec.shape, generator)) for spec in list_tensors(ARCHITECTURES["llama3_1_8b"]))
    for name, weight in tensors:
        yield name, add_outliers(name, weight) if outliers else weight


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, device=generator.device)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return weight.normal_(std=0.02, generator=generator)


def make_model(kind: str, device: torch.device, *, outliers: bool) -> CausalLM:
    """Build and fill the model. On a GPU its layers are fused, except for fp32."""
    architecture: Architecture = ARCHITECTURES["smollm2_135m" if device.type == "cpu" else "llama3_1_8b"]
    with torch.device("meta"):
        model = build_lora_llama(
            architecture,
            lora_rank=gpu.RANK,
            lora_alpha=gpu.ALPHA,
            lora_dropout=0.0,
            lora_attn_modules=gpu.ATTENTION,
            apply_lora_to_mlp=True,
            max_seq_len=1024,
        )
    fuse = device.type == "cuda" and kind != "fp32"
    prepare_training(model, compile=False, enable_activation_checkpointing=False, fuse=fuse)
    fill_model(model, iterate_weights(device, outliers=outliers), device=device, base_weights=kind)
    initialize_adapters(model, 0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_b" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * B_STD)
    return model.train()


def make_tokens(device: torch.device) -> Tensor:
    """Return tokens [batch, seq]: conversations of the quickstart on a CPU, random ones on a GPU."""
    if device.type == "cuda":
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 128_000, (2, 512), generator=generator).to(device)
    from tune2gguf.data import chat_dataset
    from tune2gguf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_dir=str(SMOLLM2), chat_template="chatml")
    files = [str(QUICKSTART / "train.jsonl")]
    rows = chat_dataset(tokenizer=tokenizer, files=files, max_seq_len=512, seed=0, packing=True).sequences
    return torch.cat([torch.as_tensor(rows[number].tokens).long()[:448] for number in range(4)]).view(4, 448)


def run_layer(model: CausalLM, number: int, hidden: Tensor) -> Tensor:
    """Return a layer's output for an input [batch, seq, dim], fused if the model is."""
    layer, (batch, seq, _) = model.decoder.layers[number], hidden.shape
    hidden = hidden.to(model.decoder.tok_embeddings.weight.dtype)
    if model.stack is None:
        return layer(hidden)
    starts = torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=hidden.device)
    layout = Layout(torch.arange(seq, device=hidden.device).repeat(batch), starts, seq)
    return layer(hidden.flatten(0, 1), layout=layout).view(hidden.shape)


@torch.no_grad()
def record_layers(model: CausalLM, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (input, output) of each layer."""
    hidden, found = model.decoder.tok_embeddings(tokens), []
    for number in range(len(model.decoder.layers)):
        out = run_layer(model, number, hidden)
        found.append((hidden, out))
        hidden = out
    return found


@torch.no_grad()
def measure_layers(model: CausalLM, recorded: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the error of each layer's residual update, given the reference's input."""
    return [measure_error(run_layer(model, number, x).float() - x, out - x) for number, (x, out) in enumerate(recorded)]


def compute_gradients(model: CausalLM, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradient of every adapter weight."""
    loss = model(tokens, tokens.clone()).mean()
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def compare_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    parts = [[gradients[name].flatten().double() for name in expected] for gradients in (found, expected)]
    whole = [torch.cat(part) for part in parts]
    cosines = [torch.cosine_similarity(*pair, dim=0) for pair in zip(*parts, strict=True)]
    return (
        f"{torch.cosine_similarity(*whole, dim=0):>12.5f}{torch.stack(cosines).mean():>12.5f}{min(cosines):>12.5f}"
        f"{measure_error(*whole):>12.4f}"
    )


@contextmanager
def take_gradients_in_e5m2() -> Iterator[None]:
    """Quantize upstream gradients to e5m2: more range, one bit less precision."""

    def quantize(parts: list[Tensor], factors: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if factors is None:
            return fp8.quantize_rows_plainly(parts, factors)
        rows = torch.cat(parts, dim=1).float() * torch.cat(factors)
        scales = rows.abs().amax(dim=1, keepdim=True).clamp_(min=fp8.LEAST_MAGNITUDE) / E5M2_LARGEST
        return (rows / scales).to(torch.float8_e5m2), scales

    with patch.object(fp8, "quantize_rows", quantize):
        yield


@contextmanager
def keep_activations() -> Iterator[None]:
    """Quantize the weights only, not activations and gradients."""

    def keep(parts: list[Tensor], factors: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.cat(parts, dim=1)
        rows = rows if factors is None else rows.float() * torch.cat(factors)
        return rows, rows.new_ones(len(rows), 1, dtype=torch.float32)

    decode = fp8.decode
    with (
        patch.object(fp8, "quantize_rows", keep),
        patch.object(
            fp8, "decode", lambda codes, dtype: decode(codes, dtype) if fp8.is_fp8(codes) else codes.to(dtype)
        ),
    ):
        yield


@contextmanager
def keep_gates_in_8_bits() -> Iterator[None]:
    """Save gate and up for backward as the fused layers do: in 8 bits, with a scale per 128 values of a row."""

    def keep(ctx, gate: Tensor, up: Tensor) -> Tensor:
        kept = [
            round_by_largest(value.float().reshape(-1, 128)).view(value.shape).to(value.dtype) for value in (gate, up)
        ]
        ctx.save_for_backward(*kept)
        return torch.nn.functional.silu(gate).mul_(up)

    with patch.object(layers._GatedProduct, "forward", staticmethod(keep)):
        yield


def report_gradients(arguments) -> Iterator[str]:
    """Yield layer errors and gradient cosines, for the model as it is and with outlier channels."""
    device = torch.device(arguments.device)
    tokens = make_tokens(device)
    ways: dict[str, tuple[str, Callable]] = {kind: (kind, nullcontext) for kind in KINDS}
    if device.type == "cpu":
        ways["fp8, gradients e5m2"] = ("fp8", take_gradients_in_e5m2)
        ways["fp8, kept in 8 bits"] = ("fp8", keep_gates_in_8_bits)
        ways["fp8, weights only"] = ("fp8", keep_activations)
    for outliers in (False, True):
        yield f"{'with outlier channels' if outliers else 'as it is'}, {tokens.numel()} tokens"
        titles = ("layers", "worst", "cosine", "mean", "least", "error")
        yield f"{'':<22}{'loss':>9}" + "".join(f"{title:>12}" for title in titles)
        reference = make_model("fp32", device, outliers=outliers)
        recorded = record_layers(reference, tokens)
        loss, expected = compute_gradients(reference, tokens)
        yield f"{'fp32':<22}{loss:>9.4f}"
        del reference
        for name, (kind, way) in ways.items():
            model = make_model(kind, device, outliers=outliers)
            with way():
                errors = measure_layers(model, recorded)
                loss, found = compute_gradients(model, tokens)
            both = f"{statistics.mean(errors):>12.4f}{max(errors):>12.4f}"
            yield f"{name:<22}{loss:>9.4f}{both}{compare_gradients(found, expected)}"
            del model, found
        yield ""


# An epoch of the quickstart.


def report_training(arguments) -> Iterator[str]:
    """Yield the held-out loss after an epoch of the quickstart for each kind and seed."""
    extent = "one epoch" if arguments.steps is None else f"{arguments.steps} steps of 4 rows"
    yield f"held-out loss of {arguments.val_rows} rows after {extent} of the quickstart"
    yield f"{'':<8}" + "".join(f"{f'seed {seed}':>10}" for seed in arguments.seeds) + f"{'mean':>10}"
    for kind in arguments.kinds:
        losses = [train(kind, seed, arguments) for seed in arguments.seeds]
        yield f"{kind:<8}" + "".join(f"{loss:>10.4f}" for loss in [*losses, statistics.mean(losses)])


def train(kind: str, seed: int, arguments) -> float:
    """Run the recipe and return its last validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = {
            "base_dir": SMOLLM2,
            "device": arguments.device,
            "dtype": "fp32" if kind == "fp32" else "bf16",
            "base_weights": kind,
            "seed": seed,
            "epochs": 1,
            "num_samples": 0,
            "eval_every_n_steps": 100_000,
            "max_val_rows": arguments.val_rows,
            "max_steps_per_epoch": arguments.steps or "null",
            "save_every_n_steps": 100_000,
            "output_dir": out,
        }
        command = ["tune", "run", "recipes/lora_finetune.py", "--config", "examples/quickstart/lora.yaml"]
        command += [f"{key}={value}" for key, value in options.items()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [record["val_loss"] for record in records if "val_loss" in record][-1]


# Products and speed on a GPU.


def time_on_gpu(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median microseconds of `repeats` calls."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def report_products(arguments) -> Iterator[str]:
    """Yield the time of the large products of 8B in bf16 and in 8 bits, and of the quantization before these."""
    yield f"microseconds for {TOKENS} tokens; `slow sums` and `one scale` are other ways to multiply 8-bit numbers"
    for name, (num_rows, num_columns) in SHAPES.items():
        works, error = list_products(num_rows, num_columns)
        us = {what: time_on_gpu(work) for what, work in works.items()}
        rate = 2 * TOKENS * num_rows * num_columns / 1e6
        ratio = us["bf16"] / us["fp8"]
        yield f"{name}: [{num_rows}, {num_columns}], fp8 {ratio:.2f} x bf16, its sums' error {error:.1e}"
        for what, spent in us.items():
            products = what not in ("quantize", "quantize back", "transpose")
            yield f"  {what:<16}{spent:>8.0f}" + f"{rate / spent:>8.0f} TFLOP/s" * products
    yield f"quantizing all matrices of 8B: {measure_quantizing():.2f} s"


def list_products(num_rows: int, num_columns: int) -> tuple[dict[str, Callable[[], object]], float]:
    """Return a matrix's operations on TOKENS tokens, forward and backward, and the error of the 8-bit sums."""
    from tune2gguf.model.fused.eight_bit import transpose_codes

    def draw_bf16(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, gradient, weight = draw_bf16(TOKENS, num_columns), draw_bf16(TOKENS, num_rows), draw_bf16(num_rows, num_columns)
    quantized = fp8.quantize_weight(weight)
    right, columns = quantized.codes.t(), quantized.scales.unsqueeze(0)
    codes, scales = fp8.quantize_rows([x])
    upstream, its_scales = fp8.quantize_rows([gradient], [quantized.scales])
    turned, ones, one = transpose_codes([quantized.codes]).t(), scales.new_ones(1, num_columns), scales.new_ones(())

    def multiply(*operands: Tensor, is_fast: bool = True) -> Tensor:
        return torch._scaled_mm(*operands, out_dtype=torch.bfloat16, use_fast_accum=is_fast)

    exact = codes[:256].double() @ right.double() * scales[:256] * columns
    works = {
        "bf16": lambda: x @ weight.T,
        "fp8": lambda: multiply(codes, right, scales, columns),
        "slow sums": lambda: multiply(codes, right, scales, columns, is_fast=False),
        "one scale": lambda: multiply(codes, right, one, one),
        "quantize": lambda: fp8.quantize_rows([x]),
        "bf16 back": lambda: gradient @ weight,
        "fp8 back": lambda: multiply(upstream, turned, its_scales, ones),
        "quantize back": lambda: fp8.quantize_rows([gradient], [quantized.scales]),
        "transpose": lambda: transpose_codes([quantized.codes]),
    }
    return works, measure_error(works["fp8"]()[:256], exact)


def measure_quantizing() -> float:
    weight = torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16)
    size = sum(spec.shape[0] * spec.shape[1] for spec in list_tensors(ARCHITECTURES["llama3_1_8b"]) if spec.is_linear)
    return time_on_gpu(lambda: fp8.quantize_weight(weight), repeats=3) / 1e6 * size / weight.numel()


def report_speed(arguments) -> Iterator[str]:
    """Yield tokens/s and peak memory of 8B, one process per case as in gpu.py."""
    shared = {"side": "ours", "model": "8b", "steps": 8, "dropout": 0.0, "device": "cuda", "compile": False}
    for case in SPEED_CASES:
        command = [sys.executable, str(REPOSITORY / "benchmarks/gpu.py"), "--case", json.dumps(shared | case)]
        result = json.dumps(gpu.run_in_process(command, 300))
        rows = case["batch"] * gpu.ROWS_PER_SEQUENCE[case["rows"]]
        label = f"8b {gpu.BASES[case['kind']]} {case['batch']}x{case['seq']} {rows} rows"
        yield f"{label + ' checkpointing' * case['checkpointing']:<40} {result}"


PARTS = {
    "weights": report_weights,
    "gradients": report_gradients,
    "training": report_training,
    "products": report_products,
    "speed": report_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of the training runs")
    parser.add_argument("--kinds", nargs="+", default=["fp32", *KINDS], help="kinds of base to train on")
    parser.add_argument("--steps", type=int, help="steps of four rows per run; default: an epoch")
    parser.add_argument("--val-rows", type=int, default=40, help="held-out rows of a run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")

    say(gpu.describe_machine())
    say("command: python benchmarks/base_kinds.py " + " ".join(sys.argv[1:]))
    for part in arguments.parts:
        say("")
        for line in PARTS[part](arguments):
            say(line)


if __name__ == "__main__":
    main()
