"""Self-contained HTML pages: one style, one way to plot, one place that escapes text from data."""
