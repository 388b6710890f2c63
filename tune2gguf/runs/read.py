"""A run as its folder tells of it once it has begun: config, rows, curves, processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune2gguf.base.digest import digest_base
from tune2gguf.base.source import name_base
from tune2gguf.runs.curves import Curves, read_curves
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, ChatTemplate

BEST, LAST = "best", "last"
ADAPTERS = (BEST, LAST)
_NEEDED_KEYS = ("base_dir", "base_weights", "chat_template", "max_seq_len", "quantization")


VERDICT_FILE = "verdict.json"


@dataclass(frozen=True)
class RecordedRun:
    """What a run folder says of a run.

    Attributes:
        run_dir: as it is typed in a command
        config: resolved
        data: data.json
        parent_run: relative to the folder of the run folder
    """

    run_dir: Path
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    curves: Curves
    parent_run: str | None

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def folder(self) -> Path:
        """Where the run folder and the ledger are."""
        return self.run_dir.resolve().parent


def read_recorded_run(run_dir: Path) -> RecordedRun:
    """Read config.yaml, data.json and metrics.jsonl of a run folder.

    Raises:
        ValueError: if one of them is missing
    """
    from omegaconf import OmegaConf

    for name in ("config.yaml", "data.json"):
        if not (run_dir / name).is_file():
            raise ValueError(f"{run_dir}: no run here ({name} is missing); give the folder of a run, such as runs/NAME")
    config = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=True)
    parent = config.get("parent_run")
    return RecordedRun(
        run_dir=run_dir,
        config=config,
        data=json.loads((run_dir / "data.json").read_text(encoding="utf-8")),
        curves=read_curves(run_dir),
        parent_run=None if parent is None else os.path.relpath(Path(parent).resolve(), run_dir.resolve().parent),
    )


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config without levels, its components' keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_num_processes(run_dir: Path) -> int:
    """Return on how many processes a run's newest checkpoint was written; 1 where there is none."""
    from tune2gguf.runs.checkpoints import CHECKPOINTS, list_checkpoints

    folder = run_dir / CHECKPOINTS
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    if not checkpoints:
        return 1
    progress = json.loads((checkpoints[-1] / "progress.json").read_text(encoding="utf-8"))
    return progress["run"]["processes"]


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(f"{path.name}: not found")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: holds no keys")
    return content


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, its adapter, and the config keys that the export needs.

    Attributes:
        base_name: the base's hub repository, else where it came from, else its folder's name
        config: all of config.yaml
        system_prompt: the one system prompt that every training row had, or None
    """

    run_dir: Path
    name: str
    adapter_dir: Path
    base_dir: Path
    chat_template: ChatTemplate
    max_seq_len: int
    quantization: str
    base_name: str
    base_weights: str
    config: dict[str, Any]
    system_prompt: str | None

    @property
    def export_dir(self) -> Path:
        return self.run_dir / "export"


def read_run(run_dir: str | Path, *, adapter: str | None = None, base_dir: str | Path | None = None) -> FinishedRun:
    """Read config.yaml and find the adapter and the base.

    Args:
        adapter: `best` or `last`; None takes best where there is one
        base_dir: where the base is now, if not where config.yaml says

    Raises:
        ValueError: if the run, its adapter or its base is missing, the base is not the one it was trained on, or
            config.yaml is not a run's
    """
    run_dir = Path(run_dir)
    config = _read_config(run_dir)
    if config["chat_template"] not in CHAT_TEMPLATES:
        raise ValueError(f"{run_dir / 'config.yaml'}: unknown chat_template {config['chat_template']!r}")
    base_dir = Path(config["base_dir"] if base_dir is None else base_dir)
    if not base_dir.is_dir():
        raise ValueError(f"no base model in {base_dir}; if it has moved, say where it is with --base-dir")
    _check_base(run_dir, base_dir)
    return FinishedRun(
        run_dir=run_dir,
        name=run_dir.resolve().name,
        adapter_dir=_find_adapter(run_dir, adapter),
        base_dir=base_dir,
        chat_template=CHAT_TEMPLATES[config["chat_template"]],
        max_seq_len=config["max_seq_len"],
        quantization=config["quantization"],
        base_name=name_base(config.get("base_source"), config.get("base_source") or base_dir.resolve().name),
        base_weights=config["base_weights"],
        config=config,
        system_prompt=_read_system_prompt(run_dir / "data.json"),
    )


def _read_system_prompt(path: Path) -> str | None:
    """Return what the ledger says of the rows' system prompts: one that all have, or nothing."""
    return json.loads(path.read_text(encoding="utf-8")).get("system_prompt") if path.is_file() else None


def _check_base(run_dir: Path, base_dir: Path) -> None:
    """Compare the base with the digest that the run recorded; an adapter on another base is another model."""
    path = run_dir / "environment.json"
    recorded = json.loads(path.read_text(encoding="utf-8")).get("base_digest") if path.is_file() else None
    if recorded is not None and digest_base(base_dir) != recorded:
        raise ValueError(
            f"{base_dir} is not the base that {run_dir} was trained on, or it has changed since (digests differ); "
            "say where the right one is with --base-dir"
        )


def _read_config(run_dir: Path) -> dict:
    import yaml
    from omegaconf import OmegaConf

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir}: no run here (config.yaml is missing); give the folder of a run, such as runs/NAME"
        )
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from None
    missing = [key for key in _NEEDED_KEYS if not isinstance(config, dict) or config.get(key) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    return config


def _find_adapter(run_dir: Path, adapter: str | None) -> Path:
    if adapter is not None and adapter not in ADAPTERS:
        raise ValueError(f"unknown adapter {adapter!r}; choose from {', '.join(ADAPTERS)}")
    wanted = ADAPTERS if adapter is None else (adapter,)
    for name in wanted:
        if (run_dir / name).is_dir():
            return run_dir / name
    raise ValueError(f"{run_dir}: has no adapter ({' or '.join(f'{name}/' for name in wanted)}); was the run finished?")
