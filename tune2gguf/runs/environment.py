"""environment.json: the machine and software of a run's start and of each resume."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import ENVIRONMENT_FILE, FOLDER_VERSION

_REPORTED_PACKAGES = (
    "tune2gguf",
    "torch",
    "torchtune",
    "triton",
    "nvidia-cudnn-frontend",
    "tokenizers",
    "datasets",
    "gguf",
    "xllamacpp",
)


class Start(TypedDict):
    """One start of a run: command, versions, machine, git revision."""

    started: str  # ISO 8601, UTC
    command: list[str]
    python: str
    platform: str
    device: str
    threads: int
    packages: dict[str, str | None]
    git_revision: str | None


class Environment(Start, total=False):
    """The content of environment.json.

    `version` is FOLDER_VERSION; `base_digest` is the result of digest_base; each entry of `resumed` is a Start with the
    `step` that it resumed after.
    """

    version: int
    base_digest: str
    resumed: list[dict[str, Any]]


def write_environment(run_dir: Path, device: str, *, base_digest: str) -> None:
    """Write environment.json of a new run.

    Args:
        device: cpu or cuda
        base_digest: sha256 of the base; the export checks its base against it
    """
    write_json(
        run_dir / ENVIRONMENT_FILE,
        {"version": FOLDER_VERSION, **describe_start(device), "base_digest": base_digest},
    )


def read_environment(run_dir: Path) -> Environment:
    """Read environment.json.

    Raises:
        ValueError: if it is missing or damaged, or a newer tune2gguf wrote the folder
    """
    path = run_dir / ENVIRONMENT_FILE
    found = read_json(path).get("version", 1)
    if isinstance(found, int) and found > FOLDER_VERSION:
        raise ValueError(
            f"{run_dir}: its files have version {found}, this tune2gguf reads up to {FOLDER_VERSION}; update tune2gguf"
        )
    return read_json(path, partial(make_record, Environment))


def record_resume(run_dir: Path, *, step: int, device: str) -> list[str]:
    """Append a resume to environment.json.

    Returns:
        the changes since the last start that affect rounding, and so the last bits: `NAME OLD before, NEW now`
    """
    environment = read_environment(run_dir)
    starts = [environment, *environment.setdefault("resumed", [])]
    now = {"step": step, **describe_start(device)}
    before, after = (
        {"device": start["device"], "threads": start["threads"], "torch": start["packages"]["torch"]}
        for start in (starts[-1], now)
    )
    environment["resumed"].append(now)
    environment["version"] = FOLDER_VERSION
    write_json(run_dir / ENVIRONMENT_FILE, environment)
    return [f"{name} {before[name]} before, {after[name]} now" for name in after if before[name] != after[name]]


def describe_start(device: str) -> Start:
    """Return command, versions and machine of this process."""
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: _find_version(name) for name in _REPORTED_PACKAGES},
        "git_revision": _read_git_revision(),
    }


def _find_version(package: str) -> str | None:
    """Return a package's version; None if it is not installed, such as llama.cpp on a training machine."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read_git_revision() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
