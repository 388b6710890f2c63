"""Text for a terminal or a pipe of any encoding."""

from __future__ import annotations

import io
import sys


def accept_any_text() -> None:
    r"""Print what standard output and error cannot hold as \u2192; read from standard input what it should not hold."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
