"""HTML pages that need nothing else: one look, one way to plot, one place where text from data is made harmless."""

from tune2gguf.pages.figures import make_figure, to_svg
from tune2gguf.pages.render import render_page

__all__ = ["make_figure", "render_page", "to_svg"]
