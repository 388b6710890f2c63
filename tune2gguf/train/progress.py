"""Where a run stands."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run is. With a seed and a plan of the epoch this is all that decides which rows come next."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0  # steps taken of the epoch after them
    validated_step: int | None = None  # step of the last validation
    sampled_step: int | None = None  # step of the last answers to the validation prompts
    best_loss: float | None = None  # lowest validation loss
    best_step: int | None = None
    best_sha256: str | None = None  # of the weights in best/
    validations_without_best: int = 0  # since the best one
    eval_every_n_steps: int | None = None  # as the validation was planned; more epochs do not change it
    num_val_rows: int | None = None

    def finish_epoch(self) -> None:
        """Stand before the next epoch."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def take_loss(self, validation_loss: float) -> bool:
        """Take note of a validation after a step; return whether its loss is the lowest yet, and best/ is due."""
        if math.isnan(validation_loss) or (self.best_loss is not None and validation_loss >= self.best_loss):
            self.validations_without_best += 1
            return False
        self.best_loss, self.best_step, self.validations_without_best = validation_loss, self.step, 0
        return True

    def is_over(self, epochs: int, *, patience: int | None) -> bool:
        """Whether the run has no step left: all epochs are done, or so many validations in a row were no best."""
        is_stopped_early = patience is not None and self.validations_without_best >= patience
        return self.epoch == epochs or is_stopped_early

    def describe_end(self, epochs: int) -> list[str]:
        """Return what a run says when it has ended before its last epoch; nothing after that."""
        if self.epoch == epochs:
            return []
        best = "there is none" if self.best_step is None else f"it is that of step {self.best_step}, in best/"
        return [
            f"stopped early after step {self.step}: {self.validations_without_best} validations in a row "
            f"without a new best; {best}"
        ]

    def finish_step(self) -> None:
        """Stand before the next step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
