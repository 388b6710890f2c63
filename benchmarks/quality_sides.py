"""The sides of quality.py: each trains an adapter on the same rows in this process and returns it in PEFT's layout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from train_cases import REPOSITORY, describe_row, make_stock_architecture

from tune2gguf.config import build_component, load_config
from tune2gguf.model.architectures import Architecture, read_architecture
from tune2gguf.model.loss import IGNORED_LABEL
from tune2gguf.train.schedules import get_schedule

# The quickstart's values, which suit its model, with 8 rows per step.
ROWS_PER_STEP, EPOCHS, LEARNING_RATE, WARMUP_STEPS = 8, 3, 1e-3, 10
RANK, ALPHA, DROPOUT, WEIGHT_DECAY, CLIP_GRAD_NORM = 16, 16, 0.1, 0.01, 1.0
MAX_SEQ_LEN = 512
ROWS_JUDGED_TOGETHER = 16
Adapter = dict[str, Tensor]
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Task:
    """The rows of a run: a file for our side, tokens from our data path for the others."""

    base_dir: Path
    rows_file: Path
    rows: list[Row]
    seed: int
    device: str
    folder: Path


def make_arguments(base_dir: Path, rows_file: Path, device: str) -> list[str]:
    """Return the recipe's arguments, without seed and output_dir."""
    options = {
        "base_dir": base_dir,
        "base_source": "null",
        "model.architecture": "null",
        "dataset.files": f"[{rows_file}]",
        "dataset.validation_files": "null",
        "dataset.validation_split": "null",
        "device": device,
        "batch_size": ROWS_PER_STEP,
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP_STEPS,
        "scheduler": "cosine",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "weight_decay": WEIGHT_DECAY,
        "clip_grad_norm": CLIP_GRAD_NORM,
        "max_seq_len": MAX_SEQ_LEN,
        "num_samples": 0,
        "save_every_n_steps": 100_000,
        "keep_last": 1,
    }
    overrides = [f"{key}={value}" for key, value in options.items()]
    return ["--config", str(REPOSITORY / "examples/quickstart/lora.yaml"), *overrides]


def tokenize(base_dir: Path, rows_file: Path) -> list[Row]:
    """Return a file's rows as tokens and labels, from the recipe's data path."""
    cfg = load_config(make_arguments(base_dir, rows_file, "cpu"))
    tokenizer = build_component(cfg.tokenizer)
    data = build_component(cfg.dataset, tokenizer=tokenizer, max_seq_len=MAX_SEQ_LEN, seed=0)
    return [describe_row(row) for row in data.sequences]


def train_ours(task: Task) -> Adapter:
    """Run the recipe by its entry point, like its command."""
    from safetensors.torch import load_file

    if sys.path[0] != str(REPOSITORY):  # torchtune has a package of that name, too
        sys.path.insert(0, str(REPOSITORY))
    from recipes.lora_finetune import recipe_main

    out, argv = task.folder / "run", sys.argv
    arguments = make_arguments(task.base_dir, task.rows_file, task.device)
    sys.argv = ["lora_finetune.py", *arguments, f"seed={task.seed}", f"output_dir={out}"]
    try:
        recipe_main()
    finally:
        sys.argv = argv
    return load_file(out / "last/adapter_model.safetensors")


def train_peft(task: Task) -> Adapter:
    """Train with transformers and PEFT in a simple loop: rows shuffled by the seed, loss averaged over a step's tokens.

    The adapter is float32: PEFT's default over a bf16 base.
    """
    import peft
    from train_peft import load_model, make_batch

    torch.manual_seed(task.seed)
    base = argparse.Namespace(base_weights="bf16", base_dir=task.base_dir, rank=RANK, alpha=ALPHA, dropout=DROPOUT)
    model = load_model(base).to(task.device)
    generator = torch.Generator().manual_seed(task.seed)
    orders = (torch.randperm(len(task.rows), generator=generator).tolist() for _ in range(EPOCHS))
    take_steps(model, task, orders, lambda rows: model(**move(make_batch(rows), task.device)).loss)
    # The judge expects the names of our adapter files.
    return {name: weight.cpu() for name, weight in peft.get_peft_model_state_dict(model).items()}


def train_stock(task: Task) -> Adapter:
    """Train like torchtune's lora_finetune_single_device: its model, loss, collation and order of rows, all bf16.

    Its sampler always has seed 0; the config's seed sets adapter and dropout.
    """
    from torchtune import training
    from torchtune.data import padded_collate_sft
    from torchtune.models.convert_weights import tune_to_peft_adapter_weights
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params
    from torchtune.training.seed import set_seed

    set_seed(task.seed)
    model, shape = load_stock_model(task), read_architecture(task.base_dir)
    loss_module = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_module.num_output_chunks)
    ignored = torch.full((ROWS_PER_STEP, 1), IGNORED_LABEL, device=task.device)

    def compute_loss(rows: list[Row]) -> Tensor:
        batch = move(padded_collate_sft(rows, padding_idx=0, ignore_idx=IGNORED_LABEL), task.device)
        labels = torch.hstack((batch["labels"][:, 1:], ignored[: len(rows)]))
        return loss_module(model(batch["tokens"]), labels)

    sampler = torch.utils.data.DistributedSampler(task.rows, num_replicas=1, rank=0, shuffle=True, seed=0)
    with training.set_default_dtype(torch.bfloat16):
        take_steps(model, task, list_stock_orders(sampler), compute_loss)
    weights = {name: weight.float().cpu() for name, weight in get_adapter_params(model).items()}
    return tune_to_peft_adapter_weights(weights, **get_heads(shape))


def get_heads(shape: Architecture) -> dict[str, int]:
    """Return the arguments of torchtune's conversion between weight layouts."""
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    return heads | {"dim": shape.embed_dim, "head_dim": shape.head_dim}


def list_stock_orders(sampler: torch.utils.data.DistributedSampler) -> Iterator[list[int]]:
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        yield list(sampler)


def load_stock_model(task: Task) -> torch.nn.Module:
    """Return torchtune's LoRA model with the base's weights; the adapter is bf16, too."""
    from safetensors.torch import load_file
    from torchtune import training
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3_2._component_builders import lora_llama3_2
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    shape = read_architecture(task.base_dir)
    options = make_stock_architecture(shape) | {"model.max_seq_len": MAX_SEQ_LEN}
    options = {key.removeprefix("model."): value for key, value in options.items() if "_component_" not in key}
    with training.set_default_dtype(torch.bfloat16), torch.device(task.device):
        model = lora_llama3_2(
            **options,
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
        )
    weights = hf_to_tune(load_file(task.base_dir / "model.safetensors"), **get_heads(shape))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("lora_" in name for name in missing), (missing, unexpected)
    set_trainable_params(model, get_adapter_params(model))
    return model.train()


def take_steps(model: torch.nn.Module, task: Task, orders: Iterator[list[int]], compute_loss) -> None:
    """Train all epochs with the recipe's optimizer, schedule and clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    num_steps = EPOCHS * -(-len(task.rows) // ROWS_PER_STEP)
    schedule = get_schedule(optimizer, name="cosine", num_warmup_steps=WARMUP_STEPS, num_training_steps=num_steps)
    for order in orders:
        for start in range(0, len(order), ROWS_PER_STEP):
            compute_loss([task.rows[index] for index in order[start : start + ROWS_PER_STEP]]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()


def move(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


class Judge:
    """transformers in float32 with the adapter merged into the base: one measure for all sides."""

    def __init__(self, base_dir: Path, device: str) -> None:
        import transformers

        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, **options).to(device).eval()
        self.device = device

    @torch.no_grad()
    def measure(self, rows: list[Row], adapter: Adapter | None = None) -> float:
        """Return the loss of rows in nats per supervised token. No adapter: the base's loss."""
        kept = self._merge(adapter or {})
        total, count = 0.0, 0
        for start in range(0, len(rows), ROWS_JUDGED_TOGETHER):
            part = rows[start : start + ROWS_JUDGED_TOGETHER]
            tokens = pad_sequence([torch.tensor(row["tokens"]) for row in part], batch_first=True).to(self.device)
            labels = [torch.tensor(row["labels"]) for row in part]
            labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL).to(self.device)
            # Padding is behind the rows, where no token of them sees it.
            logits = self.model(tokens).logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
            ).item()
            count += int((labels[:, 1:] != IGNORED_LABEL).sum())
        for weight, original in kept:
            weight.copy_(original)
        return total / count

    def _merge(self, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
        """Add the adapter to the weights; return each changed weight with its old value."""
        kept, merged = [], 0
        for name, lora_a in adapter.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_b = adapter[name.replace(".lora_A.", ".lora_B.")]
            weight = self.model.get_submodule(module).weight
            kept.append((weight, weight.clone()))
            weight += ALPHA / RANK * (lora_b.float() @ lora_a.float()).to(weight)
            merged += 2
        assert merged == len(adapter), f"not all of the adapter was merged: {sorted(adapter)[:4]}"
        return kept


TRAINERS = {"ours": train_ours, "peft": train_peft, "stock": train_stock}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
