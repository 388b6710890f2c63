"""Matplotlib figures as inline SVG. Colours and font come from the page, in light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (920, 360), (360, 300)  # on a page and on a phone; all sizes here are in pixels
FONT_SIZE = 11
MARGINS = {"left": 46, "right": 20, "top": 10, "bottom": 34}
NUM_SERIES = 8

# Names of plot colours. Matplotlib draws with a placeholder for each; the page's stylesheet has the real colours, as
# --plot-NAME.
_NAMES = ("ink", "grid", "training", "validation", "base", "limit", "bar", *(f"series-{n}" for n in range(NUM_SERIES)))
COLORS = {name: f"#0102{index:02x}" for index, name in enumerate(_NAMES)}


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        color: name of a plot colour
        shape: line, faint, dashes, band, ring, tick or a marker's name; classes of the stylesheet
    """

    text: str
    color: str
    shape: str = "line"


@dataclass(frozen=True)
class Plot:
    """A figure for a wide page, optionally one for a phone, and their texts. `label` is for screen readers."""

    title: str
    label: str
    wide: Markup
    narrow: Markup | None = None
    keys: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()


def render_figure(
    draw: Callable[[Axes], None], size: tuple[int, int], *, name: str, ylabel: str = "", xlabel: str = "step"
) -> Markup:
    """Return a figure with the axes that `draw` fills, as an `svg` element. Equal drawings give equal bytes.

    Args:
        size: width and height
        name: unique on its page
    """
    import matplotlib

    file = io.StringIO()
    # Points within 0.7 pixels of a line are dropped: peaks stay, and a page is smaller than 400 kB.
    options = {"svg.fonttype": "none", "svg.hashsalt": f"{name} {size}", "path.simplify_threshold": 0.7}
    with matplotlib.rc_context(options):
        figure, axes = _make_figure(*size, xlabel=xlabel, ylabel=ylabel)
        draw(axes)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    for color_name, color in COLORS.items():
        svg = svg.replace(color, f"var(--plot-{color_name})")
    # Ids such as line2d_1 repeat in every figure, and nothing refers to them.
    return Markup(re.sub(r' id="[^"]*_\d+"', "", svg[svg.index("<svg") :]))


def _make_figure(width: int, height: int, *, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure and its axes, with horizontal grid lines only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))  # SVG has 72 units an inch
    left, right, top, bottom = MARGINS.values()
    top += FONT_SIZE + 4 if ylabel else 0
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["grid"])
    axes.grid(axis="y", color=COLORS["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelsize=FONT_SIZE, labelcolor=COLORS["ink"])
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE, color=COLORS["ink"], labelpad=3)
    # Horizontal, above the axis: easier to read, and the curve gets the whole width.
    figure.text(4 / width, 1 - FONT_SIZE / height, ylabel, size=FONT_SIZE, color=COLORS["ink"], va="center")
    return figure, axes
