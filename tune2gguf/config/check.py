"""The check of a config before weights, tokenizer or rows are loaded. All problems are raised as one error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tune2gguf.base.gguf_rounding import get_gguf_type
from tune2gguf.config.components import COMPONENTS, find_build_problems, find_component_problems
from tune2gguf.config.keys import KEYS, find_valid, find_value_problems
from tune2gguf.config.names import suggest
from tune2gguf.config.places import (
    find_base_problems,
    find_base_warnings,
    find_data_problems,
    find_device_problems,
    find_output_problems,
)
from tune2gguf.config.plan import raise_problems
from tune2gguf.data.sources import holds_rows_out
from tune2gguf.guide import RATIO_ADVICE, RATIO_LIMITS

WAY_OUT = "hold rows out with dataset.validation_split or dataset.validation_files"


def check_config(config: DictConfig) -> list[str]:
    """Check keys, types, ranges, references, device and files. Return warnings about legal but unusual values.

    Raises:
        ValueError: with every problem, one per line
    """
    values, num_processes = _resolve(config), int(os.environ.get("WORLD_SIZE", "1"))
    valid = find_valid(values)
    components = {name: values[name] for name in COMPONENTS if isinstance(values.get(name), dict)}
    problems = _find_own_problems(values)
    problems += find_device_problems(valid, num_processes=num_processes)
    problems += find_output_problems(valid)
    problems += find_base_problems(valid, components.get("model", {}))
    problems += find_data_problems(valid, components.get("dataset"), num_processes=num_processes)
    problems += _find_validation_problems(valid, components.get("dataset"))
    raise_problems(problems or find_build_problems(values))
    warnings = [*_find_device_warnings(valid), *_find_ratio_warnings(valid), *find_base_warnings(valid)]
    return [*warnings, *_find_validation_warnings(valid, components["dataset"])]


def check_values(config: DictConfig) -> None:
    """Check keys, types, ranges and references, but neither device nor files.

    Raises:
        ValueError: with every problem, one per line
    """
    raise_problems(_find_own_problems(_resolve(config)))


def _find_own_problems(values: Mapping[str, Any]) -> list[str]:
    # A rule across keys is checked only if each of its values is valid by itself.
    valid = find_valid(values)
    return [
        *_find_key_problems(values),
        *find_component_problems(values),
        *_find_precision_problems(valid),
        *_find_offloading_problems(valid),
    ]


def _resolve(config: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"the config does not resolve: {str(error).splitlines()[0]}") from None


def _find_key_problems(values: Mapping[str, Any]) -> Iterator[str]:
    known = [*KEYS, *COMPONENTS]
    for name, value in values.items():
        if name not in known:
            yield f"unknown config key {str(name)!r}{suggest(str(name), known)}"
        elif name in KEYS:
            yield from find_value_problems(name, value, KEYS[name])
    yield from (f"missing config key {name!r}" for name in known if name not in values)


def _find_precision_problems(valid: Mapping[str, Any]) -> Iterator[str]:
    base_weights, dtype = valid.get("base_weights"), valid.get("dtype")
    gguf_type = None if base_weights is None else get_gguf_type(base_weights)
    if gguf_type is not None:
        if dtype == "fp32":
            yield f"base_weights={base_weights} with dtype=fp32: the weights of a GGUF are kept in bf16; use dtype=bf16"
        if valid.get("quantization") not in (None, gguf_type):
            yield (
                f"base_weights={base_weights} with quantization={valid['quantization']}: the run is served with the "
                f"GGUF that it is trained over; use quantization={gguf_type}"
            )
    elif None not in (base_weights, dtype) and base_weights not in ("fp8", "nf4", dtype):
        yield f"base_weights={base_weights} with dtype={dtype}: unquantized weights are kept in dtype; set both alike"
    if base_weights == "fp8" and valid.get("compile"):
        yield "base_weights=fp8 with compile=true: compiled layers have no fp8 products; use compile=false"


def _find_offloading_problems(valid: Mapping[str, Any]) -> Iterator[str]:
    if not valid.get("enable_activation_offloading"):
        return
    if valid.get("device") == "cpu":
        yield "enable_activation_offloading=true with device=cpu: activations are already on the CPU; set it to false"
    if valid.get("enable_activation_checkpointing") is False:
        yield (
            "enable_activation_offloading=true without enable_activation_checkpointing=true: moving all activations "
            "takes longer than recomputing them; set both to true"
        )


def _find_device_warnings(valid: Mapping[str, Any]) -> Iterator[str]:
    if valid["device"] == "mps":
        yield "device=mps is experimental: no test of this package has run on it; compare a short run with device=cpu"


def _find_ratio_warnings(valid: Mapping[str, Any]) -> Iterator[str]:
    alpha, rank = valid["lora_alpha"], valid["lora_rank"]
    lowest, highest = RATIO_LIMITS
    if not lowest <= alpha / rank <= highest:
        yield f"lora_alpha / lora_rank = {alpha} / {rank} = {alpha / rank:g}. The guide says: {RATIO_ADVICE}"


def _find_validation_problems(valid: Mapping[str, Any], dataset: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a problem if early stopping has no validation rows."""
    patience = valid.get("early_stopping_patience")
    if patience is not None and dataset is not None and not holds_rows_out(dataset):
        yield f"early_stopping_patience={patience} needs validation rows; {WAY_OUT}"


def _find_validation_warnings(valid: Mapping[str, Any], dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield the validation keys that have no effect, because there are no validation rows."""
    if holds_rows_out(dataset):
        return
    for name in ("eval_every_n_steps", "max_val_rows"):
        if valid[name] is not None:
            yield f"{name}={valid[name]} has no effect without validation rows; {WAY_OUT}"
