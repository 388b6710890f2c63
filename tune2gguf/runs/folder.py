"""Creation of run folders, and checks of output_dir and resume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from tune2gguf.base.digest import digest_base
from tune2gguf.commands import format_command, format_overrides
from tune2gguf.data import PreparedData
from tune2gguf.files.atomic import write_folder, write_json, write_text
from tune2gguf.runs.calibration import format_calibration_rows
from tune2gguf.runs.config_file import write_config
from tune2gguf.runs.environment import write_environment
from tune2gguf.runs.files import CALIBRATION_FILE, DATA_FILE, VALIDATION_FILE, is_run_folder
from tune2gguf.runs.validation_rows import format_validation_rows


@contextmanager
def create_run_folder(cfg: DictConfig, *, data: PreparedData, device: str) -> Iterator[Path]:
    """Yield a new run's unfinished folder, to add files to; it is renamed to output_dir at the end of the block.

    Raises:
        ValueError: if output_dir exists; a run never overwrites another
    """
    if os.path.lexists(cfg.output_dir):
        raise ValueError(describe_existing(Path(cfg.output_dir)))
    with write_folder(Path(cfg.output_dir)) as unfinished:
        write_start(unfinished, cfg, data=data, device=device)
        yield unfinished


def write_start(folder: Path, cfg: DictConfig, *, data: PreparedData, device: str) -> None:
    """Write the files of a run before its first step: environment.json and those of write_rows."""
    # Cheap: the resume check has already cached the digest.
    write_environment(folder, device, base_digest=digest_base(cfg.base_dir))
    write_rows(folder, cfg, data=data)


def write_rows(folder: Path, cfg: DictConfig, *, data: PreparedData) -> None:
    """Write config.yaml and the files about the run's rows: data.json, heldout.jsonl, calibration.jsonl."""
    validation_rows = format_validation_rows(data.validation)
    write_config(folder, cfg)
    write_json(folder / DATA_FILE, data.ledger)
    write_text(folder / VALIDATION_FILE, validation_rows)
    write_text(folder / CALIBRATION_FILE, format_calibration_rows(data.train, seed=cfg.seed))


def describe_existing(output_dir: Path) -> str:
    """Return the message for an existing output_dir, with the ways out: resume=auto, or a free name."""
    way_on = "To go on with that run, add resume=auto. " if is_run_folder(output_dir) else ""
    other = format_command(*format_overrides({"output_dir": find_free_folder(output_dir)}))
    return (
        f"output_dir={output_dir} exists, and a run never overwrites another. {way_on}"
        f"Give {'a new' if way_on else 'the'} run another name: {other}"
    )


def find_free_folder(wanted: str | Path) -> Path:
    """Return the path itself if it is free, else the first free one of NAME-2, NAME-3 …"""
    wanted = Path(wanted)
    candidate, number = wanted, 2
    while candidate.exists():
        candidate, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return candidate


def find_path_problems(resume: str | bool, output_dir: Path) -> Iterator[str]:
    """Yield the problems of `resume` and `output_dir`: a run never overwrites another."""
    if resume is False:
        if os.path.lexists(output_dir):
            yield describe_existing(output_dir)
    elif resume == "auto":
        if output_dir.exists() and not is_run_folder(output_dir):
            yield (
                f"resume=auto: {output_dir} exists, but is not the folder of a run (config.yaml is missing); "
                "give another output_dir"
            )
    elif not Path(resume).is_dir():
        yield f"resume={resume}: no such checkpoint; use auto, false, or a folder checkpoints/step_N of the run"
    elif Path(resume).resolve().parent.parent != output_dir.resolve():
        own = format_command(*format_overrides({"output_dir": Path(resume).parent.parent}))
        yield f"resume={resume} is not a checkpoint of output_dir={output_dir}; to go on with its run: {own}"
