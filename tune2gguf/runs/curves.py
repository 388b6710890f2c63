"""The recorded curves of a run, read back from metrics.jsonl, and its samples from samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step; what its line does not have is None.

    Attributes:
        loss: cross entropy per supervised token of the step, in nats; None where the step was left out
        skipped: why the step was left out
    """

    step: int
    epoch: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    supervised_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Validation:
    """One measurement of the validation loss; step 0 is the base before training.

    Attributes:
        loss: cross entropy per supervised token over all validation rows, in nats
        low, high: its 95 % interval; None where the run did not record one
        row_losses: summed nats of each row, in row order; empty where the run did not record them
        row_tokens: supervised tokens of each row
        row_indices: which of heldout.jsonl they are
    """

    step: int
    epoch: int
    loss: float
    low: float | None = None
    high: float | None = None
    rows: int = 0
    tokens: int = 0
    row_losses: tuple[float, ...] = ()
    row_tokens: tuple[int, ...] = ()
    row_indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Curves:
    """What a run measured, in the order of its steps."""

    training: tuple[TrainingStep, ...] = ()
    validations: tuple[Validation, ...] = ()

    @property
    def base(self) -> Validation | None:
        """The base before training."""
        return next((validation for validation in self.validations if validation.step == 0), None)

    @property
    def best(self) -> Validation | None:
        """The lowest validation loss after a step, the earliest of equals: the adapter in best/."""
        return min(self.trained, key=lambda validation: validation.loss, default=None)

    @property
    def final(self) -> Validation | None:
        """The last validation after a step."""
        return self.trained[-1] if self.trained else None

    @property
    def trained(self) -> tuple[Validation, ...]:
        """All validations after a step."""
        return tuple(validation for validation in self.validations if validation.step > 0)


@dataclass(frozen=True)
class Sample:
    """A validation prompt as the model answered it at a step.

    Attributes:
        row: index of the validation row
        prompt: messages, each {"role", "content"}
    """

    step: int
    epoch: int
    row: int
    prompt: tuple[dict[str, str], ...]
    reference: str
    reply: str
    ended_by_itself: bool


def read_curves(run_dir: str | Path) -> Curves:
    """Read metrics.jsonl, also while the run writes it: a last line without its end is left for later.

    Raises:
        ValueError: if the folder has no metrics.jsonl, or another line than the last is not JSON
    """
    training, validations = [], []
    for record in _read_records(Path(run_dir) / METRICS_FILE):
        if "val_loss" in record:
            validations.append(_make_validation(record))
        elif "step" in record:
            known = {name: record.get(name) for name in TrainingStep.__dataclass_fields__}
            training.append(TrainingStep(**known))
    return Curves(tuple(training), tuple(validations))


def read_samples(run_dir: str | Path) -> tuple[Sample, ...]:
    """Read samples.jsonl; a run without samples has none.

    Raises:
        ValueError: if another line than the last is not JSON
    """
    path = Path(run_dir) / SAMPLES_FILE
    if not path.is_file():
        return ()
    return tuple(
        Sample(
            step=record["step"],
            epoch=record["epoch"],
            row=record["row"],
            prompt=tuple(record["prompt"]),
            reference=record["reference"],
            reply=record["reply"],
            ended_by_itself=record["ended_by_itself"],
        )
        for record in _read_records(path)
    )


def _make_validation(record: dict[str, Any]) -> Validation:
    return Validation(
        step=record["step"],
        epoch=record["epoch"],
        loss=record["val_loss"],
        low=record.get("val_low"),
        high=record.get("val_high"),
        rows=record.get("val_rows", 0),
        tokens=record.get("val_tokens", 0),
        row_losses=tuple(record.get("val_row_losses", ())),
        row_tokens=tuple(record.get("val_row_tokens", ())),
        row_indices=tuple(record.get("val_row_indices", ())),
    )


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: not found; is {path.parent} the folder of a run?")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            # Whole lines end with a line break, so that what is after the last one is still being written.
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
