"""Read a config with its overrides and find every mistake in it before anything slow is loaded."""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune2gguf.schedules import SCHEDULERS

if TYPE_CHECKING:
    from omegaconf import DictConfig

QUANTIZATIONS = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
    "IQ4_XS",
    "IQ4_NL",
]


@dataclass(frozen=True)
class Key:
    """What a top-level key accepts. Limits are inclusive unless said otherwise; None as a limit means none."""

    kind: type
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # exclusive minimum
    below: float | None = None  # exclusive maximum
    choices: tuple[str, ...] = ()
    optional: bool = False  # null is a value
    why_not: str = ""  # why a value outside the limits makes no sense


KEYS = {
    "learning_rate": Key(float, above=0, maximum=1, why_not="at 0 nothing is learned"),
    "epochs": Key(int, minimum=1, why_not="without an epoch nothing is learned"),
    "lora_rank": Key(int, minimum=1, why_not="an adapter of rank 0 has no weights"),
    "lora_alpha": Key(float, above=0, why_not="at 0 the adapter has no effect"),
    "lora_dropout": Key(float, minimum=0, below=1, why_not="at 1 nothing passes the adapter"),
    "max_seq_len": Key(int, minimum=2, why_not="a row needs a token to predict from and one to predict"),
    "warmup_steps": Key(int, minimum=0),
    "scheduler": Key(str, choices=SCHEDULERS),
    "seed": Key(int, minimum=0, maximum=2**32 - 1),
    "batch_size": Key(int, minimum=1),
    "quantization": Key(str, choices=QUANTIZATIONS),
    "weight_decay": Key(float, minimum=0),
    "gradient_accumulation_steps": Key(int, minimum=1),
    "max_steps_per_epoch": Key(int, minimum=1, optional=True),
    "clip_grad_norm": Key(float, above=0, optional=True, why_not="null turns clipping off"),
    "base_dir": Key(str),
    "base_source": Key(str, optional=True),
    "base_weights": Key(str, choices=("bf16", "fp32", "nf4")),
    "chat_format": Key(str, choices=("llama3", "chatml")),
    "output_dir": Key(str),
    "device": Key(str),
    "dtype": Key(str, choices=("bf16", "fp32")),
    "enable_activation_checkpointing": Key(bool),
}

COMPONENTS = ("model", "tokenizer", "dataset", "optimizer", "lr_scheduler")

# Given by the recipe when it builds the component, so they may not stand in the YAML.
_GIVEN_BY_RECIPE = {
    "dataset": {"tokenizer", "max_seq_len", "seed"},
    "optimizer": {"params"},
    "lr_scheduler": {"optimizer", "num_training_steps"},
}

# One fact stands in one place: these component keys must be what the flat key says.
_REFERENCES = {
    "model.base_dir": "base_dir",
    "model.lora_rank": "lora_rank",
    "model.lora_alpha": "lora_alpha",
    "model.lora_dropout": "lora_dropout",
    "model.max_seq_len": "max_seq_len",
    "tokenizer.base_dir": "base_dir",
    "tokenizer.chat_format": "chat_format",
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "lr_scheduler.name": "scheduler",
    "lr_scheduler.num_warmup_steps": "warmup_steps",
}

# The guide's spellings and stock torchtune's keys, for whoever comes from there.
_OTHER_NAMES = {
    "LearningRate": "learning_rate",
    "Epochs": "epochs",
    "LoraRank": "lora_rank",
    "LoraAlpha": "lora_alpha",
    "LoraDropout": "lora_dropout",
    "MaxSeqLength": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "WarmupSteps": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "SchedulerType": "scheduler",
    "Seed": "seed",
    "BatchSize": "batch_size",
    "Quantization": "quantization",
    "WeightDecay": "weight_decay",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "checkpointer": "base_dir",
    "checkpoint_dir": "base_dir",
}


def load_config(arguments: list[str]) -> DictConfig:
    """Read `--config FILE [key=value …]`; a value may hold '=' and spaces.

    Raises:
        ValueError: if the file is missing or not a YAML mapping, or an override is not key=value
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    parser = argparse.ArgumentParser(prog="lora_finetune", description="Fine-tune a Llama with LoRA.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML of configs/ or examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML, components with dots")
    parsed = parser.parse_args(arguments)
    try:
        config = OmegaConf.load(parsed.config)
        if not OmegaConf.is_dict(config):
            raise ValueError(f"{parsed.config}: a config is a mapping of keys to values")
        malformed = [override for override in parsed.overrides if "=" not in override]
        if malformed:
            raise ValueError(f"overrides are written key=value; got {' '.join(malformed)}")
        return OmegaConf.merge(config, OmegaConf.from_dotlist(parsed.overrides))
    except FileNotFoundError:
        raise ValueError(f"{parsed.config}: no such config; see configs/ and examples/") from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{parsed.config}: cannot be read as YAML with these overrides: {error}") from None


def build_component(node: DictConfig, *arguments: Any, **given: Any) -> Any:
    """Call the `_component_` of a node with its keys and what the recipe gives.

    torchtune's `instantiate` would turn the dataclasses among the recipe's arguments into config nodes.
    """
    from omegaconf import OmegaConf
    from torchtune.config._utils import _get_component_from_path

    options = OmegaConf.to_container(node, resolve=True)
    return _get_component_from_path(options.pop("_component_"))(*arguments, **options, **given)


def check_config(config: DictConfig) -> None:
    """Check keys, types, ranges, references and files, without loading a weight, a tokenizer or a row.

    Raises:
        ValueError: with every problem, one a line
    """
    problems = list(_find_key_problems(config))
    if not problems:
        problems += _find_component_problems(config)
    if not problems:
        problems += _find_conflicts(config)
        problems += _find_path_problems(config)
    if problems:
        raise ValueError("\n".join(problems))


def check_plan(*, num_rows: int, rows_per_step: int, num_training_steps: int, warmup_steps: int) -> None:
    """Check what can be known only when the rows are counted.

    Raises:
        ValueError: with every problem, one a line
    """
    problems = []
    if rows_per_step > num_rows:
        problems.append(
            f"a step takes {rows_per_step} rows, but there are only {num_rows} training rows; "
            "lower batch_size or gradient_accumulation_steps"
        )
    if warmup_steps > num_training_steps:
        problems.append(
            f"warmup_steps={warmup_steps} is longer than the run of {num_training_steps} steps; "
            f"use at most {max(0, num_training_steps // 10)}, or more epochs"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _find_key_problems(config: DictConfig) -> Iterator[str]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        yield f"the config does not resolve: {error}"
        return
    known = [*KEYS, *COMPONENTS]
    for name, value in values.items():
        if name not in known:
            yield f"unknown config key {name!r}{_suggest(str(name), known)}"
        elif name in KEYS:
            yield from _find_value_problems(name, value, KEYS[name])
    yield from (f"missing config key {name!r}" for name in known if name not in values)


def _suggest(name: str, known: list[str]) -> str:
    if name in _OTHER_NAMES:
        return f"; did you mean {_OTHER_NAMES[name]!r}?"
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known keys: {', '.join(known)}"


def _find_value_problems(name: str, value: Any, key: Key) -> Iterator[str]:
    if value is None:
        if not key.optional:
            yield f"{name} is empty; it needs a value"
        return
    is_bool = isinstance(value, bool)
    accepted = (int, float) if key.kind is float else (key.kind,)
    if not isinstance(value, accepted) or (is_bool and key.kind is not bool):
        yield f"{name}={value!r} is a {type(value).__name__}; it must be {_describe_kind(key.kind)}"
        return
    if key.choices and value not in key.choices:
        yield f"{name}={value!r} is not one of {', '.join(key.choices)}"
    if key.kind in (int, float) and not _is_within(value, key):
        reason = f" ({key.why_not})" if key.why_not else ""
        yield f"{name}={value} is out of range: it must be {_describe_limits(key)}{reason}"


def _is_within(value: float, key: Key) -> bool:
    return (
        math.isfinite(value)
        and (key.minimum is None or value >= key.minimum)
        and (key.maximum is None or value <= key.maximum)
        and (key.above is None or value > key.above)
        and (key.below is None or value < key.below)
    )


def _describe_kind(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def _describe_limits(key: Key) -> str:
    limits = {"at least": key.minimum, "above": key.above, "at most": key.maximum, "below": key.below}
    return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None) or "finite"


def _find_component_problems(config: DictConfig) -> Iterator[str]:
    from omegaconf import OmegaConf
    from torchtune.config._errors import InstantiationError
    from torchtune.config._utils import _get_component_from_path

    for name in COMPONENTS:
        node = OmegaConf.to_container(config[name], resolve=True) if OmegaConf.is_dict(config[name]) else {}
        if "_component_" not in node:
            yield f"{name} needs a _component_, the dotted path of what builds it"
            continue
        path = node.pop("_component_")
        try:
            parameters = inspect.signature(_get_component_from_path(path)).parameters
        except (InstantiationError, ValueError) as error:
            yield f"{name}._component_={path}: {str(error).splitlines()[0]}"
            continue
        given = _GIVEN_BY_RECIPE.get(name, set())
        settable = [parameter for parameter in parameters if parameter not in given]
        for key in node:
            if key not in settable:
                yield f"unknown config key {f'{name}.{key}'!r}{_suggest(key, settable)}"
        required = {key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
        for key in sorted(required - given - node.keys()):
            yield f"missing config key {f'{name}.{key}'!r}"


def _find_conflicts(config: DictConfig) -> Iterator[str]:
    from omegaconf import OmegaConf

    for path, flat in _REFERENCES.items():
        value = OmegaConf.select(config, path)
        if value is not None and value != config[flat]:
            yield f"{path}={value} contradicts {flat}={config[flat]}; set {flat} only"
    if config.base_weights != "nf4" and config.base_weights != config.dtype:
        yield f"base_weights={config.base_weights} with dtype={config.dtype}: unquantized weights are kept in dtype"


def _find_path_problems(config: DictConfig) -> Iterator[str]:
    from tune2gguf.data import check_files
    from tune2gguf.runs import describe_existing

    base_dir = Path(config.base_dir)
    if not base_dir.is_dir():
        yield f"no base model in {base_dir}. Get it with:\n  python scripts/download.py --config …"
    if Path(config.output_dir).exists():
        yield describe_existing(Path(config.output_dir))
    yield from check_files(config.dataset)
