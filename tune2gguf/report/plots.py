"""The plots of a run, and what is said of them in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.pages.figures import COLORS, NARROW, NUM_SERIES, WIDE, Key, Plot, render_figure
from tune2gguf.pages.render import format_loss
from tune2gguf.report.axes import (
    MAX_NAMED_EPOCHS,
    draw_skipped,
    draw_validation,
    find_epochs,
    mark_epochs,
    needs_log,
    set_log_ticks,
    set_loss_scale,
    set_steps,
    write_label,
)
from tune2gguf.report.series import MAX_POINTS, Series, smooth, spread, take_series, thin
from tune2gguf.runs.curves import Curves, Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 440, 190
FLOOR_BELOW = 4  # a logarithmic axis of losses ends at the lowest validation one over this
DASHES = ("solid", (0, (6, 2)), (0, (2, 2)))
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^"}


@dataclass(frozen=True)
class _Losses:
    """What the plot of the losses shows.

    Attributes:
        thinned: training loss of each step, or the lowest and the highest of every so many
        floor: where a logarithmic axis ends; training losses far below every validation one, as memorized rows have
            them, would press the validation curve flat. None for a linear axis
    """

    curves: Curves
    training: Series
    thinned: Series
    every: int
    smoothed: Series
    window: int
    validation_rows: tuple[Validation, ...]
    skipped: tuple[int, ...]
    floor: float | None

    @classmethod
    def read(cls, curves: Curves) -> _Losses:
        training = take_series(curves.training, "loss")
        thinned, every = thin(training)
        smoothed, window = smooth(training) if len(training) else (training, 1)
        validation_rows = tuple(line for line in curves.validations if math.isfinite(line.loss))
        skipped = tuple(line.step for line in curves.training if line.skipped)
        shown = np.array([line.loss for line in validation_rows]) if validation_rows else training.y
        lowest = min(
            [line.low or line.loss for line in validation_rows], default=FLOOR_BELOW * training.y.min(initial=np.inf)
        )
        floor = lowest / FLOOR_BELOW if needs_log([shown]) else None
        return cls(curves, training, thinned, every, smoothed, window, validation_rows, skipped, floor)

    @property
    def base(self) -> Validation | None:
        """The base, if its loss can be drawn."""
        base = self.curves.base
        return base if base in self.validation_rows else None

    @property
    def best(self) -> Validation | None:
        best = self.curves.best
        return best if best in self.validation_rows else None


def plot_losses(curves: Curves, *, num_steps: int | None) -> Plot | None:
    """Draw training and validation loss, the base's as a line, the best one ringed; None where nothing was measured."""
    losses = _Losses.read(curves)
    if not (len(losses.training) or losses.validation_rows or losses.skipped):
        return None

    def draw(axes: Axes) -> None:
        set_steps(axes, curves, num_steps)
        mark_epochs(axes, curves)
        _draw_losses(axes, losses)

    ylabel = f"loss, nats per supervised token{'' if losses.floor is None else ', logarithmic'}"
    options = {"ylabel": ylabel, "label": _describe_losses(losses)}
    notes = _note_thinning(len(losses.training), losses.every)
    if losses.floor is not None and losses.training.y.min(initial=np.inf) < losses.floor:
        notes += (f"Training losses below {format_loss(losses.floor)} are off the scale.",)
    return Plot(
        "Loss",
        wide=render_figure(draw, WIDE, name="loss-wide", **options),
        narrow=render_figure(draw, NARROW, name="loss-narrow", **options),
        keys=tuple(_list_loss_keys(losses)),
        notes=notes,
    )


def _draw_losses(axes: Axes, losses: _Losses) -> None:
    base, best = losses.base, losses.best
    axes.plot(losses.thinned.x, losses.thinned.y, color=COLORS["training"], alpha=0.35, linewidth=1)
    axes.plot(*spread(losses.smoothed), color=COLORS["training"], linewidth=1.8)
    if base is not None:
        axes.axhline(base.loss, color=COLORS["base"], linewidth=1.4, linestyle=(0, (5, 4)))
    draw_validation(axes, losses.validation_rows, color="validation", marker="o")
    set_loss_scale(axes, is_log=losses.floor is not None, floor=losses.floor)
    if base is not None:
        write_label(axes, f"base {format_loss(base.loss)}", (1, base.loss), offset=-8, transform="axis")
    if best is not None:
        axes.plot(
            [best.step], [best.loss], "o", markersize=12, markeredgewidth=2, fillstyle="none",
            markeredgecolor=COLORS["validation"], clip_on=False, zorder=5,
        )  # fmt: skip
        write_label(axes, f"best {format_loss(best.loss)}", (best.step, best.loss), offset=-15, color="validation")
    draw_skipped(axes, losses.skipped)


def _list_loss_keys(losses: _Losses) -> Iterator[Key]:
    if len(losses.training):
        yield Key("training, each step", "training", "faint")
        yield Key(f"training, mean of {losses.window} steps", "training")
    if losses.validation_rows:
        yield Key("validation", "validation", "circle")
    if any(line.low is not None and line.high is not None for line in losses.validation_rows):
        yield Key("its 95 % interval", "validation", "band")
    if losses.best is not None:
        yield Key("best", "validation", "ring")
    if losses.base is not None:
        yield Key("the base before training", "base", "dashes")
    if len(find_epochs(losses.curves)) > MAX_NAMED_EPOCHS:
        yield Key("an epoch begins", "grid", "tick")
    if losses.skipped:
        yield Key("step left out", "limit", "tick")


def _describe_losses(losses: _Losses) -> str:
    parts = []
    smoothed, base, best, final = losses.smoothed, losses.base, losses.best, losses.curves.final
    if len(smoothed):
        parts.append(f"the smoothed training loss goes from {smoothed.y[0]:.3f} to {smoothed.y[-1]:.3f}")
    if base is not None:
        parts.append(f"the base's validation loss is {base.loss:.3f}")
    if best is not None:
        parts.append(f"the best validation loss is {best.loss:.3f} at step {best.step}")
        parts.append(f"the last one is {final.loss:.3f} at step {final.step}")
    return f"Loss by step: {'; '.join(parts) or 'no step was applied'}."


def plot_training(curves: Curves, *, num_steps: int | None, clip_grad_norm: float | None) -> list[Plot]:
    """Draw learning rate, gradient norm, speed and memory by step; what the run did not record is left out."""

    def plot(title: str, unit: str, named: Mapping[str, Series], **options) -> Plot | None:
        return _plot_small(title, unit, named, curves=curves, num_steps=num_steps, **options)

    def take(name: str, scale: float = 1.0) -> Series:
        return take_series(curves.training, name, scale=scale)

    plots = [
        plot("Learning rate", "", {"learning rate": take("lr")}),
        plot("Gradient norm", "", {"gradient norm": take("grad_norm")}, limit=clip_grad_norm),
        plot(
            "Speed",
            "tokens a second",
            {"all tokens": take("tokens_per_second"), "supervised ones": take("supervised_tokens_per_second")},
            from_zero=True,
        ),
        plot(
            "Memory", "GB, the most so far of the process", {"memory": take("peak_memory_bytes", 1e-9)}, from_zero=True
        ),
    ]
    return [plot for plot in plots if plot is not None]


def _plot_small(
    title: str,
    unit: str,
    named: Mapping[str, Series],
    *,
    curves: Curves,
    num_steps: int | None,
    limit: float | None = None,
    from_zero: bool = False,
) -> Plot | None:
    named = {name: series for name, series in named.items() if len(series)}
    if not named:
        return None
    log = not from_zero and limit is not None and needs_log([series.y for series in named.values()], ratio=20)
    colors = ["training", "validation"]
    largest, every = max(map(len, named.values())), 1

    def draw(axes: Axes) -> None:
        nonlocal every
        for series, color in zip(named.values(), colors, strict=False):
            thinned, every = thin(series, MAX_POINTS // 2)
            axes.plot(thinned.x, thinned.y, color=COLORS[color], linewidth=1.3, marker="o" * (len(series) == 1))
        if limit is not None:
            axes.axhline(limit, color=COLORS["limit"], linewidth=1.2, linestyle=(0, (5, 4)))
        if log:
            axes.set_yscale("log")
            set_log_ticks(axes)
        elif from_zero or title == "Learning rate":
            axes.set_ylim(bottom=0)
        set_steps(axes, curves, num_steps)

    means = [f"{name} {series.y.mean():.3g} on average, at most {series.y.max():.3g}" for name, series in named.items()]
    wide = render_figure(
        draw,
        SMALL,
        name=title.lower().replace(" ", "-"),
        ylabel=unit + (", logarithmic" if log and unit else "logarithmic" if log else ""),
        label=f"{title} by step: {'; '.join(means)}.",
    )
    keys = [Key(name, color) for name, color in zip(named, colors, strict=False)] if len(named) > 1 else []
    if limit is not None:
        keys.append(Key(f"clipped above {limit:g}", "limit", "dashes"))
    return Plot(title, wide=wide, keys=tuple(keys), notes=_note_thinning(largest, every))


def plot_comparison(runs: Mapping[str, Curves], *, name: str) -> Plot | None:
    """Draw the validation curves of several runs over each other; None where none was validated.

    Args:
        name: of the plot, unique on its page
    """
    shown = {run: [line for line in curves.validations if math.isfinite(line.loss)] for run, curves in runs.items()}
    shown = {run: lines for run, lines in shown.items() if lines}
    if not shown:
        return None
    log = needs_log([np.array([line.loss for line in lines]) for lines in shown.values()])
    markers = list(MARKERS)
    styles = [
        (f"series-{number % NUM_SERIES}", markers[number % len(markers)], number // NUM_SERIES % len(DASHES))
        for number in range(len(shown))
    ]

    def draw(axes: Axes) -> None:
        for lines, (color, marker, dash) in zip(shown.values(), styles, strict=True):
            draw_validation(axes, lines, color=color, marker=MARKERS[marker], linestyle=DASHES[dash], band_alpha=0.09)
        set_loss_scale(axes, is_log=log)
        set_steps(axes, Curves(validations=tuple(line for lines in shown.values() for line in lines)), None)

    ylabel = f"validation loss, nats per supervised token{', logarithmic' if log else ''}"
    ends = [f"{run} ends at {lines[-1].loss:.3f}" for run, lines in shown.items()]
    label = f"Validation loss of {len(shown)} runs by step: {'; '.join(ends)}."
    return Plot(
        "Validation loss",
        wide=render_figure(draw, WIDE, name=f"{name}-wide", ylabel=ylabel, label=label),
        narrow=render_figure(draw, NARROW, name=f"{name}-narrow", ylabel=ylabel, label=label),
        keys=tuple(
            Key(run, color, f"{marker}{' dashes' * (dash > 0)}")
            for run, (color, marker, dash) in zip(shown, styles, strict=True)
        ),
    )


def _note_thinning(count: int, every: int) -> tuple[str, ...]:
    if every == 1:
        return ()
    return (f"{count:,} steps; drawn are the lowest and the highest value of every {every}.",)
