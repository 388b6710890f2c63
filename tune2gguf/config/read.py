"""A YAML and its overrides become a config; a `_component_` of it becomes an object."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tune2gguf.base.source import BaseSource, parse_base_source
from tune2gguf.runs.config_file import ADDED_KEYS, rename_components

MODELS_FOLDER = "models"


def load_config(arguments: list[str]) -> DictConfig:
    """Read `--config FILE [key=value …]` as the recipe gets it.

    Raises:
        ValueError: if the file is missing or not a YAML mapping, or an override is not key=value
    """
    parser = argparse.ArgumentParser(prog="lora_finetune", description="Fine-tune a Llama with LoRA.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML of configs/ or examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML, components with dots")
    parsed = parser.parse_intermixed_args(arguments)
    return read_config(parsed.config, parsed.overrides)


def read_config(path: Path, overrides: list[str]) -> DictConfig:
    """Read a YAML and apply `key=value` overrides; a value is YAML and may hold '=' and spaces.

    Where `base_dir` is null it becomes the folder in models/ that is named as the repository of `base_source`, so that
    another base is one override.

    Raises:
        ValueError: if the file is missing or not a YAML mapping, or an override is not key=value
    """
    parts = {override: override.partition("=") for override in overrides}
    # OmegaConf takes ??? as "no value", and would keep the YAML's without a word.
    malformed = [text for text, (key, equals, value) in parts.items() if not (key.strip() and equals) or value == "???"]
    if malformed:
        raise ValueError(f"overrides are written key=value; got {' '.join(malformed)}")
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise ValueError(f"{path}: a config is a mapping of keys to values")
        # The config.yaml of an old run is a config, too.
        config = OmegaConf.create(ADDED_KEYS | rename_components(OmegaConf.to_container(config)))
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        base_dir = derive_base_dir(config.get("base_source"))
        if config.get("base_dir", "") is None and base_dir is not None:
            config.base_dir = base_dir
        return config
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such config; see configs/ and examples/") from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as YAML with these overrides: {error}") from None


def derive_base_dir(base_source: Any) -> str | None:
    """Return the folder of a hub repository's base, None where the source is another or none."""
    if not isinstance(base_source, str) or not base_source.startswith("hf://"):
        return None
    name = base_source.partition("@")[0].rpartition("/")[2]
    return f"{MODELS_FOLDER}/{name}" if name else None


def build_metric_logger(config: DictConfig) -> Any:
    """Build the metric logger, one of torchtune's or like them, and hand the config to it; None where there is none.

    Raises:
        ValueError: if it cannot be opened, with what it says
    """
    if config.metric_logger is None:
        return None
    try:
        logger = build_component(config.metric_logger)
        logger.log_config(config)
    except Exception as error:  # of a service, its client or a disk: whatever it is, it is the user's to mend
        name = config.metric_logger._component_.rpartition(".")[2]
        raise ValueError(f"metric_logger: {name} cannot be opened: {' '.join(str(error).split())}") from error
    return logger


def build_component(node: DictConfig, *arguments: Any, **given: Any) -> Any:
    """Call the `_component_` of a node with its keys and what the recipe gives.

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
