"""A run as its folder tells of it once it has begun: config, rows, curves, processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune2gguf.curves import Curves, read_curves

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
    from tune2gguf.checkpoints.state import CHECKPOINTS, list_checkpoints

    folder = run_dir / CHECKPOINTS
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    if not checkpoints:
        return 1
    progress = json.loads((checkpoints[-1] / "progress.json").read_text(encoding="utf-8"))
    return progress["run"]["processes"]
