"""Step checkpoints: checkpoints/step_N/ holds the adapter in PEFT's layout and the state to resume from.

    adapter_model.safetensors, adapter_config.json   the adapter after step N
    state.pt                                         optimizer, schedule, random numbers of every process
    progress.json                                    position in the run, and the run's identity (see resume.py)
    manifest.json                                    size and sha256 of every other file

A folder is renamed into place when it is complete on disk. One that is truncated or altered later does not match its
manifest.
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
    """The content of a checkpoint folder. `adapter` is in PEFT's layout; all tensors are on the CPU."""

    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    state: dict[str, Any]  # tensors, numbers, text, and lists and dicts of them
    progress: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder; its name appears once all of it is on disk.

    Raises:
        OSError: if it cannot be written; nothing is left behind
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
    """A file that is written sequentially, with its size and sha256 so far."""

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
        # torch wraps the disk's error in its own.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def find_damage(folder: Path) -> str | None:
    """Check a checkpoint against its manifest; return the first problem, or None."""
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
            return f"{name} has {path.stat().st_size} bytes, expected {num_bytes}"
        if digest_file(path) != sha256:
            return f"{name} was altered: its sha256 is not the manifest's"
    missing = {STATE, PROGRESS} - expected.keys()
    return f"{MANIFEST} does not name {min(missing)}" if missing else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint against its manifest and read it; no code in it can run.

    Raises:
        ValueError: if it is damaged; it names the run's newest good checkpoint
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
    """Return the message for a damaged checkpoint, with the command that resumes from the newest good one."""
    others = [other for other in reversed(list_checkpoints(folder.parent)) if other != folder]
    good = next((other for other in others if find_damage(other) is None), None)
    if good is None:
        way_out = "No other checkpoint of this run is good: start again with another output_dir"
    else:
        command = format_command(*format_overrides({"resume": good}))
        way_out = f"The newest good one is {good}; to go on from there: {command}"
    return f"{folder}: {damage}; it is not loaded. {way_out}"


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the step folders, oldest first."""
    if not checkpoints_dir.is_dir():
        return []
    steps = [path for path in checkpoints_dir.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(steps, key=get_step)


def get_step(folder: Path) -> int:
    """Return N of a folder step_N."""
    return int(_STEP_FOLDER.fullmatch(folder.name)[1])


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; readers see all of it or nothing."""
    removed = folder.with_name(f".{folder.name}.removed.unfinished")  # after a kill clear_leftovers removes it
    os.rename(folder, removed)
    shutil.rmtree(removed)


class CheckpointWriter:
    """A thread that writes checkpoints during training, one at a time, and keeps the newest `keep_last`."""

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
        """Wait for the previous write, then start to write step_N; its tensors must not change any more.

        An existing step_N is kept: a step has only one state.
        """
        self.wait()
        folder = self.checkpoints_dir / f"step_{step}"
        if not folder.exists():
            self._pending = self._thread.submit(self._write, folder, checkpoint)

    def wait(self) -> None:
        """Wait until the pending checkpoint is on disk, and raise its error if the write failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_if_failed(self) -> None:
        """Raise the pending write's error if it has failed; do not wait for it."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """End the thread after its last write."""
        self._thread.shutdown(wait=True)

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        write_checkpoint(folder, checkpoint)
        for old in list_checkpoints(self.checkpoints_dir)[: -self.keep_last]:
            remove_checkpoint(old)
