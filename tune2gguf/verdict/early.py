"""The outlook of a run: its likely verdict, from the curves after a third of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from tune2gguf.runs.curves import Curves
from tune2gguf.verdict.judge import GOOD_FIT, OVERFITTING, UNDERFITTING, find_notable_gain, judge
from tune2gguf.verdict.paired import Forecast

SAID_AT = 1 / 3  # of the run's steps
# Recorded runs that had this outlook, and those of them that ended so. benchmarks/judge_chains.py counts them.
RECORDED = {OVERFITTING: (6, 6), UNDERFITTING: (110, 103), GOOD_FIT: (62, 51)}


@dataclass(frozen=True)
class Outlook:
    """A likely verdict and its reason."""

    label: str
    reason: str

    def describe(self, step: int, num_steps: int) -> str:
        """Return the line that a run prints."""
        told, came = RECORDED[self.label]
        record = f"{came} of {told} recorded runs with this outlook ended so"
        return f"step {step} of {num_steps}: likely verdict: {self.label}, {self.reason} ({record})"


def is_due(curves: Curves, num_steps: int) -> bool:
    """Whether the last validation is the first that allows an outlook."""
    ready = [place for place, one in enumerate(curves.trained) if place > 0 and one.step >= SAID_AT * num_steps]
    return ready[:1] == [len(curves.trained) - 1] and curves.trained[-1].step < num_steps


def foresee(curves: Curves, *, learned: float) -> Outlook | None:
    """Return the likely verdict from the curves so far, None if they do not allow one.

    Args:
        learned: share of the whole run's learning rate, summed over steps, that is used so far
    """
    so_far = judge(curves)
    figures = so_far.figures
    if so_far.label == OVERFITTING:
        return Outlook(OVERFITTING, "the validation loss is already rising")
    if "late_share" not in figures:
        is_told = so_far.label == UNDERFITTING
        return Outlook(UNDERFITTING, "almost nothing is gained so far") if is_told else None
    forecast = Forecast(figures["late_share_at"], figures["final_loss"] / figures["gain"], 1 / learned)
    further = forecast.estimate(figures["late_share"])
    notable = find_notable_gain(figures["final_loss"], figures["gain"])
    label = UNDERFITTING if further > notable else GOOD_FIT
    return Outlook(label, f"by the curve so far, a run of twice the length would gain {further:.1%} more")
