"""Progress of a run: its steps, epochs and best validation."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """The progress of a run. Together with the seed and the epoch's plan it determines the next rows."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0  # steps taken in the current epoch
    validated_step: int | None = None  # step of the last validation
    sampled_step: int | None = None  # step of the last answers to the validation prompts
    best_loss: float | None = None  # lowest validation loss
    best_step: int | None = None
    best_sha256: str | None = None  # of the weights in best/
    validations_without_best: int = 0  # since the best one
    eval_every_n_steps: int | None = None  # as planned at the start; more epochs do not change it
    num_val_rows: int | None = None

    def finish_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def take_loss(self, validation_loss: float) -> bool:
        """Record a validation loss. Return whether it is the lowest so far; the caller then writes best/."""
        if math.isnan(validation_loss) or (self.best_loss is not None and validation_loss >= self.best_loss):
            self.validations_without_best += 1
            return False
        self.best_loss, self.best_step, self.validations_without_best = validation_loss, self.step, 0
        return True

    def is_over(self, epochs: int, *, patience: int | None) -> bool:
        """Whether the run is over: all epochs are done, or `patience` validations in a row brought no new best."""
        is_stopped_early = patience is not None and self.validations_without_best >= patience
        return self.epoch == epochs or is_stopped_early

    def describe_end(self, epochs: int) -> list[str]:
        """Return the lines about an early stop, [] after the last epoch."""
        if self.epoch == epochs:
            return []
        best = "there is no best/" if self.best_step is None else f"best/ is the adapter of step {self.best_step}"
        return [
            f"stopped early after step {self.step}: {self.validations_without_best} validations in a row "
            f"without a new best; {best}"
        ]

    def finish_step(self) -> None:
        """Move to the next step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
