"""config.yaml: the config of a run, overrides included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tune2gguf.files.atomic import write_text
from tune2gguf.runs.files import CONFIG_FILE

# Component names in run folders of version 1 -> today's.
RENAMED_COMPONENTS = {
    "tune2gguf.models.lora_llama": "tune2gguf.model.lora_llama",
    "tune2gguf.tokenizers.load_tokenizer": "tune2gguf.tokenizer.load_tokenizer",
    "tune2gguf.schedules.get_schedule": "tune2gguf.train.schedules.get_schedule",
}
# Keys that earlier versions lack, with values that keep such a run's behaviour.
ADDED_KEYS = {"tokens_per_pass": "auto", "score_general_prompts": "auto"}


def write_config(run_dir: Path, config: DictConfig) -> None:
    """Write config.yaml with its references unresolved.

    The file can be the next run's --config: a flat key changed there must reach the components.
    """
    write_text(run_dir / CONFIG_FILE, OmegaConf.to_yaml(config))


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read the config of a run, resolved, with today's component names.

    Raises:
        ValueError: if config.yaml is missing, no YAML mapping, or cannot be resolved
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir}: not the folder of a run ({CONFIG_FILE} is missing); give runs/NAME")
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise ValueError(f"{path}: must be a mapping of keys to values")
        return ADDED_KEYS | rename_components(resolve_config(config))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: a reference cannot be resolved ({' '.join(str(error).split())})") from None


def resolve_config(config: DictConfig) -> dict[str, Any]:
    """Resolve a config, except its metric logger: nothing reads that again, and its environment may be gone."""
    logger = OmegaConf.to_container(config).get("metric_logger")
    rest = OmegaConf.masked_copy(config, [key for key in config if key != "metric_logger"])
    logged = {"metric_logger": logger} if "metric_logger" in config else {}
    return OmegaConf.to_container(rest, resolve=True) | logged


def rename_components(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, nested or flat, with today's component names."""
    renamed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            renamed[key] = rename_components(value)
        else:
            is_component = str(key).rpartition(".")[2] == "_component_"
            renamed[key] = RENAMED_COMPONENTS.get(value, value) if is_component else value
    return renamed


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config: nested keys are joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
