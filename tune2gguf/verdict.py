"""Is a run over- or underfitted: decided from its held-out curve and that curve's uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field

OVERFITTING, UNDERFITTING, GOOD_FIT, INCONCLUSIVE = "overfitting", "underfitting", "good fit", "inconclusive"
LABELS = (OVERFITTING, UNDERFITTING, GOOD_FIT, INCONCLUSIVE)


@dataclass(frozen=True)
class Verdict:
    """A label, why, and the figures that led to it.

    Attributes:
        label: one of LABELS
        reasons: sentences, the deciding one first
        figures: by name; losses in nats per supervised token, shares as fractions of the gain over the base
    """

    label: str
    reasons: tuple[str, ...]
    figures: dict[str, float] = field(default_factory=dict)
