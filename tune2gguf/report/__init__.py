"""report.html of a run, and the page that compares runs: self-contained files that open from disk."""

from tune2gguf.report.compare import write_comparison
from tune2gguf.report.run import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_comparison", "write_report"]
