"""Training speed and memory on one GPU: this package, torchtune 0.6.1, Unsloth, transformers + PEFT, side by side.

    python benchmarks/gpu.py --out benchmarks/results/gpu.txt            # everything, in one command
    python benchmarks/gpu.py --models 8b --kinds lora --seq-lengths 4096 --rows full   # a part of it

Random weights in the true shapes; rank 16, alpha 16, all linear layers, no dropout, AdamW, bf16. A sequence is one row
(`full`), or a pack of four rows, each attending to itself only (`packs`; not for PEFT). All tokens are supervised: the
hardest case for this package, which skips the head for other tokens. Every side uses torch's activation checkpointing;
`unsloth offloaded` is Unsloth's default, which offloads the checkpointed activations to host memory. 4-bit bases always
run with checkpointing. Every case is a process of its own: steps to warm up and compile, then the median of the timed
steps. Model-FLOP utilization counts 4 N floating point operations per token (2 N forward, 2 N backward through frozen
weights, no attention and adapters) against the device's dense bf16 peak. Needs torch, torchtune 0.6.1 and torchao 0.13
for the stock side; transformers and peft for PEFT's; for Unsloth a folder of its packages (listed in train_unsloth.py)
and a folder of bases: MODEL/ from scripts/make_random_base.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MODELS = {"1b": "llama3_2_1b", "3b": "llama3_2_3b", "8b": "llama3_1_8b"}
SIDES = ("ours", "stock", "unsloth", "unsloth offloaded", "peft")
RANK, ALPHA = 16, 16.0
ROWS_PER_SEQUENCE = {"full": 1, "packs": 4}
WARMUP_STEPS = {"unsloth": 4, "unsloth offloaded": 4}  # Unsloth recompiles later; the others need two
BF16_PEAK = 989e12  # dense, H100 SXM and H200, from the vendor's data sheet
BASES = {"lora": "bf16", "fp8": "fp8", "qlora": "nf4"}  # kind -> base_weights
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


def make_pack(vocab_size: int, batch: int, seq: int, device: str, *, rows: str = "packs"):
    """Return tokens, labels [batch, seq], input_pos [batch, seq] and the sequences' row lengths."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (batch, seq), generator=generator).to(device)
    count = ROWS_PER_SEQUENCE[rows]
    row = seq // count
    input_pos = torch.arange(row, device=device).repeat(count).expand(batch, seq).contiguous()
    return tokens, tokens.clone(), input_pos, [torch.full((count,), row)] * batch


def make_ours(arguments, device: str, world=None):
    import torch

    from tune2gguf.base.layout import list_tensors
    from tune2gguf.base.load import fill_model
    from tune2gguf.distributed.parallel import shard
    from tune2gguf.model.architectures import ARCHITECTURES
    from tune2gguf.model.fused import why_not_fused
    from tune2gguf.model.llama import build_lora_llama, prepare_training
    from tune2gguf.model.lora import initialize_adapters

    architecture = ARCHITECTURES[MODELS[arguments.model]]
    with torch.device("meta"):
        model = build_lora_llama(
            architecture,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            lora_dropout=arguments.dropout,
            lora_attn_modules=ATTENTION,
            apply_lora_to_mlp=True,
            max_seq_len=arguments.seq,
        )

    def draw(spec):
        weight = torch.ones if len(spec.shape) == 1 else torch.randn
        return weight(spec.shape, device=device, dtype=torch.bfloat16) * (1.0 if len(spec.shape) == 1 else 0.02)

    device_type = torch.device(device).type
    obstacle = why_not_fused(
        device_type, architecture=architecture, dtype="bf16", compile=arguments.compile, lora_rank=RANK
    )
    prepare_training(
        model,
        compile=arguments.compile,
        enable_activation_checkpointing=arguments.checkpointing,
        fuse=obstacle is None,
    )
    if world is not None and arguments.parallel == "shard":
        shard(model, world)
    weights = ((spec.tune_name, draw(spec)) for spec in list_tensors(architecture))
    fill_model(model, weights, device=torch.device(device), base_weights=BASES[arguments.kind])
    initialize_adapters(model, 0)
    kind = getattr(arguments, "rows", "packs")
    tokens, labels, input_pos, _ = make_pack(architecture.vocab_size, arguments.batch, arguments.seq, device, rows=kind)
    row = arguments.seq // ROWS_PER_SEQUENCE[kind]
    row_starts = torch.arange(0, tokens.numel() + 1, row, dtype=torch.int32, device=device)
    places = torch.arange(tokens.numel(), device=device).view(tokens.shape)
    rows = {"row_starts": row_starts, "longest_row": row, "input_pos": input_pos}

    def compute_loss():
        return model(tokens, labels, places[:, :-1].flatten(), **rows).mean()

    return model, compute_loss, architecture.vocab_size


def make_stock(arguments, device: str):
    """Make stock torchtune with its best settings: flex attention for packs, model and loss compiled, chunked loss."""
    import torch
    from torchtune import training
    from torchtune.models import llama3_1, llama3_2
    from torchtune.modules import TransformerSelfAttentionLayer, common_utils
    from torchtune.modules.attention_utils import packed_block_causal_mask
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    assert common_utils.NF4Tensor.__module__.startswith("torchao"), "torchtune's own 4-bit weights, not this package's"
    builders = {"1b": llama3_2.lora_llama3_2_1b, "3b": llama3_2.lora_llama3_2_3b, "8b": llama3_1.lora_llama3_1_8b}
    with training.set_default_dtype(torch.bfloat16), torch.device(device):
        model = builders[arguments.model](
            lora_attn_modules=ATTENTION,
            apply_lora_to_mlp=True,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            lora_dropout=arguments.dropout,
            quantize_base=arguments.kind == "qlora",
        )
    set_trainable_params(model, get_adapter_params(model))
    if arguments.checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    loss_module = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_module.num_output_chunks)
    if arguments.compile:
        training.compile_model(model)
        loss_module = training.compile_loss(loss_module)
    vocab_size = model.tok_embeddings.num_embeddings
    rows = getattr(arguments, "rows", "packs")
    tokens, labels, input_pos, row_lengths = make_pack(vocab_size, arguments.batch, arguments.seq, device, rows=rows)
    # A single row needs no mask: without one, torchtune's attention is causal and uses a faster kernel.
    inputs = {"mask": packed_block_causal_mask(row_lengths), "input_pos": input_pos} if rows == "packs" else {}
    ignored = torch.full((arguments.batch, 1), loss_module.ignore_index, device=device)
    shifted = torch.hstack((labels[:, 1:], ignored))
    return model, lambda: loss_module(model(tokens, **inputs), shifted), vocab_size


def make_peft(arguments, device: str):
    import peft

    # peft refuses the torchao version that stock torchtune needs, although plain LoRA does not use torchao.
    import peft.tuners.lora.torchao as peft_torchao
    import torch
    import transformers

    from tune2gguf.model.architectures import ARCHITECTURES, make_hf_config

    peft_torchao.is_torchao_available = lambda: False
    architecture = ARCHITECTURES[MODELS[arguments.model]]
    with torch.device(device):
        config = transformers.LlamaConfig(**make_hf_config(architecture))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    options = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=arguments.dropout, target_modules="all-linear")
    model = peft.get_peft_model(model, options)
    tokens, labels, _, _ = make_pack(architecture.vocab_size, arguments.batch, arguments.seq, device)
    return model, lambda: model(input_ids=tokens, labels=labels).loss, architecture.vocab_size


def make_unsloth(arguments, device: str):
    """Make Unsloth's model and its padding-free batches: rows joined into one, lengths, positions that restart."""
    from train_unsloth import describe_attention, link_base, load_model

    checkpointing = "unsloth" if arguments.side == "unsloth offloaded" else arguments.checkpointing
    base_dir = Path(arguments.bases) / MODELS[arguments.model]
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(
            link_base(base_dir, Path(folder) / "base"),
            kind=arguments.kind,
            rank=RANK,
            alpha=ALPHA,
            max_seq_len=arguments.seq,
            checkpointing=checkpointing,
        )
    import torch
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    print(f"attention without padding: {describe_attention()}", flush=True)
    vocab_size = model.config.vocab_size
    tokens, labels, input_pos, row_lengths = make_pack(
        vocab_size, arguments.batch, arguments.seq, device, rows=arguments.rows
    )
    inputs = {"input_ids": tokens, "labels": labels}
    if arguments.rows == "packs":
        inputs = {"input_ids": tokens.view(1, -1), "labels": labels.view(1, -1), "position_ids": input_pos.view(1, -1)}
        inputs["packed_seq_lengths"] = torch.cat(row_lengths).int()

    def compute_loss():
        with torch.autocast(device, dtype=torch.bfloat16):  # like its Trainer with bf16=True
            return model(**inputs, use_cache=False).loss

    return model, compute_loss, vocab_size


def measure(arguments, make, device: str, *, reduce=None) -> dict:
    """Train the model from `make` for a few steps; return tokens/s, peak memory and losses.

    Args:
        reduce: all-reduces the gradients of parameters, if there are several processes
    """
    import torch

    torch.manual_seed(0)
    model, compute_loss, _ = make(arguments, device)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    seconds, losses = [], []
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    warmup = WARMUP_STEPS.get(getattr(arguments, "side", "ours"), 2)
    for _ in range(arguments.steps + warmup):
        synchronize(device)
        started = time.perf_counter()
        loss = compute_loss()
        loss.backward()
        if reduce is not None:
            reduce(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    step = statistics.median(seconds[warmup:])
    weights = count_weights(arguments.model)
    assert losses[-1] != losses[0], "nothing was learned"
    tokens_per_second = arguments.batch * arguments.seq / step
    return {
        "tokens_per_second": round(tokens_per_second),
        "mfu": round(4 * weights * tokens_per_second / BF16_PEAK, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device != "cpu" else None,
        **({"estimated_gib": estimate_peak(arguments)} if arguments.side == "ours" else {}),
        "first_step_s": round(seconds[0], 1),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def estimate_peak(arguments) -> float:
    """Return estimate_memory.py's peak for a case, GiB, without the CUDA context, which torch does not count either."""
    import torch

    from tune2gguf.machine.memory import RunSpec, estimate_memory
    from tune2gguf.model.architectures import ARCHITECTURES
    from tune2gguf.model.fp8 import multiplies_fp8

    spec = RunSpec(
        architecture=ARCHITECTURES[MODELS[arguments.model]],
        base_weights=BASES[arguments.kind],
        dtype="bf16",
        lora_rank=RANK,
        lora_dropout=arguments.dropout,
        lora_attn_modules=tuple(ATTENTION),
        apply_lora_to_mlp=True,
        tokens_per_pass=arguments.batch * arguments.seq,
        longest_row=arguments.seq // ROWS_PER_SEQUENCE[getattr(arguments, "rows", "packs")],
        enable_activation_checkpointing=arguments.checkpointing,
        device_type="cuda",
        num_devices=getattr(arguments, "num_gpus", 1),
        parallel=getattr(arguments, "parallel", "replicate"),
        compile=arguments.compile,
        multiplies_fp8=multiplies_fp8(torch.device("cuda")),
    )
    estimate = estimate_memory(spec)
    return round((estimate.training - estimate.program) / 2**30, 2)


def count_weights(model: str) -> int:
    """Return the number of weights in a model's matrices: with the output head, without the embedding."""
    from tune2gguf.base.layout import list_tensors
    from tune2gguf.model.architectures import ARCHITECTURES

    specs = list_tensors(ARCHITECTURES[MODELS[model]])
    layers = sum(
        spec.shape[0] * spec.shape[1] for spec in specs if spec.tune_name.startswith("layers.") and len(spec.shape) == 2
    )
    head = ARCHITECTURES[MODELS[model]]
    return layers + head.vocab_size * head.embed_dim


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def list_cases(arguments) -> list[dict]:
    cases = []
    for model, kind, seq, rows, checkpointing, side in itertools.product(
        arguments.models,
        arguments.kinds,
        arguments.seq_lengths,
        arguments.rows,
        [mode == "on" for mode in arguments.checkpointing],
        arguments.sides,
    ):
        if kind == "fp8" and side != "ours":
            continue
        if (kind == "qlora" and not checkpointing) or (side == "unsloth offloaded" and not checkpointing):
            continue
        if side == "peft" and (kind == "qlora" or rows == "packs"):
            continue  # PEFT's 4 bits would measure bitsandbytes; PEFT has no packs
        case = {"side": side, "model": model, "kind": kind, "seq": seq, "batch": arguments.batch, "rows": rows}
        compile = side == "stock" and not arguments.no_compile
        cases.append(case | {"compile": compile, "checkpointing": checkpointing})
    return cases


def run_in_process(command: list[str], timeout: int, *, environment: dict[str, str] | None = None) -> dict | str:
    """Run a case in a process of its own; return its result, or the reason why it has none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout} s"
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0]) if found else "failed: " + " | ".join(done.stderr.strip().splitlines()[-3:])


def describe_machine() -> str:
    import torch

    def get_version(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    names = ("torch", "triton", "torchtune", "torchao", "transformers", "peft")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    packages = ", ".join(f"{name} {get_version(name)}" for name in names)
    return f"{date.today()}, {device}, CUDA {torch.version.cuda}, python {platform.python_version()}, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=["lora", "qlora"], choices=BASES)
    parser.add_argument("--sides", nargs="+", default=[*SIDES], choices=SIDES)
    parser.add_argument("--seq-lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--rows", nargs="+", default=[*ROWS_PER_SEQUENCE], choices=ROWS_PER_SEQUENCE)
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--unsloth-site", type=Path, help="a folder with Unsloth's packages")
    parser.add_argument("--bases", type=Path, help="a folder with the bases that Unsloth loads")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--no-compile", action="store_true", help="stock torchtune without its compiler")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--timeout", type=int, default=300, help="limit of a case in seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", type=json.loads, help="JSON list of cases, instead of the other options' product")
    parser.add_argument("--case", help="run one case, given as JSON, and print its result (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.case:
        case = argparse.Namespace(**json.loads(arguments.case))
        print("RESULT " + json.dumps(measure(case, MAKERS[case.side], case.device)))
        return
    shared = {"steps": arguments.steps, "dropout": arguments.dropout, "device": arguments.device, "rows": "packs"}
    shared |= {"bases": str(arguments.bases)}
    lines = [describe_machine(), "command: python benchmarks/gpu.py " + " ".join(sys.argv[1:]), ""]
    print("\n".join(lines), flush=True)
    for case in arguments.cases or list_cases(arguments):
        case = shared | case
        environment = None
        if case["side"].startswith("unsloth"):
            if arguments.unsloth_site is None or arguments.bases is None:
                sys.exit("--unsloth-site or --bases is missing; Unsloth's sides need both")
            environment = make_unsloth_environment(arguments.unsloth_site)
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        result = json.dumps(run_in_process(command, arguments.timeout, environment=environment))
        lines.append(f"{label_case(case):60} {result}")
        print(lines[-1], flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")


def label_case(case: dict) -> str:
    settings = ("compile" * case["compile"], "checkpointing" * case["checkpointing"])
    label = f"{case['model']} {case['kind']} {case['batch']}x{case['seq']} {case['rows']} {case['side']}"
    return " ".join(filter(None, (label, *settings)))


def make_unsloth_environment(site: Path) -> dict[str, str]:
    """Return the environment of Unsloth's process: its packages, and this repository for the architectures."""
    from train_unsloth import make_environment

    environment = make_environment(site, Path(tempfile.gettempdir()) / "unsloth")
    repository = str(Path(__file__).resolve().parents[1])
    return environment | {"PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], repository])}


MAKERS = {
    "ours": make_ours,
    "stock": make_stock,
    "unsloth": make_unsloth,
    "unsloth offloaded": make_unsloth,
    "peft": make_peft,
}


if __name__ == "__main__":
    main()
