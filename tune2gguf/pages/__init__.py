"""HTML pages that need nothing else: one look, one way to plot, one place where text from data is made harmless."""

from tune2gguf.pages.figures import Key, Plot, render_figure
from tune2gguf.pages.render import render_page

__all__ = ["Key", "Plot", "render_figure", "render_page"]
