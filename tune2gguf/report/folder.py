"""What a run's folder says of the run. A part that is missing or unreadable becomes a note, never an exception."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from tune2gguf.runs.curves import METRICS_FILE, SAMPLES_FILE, Curves, Sample, read_curves, read_samples
from tune2gguf.runs.folder import PLAN_FILE
from tune2gguf.runs.read import VERDICT_FILE, _read_mapping, read_num_processes
from tune2gguf.verdict.advice import Advice
from tune2gguf.verdict.conclude import read_verdict
from tune2gguf.verdict.judge import Verdict

CONFIG_FILE = "config.yaml"

PARTS_OF_READ = ("trained", "validated", "truncated", "dropped")
_LEDGER_KEYS = ("read", *PARTS_OF_READ, "training", "validation", "notes", "files", "rows_truncated", "rows_dropped")

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        step: optimizer steps taken or left out
        num_steps: of the whole run; None where plan.json is missing
        epoch: the one in progress or the last one, counted from 1
        num_epochs: None where the config is missing
        measured_at: when something was measured last; None before that
    """

    step: int
    num_steps: int | None
    epoch: int
    num_epochs: int | None
    measured_at: str | None


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder.

    Attributes:
        outcome: whether the advice that the run follows helped, as a sentence; empty where it follows none
        plan: what the run said it was about to do, line by line
        problems: what could not be read
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    samples: tuple[Sample, ...] = ()
    verdict: Verdict | None = None
    advice: tuple[Advice, ...] = ()
    outcome: str = ""
    plan: tuple[str, ...] = ()
    num_processes: int = 1
    has_last: bool = False
    position: Position = field(default_factory=lambda: Position(0, None, 1, None, None))
    problems: tuple[str, ...] = ()


def read_run_folder(run_dir: Path) -> RunFolder:
    """Read all that a report is made of.

    Raises:
        ValueError: if there is no such folder
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such folder; give the folder of a run, such as runs/quickstart")
    problems: list[str] = []

    def take(name: str, read: Callable[[Path], T], otherwise: T) -> T:
        try:
            return read(run_dir)
        except KeyError as error:
            problems.append(f"{name}: lacks the key {error}")
        except TypeError as error:
            problems.append(f"{name}: {error}")
        except (ValueError, OSError) as error:
            problems.append(str(error))
        return otherwise

    config = take(CONFIG_FILE, _read_config, {})
    plan = take(PLAN_FILE, lambda folder: _read_mapping(folder / PLAN_FILE), {})
    curves = take(METRICS_FILE, read_curves, Curves())
    verdict, advice, outcome = take(VERDICT_FILE, lambda folder: read_verdict(folder, config), (None, (), ""))
    return RunFolder(
        # resolve(): the name of "." is the folder's, too.
        name=run_dir.resolve().name,
        path=run_dir,
        config=config,
        environment=take("environment.json", lambda folder: _read_mapping(folder / "environment.json"), {}),
        ledger=take("data.json", _read_ledger, {}),
        curves=curves,
        samples=take(SAMPLES_FILE, read_samples, ()),
        verdict=verdict,
        advice=advice,
        outcome=outcome,
        num_processes=take("checkpoints", read_num_processes, 1),
        has_last=(run_dir / "last").is_dir(),
        plan=tuple(plan.get("lines", ())),
        position=_find_position(run_dir, config, plan, curves),
        problems=tuple(problems),
    )


def _read_config(run_dir: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content = _read_mapping(run_dir / CONFIG_FILE)
    try:
        # References are kept in the file.
        return OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{CONFIG_FILE}: a reference leads nowhere ({error})") from None


def _read_ledger(run_dir: Path) -> dict[str, Any]:
    ledger = _read_mapping(run_dir / "data.json")
    missing = [key for key in _LEDGER_KEYS if key not in ledger]
    if missing:
        raise ValueError(f"data.json: not the ledger of a run, it lacks {', '.join(missing)}")
    return ledger


def _find_position(run_dir: Path, config: Mapping[str, Any], plan: Mapping[str, Any], curves: Curves) -> Position:
    epochs = config.get("epochs")
    path = run_dir / METRICS_FILE
    measured_at = None
    if path.is_file():
        measured_at = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Position(
        step=max([line.step for line in (*curves.training, *curves.validations)], default=0),
        num_steps=plan.get("num_steps"),
        epoch=1 + max((line.epoch for line in curves.training), default=0),
        num_epochs=epochs if isinstance(epochs, int) else None,
        measured_at=measured_at,
    )


def is_number(value: float | None) -> bool:
    """Whether there is a value that can be drawn."""
    return value is not None and math.isfinite(value)
