"""metrics.jsonl: the curves of a run, one line per optimizer step and per validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tune2gguf.files.records import AnyRecord, make_record
from tune2gguf.runs.files import METRICS_FILE, read_json_lines


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step; fields missing from its line are None.

    Attributes:
        loss: cross entropy per supervised token of the step, in nats; None if the step was skipped
        tokens: tokens of all processes, without padding
        seconds: duration of the step
        skipped: reason for a skipped step
    """

    step: int
    epoch: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    supervised_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    skipped: str | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the line for metrics.jsonl."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> TrainingStep:
        """Parse a line of metrics.jsonl."""
        return make_record(cls, record)


@dataclass(frozen=True)
class Validation:
    """One measurement of the validation loss; step 0 is the base before training.

    Attributes:
        loss: cross entropy per supervised token over all validation rows, in nats
        low, high: 95 % interval of the loss; None if the run did not record it
        row_losses: summed loss of each row in nats, in row order; empty if the run did not record them
        row_tokens: supervised tokens of each row
        row_indices: index of each row in heldout.jsonl
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

    def to_record(self) -> dict[str, Any]:
        """Return the line for metrics.jsonl; torchtune's users and tools know the loss as val_loss."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {name if name in _UNPREFIXED else f"val_{name}": value for name, value in values.items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Validation:
        """Parse a line of metrics.jsonl; old runs lack some keys."""
        found = {name: record.get(name if name in _UNPREFIXED else f"val_{name}") for name in cls.__dataclass_fields__}
        return make_record(cls, {name: value for name, value in found.items() if value is not None})

    def describe(self) -> str:
        """Return the line that a run prints about it."""
        interval = "one row has no interval" if self.low is None else f"{self.low:.4f} to {self.high:.4f}"
        return f"step {self.step}: validation loss {self.loss:.4f} ({interval}) on {self.rows} rows"


# Keys that both kinds of lines share; all others tell the kinds apart.
_UNPREFIXED = ("step", "epoch")


@dataclass(frozen=True)
class Curves:
    """The curves of a run, in the order of its steps."""

    training: tuple[TrainingStep, ...] = ()
    validations: tuple[Validation, ...] = ()

    @property
    def base(self) -> Validation | None:
        """The validation of the base, before training."""
        return next((validation for validation in self.validations if validation.step == 0), None)

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss after a step, the earliest of equals: the adapter in best/."""
        return min(self.trained, key=lambda validation: validation.loss, default=None)

    @property
    def final(self) -> Validation | None:
        """The last validation after a step."""
        return self.trained[-1] if self.trained else None

    @property
    def trained(self) -> tuple[Validation, ...]:
        """All validations after a step."""
        return tuple(validation for validation in self.validations if validation.step > 0)


def read_curves(run_dir: str | Path) -> Curves:
    """Read metrics.jsonl, also while the run writes it.

    Raises:
        ValueError: if the folder has no metrics.jsonl, or another line than the last is not JSON
    """
    lines = [*read_json_lines(Path(run_dir) / METRICS_FILE, _parse_line)]
    training = tuple(line for line in lines if isinstance(line, TrainingStep))
    return Curves(training, tuple(line for line in lines if isinstance(line, Validation)))


def _parse_line(values: Any) -> TrainingStep | Validation | None:
    """Parse a line of metrics.jsonl; None for a line of another kind."""
    record = make_record(AnyRecord, values)
    if "val_loss" in record:
        return Validation.from_record(record)
    return TrainingStep.from_record(record) if "step" in record else None
