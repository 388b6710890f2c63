"""The plots of a run by step, each with a description in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.pages.figures import COLORS, FONT_SIZE, NARROW, NUM_SERIES, WIDE, Key, Plot, render_figure
from tune2gguf.pages.render import format_loss
from tune2gguf.runs.curves import Curves, TrainingStep, Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 440, 190
SMOOTHED_SHARE = 0.05
MAX_EPOCHS = 12  # more lines would hide the curve
MAX_NAMED_EPOCHS = 4  # more names would overlap on a phone
FLOOR_BELOW = 4  # a logarithmic axis ends at the lowest validation loss / this
DASHED = (0, (5, 4))
DASHES = ("solid", (0, (6, 2)), (0, (2, 2)))
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^"}


def plot_losses(curves: Curves, *, num_steps: int | None) -> Plot | None:
    """Plot training and validation loss, the base's as a line, the best one ringed; None without measurements."""
    x, y = take_series(curves.training, "loss")
    smoothed, window = smooth(y)
    validations = _list_finite(curves)
    base, best = (one if one in validations else None for one in (curves.base, curves.best))
    skipped = [line.step for line in curves.training if line.skipped]
    if not (len(y) or validations or skipped):
        return None
    floor = _find_floor(y, validations)

    def draw(axes: Axes) -> None:
        _set_steps(axes, curves, num_steps)
        _mark_epochs(axes, curves)
        axes.plot(x, y, color=COLORS["training"], alpha=0.35, linewidth=1)
        axes.plot(x, smoothed, color=COLORS["training"], linewidth=1.8)
        _draw_validations(axes, validations, color="validation")
        _set_loss_scale(axes, is_log=floor is not None, floor=floor)
        if base is not None:
            axes.axhline(base.loss, color=COLORS["base"], linewidth=1.4, linestyle=DASHED)
            at_end = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "color": COLORS["ink"]}
            _write(axes, f"base {format_loss(base.loss)}", (1, base.loss), offset=-8, **at_end)
        if best is not None:
            ring = {"markersize": 12, "markeredgewidth": 2, "fillstyle": "none", "clip_on": False, "zorder": 5}
            axes.plot([best.step], [best.loss], "o", color=COLORS["validation"], **ring)
            align = "right" if best.step > 0.88 * axes.get_xlim()[1] else "center"
            look = {"ha": align, "color": COLORS["validation"], "weight": "bold"}
            _write(axes, f"best {format_loss(best.loss)}", (best.step, best.loss), offset=-15, **look)
        foot = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(skipped, [0.02] * len(skipped), "|", color=COLORS["limit"], markersize=9, markeredgewidth=1.5, **foot)

    hidden = floor is not None and y.min(initial=np.inf) < floor
    ylabel = f"loss, nats per supervised token{'' if floor is None else ', logarithmic'}"
    keys = [Key("training, each step", "training", "faint"), Key(f"training, mean of {window} steps", "training")]
    return Plot(
        "Loss",
        label=_describe_losses(smoothed, base, best, curves.final),
        wide=render_figure(draw, WIDE, name="loss", ylabel=ylabel),
        narrow=render_figure(draw, NARROW, name="loss", ylabel=ylabel),
        keys=(*(keys if len(y) else ()), *_list_loss_keys(curves, validations, base, best, skipped)),
        notes=(f"Training losses below {format_loss(floor)} are off the scale.",) if hidden else (),
    )


def _find_floor(training: np.ndarray, validations: Sequence[Validation]) -> float | None:
    """Return the lower end of a logarithmic axis, None for a linear one.

    Training losses far below every validation loss, as of memorized rows, would flatten the validation curve.
    """
    shown = np.array([line.loss for line in validations]) if validations else training
    if not _needs_log(shown):
        return None
    return min((line.low or line.loss for line in validations), default=FLOOR_BELOW * training.min()) / FLOOR_BELOW


def _list_loss_keys(
    curves: Curves, validations: list[Validation], base: Validation | None, best: Validation | None, skipped: list[int]
) -> Iterator[Key]:
    if validations:
        yield Key("validation", "validation", "circle")
    if any(line.low is not None and line.high is not None for line in validations):
        yield Key("its 95 % interval", "validation", "band")
    if best is not None:
        yield Key("best", "validation", "ring")
    if base is not None:
        yield Key("the base before training", "base", "dashes")
    if MAX_NAMED_EPOCHS < len(_find_epochs(curves)) <= MAX_EPOCHS:
        yield Key("an epoch begins", "grid", "tick")
    if skipped:
        yield Key("step left out", "limit", "tick")


def _describe_losses(
    smoothed: np.ndarray, base: Validation | None, best: Validation | None, final: Validation | None
) -> str:
    parts = []
    if len(smoothed):
        parts.append(f"the smoothed training loss goes from {smoothed[0]:.3f} to {smoothed[-1]:.3f}")
    if base is not None:
        parts.append(f"the base's validation loss is {base.loss:.3f}")
    if best is not None:
        parts.append(f"the best validation loss is {best.loss:.3f} at step {best.step}")
        parts.append(f"the last one is {final.loss:.3f} at step {final.step}")
    return f"Loss by step: {'; '.join(parts) or 'no step was applied'}."


def plot_training(curves: Curves, *, num_steps: int | None, clip_grad_norm: float | None) -> list[Plot]:
    """Plot learning rate, gradient norm, speed and memory by step, if the run recorded them."""

    plot = partial(_plot_small, curves, num_steps=num_steps)
    speeds = {"all tokens": "tokens_per_second", "supervised ones": "supervised_tokens_per_second"}
    plots = [
        plot("Learning rate", "", {"learning rate": "lr"}),
        plot("Gradient norm", "", {"gradient norm": "grad_norm"}, limit=clip_grad_norm, from_zero=False),
        plot("Speed", "tokens per second", speeds),
        plot("Memory", "GB, peak of the process so far", {"memory": "peak_memory_bytes"}, scale=1e-9),
    ]
    return [plot for plot in plots if plot is not None]


def _plot_small(
    curves: Curves,
    title: str,
    unit: str,
    attributes: Mapping[str, str],
    *,
    num_steps: int | None,
    limit: float | None = None,
    from_zero: bool = True,
    scale: float = 1.0,
) -> Plot | None:
    series = {name: take_series(curves.training, attribute) for name, attribute in attributes.items()}
    named = {name: (x, y * scale) for name, (x, y) in series.items() if len(x)}
    if not named:
        return None
    is_log = not from_zero and limit is not None and _needs_log(*(y for _, y in named.values()), ratio=20)
    keys = [Key(name, color) for name, color in zip(named, ("training", "validation"), strict=False)]

    def draw(axes: Axes) -> None:
        _set_steps(axes, curves, num_steps)
        for (x, y), key in zip(named.values(), keys, strict=True):
            axes.plot(x, y, color=COLORS[key.color], linewidth=1.3, marker="o" * (len(x) == 1))
        if limit is not None:
            axes.axhline(limit, color=COLORS["limit"], linewidth=1.2, linestyle=DASHED)
        if is_log:
            _set_log_scale(axes)
        elif from_zero:
            axes.set_ylim(bottom=0)

    means = [f"{name} {y.mean():.3g} on average, at most {y.max():.3g}" for name, (_, y) in named.items()]
    limits = [] if limit is None else [Key(f"clipped above {limit:g}", "limit", "dashes")]
    return Plot(
        title,
        label=f"{title} by step: {'; '.join(means)}.",
        wide=render_figure(draw, SMALL, name=title, ylabel="logarithmic" if is_log else unit),
        keys=(*(keys if len(keys) > 1 else ()), *limits),
    )


def plot_comparison(runs: Mapping[str, Curves], *, name: str) -> Plot | None:
    """Plot the validation curves of several runs in one plot; None if none was validated."""
    shown = {run: lines for run, curves in runs.items() if (lines := _list_finite(curves))}
    if not shown:
        return None
    everything = [line for lines in shown.values() for line in lines]
    is_log = _needs_log(np.array([line.loss for line in everything]))
    shapes, looks = [*MARKERS], []
    for number in range(len(shown)):
        dashes = number // NUM_SERIES % len(DASHES)
        looks.append((f"series-{number % NUM_SERIES}", shapes[number % len(shapes)], dashes))

    def draw(axes: Axes) -> None:
        _set_steps(axes, Curves(validations=tuple(everything)), None)
        for lines, (color, shape, dashes) in zip(shown.values(), looks, strict=True):
            style = {"marker": MARKERS[shape], "linestyle": DASHES[dashes]}
            _draw_validations(axes, lines, color=color, band_alpha=0.09, **style)
        _set_loss_scale(axes, is_log=is_log)

    ylabel = f"validation loss, nats per supervised token{', logarithmic' if is_log else ''}"
    ends = [f"{run} ends at {lines[-1].loss:.3f}" for run, lines in shown.items()]
    return Plot(
        "Validation loss",
        label=f"Validation loss of {len(shown)} runs by step: {'; '.join(ends)}.",
        wide=render_figure(draw, WIDE, name=name, ylabel=ylabel),
        narrow=render_figure(draw, NARROW, name=name, ylabel=ylabel),
        keys=tuple(
            Key(run, color, f"{shape}{' dashes' * (dashes > 0)}")
            for run, (color, shape, dashes) in zip(shown, looks, strict=True)
        ),
    )


def take_series(lines: Sequence[TrainingStep], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and their values of an attribute, without missing and non-finite values."""
    pairs = [(line.step, getattr(line, name)) for line in lines]
    kept = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    x, y = np.array(kept, np.float64).reshape(-1, 2).T
    return x, y


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the moving average, over fewer values at both ends, and its window."""
    if not len(values):
        return values, 1
    window = 2 * max(1, round(len(values) * SMOOTHED_SHARE / 2)) + 1
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same"), window


def _list_finite(curves: Curves) -> list[Validation]:
    return [line for line in curves.validations if math.isfinite(line.loss)]


def _draw_validations(
    axes: Axes, lines: Sequence[Validation], *, color: str, band_alpha: float = 0.18, marker: str = "o", **style
) -> None:
    """Draw the loss of each validation, and the intervals as a band, or as a bar if there is only one."""
    bounds = [(line.step, line.low, line.high) for line in lines if line.low is not None and line.high is not None]
    x, low, high = np.array(bounds, np.float64).reshape(-1, 3).T
    if len(x) == 1:  # a band needs two
        axes.vlines(x, low, high, color=COLORS[color], alpha=0.4, linewidth=3)
    axes.fill_between(x, low, high, color=COLORS[color], alpha=band_alpha, linewidth=0)
    steps, losses = [line.step for line in lines], [line.loss for line in lines]
    style |= {"linewidth": 2, "marker": marker, "markersize": 5, "clip_on": False, "zorder": 4}
    axes.plot(steps, losses, color=COLORS[color], **style)


def _write(axes: Axes, text: str, point: tuple[float, float], *, offset: int, **look) -> None:
    """Write text `offset` points above a point of the plot."""
    at = (6 if look["ha"] == "right" else 0, offset)
    axes.annotate(text, point, xytext=at, textcoords="offset points", va="center", size=FONT_SIZE, **look)


def _find_epochs(curves: Curves) -> dict[int, int]:
    """Return epoch -> the last step before it, for each epoch but the first."""
    return {line.epoch + 1: line.step - 1 for line in reversed(curves.training) if line.epoch > 0}


def _mark_epochs(axes: Axes, curves: Curves) -> None:
    """Draw a line with the epoch's number at each epoch's beginning."""
    starts = _find_epochs(curves)
    look = {"textcoords": "offset points", "va": "top", "size": FONT_SIZE - 1, "color": COLORS["ink"]}
    for epoch, step in starts.items() if len(starts) <= MAX_EPOCHS else ():
        axes.axvline(step, color=COLORS["grid"], linewidth=1)
        name = f"epoch {epoch}" if len(starts) <= MAX_NAMED_EPOCHS else str(epoch)
        axes.annotate(name, (step, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), **look)


def _set_steps(axes: Axes, curves: Curves, num_steps: int | None) -> None:
    """Set the x axis to all steps of the run, even if it is in progress."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    last = max((line.step for line in (*curves.training, *curves.validations)), default=1)
    axes.set_xlim(0, max(last, num_steps or 0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=2))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _set_loss_scale(axes: Axes, *, is_log: bool, floor: float | None = None) -> None:
    """Scale the loss axis: logarithmic, down to the floor if there is one, or linear and not below 0."""
    if is_log:
        _set_log_scale(axes, low=floor, high=1.3 * axes.dataLim.y1)  # room for the epochs' names
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, low) if low > -0.2 * (high - low) else low, high)


def _set_log_scale(axes: Axes, *, low: float | None = None, high: float | None = None) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade, or only at 1 from three decades on."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=12))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _needs_log(*values: np.ndarray, ratio: float = 5) -> bool:
    """Return whether max / min exceeds `ratio`: a linear axis would show only the largest values."""
    everything = np.concatenate(values)
    return bool(len(everything)) and everything.min() > 0 and everything.max() / everything.min() > ratio
