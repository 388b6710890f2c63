"""The twelve parameters of the fine-tuning guide: the config key, the component and the effect of each.

The table of docs/parameters.md and the head of every YAML are written from this list:
python -m tests.unit.write_guide_tables
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULERS = ("cosine", "linear", "constant")


# These component keys take the value of a flat key, so that each value is set in one place.
REFERENCES = {
    "model.base_dir": "base_dir",
    "model.lora_rank": "lora_rank",
    "model.lora_alpha": "lora_alpha",
    "model.lora_dropout": "lora_dropout",
    "model.max_seq_len": "max_seq_len",
    "tokenizer.base_dir": "base_dir",
    "tokenizer.chat_template": "chat_template",
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "lr_scheduler.name": "scheduler",
    "lr_scheduler.num_warmup_steps": "warmup_steps",
}


@dataclass(frozen=True)
class GuideParameter:
    """One parameter. `component` is the config key that takes its value, or the program that reads it."""

    guide: str
    key: str
    default: float | int | str  # the guide's recommendation, which the configs of its models use
    component: str
    effect: str


GUIDE_PARAMETERS = (
    GuideParameter(
        "LearningRate", "learning_rate", 1e-4, "optimizer.lr", "peak after warm-up; also try 2.0e-4, 5.0e-5"
    ),
    GuideParameter("Epochs", "epochs", 3, "recipe", "passes over the training rows"),
    GuideParameter("LoraRank", "lora_rank", 16, "model.lora_rank", "a higher rank captures more and costs memory"),
    GuideParameter(
        "LoraAlpha", "lora_alpha", 16, "model.lora_alpha", "adapter scale is alpha / rank; ratio 1, also try 2, 0.5"
    ),
    GuideParameter(
        "LoraDropout", "lora_dropout", 0.1, "model.lora_dropout", "share of the adapter's inputs dropped in training"
    ),
    GuideParameter(
        "MaxSeqLength", "max_seq_len", 2048, "model.max_seq_len, dataset", "token limit per row; memory grows with it"
    ),
    GuideParameter(
        "WarmupSteps", "warmup_steps", 10, "lr_scheduler.num_warmup_steps", "optimizer steps up to the peak; 0: none"
    ),
    GuideParameter(
        "SchedulerType", "scheduler", "cosine", "lr_scheduler.name", "after the peak: cosine, linear, constant"
    ),
    GuideParameter("Seed", "seed", 42, "recipe, dataset", "sets adapter, row order, split and dropout"),
    GuideParameter("BatchSize", "batch_size", 2, "recipe", "rows per step, times accumulation and devices"),
    GuideParameter("Quantization", "quantization", "Q4_K_M", "scripts/export.py", "type of the exported GGUF only"),
    GuideParameter(
        "WeightDecay", "weight_decay", 0.01, "optimizer.weight_decay", "decoupled, adapter only; also try 0.1, 0.001, 0"
    ),
)

RATIO_LIMITS = 0.5, 2.0
RATIO_ADVICE = (
    "A ratio of 1 is generally recommended, but feel free to experiment with ratios of 2 or 0.5 based on your specific "
    "needs."
)
