"""What to run next: the fine-tuning guide's adjustments as complete commands, most effective first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Advice:
    """One step to take.

    Attributes:
        command: to copy and paste, from the root of the checkout
        changes: config key -> new value, of what it changes about the run; empty where nothing is trained again
        reason: why, in a sentence or two
        guide_section: of the fine-tuning guide, such as "4. Balancing Underfitting and Overfitting"
    """

    command: str
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    guide_section: str = ""
