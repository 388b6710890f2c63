"""HTML pages that need nothing else: one look, one way to plot, one place where text from data is made harmless."""
