import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, write_tiny_tokenizer
from tune2gguf.commands import format_command
from tune2gguf.machine.devices import Device
from tune2gguf.machine.fit import advise, explain_out_of_memory, find_fitting_change, find_warning, fits, list_changes
from tune2gguf.machine.memory import (
    RunSpec,
    count_adapter_weights,
    count_kept_activations,
    estimate_memory,
    list_layer_activations,
)
from tune2gguf.machine.passes import USABLE_SHARE, choose_passes
from tune2gguf.model.architectures import LLAMA3_1_8B, LLAMA3_2_1B, LLAMA3_2_3B, Architecture
from tune2gguf.model.llama import build_lora_llama

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
SMALL = Architecture(
    vocab_size=384,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    embed_dim=64,
    intermediate_dim=160,
    head_dim=16,
    max_position_embeddings=512,
    tied=True,
)


def make_spec(architecture: Architecture = SMALL, **changed) -> RunSpec:
    options = dict(
        base_weights="bf16",
        dtype="bf16",
        lora_rank=4,
        lora_dropout=0.1,
        lora_attn_modules=ATTENTION,
        apply_lora_to_mlp=True,
        longest_row=32,
        tokens_per_pass=64,
        enable_activation_checkpointing=False,
    )
    return RunSpec(architecture, **(options | changed))


def measure_kept_bytes(spec: RunSpec) -> int:
    """Count the distinct storages that autograd keeps from a forward pass, without model and inputs."""
    default = torch.get_default_dtype()
    torch.set_default_dtype({"bf16": torch.bfloat16, "fp32": torch.float32}[spec.dtype])
    try:
        model = build_lora_llama(
            spec.architecture,
            lora_rank=spec.lora_rank,
            lora_alpha=1.0,
            lora_dropout=spec.lora_dropout,
            lora_attn_modules=list(spec.lora_attn_modules),
            apply_lora_to_mlp=spec.apply_lora_to_mlp,
            max_seq_len=spec.tokens_per_pass,
        )
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            parameter.data = parameter.data.float()
    tokens = torch.randint(0, spec.architecture.vocab_size, (1, spec.tokens_per_pass))
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), tokens]}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        starts = torch.arange(0, spec.tokens_per_pass + 1, spec.longest_row, dtype=torch.int32)
        losses = model(tokens, tokens, row_starts=starts)
    assert losses.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lora_dropout": 0.0},
        {"dtype": "fp32", "base_weights": "fp32"},
        {"dtype": "fp32", "base_weights": "fp32", "lora_dropout": 0.0},
        {"lora_rank": 16, "tokens_per_pass": 192, "longest_row": 48},
    ],
    ids=str,
)
def test_kept_activations_are_what_autograd_saves(changed):
    spec = make_spec(**changed)
    assert measure_kept_bytes(spec) == pytest.approx(count_kept_activations(spec), rel=0.005)


def test_a_further_layer_keeps_exactly_what_the_formula_says():
    spec = make_spec()
    deeper = replace(spec, architecture=replace(SMALL, num_layers=4))
    casts = 2 * (count_adapter_weights(deeper) - count_adapter_weights(spec))
    assert measure_kept_bytes(deeper) - measure_kept_bytes(spec) == sum(list_layer_activations(spec)) + casts


def write_long_rows(path: Path, count: int) -> Path:
    """Write rows that fill any max_seq_len of these tests, so that every batch has its full length."""
    filler = " ".join(f"{number}" for number in range(3000))
    rows = [
        {"messages": [{"role": "user", "content": f"{row}?"}, {"role": "assistant", "content": filler}]}
        for row in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_and_measure(arguments: list[str], run_dir: Path) -> int:
    """Run the recipe; return its recorded peak resident memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipes/lora_finetune.py", *arguments, f"output_dir={run_dir}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return max(record.get("peak_memory_bytes", 0) for record in records)


MEDIUM = Architecture(
    vocab_size=32_000,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    embed_dim=512,
    intermediate_dim=2048,
    head_dim=64,
    max_position_embeddings=4096,
    tied=True,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tokens_per_pass": 4096},
        {"tokens_per_pass": 4096, "enable_activation_checkpointing": True},
        {"dtype": "fp32", "base_weights": "fp32", "lora_dropout": 0.0},
        {"base_weights": "nf4", "lora_rank": 64},
        {"base_weights": "fp8"},
        {"base_weights": "gguf:Q8_0"},
    ],
    ids=str,
)
def test_estimate_is_within_15_percent_of_the_measured_peak(changed, tmp_path):
    from tune2gguf.base.random_base import write_random_base

    spec = make_spec(MEDIUM, **({"tokens_per_pass": 2048, "longest_row": 512, "lora_rank": 16} | changed))
    base = write_random_base(MEDIUM, tmp_path / "base")
    write_tiny_tokenizer(base)
    rows_per_step = spec.tokens_per_pass // spec.longest_row
    rows = write_long_rows(tmp_path / "train.jsonl", 2 * rows_per_step)
    names = ("base_weights", "dtype", "lora_rank", "lora_dropout", "tokens_per_pass", "enable_activation_checkpointing")
    peak = run_and_measure(
        [
            *("--config", "examples/quickstart/lora.yaml", f"base_dir={base}", "base_source=null"),
            *("model.architecture=null", "epochs=1", "warmup_steps=0", f"batch_size={rows_per_step}"),
            *(f"dataset.files=[{rows}]", "dataset.validation_files=null", f"max_seq_len={spec.longest_row}"),
            *(f"{name}={getattr(spec, name)}" for name in names),
            "save_every_n_steps=2",
        ],
        tmp_path / "run",
    )
    estimate = estimate_memory(spec)
    # A checkpoint's copies meet the peak of a step or not, depending on how fast the disk is.
    assert estimate.peak > 0.85 * peak
    assert estimate.peak - estimate.checkpoint < 1.15 * peak


def test_batch_rank_and_base_add_what_they_hold():
    small, large = make_spec(LLAMA3_1_8B), make_spec(LLAMA3_1_8B, lora_rank=8)
    # q, o: 4096 + 4096; k, v: 4096 + 1024; gate, up, down: 4096 + 14336.
    assert count_adapter_weights(large) == 32 * 8 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    estimate = estimate_memory(large)
    assert (estimate.adapter, estimate.gradients, estimate.optimizer) == tuple(
        factor * count_adapter_weights(large) for factor in (4, 4, 8)
    )
    assert estimate_memory(small).weights == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert estimate_memory(replace(small, base_weights="gguf:Q4_K_M")) == estimate_memory(small)
    nf4 = estimate_memory(replace(small, base_weights="nf4")).weights
    in_bf16 = 2 * 128_256 * 4096 * 2
    assert nf4 == pytest.approx(in_bf16 + (8_030_261_248 - 2 * 128_256 * 4096) * 0.515869, rel=1e-3)
    # One byte per weight and four per row: 4096 rows of q, o and down, 1024 of k and v, 14336 of gate and up.
    fp8 = estimate_memory(replace(small, base_weights="fp8")).weights
    norms = 65 * 4096
    scales = 4 * 32 * (3 * 4096 + 2 * 1024 + 2 * 14336)
    assert fp8 == in_bf16 + (8_030_261_248 - 2 * 128_256 * 4096 - norms) + scales + 4 * norms


def test_most_is_kept_in_8_bits_where_the_gpu_multiplies_them():
    spec = make_spec(LLAMA3_1_8B, device_type="cuda", base_weights="fp8", tokens_per_pass=8192)
    kept_less = count_kept_activations(spec) - count_kept_activations(replace(spec, multiplies_fp8=True))
    gate_and_up, attended = 2 * (14336 * 2 - 14336 - 4 * 112), 4096 * 2 - 4096 - 4  # scales: per 128 values, per token
    assert kept_less == 8192 * 32 * (gate_and_up + attended)
    in_bf16 = replace(spec, base_weights="bf16")
    assert count_kept_activations(replace(in_bf16, multiplies_fp8=True)) == count_kept_activations(in_bf16)


def test_an_8_bit_base_is_advised_before_what_costs_time_where_the_gpu_multiplies_8_bits():
    spec = replace(BIG, architecture=LLAMA3_1_8B, multiplies_fp8=True, tokens_per_pass=2048)
    free = estimate_memory(replace(spec, base_weights="fp8")).peak
    assert find_fitting_change(spec, free) == {"base_weights": "fp8"}
    assert advise(spec, free) == f"This would make it fit, and faster: {format_command('base_weights=fp8')}"
    # Without 8-bit products, fp8 saves memory only; changes that keep the adapter's result come first.
    changes = list(list_changes(replace(spec, multiplies_fp8=False)))
    first = changes.index({"base_weights": "fp8"})
    assert {"enable_activation_checkpointing": True} in changes[:first] and {"base_weights": "nf4"} in changes[first:]


def test_offloading_leaves_the_gpu_five_inputs_of_layers():
    spec = make_spec(LLAMA3_1_8B, device_type="cuda", enable_activation_checkpointing=True)
    offloaded = replace(spec, enable_activation_offloading=True)
    an_input = 128 * 4096 * 2  # of 64 tokens, padded
    assert count_kept_activations(spec) - count_kept_activations(offloaded) == (32 - 5) * an_input


def test_shards_hold_their_part_and_what_they_gather_and_replicas_all_of_it():
    spec = make_spec(LLAMA3_1_8B, device_type="cuda", num_devices=4)
    alone = estimate_memory(replace(spec, num_devices=1))
    assert estimate_memory(spec) == alone
    sharded, norms = estimate_memory(replace(spec, parallel="shard")), 65 * 4096 * 4
    assert sharded.weights == pytest.approx((alone.weights - norms) / 4 + norms)
    layer = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert sharded.work - alone.work == 2 * layer + 2 * 128_256 * 4096  # two layers, and the embedding or the head
    assert sharded.adapter + sharded.gradients + sharded.optimizer == alone.adapter + alone.gradients + alone.optimizer


BIG = make_spec(LLAMA3_2_1B, device_type="cuda", tokens_per_pass=8192, longest_row=2048, lora_rank=16)


def need(**changed) -> int:
    return estimate_memory(replace(BIG, **changed)).peak


@pytest.mark.parametrize(
    ("free", "change"),
    [
        (need(tokens_per_pass=4096), {"tokens_per_pass": 4096}),
        (need(tokens_per_pass=2048), {"tokens_per_pass": 2048}),
        (need(enable_activation_checkpointing=True), {"enable_activation_checkpointing": True}),
        (
            need(enable_activation_checkpointing=True, tokens_per_pass=2048),
            {"enable_activation_checkpointing": True, "tokens_per_pass": 2048},
        ),
        (
            need(enable_activation_checkpointing=True, tokens_per_pass=2048) - 1,
            {"enable_activation_checkpointing": True, "enable_activation_offloading": True, "tokens_per_pass": 4096},
        ),
        (need(enable_activation_checkpointing=True, base_weights="nf4"), None),
        (10**9, None),
    ],
)
def test_first_change_that_fits_is_found(free, change):
    found = find_fitting_change(BIG, free)
    if change is not None:
        assert found == change
    for option in list_changes(BIG):
        if option == found:
            break
        assert not fits(replace(BIG, **option), free)


def test_advice_is_overrides_or_says_that_none_helps():
    assert advise(BIG, need(tokens_per_pass=2048)).endswith("tokens_per_pass=2048")
    assert advise(BIG, 10**9).startswith("No setting makes it fit: it needs at least ")
    assert find_warning(BIG, Device("cuda:0", "a GPU", need())) is None
    warning = find_warning(BIG, Device("cuda:0", "a GPU", need() - 1))
    assert "will probably run out of memory" in warning and "tokens_per_pass=4096" in warning


def choose(free: int, *, tokens_per_pass="auto", checkpointing="auto", tokens_per_step=16_384) -> tuple[int, bool]:
    layout = {"tokens_per_pass": tokens_per_pass, "checkpointing": checkpointing}
    spec = choose_passes(BIG, free, **layout, tokens_per_step=tokens_per_step)
    return spec.tokens_per_pass, spec.enable_activation_checkpointing


def test_passes_are_as_long_as_the_memory_allows_and_recompute_only_where_they_must():
    usable = 1.001 / USABLE_SHARE
    assert choose(10**12) == (8192, False)
    assert choose(10**12, tokens_per_step=3000) == (3000, False)
    assert choose(int(need(tokens_per_pass=4096) * usable)) == (4096, False)
    assert choose(int(need(tokens_per_pass=2048) * usable)) == (2048, False)
    least = need(tokens_per_pass=2048, enable_activation_checkpointing=True)
    assert choose(int(least * usable)) == (2048, True)
    assert choose(10**9) == (2048, True), "where nothing fits, the smallest"


def test_what_the_user_says_of_the_layout_stays():
    assert choose(10**9, tokens_per_pass=5000, checkpointing=False) == (5000, False)
    assert choose(10**12, checkpointing=True) == (8192, True)
    assert choose(10**12, tokens_per_pass=100) == (2048, False), "the longest row is a pass by itself"


def test_other_errors_are_not_called_out_of_memory():
    device = Device("cpu", "memory", 10**9)
    with pytest.raises(ValueError, match="out of memory on cpu"), explain_out_of_memory(BIG, device):
        raise MemoryError
    with pytest.raises(ValueError, match="out of memory on cpu"), explain_out_of_memory(BIG, device):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), explain_out_of_memory(BIG, device):
        raise RuntimeError("something else")


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/estimate_memory.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
def test_script_prints_the_estimate_of_a_config_without_its_base():
    done = run_script("--config", "configs/llama3_1_8b/lora.yaml", "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert "base weights               16.06 GB" in done.stdout
    assert "  cpu (this machine's memory), " in done.stdout and "for each of 2 processes" in done.stdout
    wrong = run_script("--config", "configs/llama3_1_8b/lora.yaml", "lora_rnk=1")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: unknown config key 'lora_rnk'; did you mean 'lora_rank'?\n"


LIMIT = 1_800_000_000  # bytes of data: enough for the program and short rows


@pytest.mark.slow
def test_run_that_runs_out_of_memory_says_what_to_change_and_keeps_its_checkpoints(tmp_path):
    """Short rows train and are saved; the one long row does not fit into the process's limit."""
    from tune2gguf.base.random_base import write_random_base
    from tune2gguf.runs.checkpoints import list_checkpoints, read_checkpoint

    base = write_random_base(MEDIUM, tmp_path / "base")
    write_tiny_tokenizer(base)
    rows = write_long_rows(tmp_path / "train.jsonl", 1).read_text()
    short = [json.dumps({"prompt": f"{row}?", "completion": f"{row}."}) + "\n" for row in range(7)]
    messages = json.loads(rows)["messages"]
    long = json.dumps({"prompt": messages[0]["content"], "completion": messages[1]["content"]}) + "\n"
    (tmp_path / "train.jsonl").write_text("".join([*short, long]))
    arguments = [
        *("--config", "examples/quickstart/lora.yaml", f"base_dir={base}", "base_source=null", "seed=1"),
        *("model.architecture=null", f"output_dir={tmp_path / 'run'}", "epochs=2", "warmup_steps=0", "batch_size=1"),
        *(f"dataset.files=[{tmp_path / 'train.jsonl'}]", "dataset.validation_files=null", "max_seq_len=4096"),
        *("base_weights=fp32", "dtype=fp32", "save_every_n_steps=1"),
    ]
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))"
    start = f"{limited}; import runpy; runpy.run_path('recipes/lora_finetune.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: out of memory on cpu: it needs about " in done.stderr
    assert "enable_activation_checkpointing=true" in done.stderr
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved
    for folder in saved:
        read_checkpoint(folder)


def read_measured_peaks() -> list[tuple[str, float]]:
    """Return name and peak GiB of this package's recorded GPU cases."""
    lines = (REPOSITORY / "benchmarks/results/gpu_h200.txt").read_text().splitlines()
    cases = [line.partition("{") for line in lines if " ours " in line and "{" in line]
    return [(name.strip(), json.loads("{" + result)["peak_gib"]) for name, _, result in cases]


def test_estimates_for_a_gpu_are_within_a_tenth_of_the_peaks_measured_there():
    architectures = {"8b": LLAMA3_1_8B, "3b": LLAMA3_2_3B, "1b": LLAMA3_2_1B}
    measured = read_measured_peaks()
    assert len(measured) >= 9
    for name, peak in measured:
        model, kind, size, *_ = name.split()
        batch, row = map(int, size.split("x"))
        spec = make_spec(
            architectures[model],
            base_weights={"lora": "bf16", "fp8": "fp8", "qlora": "nf4"}[kind],
            multiplies_fp8=True,
            lora_rank=16,
            lora_dropout=0.0,
            tokens_per_pass=batch * row,
            longest_row=row if "full" in name else row // 4,  # packs of four rows
            enable_activation_checkpointing="checkpointing" in name,
            device_type="cuda",
        )
        estimate = estimate_memory(spec)
        # torch counts its own allocations, without the CUDA context.
        assert (estimate.training - estimate.program) / 2**30 == pytest.approx(peak, rel=0.1), name
