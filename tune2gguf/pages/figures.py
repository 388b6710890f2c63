"""Matplotlib figures as inline SVG that takes its colours and its font from the page, so that it suits light and dark.

Text stays text. The same figure gives the same bytes: no dates, and ids that follow from the figure's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (920, 360), (360, 300)  # of a page, and of a phone; in pixels, as all sizes here
FONT_SIZE = 11
MARGINS = {"left": 46, "right": 20, "top": 10, "bottom": 34}
NUM_SERIES = 8

# What a plot is drawn with -> a colour that stands for it while matplotlib draws; the page's stylesheet has the real
# ones, as --plot-NAME.
_NAMES = ("ink", "grid", "training", "validation", "base", "limit", "bar", *(f"series-{n}" for n in range(NUM_SERIES)))
COLORS = {name: f"#0102{index:02x}" for index, name in enumerate(_NAMES)}
_NAMES_BY_COLOR = {color: name for name, color in COLORS.items()}


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
    """A drawing for a wide page, perhaps another for a phone, and the words around it."""

    title: str
    wide: Markup
    narrow: Markup | None = None
    keys: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()


def render_figure(
    draw: Callable[[Axes], None],
    size: tuple[int, int],
    *,
    name: str,
    label: str,
    ylabel: str = "",
    xlabel: str = "step",
) -> Markup:
    """Return as an `svg` element what is drawn into axes of their own.

    Args:
        size: width and height
        name: unique on its page
        label: what a reader who cannot see it is told
    """
    figure, axes = _make_figure(*size, xlabel=xlabel, ylabel=ylabel)
    draw(axes)
    return _to_svg(figure, name=name, label=label)


def _make_figure(width: int, height: int, *, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure and its axes, with horizontal grid lines only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))  # SVG has 72 units an inch
    left, right, top, bottom = MARGINS.values()
    top += FONT_SIZE + 4 if ylabel else 0
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["grid"])
    axes.grid(axis="y", color=COLORS["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelsize=FONT_SIZE, labelcolor=COLORS["ink"])
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE, color=COLORS["ink"], labelpad=3)
    if ylabel:
        # Above the axis instead of beside it: read without tilting the head, and all the width is the curve's.
        figure.text(4 / width, 1 - FONT_SIZE / height, ylabel, size=FONT_SIZE, color=COLORS["ink"], va="center")
    return figure, axes


def _to_svg(figure: Figure, *, name: str, label: str) -> Markup:
    import io

    import matplotlib
    from markupsafe import Markup

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": False}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(_adapt(file.getvalue(), label))


def _adapt(svg: str, label: str) -> str:
    """Make matplotlib's file a part of a page."""
    svg = svg[svg.index("<svg") :]
    viewbox = re.search(r'viewBox="[^"]*"', svg)[0]
    # Its style element would apply to the page: the page's stylesheet has the rules instead.
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"^<svg[^>]*>", f'<svg {viewbox} role="img" aria-label="{escape(label)}">', svg)
    svg = re.sub(r"#0102[0-9a-f]{2}", lambda color: f"var(--plot-{_NAMES_BY_COLOR[color[0]]})", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"<g/>|<g>\s*</g>", "", svg.replace("xlink:href", "href"))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _round, tag[0]), svg)  # not the text between tags
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _round(number: re.Match) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
