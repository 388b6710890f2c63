"""The run folder: what a run was, and what it measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tune2gguf.files.atomic import write_folder, write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from tune2gguf.data import PreparedData


PLAN_FILE = "plan.json"
_REPORTED_PACKAGES = ("tune2gguf", "torch", "torchtune", "torchao", "tokenizers", "datasets", "gguf", "xllamacpp")


def create_run_folder(output_dir: str | Path, cfg: DictConfig, *, data: PreparedData, device: str) -> Path:
    """Create the folder of a new run with config.yaml, environment.json, data.json and heldout.jsonl, in one move.

    Raises:
        ValueError: if the folder exists; a run never overwrites another
    """
    from tune2gguf.base.digest import digest_base
    from tune2gguf.data.validation_rows import VALIDATION_FILE, format_validation_rows

    # Read again before the folder is made: a data file that has vanished must not leave a folder behind.
    heldout = format_validation_rows(data.validation, format=cfg.dataset.get("format", "auto"))
    folder = Path(output_dir)
    if os.path.lexists(folder):
        raise ValueError(describe_existing(folder))
    with write_folder(folder) as unfinished:
        write_config(unfinished, cfg)
        # The digest was taken for the resume already; the export compares the base that it merges into.
        environment = {**describe_environment(device), "base_digest": digest_base(cfg.base_dir)}
        write_text(unfinished / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_text(unfinished / "data.json", json.dumps(data.ledger, indent=2, ensure_ascii=False) + "\n")
        write_text(unfinished / VALIDATION_FILE, heldout)
    return folder


def write_config(folder: Path, cfg: DictConfig) -> None:
    """Write config.yaml, the config of a run with its overrides.

    References stay references: the file is the next run's --config, and a flat key changed there has to reach the
    components. Who reads it resolves it.
    """
    from omegaconf import OmegaConf

    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg))


def record_resume(folder: Path, *, step: int, device: str) -> list[str]:
    """Add to environment.json where, when and from which step the run went on.

    Returns:
        what of it rounds otherwise than where the run was last, so that the last bits may become others
    """
    path = folder / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8"))
    starts = [environment, *environment.setdefault("resumed", [])]
    now = {"step": step, **describe_environment(device)}
    before, after = (
        {"device": start["device"], "threads": start["threads"], "torch": start["packages"]["torch"]}
        for start in (starts[-1], now)
    )
    environment["resumed"].append(now)
    write_text(path, json.dumps(environment, indent=2) + "\n")
    return [f"{name} {before[name]} before, {after[name]} now" for name in after if before[name] != after[name]]


def describe_existing(output_dir: Path) -> str:
    """Return the error for a run folder that is taken: how to go on with it, and a name that is free."""
    way_on = "To go on with that run, add resume=auto. " if (output_dir / "config.yaml").is_file() else ""
    return (
        f"output_dir={output_dir} exists, and a run never overwrites another. {way_on}"
        f"Give {'a new' if way_on else 'the'} run another name: output_dir={find_free_folder(output_dir)}"
    )


def find_free_folder(wanted: str | Path) -> Path:
    """Return the path itself where nothing stands there, else the first free of NAME-2, NAME-3 …"""
    wanted = Path(wanted)
    candidate, number = wanted, 2
    while candidate.exists():
        candidate, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return candidate


class JsonLinesFile:
    """metrics.jsonl or samples.jsonl: one JSON object a line, on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> int:
        """Return the size in bytes when all of it is on the disk."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def cut(self, num_bytes: int) -> None:
        """Forget what was written after the first bytes.

        Raises:
            ValueError: if the file is shorter
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < num_bytes:
            raise ValueError(f"{self.path} has {size} bytes, but had {num_bytes} at the checkpoint; bring it back")
        if size > num_bytes:
            os.truncate(self.path, num_bytes)


def write_plan(folder: Path, lines: Sequence[str], *, num_steps: int) -> None:
    """Write plan.json: what a run said it was about to do, and its optimizer steps in all epochs together."""
    write_text(folder / PLAN_FILE, json.dumps({"num_steps": num_steps, "lines": [*lines]}, indent=2) + "\n")


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
        "packages": {name: _find_version(name) for name in _REPORTED_PACKAGES},
        "git_revision": _read_git_revision(),
    }


def _find_version(package: str) -> str | None:
    """Return None where it is not installed: training needs no llama.cpp, a checkout on the path no package."""
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


def find_path_problems(resume: str | bool, output_dir: Path) -> Iterator[str]:
    """Yield why `resume` and `output_dir` do not fit together: a run never overwrites another."""
    if resume is False:
        if os.path.lexists(output_dir):
            yield describe_existing(output_dir)
    elif resume == "auto":
        if output_dir.exists() and not (output_dir / "config.yaml").is_file():
            yield f"resume=auto: {output_dir} exists, but is not the folder of a run (config.yaml is missing)"
    elif not Path(resume).is_dir():
        yield f"resume={resume}: no such checkpoint; use auto, false, or a folder checkpoints/step_N of the run"
    elif Path(resume).resolve().parent.parent != output_dir.resolve():
        yield (
            f"resume={resume} is not a checkpoint of output_dir={output_dir}; "
            f"to go on with its run: output_dir={Path(resume).parent.parent}"
        )
