"""A data summary as one HTML file that needs nothing else: figures, a histogram, rows with supervised tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tune2gguf.data.show import Bin, format_summary, make_histogram, split_runs
from tune2gguf.data.summary import DataSummary
from tune2gguf.data.tokenize import TokenizedRow
from tune2gguf.tokenizers import ChatTokenizer

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; color: #666; }
pre.figures { white-space: pre; overflow-x: auto; color: inherit; }
mark { background: #c9f2cf; color: #000; }
rect { fill: #4a7; } line { stroke: #c33; } text { font-size: 11px; fill: currentColor; }
"""
_WIDTH, _HEIGHT, _MARGIN = 800, 240, 30


def make_html(summary: DataSummary, rows: Sequence[TokenizedRow], tokenizer: ChatTokenizer) -> str:
    """Return the page. Everything that comes from the data is escaped; there are no scripts."""
    title = escape(", ".join(summary.shapes))
    shown = "\n".join(_format_row(row, tokenizer) for row in rows)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<h2>Tokens per row</h2>
{make_svg(make_histogram(summary.lengths), max_seq_len=summary.max_seq_len)}
<h2>Figures</h2>
<pre class="figures">{escape(format_summary(summary))}</pre>
<h2>Rows, with the <mark>supervised tokens</mark> marked</h2>
{shown}
</body></html>
"""


def make_svg(bins: Sequence[Bin], *, max_seq_len: int) -> str:
    """Return the histogram as an SVG drawing; a red line stands at max_seq_len where it is in the range."""
    largest = max(entry.count for entry in bins)
    width, floor = _WIDTH / len(bins), _HEIGHT - _MARGIN
    parts = []
    for index, entry in enumerate(bins):
        height = entry.count / largest * (floor - _MARGIN)
        left = index * width
        label = f"{entry.start}" if entry.stop else f"{entry.start} +"
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{floor - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}"/>'
            f'<text x="{left + 1:.1f}" y="{floor + 14}">{label}</text>'
            f'<text x="{left + 1:.1f}" y="{floor - height - 4:.1f}">{entry.count}</text>'
        )
    if bins[0].stop and max_seq_len < bins[0].stop * len(bins):
        x = max_seq_len / bins[0].stop * width
        parts.append(
            f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{floor}"/><text x="{x + 3:.1f}" y="12">max_seq_len</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="tokens per row">{"".join(parts)}</svg>'


def _format_row(row: TokenizedRow, tokenizer: ChatTokenizer) -> str:
    runs = [
        f"<mark>{escape(text)}</mark>" if supervised else escape(text)
        for text, supervised in split_runs(row, tokenizer)
    ]
    header = f"{row.source}: {len(row.tokens)} tokens, {row.num_supervised} supervised"
    return f"<h3>{escape(header)}</h3>\n<pre>{''.join(runs)}</pre>"
