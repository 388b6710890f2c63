"""What the plots of a run have in common: steps and epochs along x, losses along y, validation curves, labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.pages.figures import COLORS, FONT_SIZE
from tune2gguf.runs.curves import Curves, Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Above this ratio of highest to lowest, a linear axis shows the largest values only.
LOG_FROM_RATIO = 5
MAX_NAMED_EPOCHS = 4  # more names than these would run into each other on a phone


def draw_validation(
    axes: Axes,
    lines: Sequence[Validation],
    *,
    color: str,
    marker: str,
    linestyle: str | tuple = "solid",
    band_alpha: float = 0.18,
) -> None:
    """Draw the validation loss of each validation, and its interval as a band, or as a bar where there is one only."""
    x = [line.step for line in lines]
    bounded = [line for line in lines if line.low is not None and line.high is not None]
    axes.fill_between(
        [line.step for line in bounded],
        [line.low for line in bounded],
        [line.high for line in bounded],
        color=COLORS[color],
        alpha=band_alpha,
        linewidth=0,
    )
    if len(bounded) == 1:  # a band needs two
        only = bounded[0]
        axes.vlines(only.step, only.low, only.high, color=COLORS[color], alpha=0.4, linewidth=3)
    axes.plot(
        x, [line.loss for line in lines], color=COLORS[color], linewidth=2, linestyle=linestyle, marker=marker,
        markersize=5, clip_on=False, zorder=4,
    )  # fmt: skip


def write_label(
    axes: Axes, text: str, point: tuple[float, float], *, offset: int, color: str = "ink", transform: str = "data"
) -> None:
    """Write so many pixels above a point, or below it; the end of the text is at the point where it leaves no room."""
    x, _ = axes.transData.inverted().transform(axes.transAxes.transform((0.88, 0)))
    is_at_end = transform == "axis" or point[0] > x
    axes.annotate(
        text, point, xycoords=axes.get_yaxis_transform() if transform == "axis" else "data",
        xytext=(6 * is_at_end, offset), textcoords="offset points", ha="right" if is_at_end else "center",
        va="center", size=FONT_SIZE, color=COLORS[color], weight="bold" if color == "validation" else "normal",
    )  # fmt: skip


def draw_skipped(axes: Axes, steps: Sequence[int]) -> None:
    """Mark steps that were left out, at the foot of the plot."""
    axes.plot(
        steps, [0.02] * len(steps), "|", color=COLORS["limit"], markersize=9, markeredgewidth=1.5,
        transform=axes.get_xaxis_transform(), clip_on=False,
    )  # fmt: skip


def find_epochs(curves: Curves) -> dict[int, int]:
    """Return after which step each epoch but the first begins; none of many, whose lines would hide the curve."""
    starts = {line.epoch + 1: line.step - 1 for line in reversed(curves.training) if line.epoch > 0}
    return starts if len(starts) <= 12 else {}


def mark_epochs(axes: Axes, curves: Curves) -> None:
    """Draw a line where an epoch begins, with its number."""
    starts = find_epochs(curves)
    for epoch, step in starts.items():
        axes.axvline(step, color=COLORS["grid"], linewidth=1)
        axes.annotate(
            f"epoch {epoch}" if len(starts) <= MAX_NAMED_EPOCHS else str(epoch), (step, 1), va="top",
            xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points", size=FONT_SIZE - 1,
            color=COLORS["ink"],
        )  # fmt: skip


def set_steps(axes: Axes, curves: Curves, num_steps: int | None) -> None:
    """Show the whole run, so that one in progress is seen to be unfinished."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    last = max((line.step for line in (*curves.training, *curves.validations)), default=1)
    axes.set_xlim(0, max(last, num_steps or 0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=2))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def set_loss_scale(axes: Axes, *, is_log: bool, floor: float | None = None) -> None:
    """Scale the losses: logarithmic, down to the floor if there is one, or linear and not below 0."""
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(floor, 1.3 * axes.dataLim.y1)  # room for the epochs' names
        set_log_ticks(axes)
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, low) if low > -0.2 * (high - low) else low, high)


def set_log_ticks(axes: Axes) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of a decade; at 1 only where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    few_decades = math.log10(high / low) < 3
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def needs_log(values: Sequence[np.ndarray], *, ratio: float = LOG_FROM_RATIO) -> bool:
    """Return whether the highest value is more than so many times the lowest; never where one is not positive."""
    everything = np.concatenate([np.zeros(0), *values])
    return bool(len(everything)) and everything.min() > 0 and everything.max() / everything.min() > ratio
