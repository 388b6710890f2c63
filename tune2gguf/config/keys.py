"""The flat keys of a config: what each accepts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune2gguf.base.gguf_rounding import make_gguf_kinds
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.guide import SCHEDULERS
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES


@dataclass(frozen=True)
class Key:
    """The values that a key accepts. Limits are inclusive unless noted; None is no limit."""

    kind: type
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # exclusive minimum
    below: float | None = None  # exclusive maximum
    choices: Sequence[str] = ()  # of the value, or of each element of a list
    optional: bool = False  # null is accepted
    or_false: bool = False  # false is accepted, too
    or_auto: bool = False  # auto is accepted, too
    why_not: str = ""  # reason of the limits, shown in the error


KEYS = {
    "learning_rate": Key(float, above=0, maximum=1, why_not="at 0 nothing is learned"),
    "epochs": Key(int, minimum=1, why_not="without an epoch nothing is learned"),
    "lora_rank": Key(int, minimum=1, why_not="an adapter of rank 0 has no weights"),
    "lora_alpha": Key(float, above=0, why_not="at 0 the adapter has no effect"),
    "lora_dropout": Key(float, minimum=0, below=1, why_not="at 1 the adapter gets no input"),
    "max_seq_len": Key(int, minimum=2, why_not="a row needs a token to predict from and one to predict"),
    "warmup_steps": Key(int, minimum=0, why_not="0 turns warm-up off"),
    "scheduler": Key(str, choices=SCHEDULERS, optional=True),
    "seed": Key(int, minimum=0, maximum=2**32 - 1),
    "batch_size": Key(int, minimum=1, why_not="a step needs a row"),
    "quantization": Key(str, choices=tuple(QUANTIZATIONS)),
    "weight_decay": Key(float, minimum=0, why_not="a negative decay would make weights grow"),
    "gradient_accumulation_steps": Key(int, minimum=1, why_not="1 accumulates nothing"),
    "max_steps_per_epoch": Key(int, minimum=1, optional=True, why_not="null runs every row"),
    "clip_grad_norm": Key(float, above=0, optional=True, why_not="null turns clipping off"),
    "base_dir": Key(str),
    "base_source": Key(str, optional=True),
    "base_weights": Key(str, choices=("bf16", "fp32", "fp8", "nf4", *make_gguf_kinds())),
    "chat_template": Key(str, choices=tuple(CHAT_TEMPLATES)),
    "output_dir": Key(str),
    "device": Key(str),
    "dtype": Key(str, choices=("bf16", "fp32")),
    "tokens_per_pass": Key(int, minimum=1, or_auto=True, why_not="auto takes as many as fit into memory"),
    "enable_activation_checkpointing": Key(bool, or_auto=True),
    "enable_activation_offloading": Key(bool),
    "compile": Key(bool),
    "save_every_n_steps": Key(int, minimum=1, optional=True, why_not="null saves about every 5 % of the run"),
    "keep_last": Key(int, minimum=1, why_not="without a checkpoint a run cannot be resumed"),
    "resume": Key(str, or_false=True),
    "parallel": Key(str, choices=("auto", "replicate", "shard")),
    "on_nonfinite": Key(str, choices=("stop", "skip")),
    "eval_every_n_steps": Key(int, minimum=1, optional=True, why_not="null validates up to 10 times per run"),
    "max_val_rows": Key(int, minimum=1, optional=True, why_not="null uses up to 10 % of the training time"),
    "early_stopping_patience": Key(int, minimum=1, optional=True, why_not="null never stops early"),
    "num_samples": Key(int, minimum=0, why_not="0 turns samples off"),
    "score_general_prompts": Key(bool, or_auto=True),
    "parent_run": Key(str, optional=True),
}

_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list of texts",
}


def find_value_problems(name: str, value: Any, key: Key) -> Iterator[str]:
    """Yield the problems of one key's value by itself."""
    if value is None:
        if not key.optional:
            yield f"{name} is empty; it needs a value"
    elif (value is False and key.or_false) or (value == "auto" and key.or_auto):
        return
    elif value is True and key.or_false:
        yield f"{name}=true names no checkpoint; use auto, false, or a folder checkpoints/step_N of the run"
    elif not _is_kind(value, key.kind):
        expected = _KIND_NAMES[key.kind] + (", or auto" if key.or_auto else "")
        yield f"{name}={value!r} is {_describe_type(value)}; it must be {expected}"
    elif key.kind in (int, float):
        if not _is_within(value, key):
            reason = f" ({key.why_not})" if key.why_not else ""
            yield f"{name}={value} is out of range: it must be {_describe_limits(key)}{reason}"
    elif key.kind is str and not value.strip():
        yield f"{name} is empty; it needs a value"
    elif key.kind is str and key.choices and value not in key.choices:
        yield f"{name}={value!r} is not one of {', '.join(key.choices)}{_suggest_choice(value, key.choices)}"
    elif key.kind is list and not set(value) <= set(key.choices):
        yield f"{name}={value} may hold only {', '.join(key.choices)}"


def find_valid(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat keys with valid values, on which rules across keys can rely."""
    return {
        name: values[name]
        for name, key in KEYS.items()
        if name in values and not any(find_value_problems(name, values[name], key))
    }


def _is_kind(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(element, str) for element in value)
    accepted = (int, float) if kind is float else kind
    # In Python, bool is a subclass of int.
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _describe_type(value: Any) -> str:
    names = _KIND_NAMES | {bool: "a boolean", list: "a list", dict: "a mapping of keys to values"}
    return names.get(type(value), type(value).__name__)


def _is_within(value: float, key: Key) -> bool:
    return (
        -math.inf < value < math.inf  # isfinite() fails on whole numbers beyond floats
        and (key.minimum is None or value >= key.minimum)
        and (key.maximum is None or value <= key.maximum)
        and (key.above is None or value > key.above)
        and (key.below is None or value < key.below)
    )


def _describe_limits(key: Key) -> str:
    limits = {"at least": key.minimum, "above": key.above, "at most": key.maximum, "below": key.below}
    return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None) or "finite"


def _suggest_choice(value: str, choices: Sequence[str]) -> str:
    by_lower_case = {choice.lower(): choice for choice in choices}
    nearest = difflib.get_close_matches(value.lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[nearest[0]]}?" if nearest else ""
