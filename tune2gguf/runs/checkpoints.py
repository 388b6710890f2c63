"""Step checkpoints: checkpoints/step_N/ holds the adapter in PEFT's layout and all else that a run needs to go on.

    adapter_model.safetensors, adapter_config.json   the adapter after step N
    state.pt                                         optimizer, schedule, random numbers of every rank
    progress.json                                    position in the run, and what the run is (see resume.py)
    manifest.json                                    size and sha256 of every other file

A folder appears in one move when all of it is on disk; one that is cut or altered later does not match its manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune2gguf.commands import format_command, format_overrides
from tune2gguf.files.atomic import write_file, write_folder, write_json
from tune2gguf.files.digest import digest_file
from tune2gguf.files.json_files import read_json
from tune2gguf.runs.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = "checkpoints"
MANIFEST, STATE, PROGRESS = "manifest.json", "state.pt", "progress.json"
_STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds. `adapter` is in PEFT's layout, all tensors are on the CPU."""

    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    state: dict[str, Any]  # tensors, numbers, text, and lists and dicts of them
    progress: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder: all of it is on disk before its name appears.

    Raises:
        OSError: if it cannot be written; nothing is left of it then
    """
    from safetensors.torch import save

    adapter_config, progress = (
        json.dumps(content, indent=2).encode() for content in (checkpoint.adapter_config, checkpoint.progress)
    )
    writers = {
        ADAPTER_WEIGHTS: lambda file: file.write(save(checkpoint.adapter, metadata={"format": "pt"})),
        ADAPTER_CONFIG: lambda file: file.write(adapter_config),
        STATE: lambda file: _write_state(checkpoint.state, file),
        PROGRESS: lambda file: file.write(progress),
    }
    files = {}
    with write_folder(folder) as unfinished:
        for name, write in writers.items():
            with write_file(unfinished / name) as path, path.open("wb", buffering=0) as opened:
                file = _DigestedFile(opened)
                write(file)
                files[name] = {"bytes": file.num_bytes, "sha256": file.sha256.hexdigest()}
        write_json(unfinished / MANIFEST, {"files": files})


class _DigestedFile:
    """A file that is written from its start to its end, with its size and sha256."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        left = memoryview(content).cast("B")
        while left:
            left = left[self.file.write(left) :]
        self.num_bytes += len(content)
        self.sha256.update(content)
        return len(content)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


def _write_state(state: dict[str, Any], file: _DigestedFile) -> None:
    import torch

    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch hides what the disk says behind an error of its own.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint by its manifest; None where every byte is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, (num_bytes, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {num_bytes}"
        if digest_file(path) != sha256:
            return f"{name} was altered: its sha256 is not the manifest's"
    missing = {STATE, PROGRESS} - expected.keys()
    return f"{MANIFEST} does not name {min(missing)}" if missing else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose manifest was checked; no code in it can run.

    Raises:
        ValueError: if it is damaged; the newest good one of the run is named
    """
    import torch
    from safetensors.torch import load_file

    damage = find_damage(folder)
    if damage is not None:
        raise ValueError(describe_damage(folder, damage))
    return Checkpoint(
        adapter=load_file(folder / ADAPTER_WEIGHTS),
        adapter_config=json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")),
        state=torch.load(folder / STATE, map_location="cpu", weights_only=True),
        progress=read_progress(folder),
    )


def read_progress(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's progress.json.

    Raises:
        ValueError: if it is damaged
    """
    return read_json(folder / PROGRESS)


def describe_damage(folder: Path, damage: str) -> str:
    """Return the error for a damaged checkpoint, with the newest good one and how to take it."""
    others = [other for other in reversed(list_checkpoints(folder.parent)) if other != folder]
    good = next((other for other in others if find_damage(other) is None), None)
    if good is None:
        way_out = "No other checkpoint of this run is good; start again under another output_dir"
    else:
        command = format_command(*format_overrides({"resume": good}))
        way_out = f"The newest good one is {good}; to go on from there: {command}"
    return f"{folder}: {damage}, so it is not loaded. {way_out}"


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the step folders, the oldest first."""
    if not checkpoints_dir.is_dir():
        return []
    steps = [path for path in checkpoints_dir.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(steps, key=get_step)


def get_step(folder: Path) -> int:
    """Return N of a folder step_N."""
    return int(_STEP_FOLDER.fullmatch(folder.name)[1])


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; whoever looks meanwhile sees all of it or nothing."""
    removed = folder.with_name(f".{folder.name}.removed.unfinished")  # clear_leftovers goes on with it
    os.rename(folder, removed)
    shutil.rmtree(removed)


class CheckpointWriter:
    """Writes checkpoints beside the training, one at a time, and keeps the newest `keep_last`."""

    def __init__(self, run_dir: Path, *, keep_last: int) -> None:
        self.checkpoints_dir = run_dir / CHECKPOINTS
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that is on disk."""
        return next(reversed(list_checkpoints(self.checkpoints_dir)), None)

    def start(self, step: int, checkpoint: Checkpoint) -> None:
        """Begin to write step_N from tensors that nobody changes any more, when the one before is on disk.

        A step has one state, so that its checkpoint is never written twice.
        """
        self.wait()
        folder = self.checkpoints_dir / f"step_{step}"
        if not folder.exists():
            self._pending = self._thread.submit(self._write, folder, checkpoint)

    def wait(self) -> None:
        """Return when the checkpoint that was begun is on disk; raise the error that kept it from there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_if_failed(self) -> None:
        """Raise the error of a write that has failed meanwhile; do not wait for one that goes on."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Let the thread end after its last write."""
        self._thread.shutdown(wait=True)

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        write_checkpoint(folder, checkpoint)
        for old in list_checkpoints(self.checkpoints_dir)[: -self.keep_last]:
            remove_checkpoint(old)
