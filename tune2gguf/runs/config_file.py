"""config.yaml: the config of a run, with its overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tune2gguf.files.atomic import write_text
from tune2gguf.runs.files import CONFIG_FILE

# Names that the components had in runs of version 1.
RENAMED_COMPONENTS = {
    "tune2gguf.models.lora_llama": "tune2gguf.model.lora_llama",
    "tune2gguf.tokenizers.load_tokenizer": "tune2gguf.tokenizer.load_tokenizer",
    "tune2gguf.schedules.get_schedule": "tune2gguf.train.schedules.get_schedule",
}
# Keys that a run of an earlier version does not have, with what they do not change about it.
ADDED_KEYS = {"tokens_per_pass": "auto", "score_general_prompts": "auto"}


def write_config(run_dir: Path, config: DictConfig) -> None:
    """Write config.yaml.

    References stay references: the file is the next run's --config, and a flat key changed there has to reach the
    components. Who reads it resolves it.
    """
    write_text(run_dir / CONFIG_FILE, OmegaConf.to_yaml(config))


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the config of a run, resolved, its components by today's names.

    Raises:
        ValueError: if there is none, or it is not a YAML mapping that resolves
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir}: no run here ({CONFIG_FILE} is missing); give the folder of a run, runs/NAME")
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise ValueError(f"{path}: holds no keys")
        return ADDED_KEYS | rename_components(resolve_config(config))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: a reference leads nowhere ({' '.join(str(error).split())})") from None


def resolve_config(config: DictConfig) -> dict[str, Any]:
    """Return a config, resolved but for its metric logger: nobody asks it again, and its environment may be gone."""
    logger = OmegaConf.to_container(config).get("metric_logger")
    rest = OmegaConf.masked_copy(config, [key for key in config if key != "metric_logger"])
    logged = {"metric_logger": logger} if "metric_logger" in config else {}
    return OmegaConf.to_container(rest, resolve=True) | logged


def rename_components(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, nested or flat, with today's names of its components."""
    renamed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            renamed[key] = rename_components(value)
        else:
            is_component = str(key).rpartition(".")[2] == "_component_"
            renamed[key] = RENAMED_COMPONENTS.get(value, value) if is_component else value
    return renamed


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config without levels, its components' keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
