"""Reading of a config from a YAML and overrides, and building of its components."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tune2gguf.base.source import BaseSource, parse_base_source
from tune2gguf.commands import (
    MAPPING_KEYS,
    PATH_KEYS,
    TEXT_KEYS,
    TEXTS_KEYS,
    escape_references,
    expand_path,
    read_override,
    read_texts,
)
from tune2gguf.config.keys import KEYS
from tune2gguf.guide import REFERENCES
from tune2gguf.runs.config_file import ADDED_KEYS, flatten_config, rename_components

MODELS_FOLDER = "models"


def load_config(arguments: list[str]) -> DictConfig:
    """Return the config of the recipe's arguments, `--config FILE [key=value …]`.

    Raises:
        ValueError: if the file is missing or not a YAML mapping, or an override is not key=value
    """
    parser = argparse.ArgumentParser(prog="lora_finetune", description="Fine-tune a Llama with LoRA.")
    parser.add_argument("--config", type=expand_path, required=True, help="a YAML of configs/ or examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML, components with dots")
    parsed = parser.parse_intermixed_args(arguments)
    return read_config(parsed.config, parsed.overrides)


def read_config(path: Path, overrides: list[str]) -> DictConfig:
    """Read a YAML and apply `key=value` overrides. A value is YAML, and may contain '=' and spaces.

    ~ and environment variables are expanded, because the saved config may be read in another environment. A null
    `base_dir` becomes models/NAME with the repository's name in `base_source`: one override changes the base.

    Raises:
        ValueError: if the file is missing or not a YAML mapping, or an override is not key=value
    """
    _check_overrides(overrides)
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise ValueError(f"{path}: must be a mapping of keys to values")
        # The config may be the config.yaml of a run by an older version.
        config = OmegaConf.create(ADDED_KEYS | rename_components(OmegaConf.to_container(config)))
        apply_overrides(config, overrides)
        base_dir = derive_base_dir(config.get("base_source"))
        if config.get("base_dir", "") is None and base_dir is not None:
            config.base_dir = base_dir
        _settle_environment(config)
        _expand_paths(config)
        return config
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such config; see configs/ and examples/") from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as YAML with these overrides: {reason}") from None


def _check_overrides(overrides: list[str]) -> None:
    parts = [override.partition("=") for override in overrides]
    # OmegaConf takes ??? as a missing value and would silently keep the YAML's.
    malformed = ["".join(one) for one in parts if not (one[0].strip() and one[1]) or one[2] == "???"]
    if malformed:
        raise ValueError(f"overrides are written key=value; got {' '.join(malformed)}")


def apply_overrides(config: DictConfig, overrides: list[str]) -> None:
    """Apply `key=value` overrides to a config. A mapping is replaced as a whole.

    Raises:
        ValueError: if one is not key=value
    """
    _check_overrides(overrides)
    for key, _, text in (override.partition("=") for override in overrides):
        value = _read_value(key.strip(), text, config)
        OmegaConf.update(config, key, value, force_add=True, merge=key.strip() not in MAPPING_KEYS)


def _read_value(key: str, text: str, config: DictConfig) -> Any:
    """Return the value of an override, as text if the key takes text or now has text."""
    if key in TEXTS_KEYS:
        return read_texts(text)
    known = KEYS.get(REFERENCES.get(key, key))
    if known is not None:
        value = read_override(text, is_text=known.kind is str)
        return False if known.or_false and value == "false" else value
    now = OmegaConf.to_container(config)
    for name in key.split("."):
        now = now.get(name) if isinstance(now, dict) else None
    is_column = key.rpartition(".")[0] in MAPPING_KEYS
    return read_override(text, is_text=isinstance(now, str) or is_column or key in PATH_KEYS + TEXT_KEYS)


def _settle_environment(config: DictConfig) -> None:
    """Replace references to environment variables by their values.

    Other references stay. Those of a metric logger stay, too: they may be secret, and are not read again.
    """
    for key, value in flatten_config(OmegaConf.to_container(config)).items():
        if "oc.env" in str(value) and not key.startswith("metric_logger."):
            found = OmegaConf.select(config, key)
            found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
            OmegaConf.update(config, key, _map_texts(escape_references, found))


def _expand_paths(config: DictConfig) -> None:
    """Expand ~ in every path of the config."""
    for key, value in flatten_config(OmegaConf.to_container(config)).items():
        if key in PATH_KEYS and "~" in str(value):
            OmegaConf.update(config, key, _map_texts(os.path.expanduser, value))


def _map_texts(change: Callable[[str], str], value: Any) -> Any:
    """Apply `change` to a text, or to every text in a list or mapping. Other values are returned unchanged."""
    if isinstance(value, dict):
        return {key: _map_texts(change, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_map_texts(change, one) for one in value]
    return change(value) if isinstance(value, str) else value


def derive_base_dir(base_source: Any) -> str | None:
    """Return models/NAME for a base_source on the hub, None for any other."""
    if not isinstance(base_source, str) or not base_source.startswith("hf://"):
        return None
    name = base_source.partition("@")[0].rpartition("/")[2]
    return f"{MODELS_FOLDER}/{name}" if name else None


def build_metric_logger(config: DictConfig) -> Any:
    """Build the metric logger and log the config with it. Return None if the config has none.

    Raises:
        ValueError: if it cannot be opened, with its message
    """
    if config.metric_logger is None:
        return None
    try:
        logger = build_component(config.metric_logger)
        logger.log_config(config)
    except Exception as error:  # an error of a service, its client or a disk: the user's to fix
        name = config.metric_logger._component_.rpartition(".")[2]
        raise ValueError(f"metric_logger: {name} cannot be opened: {' '.join(str(error).split())}") from error
    return logger


def build_optimizer(node: DictConfig, parameters: list[Any]) -> Any:
    """Build the optimizer, fused if torch has that and the config does not choose an implementation.

    A fused optimizer updates all weights in one call; hundreds of small calls took longer than the update.
    """
    from torchtune.config._utils import _get_component_from_path

    settable = inspect.signature(_get_component_from_path(node["_component_"])).parameters
    is_fused = "fused" in settable and not {"fused", "foreach", "differentiable"} & node.keys()
    return build_component(node, parameters, **({"fused": True} if is_fused else {}))


def build_component(node: DictConfig, *arguments: Any, **given: Any) -> Any:
    """Call the `_component_` of a node with the node's keys and the recipe's arguments.

    torchtune's `instantiate` would turn the dataclasses among the recipe's arguments into config nodes.
    """
    from torchtune.config._utils import _get_component_from_path

    options = OmegaConf.to_container(node, resolve=True)
    return _get_component_from_path(options.pop("_component_"))(*arguments, **options, **given)


def read_base_keys(config_path: str | Path, overrides: list[str]) -> tuple[Path, BaseSource]:
    """Return `base_dir` and `base_source` of a config, after `key=value` overrides.

    Raises:
        ValueError: if the config cannot be read or lacks a key
    """
    config = read_config(Path(config_path), overrides)
    values = {key: config.get(key) for key in ("base_dir", "base_source")}
    missing = [key for key, value in values.items() if not isinstance(value, str) or not value]
    if missing:
        raise ValueError(f"{config_path}: needs {' and '.join(missing)}, as text")
    return Path(values["base_dir"]), parse_base_source(values["base_source"])
