"""The run folder: what a run was, and what it measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from tune2gguf.data import PreparedData

_REPORTED_PACKAGES = ("tune2gguf", "torch", "torchtune", "torchao", "tokenizers", "datasets", "gguf", "xllamacpp")


def create_run_folder(output_dir: str | Path, cfg: DictConfig, *, data: PreparedData, device: str) -> Path:
    """Create the folder of a new run with config.yaml, environment.json, data.json and heldout.jsonl.

    Raises:
        ValueError: if the folder exists; a run never overwrites another
    """
    from omegaconf import OmegaConf

    from tune2gguf.data.heldout import HELDOUT_FILE, format_heldout

    # Read again before the folder is made: a data file that has vanished must not leave a folder behind.
    heldout = format_heldout(data.validation, format=cfg.dataset.get("format", "auto"))
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(describe_existing(folder)) from None
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_text(folder / "environment.json", json.dumps(describe_environment(device), indent=2) + "\n")
    write_text(folder / "data.json", json.dumps(data.ledger, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / HELDOUT_FILE, heldout)
    return folder


def describe_existing(output_dir: Path) -> str:
    """Return the error for a run folder that is taken, with a name that is free."""
    return (
        f"output_dir={output_dir} exists, and a run never overwrites another. "
        f"Give the run another name: output_dir={find_free_folder(output_dir)}"
    )


def find_free_folder(wanted: str | Path) -> Path:
    """Return the path itself where nothing stands there, else the first free of NAME-2, NAME-3 …"""
    wanted = Path(wanted)
    candidate, number = wanted, 2
    while candidate.exists():
        candidate, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return candidate


def write_text(path: Path, text: str) -> None:
    """Write a file in one move, so that a reader never sees half of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def describe_environment(device: str) -> dict:
    """Return what a reader needs to repeat the run: command, versions, machine, git revision."""
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in _REPORTED_PACKAGES},
        "git_revision": _read_git_revision(),
    }


def _read_git_revision() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
