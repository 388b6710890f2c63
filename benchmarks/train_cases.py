"""The cases of train.py: bases, rows of an exact length, and the command that trains them on each side."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from tune2gguf.config import build_component, load_config
from tune2gguf.data import PreparedData, plan_epoch
from tune2gguf.data.tokenize import TokenizedRow
from tune2gguf.model.architectures import ARCHITECTURES, Architecture, read_architecture
from tune2gguf.model.loss import IGNORED_LABEL

REPOSITORY = Path(__file__).resolve().parents[1]
TUNE = str(Path(sys.executable).with_name("tune"))
SIDES = ("ours", "stock", "peft")
RANK, ALPHA, LEARNING_RATE, CLIP_GRAD_NORM = 16, 16, 1e-3, 1.0
ATTENTION = "[q_proj,k_proj,v_proj,output_proj]"
STOCK_DTYPES = {"bf16": "bf16", "fp32": "fp32", "nf4": "bf16"}
# With the space before it, each word is one token of Llama 3.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
)


@dataclass(frozen=True)
class Case:
    """A training to time. `supervised` is the share of each row's tokens; `seq` None: the quickstart's rows.

    One epoch, without a checkpoint between its steps: a usual run writes one per twenty steps at most. torchtune's
    recipe is slow and takes the first steps only; losses are compared at its last step.
    """

    base: str  # a name in ARCHITECTURES
    base_weights: str  # bf16 | fp32 | nf4
    batch: int
    steps: int
    stock_steps: int
    seq: int | None = None
    supervised: float | None = None
    dropout: float = 0.0  # with it, losses differ by each side's own draws

    def count_steps(self, side: str) -> int:
        """Return the steps that a side takes."""
        return self.stock_steps if side == "stock" else self.steps

    @property
    def dtype(self) -> str:
        """Return the dtype of the computation."""
        return STOCK_DTYPES[self.base_weights]


CASES = {
    "smollm2 quickstart": Case("smollm2_135m", "bf16", batch=4, steps=10, stock_steps=10, dropout=0.1),
    "smollm2 quickstart without dropout": Case("smollm2_135m", "bf16", batch=4, steps=10, stock_steps=10),
    "1b bf16 2x256 50%": Case("llama3_2_1b", "bf16", batch=2, steps=6, stock_steps=2, seq=256, supervised=0.5),
    "1b bf16 2x256 100%": Case("llama3_2_1b", "bf16", batch=2, steps=6, stock_steps=2, seq=256, supervised=1.0),
    "1b bf16 2x256 25%": Case("llama3_2_1b", "bf16", batch=2, steps=6, stock_steps=2, seq=256, supervised=0.25),
    "1b fp32 2x256 50%": Case("llama3_2_1b", "fp32", batch=2, steps=4, stock_steps=2, seq=256, supervised=0.5),
    "1b qlora 2x256 50%": Case("llama3_2_1b", "nf4", batch=2, steps=4, stock_steps=2, seq=256, supervised=0.5),
    "1b bf16 1x2048 50%": Case("llama3_2_1b", "bf16", batch=1, steps=3, stock_steps=2, seq=2048, supervised=0.5),
}


@dataclass(frozen=True)
class Prepared:
    """A prepared case: its base, our arguments, and the batches of every side in order."""

    case: Case
    base_dir: Path
    arguments: list[str]  # of our recipe, without output_dir
    batches_path: Path  # a JSON list of batches, each a list of {tokens, labels}

    def count_tokens(self) -> list[tuple[int, int]]:
        """Return the tokens and the supervised tokens of each step, without padding."""
        batches = json.loads(self.batches_path.read_text())
        return [
            (
                sum(len(row["tokens"]) for row in batch),
                sum(label != IGNORED_LABEL for row in batch for label in row["labels"]),
            )
            for batch in batches
        ]


def prepare_case(name: str, folder: Path) -> Prepared:
    """Make a case's missing files in a folder."""
    case = CASES[name]
    base_dir = REPOSITORY / "models/SmolLM2-135M-Instruct"
    options = {"dataset.validation_files": "null"}
    config = "examples/quickstart/lora.yaml"
    if case.seq is not None:
        base_dir, config = make_base(case.base, folder), "configs/llama3_2_1b/lora.yaml"
        rows = write_rows(folder / f"{name.replace(' ', '_')}.jsonl", case)
        options = {
            "dataset.files": f"[{rows}]",
            "dataset.validation_split": "null",
            "base_source": "null",
            "base_dir": base_dir,
            "max_seq_len": case.seq,
        }
    elif not base_dir.is_dir():
        sys.exit(f"{base_dir} is missing; get it: python scripts/download.py --config {config}")
    options |= {
        "learning_rate": LEARNING_RATE,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": case.dropout,
        "warmup_steps": 0,
        "scheduler": "constant",
        "clip_grad_norm": CLIP_GRAD_NORM,
        "batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "epochs": 1,
        "max_steps_per_epoch": case.steps,
        "save_every_n_steps": case.steps,
        "num_samples": 0,
        "device": "cpu",
        "dtype": case.dtype,
        "base_weights": case.base_weights,
    }
    arguments = ["--config", config, *(f"{key}={value}" for key, value in options.items())]
    batches_path = folder / f"{name.replace(' ', '_')}.batches.json"
    batches_path.write_text(json.dumps(plan_batches(case, arguments)))
    return Prepared(case, base_dir, arguments, batches_path)


def make_base(name: str, folder: Path) -> Path:
    """Return the folder of a base with a true architecture, random weights and Llama 3's tokenizer."""
    from tune2gguf.base.pypi import LLAMA3_TOKENIZER, fetch_pypi_file
    from tune2gguf.base.random_base import write_random_base

    base_dir = folder / name
    if not base_dir.exists():
        write_random_base(ARCHITECTURES[name], base_dir, tokenizer_model=fetch_pypi_file(LLAMA3_TOKENIZER))
    return base_dir


def write_rows(path: Path, case: Case) -> Path:
    """Write rows of exactly `seq` tokens in the short Llama 3 template, with the case's supervised share."""
    draw = random.Random(0)

    def make_words(count: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=count))

    rows = []
    for _ in range(case.batch * case.steps):
        if case.supervised == 1.0:
            # Between <|begin_of_text|> and <|end_of_text|>; " a b" and "a b" are as many tokens.
            rows.append({"text": make_words(case.seq - 2)})
            continue
        reply = round(case.seq * case.supervised) - 1  # and its <|eot_id|>
        # <|begin_of_text|>, two headers of four tokens, the prompt's <|eot_id|>, the reply and its own.
        prompt = case.seq - 1 - 2 * 4 - 1 - reply - 1
        messages = [("user", make_words(prompt)), ("assistant", make_words(reply))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan_batches(case: Case, arguments: list[str]) -> list[list[dict]]:
    """Return the batches of the recipe's steps, from its data path and in its order."""
    cfg = load_config(arguments)
    tokenizer = build_component(cfg.tokenizer)
    data: PreparedData = build_component(cfg.dataset, tokenizer=tokenizer, max_seq_len=cfg.max_seq_len, seed=cfg.seed)
    batches = []
    order = plan_epoch(data.sequence_lengths, seed=cfg.seed, epoch=0, rows_per_step=case.batch)
    for indices in order[: case.steps]:
        rows = [data.sequences[index] for index in indices]
        if case.seq is not None:
            assert {len(row.tokens) for row in rows} == {case.seq}, [len(row.tokens) for row in rows]
            assert all(abs(row.num_supervised - case.seq * case.supervised) <= 1 for row in rows)
        batches.append([describe_row(row) for row in rows])
    return batches


def describe_row(row: TokenizedRow) -> dict[str, list[int]]:
    """Return a row in the form of the other sides."""
    labels = [
        int(token) if supervised else IGNORED_LABEL
        for token, supervised in zip(row.tokens, row.supervised, strict=True)
    ]
    return {"tokens": [int(token) for token in row.tokens], "labels": labels}


def make_command(side: str, prepared: Prepared, output_dir: Path) -> tuple[list[str], Path]:
    """Return a side's command and working directory."""
    if side == "ours":
        return [TUNE, "run", "recipes/lora_finetune.py", *prepared.arguments, f"output_dir={output_dir}"], REPOSITORY
    if side == "peft":
        case = prepared.case
        options = {
            "--base-dir": prepared.base_dir,
            "--batches": prepared.batches_path,
            "--base-weights": case.base_weights,
            "--rank": RANK,
            "--alpha": ALPHA,
            "--dropout": case.dropout,
            "--learning-rate": LEARNING_RATE,
            "--clip-grad-norm": CLIP_GRAD_NORM,
            "--out": output_dir / "log.txt",
        }
        words = [str(word) for item in options.items() for word in item]
        return [sys.executable, str(REPOSITORY / "benchmarks/train_peft.py"), *words], output_dir
    # Not from the repository's root: there `tune` finds our recipes first.
    return make_stock_command(prepared, output_dir), output_dir


def make_stock_command(prepared: Prepared, output_dir: Path) -> list[str]:
    """Return the command of torchtune's recipe, on its config for the 1B model with overrides."""
    case = prepared.case
    options = {
        "output_dir": output_dir,
        "model.lora_attn_modules": ATTENTION,
        "model.lora_rank": RANK,
        "model.lora_alpha": ALPHA,
        "model.lora_dropout": case.dropout,
        "tokenizer.path": prepared.base_dir / "original/tokenizer.model",
        "checkpointer.checkpoint_dir": prepared.base_dir,
        "save_adapter_weights_only": True,
        "dataset._component_": "benchmarks.train_stock.PlannedRows",
        "dataset.path": prepared.batches_path,
        "shuffle": False,
        "batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "max_steps_per_epoch": case.stock_steps,
        "optimizer.lr": LEARNING_RATE,
        "lr_scheduler._component_": "benchmarks.train_stock.get_constant_schedule",
        "clip_grad_norm": CLIP_GRAD_NORM,
        "device": "cpu",
        "dtype": case.dtype,
        "log_peak_memory_stats": False,
    }
    if case.base_weights == "nf4":
        options["model._component_"] = "torchtune.models.llama3_2.qlora_llama3_2_1b"
    if case.seq is None:
        options |= make_stock_architecture(read_architecture(prepared.base_dir))
        options |= {
            "tokenizer._component_": "benchmarks.train_stock.load_tokenizer",
            "tokenizer.path": prepared.base_dir,
        }
    overrides = [f"{key}={value}" for key, value in options.items()]
    return [TUNE, "run", "lora_finetune_single_device", "--config", "llama3_2/1B_lora_single_device", *overrides]


def make_stock_architecture(shape: Architecture) -> dict[str, object]:
    """Return the options of torchtune's model builder. A scale factor of 1 leaves RoPE unscaled."""
    return {
        "model._component_": "torchtune.models.llama3_2._component_builders.lora_llama3_2",
        "model.vocab_size": shape.vocab_size,
        "model.num_layers": shape.num_layers,
        "model.num_heads": shape.num_heads,
        "model.num_kv_heads": shape.num_kv_heads,
        "model.embed_dim": shape.embed_dim,
        "model.intermediate_dim": shape.intermediate_dim,
        "model.max_seq_len": 512,
        "model.norm_eps": shape.norm_eps,
        "model.rope_base": int(shape.rope_base),
        "model.scale_factor": 1,
    }
