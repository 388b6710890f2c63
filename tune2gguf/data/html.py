"""A data summary as a self-contained HTML page: figures, a histogram, rows with supervised tokens marked.

The histogram is also available as a PNG file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tune2gguf.data.show import Bin, describe_row, format_summary, make_histogram, split_runs
from tune2gguf.data.summary import DataSummary
from tune2gguf.data.tokenize import TokenizedRow
from tune2gguf.pages.figures import COLORS, NARROW, WIDE, Key, Plot, render_figure
from tune2gguf.pages.render import render_page
from tune2gguf.tokenizer.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def make_html(summary: DataSummary, rows: Sequence[TokenizedRow], tokenizer: ChatTokenizer) -> str:
    """Return the page. Everything from the data is escaped, and none of it reaches a script."""
    return render_page(
        "data.html",
        title=", ".join(summary.shapes),
        histogram=plot_lengths(make_histogram(summary.lengths), max_seq_len=summary.max_seq_len),
        figures=format_summary(summary),
        rows=[(describe_row(row), split_runs(row, tokenizer)) for row in rows],
    )


def draw_png(summary: DataSummary) -> bytes:
    """Return the histogram as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE[0] / 72, WIDE[1] / 72), dpi=144, layout="constrained")
    axes = figure.subplots()
    colors = {"bar": "tab:blue", "limit": "tab:red", "ink": "black"}
    bins = make_histogram(summary.lengths)
    limit = _find_limit(bins, summary.max_seq_len)
    _draw_bins(axes, bins, limit=limit, colors=colors)
    if limit is not None:
        axes.legend([f"max_seq_len = {limit}"], frameon=False)
    axes.set(xlabel="tokens" if bins[-1].stop else "tokens; the last bar holds all longer rows", ylabel="rows")
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def plot_lengths(bins: Sequence[Bin], *, max_seq_len: int) -> Plot:
    """Draw the histogram, with a line at max_seq_len if that is in the range."""
    limit = _find_limit(bins, max_seq_len)
    shown = ", ".join(f"{entry.start} to {entry.stop - 1}: {entry.count}" for entry in bins if entry.stop)
    longer = "" if bins[-1].stop else f"; {bins[-1].start} or more: {bins[-1].count}"

    def draw(axes: Axes) -> None:
        _draw_bins(axes, bins, limit=limit, colors=COLORS)

    options = {"name": "lengths", "ylabel": "rows", "xlabel": "tokens"}
    return Plot(
        "Rows by number of tokens",
        label=f"Rows by number of tokens, {shown}{longer}",
        wide=render_figure(draw, WIDE, **options),
        narrow=render_figure(draw, NARROW, **options),
        keys=() if limit is None else (Key(f"max_seq_len = {limit}", "limit"),),
        notes=() if bins[-1].stop else (f"The last bar holds all rows of {bins[-1].start} tokens or more.",),
    )


def _find_limit(bins: Sequence[Bin], max_seq_len: int) -> int | None:
    """Return max_seq_len if it is in the bins' range."""
    return max_seq_len if max_seq_len < (bins[0].stop or 1) * len(bins) else None


def _draw_bins(axes: Axes, bins: Sequence[Bin], *, limit: int | None, colors: Mapping[str, str]) -> None:
    """Draw the bars and the limit, in the colours for bar, limit and ink."""
    width = bins[0].stop or 1
    lefts = [entry.start for entry in bins]
    if limit is not None:
        axes.axvline(limit, color=colors["limit"], linewidth=1.5)
    bars = axes.bar(lefts, [entry.count for entry in bins], width=0.92 * width, align="edge", color=colors["bar"])
    # On a narrow page, a count of four digits does not fit over a bar.
    if axes.figure.get_figwidth() * 72 >= WIDE[0]:
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=10, color=colors["ink"])
    every = -(-len(bins) // 8)
    labels = [f"{entry.start}{'' if entry.stop else ' +'}" for entry in bins]
    axes.set_xticks(lefts[::every], labels[::every])
    axes.set_xlim(0, width * len(bins))
