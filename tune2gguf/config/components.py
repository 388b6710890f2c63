"""The components of a config. Their keys are their callables' parameters; references pass flat keys to them."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tune2gguf.commands import MAPPING_KEYS
from tune2gguf.config.keys import KEYS, Key, find_value_problems
from tune2gguf.config.names import suggest
from tune2gguf.guide import REFERENCES
from tune2gguf.model.architectures import ARCHITECTURES

_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD

COMPONENTS = ("model", "tokenizer", "dataset", "optimizer", "lr_scheduler", "metric_logger")
_OPTIONAL = ("metric_logger",)  # null builds none

# The packages that torchtune's metric loggers import. This package does not depend on them.
_LOGGER_PACKAGES = {
    "TensorBoardLogger": "tensorboard",
    "WandBLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
}

# Arguments that the recipe passes to a component, so the YAML may not set them.
_GIVEN_BY_RECIPE = {
    "dataset": {"tokenizer", "max_seq_len", "seed"},
    "optimizer": {"params"},
    "lr_scheduler": {"optimizer", "num_training_steps"},
}


def find_component_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of the components' callables, keys and references."""
    for name in COMPONENTS:
        if name not in values:
            continue  # reported as a missing key
        node = values[name]
        if node is None and name in _OPTIONAL:
            continue
        if not isinstance(node, dict) or not isinstance(node.get("_component_"), str):
            yield f"{name} needs a _component_, the dotted path of a class or function"
            continue
        options = {key: value for key, value in node.items() if key != "_component_"}
        try:
            parameters = inspect.signature(_find_callable(node["_component_"])).parameters
        except ValueError as error:
            yield f"{name}._component_={node['_component_']}: {error}"
            continue
        given = _GIVEN_BY_RECIPE.get(name, set())
        named = {key: parameter for key, parameter in parameters.items() if parameter.kind is not _VAR_KEYWORD}
        settable = [parameter for parameter in named if parameter not in given]
        yield from _find_name_problems(name, options, settable, takes_any=len(named) < len(parameters))
        required = {key for key, parameter in named.items() if parameter.default is inspect.Parameter.empty}
        yield from (f"missing config key {f'{name}.{key}'!r}" for key in sorted(required - given - options.keys()))
        yield from _find_reference_problems(name, options, values, settable=settable)
        if name == "model":
            yield from _find_model_problems(options)
        if name == "metric_logger":
            yield from _find_package_problems(node["_component_"].rpartition(".")[2])


def _find_callable(path: str) -> Callable:
    """Return the class or function at a dotted path. Raises ValueError if there is none."""
    from torchtune.config._errors import InstantiationError
    from torchtune.config._utils import _get_component_from_path

    try:
        found = _get_component_from_path(path)
    except (InstantiationError, ValueError, ImportError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not callable(found):
        raise ValueError(f"is a {type(found).__name__}, not a class or function")
    return found


def _find_package_problems(logger: str) -> Iterator[str]:
    package = _LOGGER_PACKAGES.get(logger)
    if package is not None and importlib.util.find_spec(package) is None:
        yield f"metric_logger: {logger} needs the package {package}, which is not installed: pip install {package}"


def _find_name_problems(component: str, options: dict, settable: list[str], *, takes_any: bool) -> Iterator[str]:
    """Yield the keys that the callable does not take; if it takes any key, only probable misspellings."""
    for key, value in options.items():
        name = f"{component}.{key}"
        if key not in settable and (not takes_any or difflib.get_close_matches(key, settable, cutoff=0.8)):
            yield f"unknown config key {name!r}{suggest(name, settable, flat=KEYS)}"
        elif isinstance(value, dict) and name not in MAPPING_KEYS:
            # No other key takes a mapping: without this check, a key one level too deep would be passed as a value.
            for inner in value:
                yield f"unknown config key {f'{name}.{inner}'!r}; {name} holds a value, not keys"


def _find_reference_problems(
    component: str, options: dict, values: Mapping[str, Any], *, settable: list[str]
) -> Iterator[str]:
    for path, flat in REFERENCES.items():
        name, _, key = path.partition(".")
        if name != component or flat not in values:
            continue
        if values[flat] is None and KEYS[flat].optional:
            # null stands for a component without this setting.
            if key in settable:
                yield f"{flat} is empty; {component}._component_ takes {key!r}, so it needs a value"
        elif key not in settable:
            way_out = f"; set {flat}=null and remove {path}" if KEYS[flat].optional else ""
            yield f"{flat} has no effect: {component}._component_ takes no {key!r}{way_out}"
        elif key not in options:
            yield f"{flat} has no effect: {path} must be ${{{flat}}}"
        elif not isinstance(options[key], dict) and options[key] != values[flat]:
            yield f"{path}={options[key]} contradicts {flat}={values[flat]}; set {flat} only"


def _find_model_problems(options: dict) -> Iterator[str]:
    from tune2gguf.model.llama import LORA_ATTN_MODULES

    keys = {
        "architecture": Key(str, choices=tuple(ARCHITECTURES), optional=True),
        "lora_attn_modules": Key(list, choices=LORA_ATTN_MODULES),
        "apply_lora_to_mlp": Key(bool),
    }
    for key, accepted in keys.items():
        if key in options:
            yield from find_value_problems(f"model.{key}", options[key], accepted)
    if options.get("lora_attn_modules") == [] and options.get("apply_lora_to_mlp") is False:
        yield "model.lora_attn_modules=[] and model.apply_lora_to_mlp=false leave nothing to train"


def find_build_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the error of building the optimizer or the schedule, tried on a single weight."""
    import torch

    def build(name: str, *arguments: Any, **given: Any) -> Any:
        options = {key: value for key, value in values[name].items() if key != "_component_"}
        return _find_callable(values[name]["_component_"])(*arguments, **options, **given)

    name = "optimizer"
    try:
        optimizer = build(name, [torch.nn.Parameter(torch.zeros(1))])
        name = "lr_scheduler"
        build(name, optimizer, num_training_steps=1)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        yield f"{name} cannot be built: {type(error).__name__}: {' '.join(str(error).split())}"
